// quire layout: what make_layout answers for one cache, or bytes per token-head for every mode and head size.
#include <fmt/core.h>

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "options.h"
#include "quire/layout.h"
#include "quire/mode.h"
#include "verbs.h"

namespace quire::cli {
namespace {

using nlohmann::ordered_json;

const Choices<CacheOrder> kOrders = {{"nhd", CacheOrder::kNHD}, {"hnd", CacheOrder::kHND}};
const Choices<KVPacking> kPackings = {
    {"separate", KVPacking::kSeparate}, {"kv_in_block", KVPacking::kKVInBlock}, {"kv_in_row", KVPacking::kKVInRow}};
const Choices<ScalePlacement> kScalePlacements = {{"separate", ScalePlacement::kSeparate},
                                                  {"inline", ScalePlacement::kInline}};
const Choices<DType> kModelDTypes = {
    {"float32", DType::kFloat32}, {"float16", DType::kFloat16}, {"bfloat16", DType::kBFloat16}};

template <class T>
std::string name_in(const Choices<T>& names, T value) {
  for (const auto& [name, named] : names) {
    if (named == value) return name;
  }
  return "?";
}

struct HeadSizes {
  int k, v;
};
constexpr HeadSizes kTableHeadSizes[] = {{64, 64},   {80, 80},   {96, 96},   {112, 112}, {128, 128},
                                         {192, 192}, {256, 256}, {512, 512}, {192, 128}};

std::string column_name(HeadSizes sizes) {
  return sizes.k == sizes.v ? fmt::format("{}", sizes.k) : fmt::format("{}/{}", sizes.k, sizes.v);
}

struct TableRow {
  std::string mode;
  std::vector<std::int64_t> bytes;  // one per entry of kTableHeadSizes; 0 where the mode cannot store that size
};

std::vector<TableRow> byte_table() {
  std::vector<TableRow> rows;
  for (const ModeInfo& mode : list_modes()) {
    TableRow row{mode.name, {}};
    for (HeadSizes sizes : kTableHeadSizes) {
      KVCacheSpec spec;
      spec.mode = mode.id;
      spec.head_size = sizes.k;
      spec.head_size_v = sizes.v;
      const auto layout = make_layout(spec);
      row.bytes.push_back(layout.ok() ? layout->bytes_per_token_head : 0);
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

void print_byte_table(bool markdown) {
  const std::vector<TableRow> rows = byte_table();
  std::size_t name_width = 0;
  for (const TableRow& row : rows) name_width = std::max(name_width, row.mode.size());
  const auto print_row = [&](const std::string& first, const std::vector<std::string>& cells) {
    std::string line = fmt::format("{}{:<{}}", markdown ? "| " : "", first, name_width);
    for (const std::string& cell : cells) line += fmt::format("{}{:>7}", markdown ? " | " : "  ", cell);
    fmt::print("{}{}\n", line, markdown ? " |" : "");
  };
  std::vector<std::string> cells;
  for (HeadSizes sizes : kTableHeadSizes) cells.push_back(column_name(sizes));
  print_row("mode", cells);
  if (markdown) {
    fmt::print("|{:-<{}}", "", name_width + 2);
    for (std::size_t i = 0; i < cells.size(); ++i) fmt::print("|{:->9}", ":");
    fmt::print("|\n");
  }
  for (const TableRow& row : rows) {
    cells.clear();
    for (std::int64_t bytes : row.bytes) cells.push_back(bytes > 0 ? fmt::format("{}", bytes) : "-");
    print_row(row.mode, cells);
  }
}

void print_byte_table_json() {
  ordered_json rows = ordered_json::array();
  for (const TableRow& row : byte_table()) {
    ordered_json bytes = ordered_json::object();
    for (std::size_t i = 0; i < row.bytes.size(); ++i) {
      bytes[column_name(kTableHeadSizes[i])] = row.bytes[i] > 0 ? ordered_json(row.bytes[i]) : ordered_json();
    }
    rows.push_back({{"mode", row.mode}, {"bytes_per_token_head", bytes}});
  }
  fmt::print("{}\n", ordered_json{{"table", rows}}.dump(2));
}

ordered_json describe(const KVCacheLayout& layout, const std::string& mode) {
  const KVCacheSpec& spec = layout.spec;
  return {{"mode", mode},
          {"head_size", spec.head_size},
          {"head_size_v", spec.head_size_v},
          {"num_kv_heads", spec.num_kv_heads},
          {"num_layers", spec.num_layers},
          {"block_size", spec.block_size},
          {"model_dtype", dtype_name(spec.model_dtype)},
          {"order", name_in(kOrders, spec.order)},
          {"packing", name_in(kPackings, spec.packing)},
          {"scales", name_in(kScalePlacements, spec.scales)},
          {"page_alignment", spec.page_alignment},
          {"key_cache_dtype", dtype_name(layout.key_cache_dtype)},
          {"value_cache_dtype", dtype_name(layout.value_cache_dtype)},
          {"k_data_bytes", layout.k_data_bytes},
          {"v_data_bytes", layout.v_data_bytes},
          {"k_scale_bytes", layout.k_scale_bytes},
          {"v_scale_bytes", layout.v_scale_bytes},
          {"k_row_bytes", layout.k_row_bytes},
          {"v_row_bytes", layout.v_row_bytes},
          {"bytes_per_token_head", layout.bytes_per_token_head},
          {"bytes_per_token", layout.bytes_per_token},
          {"bytes_per_block", layout.bytes_per_block},
          {"tokens_per_gib", layout.tokens_per_gib},
          {"k_block_stride", layout.k_block_stride},
          {"k_slot_stride", layout.k_slot_stride},
          {"k_head_stride", layout.k_head_stride},
          {"v_block_stride", layout.v_block_stride},
          {"v_slot_stride", layout.v_slot_stride},
          {"v_head_stride", layout.v_head_stride},
          {"v_offset", layout.v_offset},
          {"k_scale_offset", layout.k_scale_offset},
          {"v_scale_offset", layout.v_scale_offset},
          {"effective_head_size", layout.effective_head_size},
          {"effective_head_size_v", layout.effective_head_size_v},
          {"padded_head_size", layout.padded_head_size},
          {"padded_head_size_v", layout.padded_head_size_v}};
}

struct Options {
  std::string mode;
  KVCacheSpec spec;
  bool table = false, markdown = false, as_json = false;
};

int run(Options options) {
  if (options.table) {
    if (options.as_json) {
      print_byte_table_json();
    } else {
      print_byte_table(options.markdown);
    }
    return 0;
  }
  if (options.mode.empty()) return report(invalid_argument("layout needs --mode or --table"));
  const auto mode = parse_kv_cache_dtype(options.mode);
  if (!mode.ok()) return report(mode.status());
  options.spec.mode = *mode;
  const auto layout = make_layout(options.spec);
  if (!layout.ok()) return report(layout.status());
  const auto info = mode_info(*mode);
  const ordered_json fields = describe(*layout, info.ok() ? (*info)->name : options.mode);
  if (options.as_json) {
    fmt::print("{}\n", fields.dump(2));
  } else {
    for (const auto& [name, value] : fields.items()) {
      fmt::print("{:<22} {}\n", name, value.is_string() ? value.get<std::string>() : value.dump());
    }
    fmt::print("\nStrides and offsets are in bytes; an offset of -1 means there is none.\n");
  }
  return 0;
}

}  // namespace

void add_layout(CLI::App& app, int& exit_status) {
  CLI::App* verb = app.add_subcommand("layout", "What a cache costs and where its bytes lie");
  auto options = std::make_shared<Options>();
  KVCacheSpec& spec = options->spec;
  auto* mode = verb->add_option("-m,--mode", options->mode, "kv_cache_dtype, such as int4_per_token_head");
  add_integer(*verb, "--head-size", spec.head_size, "Head size of K")->capture_default_str();
  add_integer(*verb, "--head-size-v", spec.head_size_v, "Head size of V; 0: that of K")->capture_default_str();
  add_integer(*verb, "--num-kv-heads", spec.num_kv_heads, "KV heads")->capture_default_str();
  add_integer(*verb, "--num-layers", spec.num_layers, "Layers")->capture_default_str();
  add_integer(*verb, "--block-size", spec.block_size, "Token slots of a page")->capture_default_str();
  add_integer(*verb, "--page-alignment", spec.page_alignment, "A page is rounded up to a multiple of this many bytes")
      ->capture_default_str();
  add_choice(*verb, "--order", spec.order, "Order of slots and heads in a page", kOrders);
  add_choice(*verb, "--packing", spec.packing, "How K and V share memory", kPackings);
  add_choice(*verb, "--scales", spec.scales, "Where per-row scales live", kScalePlacements);
  add_choice(*verb, "--model-dtype", spec.model_dtype, "What 'auto' stores", kModelDTypes);
  auto* table = verb->add_flag("--table", options->table, "Bytes per token-head of every mode and head size");
  verb->add_flag("--markdown", options->markdown, "The table in Markdown")->needs(table);
  verb->add_flag("--json", options->as_json, "Print JSON");
  table->excludes(mode);
  verb->callback([options, &exit_status] { exit_status = run(*options); });
}

}  // namespace quire::cli
