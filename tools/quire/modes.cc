// quire modes: every mode this build knows, registered ones included.
#include <fmt/core.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "quire/layout.h"
#include "quire/mode.h"
#include "verbs.h"

namespace quire::cli {
namespace {

using nlohmann::ordered_json;

constexpr int kHeadSize = 128;

// Empty for a mode the enum does not know.
std::string quant_mode_name(const ModeInfo& mode) {
  return mode.kv_quant_mode ? std::string(kv_quant_mode_name(*mode.kv_quant_mode)) : "";
}

// The layout at head size 128; none for a mode that was left out of the build or whose backend is not registered.
std::optional<KVCacheLayout> layout_of(const ModeInfo& mode) {
  KVCacheSpec spec;
  spec.mode = mode.id;
  spec.head_size = kHeadSize;
  auto layout = make_layout(spec);
  if (!layout.ok()) return std::nullopt;
  return std::move(layout).value();
}

ordered_json describe(const ModeInfo& mode) {
  ordered_json row = {{"name", mode.name}, {"aliases", mode.aliases}};
  const std::string quant_mode = quant_mode_name(mode);
  row["kv_quant_mode"] = quant_mode.empty() ? ordered_json() : ordered_json(quant_mode);
  row["key_format"] = mode.key_format;
  row["value_format"] = mode.value_format;
  row["key_bits"] = nullptr;
  row["value_bits"] = nullptr;
  row["scale_caches"] = nullptr;
  row["bytes_per_token_head"] = nullptr;
  if (const auto layout = layout_of(mode)) {
    row["key_bits"] = 8.0 * static_cast<double>(layout->k_data_bytes) / kHeadSize;
    row["value_bits"] = 8.0 * static_cast<double>(layout->v_data_bytes) / kHeadSize;
    row["scale_caches"] = layout->k_scale_bytes + layout->v_scale_bytes > 0;
    row["bytes_per_token_head"] = layout->bytes_per_token_head;
  }
  row["shared_slot"] = mode.shared_slot;
  row["compiled"] = mode.compiled;
  row["registered"] = mode.registered;
  return row;
}

std::string bits_text(const ordered_json& row) {
  if (row["key_bits"].is_null()) return "-";
  const auto key_bits = row["key_bits"].get<double>();
  const auto value_bits = row["value_bits"].get<double>();
  return key_bits == value_bits ? fmt::format("{:g}", key_bits) : fmt::format("{:g} {:g}", key_bits, value_bits);
}

std::string formats_text(const ModeInfo& mode) {
  if (mode.key_format.empty()) return "its own";
  return mode.key_format == mode.value_format ? mode.key_format : mode.key_format + " " + mode.value_format;
}

void print_table() {
  std::vector<std::array<std::string, 7>> lines = {
      {"mode", "KVQuantMode", "format of K and V", "bits", "scales", "bytes", "also"}};
  for (const ModeInfo& mode : list_modes()) {
    const ordered_json row = describe(mode);
    const std::string quant_mode = quant_mode_name(mode);
    const ordered_json& scales = row["scale_caches"];
    const ordered_json& bytes = row["bytes_per_token_head"];
    std::vector<std::string> notes = mode.aliases;
    if (mode.registered) notes.push_back("registered");
    if (!mode.compiled) notes.push_back("not in this build");
    lines.push_back({mode.name, quant_mode.empty() ? "-" : quant_mode, formats_text(mode), bits_text(row),
                     scales.is_null() ? "-" : (scales.get<bool>() ? "yes" : "no"), bytes.is_null() ? "-" : bytes.dump(),
                     fmt::format("{}", fmt::join(notes, ", "))});
  }
  std::array<std::size_t, 7> widths = {};
  for (const auto& line : lines) {
    for (std::size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  }
  for (const auto& line : lines) {
    fmt::print("{:<{}}  {:<{}}  {:<{}}  {:>{}}  {:>{}}  {:>{}}  {}\n", line[0], widths[0], line[1], widths[1], line[2],
               widths[2], line[3], widths[3], line[4], widths[4], line[5], widths[5], line[6]);
  }
  fmt::print(
      "\nbits: stored per element, metadata inside the row counted. bytes: K, V and scales of one token and head, "
      "head size {}.\n",
      kHeadSize);
}

}  // namespace

void add_modes(CLI::App& app, int& exit_status) {
  CLI::App* verb = app.add_subcommand("modes", "List every way of storing a cache");
  auto as_json = std::make_shared<bool>(false);
  verb->add_flag("--json", *as_json, "Print JSON");
  verb->callback([as_json, &exit_status] {
    exit_status = 0;
    if (!*as_json) return print_table();
    ordered_json rows = ordered_json::array();
    for (const ModeInfo& mode : list_modes()) rows.push_back(describe(mode));
    fmt::print("{}\n", ordered_json{{"head_size", kHeadSize}, {"modes", rows}}.dump(2));
  });
}

}  // namespace quire::cli
