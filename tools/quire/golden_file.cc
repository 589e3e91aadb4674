#include "golden_file.h"

#include <utility>

namespace quire::cli {

using nlohmann::json;

Status GoldenCase::require(std::string_view tensor_name, int ndim) const {
  if (!has(tensor_name)) return refuse(std::string("no tensor '").append(tensor_name) + "'");
  const Tensor found = tensor(tensor_name);
  if (found.ndim == ndim) return {};
  return refuse(std::string("'").append(tensor_name) + "' is " + to_string(found) + ", needs " + std::to_string(ndim) +
                " dimensions");
}

Status GoldenCase::confirm(const char* key, std::int64_t actual) const {
  auto stated = static_cast<int>(actual);
  if (Status status = read(key, &stated); !status) return status;
  if (stated == actual) return {};
  return refuse("parameter '" + std::string(key) + "' is " + std::to_string(stated) + ", the tensors say " +
                std::to_string(actual));
}

Result<std::vector<GoldenCase>> cases_of(const llm::SafetensorsFile& file) {
  std::map<std::string, GoldenCase> cases;
  for (const std::string& name : file.names()) {
    const std::size_t slash = name.rfind('/');
    if (slash == std::string::npos) {
      return invalid_argument(file.path() + ": tensor '" + name + "' belongs to no case; names are <case>/<tensor>");
    }
    const auto tensor = file.tensor(name);
    if (!tensor.ok()) return tensor.status();
    GoldenCase& golden = cases[name.substr(0, slash)];
    golden.name = name.substr(0, slash);
    golden.where = file.path() + ": case '" + golden.name + "'";
    golden.tensors.emplace(name.substr(slash + 1), *tensor);
  }
  for (const auto& [name, text] : file.metadata()) {
    const auto found = cases.find(name);
    if (found == cases.end())
      return invalid_argument(file.path() + ": metadata of case '" + name + "', but no tensors");
    GoldenCase& golden = found->second;
    golden.params = json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!golden.params.is_object()) return golden.refuse("its parameters are not a JSON object");
  }
  std::vector<GoldenCase> list;
  for (auto& [name, golden] : cases) list.push_back(std::move(golden));
  return list;
}

}  // namespace quire::cli
