#include "options.h"

#include <fmt/core.h>
#include <fmt/format.h>

#include <algorithm>

namespace quire::cli {
namespace {

// Text from the command line as it appears in a message.
std::string in_quotes(const std::string& text) {
  constexpr std::size_t kShown = 80;
  std::string out = "'";
  for (char c : text.substr(0, kShown)) out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  return out + (text.size() > kShown ? "...'" : "'");
}

std::string lower_case(std::string text) {
  for (char& c : text) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  return text;
}

template <class T>
CLI::Option* add_float(CLI::App& verb, const std::string& names, T& field, const std::string& description, T low,
                       T high) {
  const auto take = [=, &field](const std::string& text) {
    const char* end = text.data() + text.size();
    T value{};
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc() || stop != end || !(value >= low && value <= high)) {
      refuse_value(names, text, fmt::format("expected a number from {} to {}", low, high));
    }
    field = value;
  };
  return add_text(verb, names, description, "FLOAT", take, [&field] { return fmt::format("{}", field); });
}

}  // namespace

CLI::Option* add_text(CLI::App& verb, const std::string& names, const std::string& description,
                      const std::string& type_name, const std::function<void(const std::string& text)>& take,
                      const std::function<std::string()>& shown) {
  CLI::Option* option = verb.add_option_function<std::string>(names, take, description)->type_name(type_name);
  return shown ? option->default_function(shown) : option;
}

void refuse_value(const std::string& names, const std::string& text, const std::string& wanted) {
  const std::string name = names.substr(names.rfind(',') + 1);
  throw CLI::ValidationError(fmt::format("{} is {}, {}", name, in_quotes(text), wanted));
}

std::vector<std::string> split_list(const std::string& text) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0, end; begin <= text.size(); begin = end + 1) {
    end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
  }
  return parts;
}

CLI::Option* add_number(CLI::App& verb, const std::string& names, double& field, const std::string& description,
                        double low, double high) {
  return add_float(verb, names, field, description, low, high);
}

CLI::Option* add_number(CLI::App& verb, const std::string& names, float& field, const std::string& description,
                        float low, float high) {
  return add_float(verb, names, field, description, low, high);
}

std::size_t parse_choice(const std::string& names, const std::string& text, const std::vector<std::string>& choices) {
  const auto found = std::find(choices.begin(), choices.end(), lower_case(text));
  if (found == choices.end()) refuse_value(names, text, fmt::format("supported are {}", fmt::join(choices, ", ")));
  return static_cast<std::size_t>(found - choices.begin());
}

CLI::Option* add_choice(CLI::App& verb, const std::string& names, const std::string& description,
                        const std::vector<std::string>& choices, const std::function<void(std::size_t place)>& take) {
  return add_text(verb, names, description, fmt::format("{}", fmt::join(choices, "|")),
                  [=](const std::string& text) { take(parse_choice(names, text, choices)); });
}

CLI::Option* add_device(CLI::App& verb, Device& device, const std::string& description) {
  return add_text(verb, "--device", description, "cpu|cuda|cuda:N", [&device](const std::string& text) {
    constexpr std::string_view kIndexed = "cuda:";
    const std::string name = lower_case(text);
    if (name == "cpu" || name == "cuda") {
      device = name == "cpu" ? Device::cpu() : Device::cuda();
      return;
    }
    int index = -1;
    const std::string digits = name.substr(std::min(name.size(), kIndexed.size()));
    std::from_chars(digits.data(), digits.data() + digits.size(), index);
    if (!name.starts_with(kIndexed) || index < 0 || std::to_string(index) != digits) {
      refuse_value("--device", text, "supported are cpu, cuda and cuda:N, N the number of a GPU from 0 on");
    }
    device = Device::cuda(index);
  });
}

}  // namespace quire::cli
