// Options whose values are taken as written or refused, in a sentence that names the option, the value and what is
// supported. CLI11 by itself takes 010 for 8, an empty string for 0, what is too large for the largest number that
// fits, and the number of an enumerator for its name.
#pragma once

#include <CLI/CLI.hpp>
#include <charconv>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "quire/tensor.h"

namespace quire::cli {

// What the functions below are made of. `names` is a list such as "-n,--max-new-tokens". `shown` gives the default for
// the help text, where the caller asks for it by capture_default_str().
CLI::Option* add_text(CLI::App& verb, const std::string& names, const std::string& description,
                      const std::string& type_name, const std::function<void(const std::string& text)>& take,
                      const std::function<std::string()>& shown = {});

// Throws what cli_main reports as bad usage: "--order is 'zzz', " and what was wanted.
[[noreturn]] void refuse_value(const std::string& names, const std::string& text, const std::string& wanted);

// The parts between commas, empty ones included: "1,,2" has three and "" has one.
std::vector<std::string> split_list(const std::string& text);

// Takes digits, which may follow a minus sign; no other digit may follow a leading zero.
template <class T>
T parse_integer(const std::string& names, const std::string& text, T low, T high) {
  T value{};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || std::to_string(value) != text || value < low || value > high) {
    refuse_value(names, text, "expected a decimal integer from " + std::to_string(low) + " to " + std::to_string(high));
  }
  return value;
}

template <class T>
CLI::Option* add_integer(CLI::App& verb, const std::string& names, T& field, const std::string& description,
                         T low = std::numeric_limits<T>::min(), T high = std::numeric_limits<T>::max()) {
  return add_text(
      verb, names, description, "INT",
      [=, &field](const std::string& text) { field = parse_integer(names, text, low, high); },
      [&field] { return std::to_string(field); });
}

// Takes integers with commas between them.
template <class T>
CLI::Option* add_integers(CLI::App& verb, const std::string& names, std::vector<T>& field,
                          const std::string& description, T low = std::numeric_limits<T>::min(),
                          T high = std::numeric_limits<T>::max()) {
  return add_text(verb, names, description, "INT,..", [=, &field](const std::string& text) {
    field.clear();
    for (const std::string& part : split_list(text)) field.push_back(parse_integer(names, part, low, high));
  });
}

// Takes a number in decimal, with or without an exponent, from low to high, so neither NaN nor infinity.
CLI::Option* add_number(CLI::App& verb, const std::string& names, double& field, const std::string& description,
                        double low, double high);
CLI::Option* add_number(CLI::App& verb, const std::string& names, float& field, const std::string& description,
                        float low, float high);

// Names and what they stand for, in the order of help and refusals. Upper and lower case are the same.
template <class T>
using Choices = std::vector<std::pair<std::string, T>>;

template <class T>
std::vector<std::string> names_of(const Choices<T>& choices) {
  std::vector<std::string> names;
  for (const auto& [name, value] : choices) names.push_back(name);
  return names;
}

// The place of `text` among the choices. It is refused where it is none of them.
std::size_t parse_choice(const std::string& names, const std::string& text, const std::vector<std::string>& choices);

CLI::Option* add_choice(CLI::App& verb, const std::string& names, const std::string& description,
                        const std::vector<std::string>& choices, const std::function<void(std::size_t place)>& take);

template <class T>
CLI::Option* add_choice(CLI::App& verb, const std::string& names, T& field, const std::string& description,
                        const Choices<T>& choices) {
  return add_choice(verb, names, description, names_of(choices),
                    [&field, choices](std::size_t place) { field = choices[place].second; });
}

// --device cpu, cuda or cuda:N into `device`; cuda is cuda:0. Whether there is such a device is for the verb to ask.
CLI::Option* add_device(CLI::App& verb, Device& device, const std::string& description);

}  // namespace quire::cli
