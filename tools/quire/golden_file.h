// The cases of a golden file: its tensors by name and its parameters, in the form that golden.h describes. Nothing here
// knows what a case means; what is missing, or has the wrong type, is refused by file, case and name.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "llm/safetensors.h"
#include "quire/status.h"
#include "quire/tensor.h"

namespace quire::cli {

struct GoldenCase {
  std::string where;  // "<path>: case '<name>'", for messages
  std::string name;
  std::map<std::string, Tensor, std::less<>> tensors;
  nlohmann::json params = nlohmann::json::object();

  // Returns a tensor, which is not defined where the case has none of that name.
  Tensor tensor(std::string_view tensor_name) const {
    const auto found = tensors.find(tensor_name);
    return found == tensors.end() ? Tensor() : found->second;
  }
  bool has(std::string_view tensor_name) const { return tensors.find(tensor_name) != tensors.end(); }
  Status refuse(const std::string& reason) const { return invalid_argument(where + ": " + reason); }

  Status require(std::string_view tensor_name, int ndim) const;

  // Reads a parameter that may be missing, and then leaves `value` as it is.
  template <class T>
  Status read(const char* key, T* value) const {
    if (!params.contains(key)) return {};
    const nlohmann::json& found = params[key];
    const bool fits = std::is_same_v<T, bool>          ? found.is_boolean()
                      : std::is_same_v<T, std::string> ? found.is_string()
                      : std::is_integral_v<T>          ? found.is_number_integer() &&
                                                    std::fabs(found.get<double>()) <= std::numeric_limits<int>::max()
                                              : found.is_number();
    if (!fits) return refuse("parameter '" + std::string(key) + "' is " + found.dump() + ", of the wrong type");
    *value = found.get<T>();
    return {};
  }

  // Reads a parameter that repeats what the tensors say, and refuses it where the two disagree.
  Status confirm(const char* key, std::int64_t actual) const;
};

// Ordered by name.
Result<std::vector<GoldenCase>> cases_of(const llm::SafetensorsFile& file);

}  // namespace quire::cli
