#include "core/mode_table.h"

#include <algorithm>
#include <cstdio>
#include <deque>
#include <iterator>
#include <mutex>
#include <shared_mutex>
#include <utility>

#include "core/checks.h"
#include "core/guard.h"

namespace quire {
namespace {

using format::AutoFloat;

// K and V go into one slot of one tensor where the value keeps its metadata in its row and the key needs no scale
// cache.
constexpr bool shares_slot(format::MetaPlace key, format::MetaPlace value) {
  return value == format::MetaPlace::kInRow && key != format::MetaPlace::kScaleCache;
}

// The same for a row of the table, whose formats may be "auto".
template <class Key, class Value>
constexpr bool shares_slot() {
  if constexpr (format::Format<Key> && format::Format<Value>) return shares_slot(Key::kMetaPlace, Value::kMetaPlace);
  return false;
}

using core::ModeRow;

// Looks up the formats that a row names.
void set_formats(ModeRow& mode) {
  mode.auto_key = mode.key_format == AutoFloat::kName;
  mode.auto_value = mode.value_format == AutoFloat::kName;
  mode.formats = {format::find_format(mode.key_format), format::find_format(mode.value_format)};
}

// The rows of the table. They never move, because callers keep pointers to them.
std::deque<ModeRow> built_in_modes() {
  using namespace format;
  std::deque<ModeRow> modes;
#define QUIRE_MODE(mode_name, enum_value, Key, Value) \
  {                                                   \
    ModeRow mode;                                     \
    mode.id = static_cast<ModeId>(modes.size());      \
    mode.name = mode_name;                            \
    mode.kv_quant_mode = enum_value;                  \
    mode.key_format = Key::kName;                     \
    mode.value_format = Value::kName;                 \
    mode.shared_slot = shares_slot<Key, Value>();     \
    mode.compiled = mode_enabled(mode_name);          \
    set_formats(mode);                                \
    modes.push_back(std::move(mode));                 \
  }
#define QUIRE_MODE_ALIAS(alias, name_of)                        \
  for (ModeRow & mode : modes) {                                \
    if (mode.name == name_of) mode.aliases.emplace_back(alias); \
  }
  using enum KVQuantMode;
  [[maybe_unused]] constexpr std::optional<KVQuantMode> kNoEnum;
#include "format/modes.def"
#undef QUIRE_MODE
#undef QUIRE_MODE_ALIAS
  return modes;
}

std::string format_names() {
  std::string names;
  for (const format::FormatInfo& info : format::kFormatTable)
    names += (names.empty() ? "" : ", ") + std::string(info.name);
  return names;
}

bool format_compiled(format::FormatId id) {
  bool compiled = false;
  format::for_each_format(
      [&]<class F>() { compiled = compiled || (format::format_id<F> == id && format::format_enabled<F>()); });
  return compiled;
}

struct ModeTable {
  std::shared_mutex mutex;
  std::deque<ModeRow> modes = built_in_modes();

  const ModeRow* find(std::string_view name) const {
    for (const ModeRow& mode : modes) {
      if (mode.name == name || std::ranges::find(mode.aliases, name) != mode.aliases.end()) return &mode;
    }
    return nullptr;
  }

  // A format by its name, or by an alias of the mode that has it for K and for V.
  format::FormatId find_format(std::string_view name) const {
    if (const format::FormatId id = format::find_format(name); id != format::FormatId::kNone) return id;
    const ModeInfo* mode = find(name);
    if (mode == nullptr || mode->key_format != mode->value_format) return format::FormatId::kNone;
    return format::find_format(mode->key_format);
  }
};

ModeTable& table() {
  static ModeTable instance;
  return instance;
}

// The mode that "k=<format>,v=<format>" describes, without an id; kNotFound for another spelling or an unknown format.
Result<ModeRow> compose(std::string_view name) {
  const std::size_t comma = name.find(",v=");
  const auto find = [](std::string_view format_name) {
    std::shared_lock lock(table().mutex);
    return table().find_format(format_name);
  };
  const format::FormatId key = find(name.substr(2, comma - 2));
  const format::FormatId value =
      comma == std::string_view::npos ? format::FormatId::kNone : find(name.substr(comma + 3));
  if (key == format::FormatId::kNone || value == format::FormatId::kNone) {
    return not_found("kv_cache_dtype " + core::quoted(name) +
                     " is not k=<format>,v=<format>; formats: " + format_names());
  }
  ModeRow mode;
  mode.formats = {key, value};
  mode.key_format = format::format_info(key).name;
  mode.value_format = format::format_info(value).name;
  mode.name = "k=" + mode.key_format + ",v=" + mode.value_format;
  mode.shared_slot = shares_slot(format::format_info(key).meta_place, format::format_info(value).meta_place);
  mode.compiled = format_compiled(key) && format_compiled(value);
  mode.composed = true;
  return mode;
}

// The names of vLLM's enum. A mode's row in modes.def has the value, not the name.
constexpr std::pair<KVQuantMode, std::string_view> kKVQuantModeNames[] = {
    {KVQuantMode::kNone, "NONE"},
    {KVQuantMode::kFp8PerTensor, "FP8_PER_TENSOR"},
    {KVQuantMode::kInt8PerTokenHead, "INT8_PER_TOKEN_HEAD"},
    {KVQuantMode::kFp8PerTokenHead, "FP8_PER_TOKEN_HEAD"},
    {KVQuantMode::kInt4PerTokenHead, "INT4_PER_TOKEN_HEAD"},
    {KVQuantMode::kInt2PerTokenHead, "INT2_PER_TOKEN_HEAD"},
};

std::string kv_quant_mode_names() {
  std::string names;
  for (const auto& [value, name] : kKVQuantModeNames) names += (names.empty() ? "" : ", ") + std::string(name);
  return names;
}

// Its number says nothing: numbers have moved between vLLM versions.
Status outside_the_enum() {
  return not_found("the KVQuantMode is outside the enum; supported: " + kv_quant_mode_names());
}

// The key format of an enum value, null outside the enum. Modes that share a value pack alike and keep their scales
// alike.
const format::FormatInfo* key_format_of(KVQuantMode value) {
  std::shared_lock lock(table().mutex);
  for (const ModeRow& mode : table().modes) {
    if (mode.kv_quant_mode != value) continue;
    const core::FormatPair pair = core::formats_of(mode, DType::kFloat32, DType::kFloat32);
    return &format::format_info(pair.key);
  }
  return nullptr;
}

// A name that tables, comma-separated lists and messages can hold.
bool is_plain_name(std::string_view name) {
  constexpr std::size_t kMaxLength = 64;
  constexpr std::string_view kAllowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.";
  return !name.empty() && name.size() <= kMaxLength && name.find_first_not_of(kAllowed) == std::string_view::npos;
}

}  // namespace

namespace core {

std::string mode_names() {
  std::string names;
  for (const ModeInfo& mode : list_modes()) {
    if (!names.empty()) names += ", ";
    names += mode.name;
    for (const std::string& alias : mode.aliases) names += " (" + alias + ")";
  }
  return names;
}

Status check_multiple(std::string_view who, int unit, int head_size) {
  if (head_size >= 1 && head_size % unit == 0) return {};
  return invalid_argument("head_size is " + std::to_string(head_size) + "; " + std::string(who) +
                          (unit > 1 ? " packs multiples of " + std::to_string(unit) : " takes 1 and more"));
}

std::string mode_name(ModeId mode) {
  const ModeRow* row = find_mode(mode);
  return row != nullptr ? row->name : "id " + std::to_string(static_cast<std::int32_t>(mode));
}

const ModeRow* find_mode(ModeId mode) {
  std::shared_lock lock(table().mutex);
  const auto index = static_cast<std::size_t>(mode);
  if (static_cast<std::int32_t>(mode) < 0 || index >= table().modes.size()) return nullptr;
  return &table().modes[index];
}

std::string quoted(std::string_view text) {
  constexpr std::size_t kMaxShown = 64;
  std::string quoted = "'";
  for (const char c : text.substr(0, kMaxShown)) {
    if (c >= ' ' && c <= '~') {
      quoted += c;
    } else {
      char escaped[5];
      std::snprintf(escaped, sizeof(escaped), "\\x%02x", static_cast<unsigned>(static_cast<unsigned char>(c)));
      quoted += escaped;
    }
  }
  quoted += "'";
  if (text.size() > kMaxShown) quoted += " (of " + std::to_string(text.size()) + " characters)";
  return quoted;
}

}  // namespace core

Result<ModeId> parse_kv_cache_dtype(std::string_view name) {
  return core::guarded([&]() -> Result<ModeId> {
    {
      std::shared_lock lock(table().mutex);
      if (const ModeInfo* mode = table().find(name)) return mode->id;
    }
    if (name.substr(0, 2) != "k=") {
      return not_found("kv_cache_dtype " + core::quoted(name) + " is not a mode; modes: " + core::mode_names() +
                       ", and any pair k=<format>,v=<format>");
    }
    Result<ModeRow> composed = compose(name);
    if (!composed) return composed.status();
    std::unique_lock lock(table().mutex);
    for (const ModeRow& mode : table().modes) {
      if (mode.key_format == composed->key_format && mode.value_format == composed->value_format) return mode.id;
    }
    composed->id = static_cast<ModeId>(table().modes.size());
    table().modes.push_back(*composed);
    return composed->id;
  });
}

Result<ModeId> mode_from_kv_quant_mode(KVQuantMode value) {
  return core::guarded([&]() -> Result<ModeId> {
    std::shared_lock lock(table().mutex);
    const ModeInfo* found = nullptr;
    std::string sharing;
    for (const ModeRow& mode : table().modes) {
      if (mode.kv_quant_mode != value) continue;
      sharing += (found == nullptr ? "" : ", ") + mode.name;
      found = found == nullptr ? &mode : found;
    }
    if (found == nullptr) return outside_the_enum();
    if (sharing != found->name) {
      return invalid_argument("KVQuantMode " + std::string(kv_quant_mode_name(value)) + " is shared by the modes " +
                              sharing + ": name one of them");
    }
    return found->id;
  });
}

Result<const ModeInfo*> mode_info(ModeId mode) {
  return core::guarded([&]() -> Result<const ModeInfo*> {
    const Result<const ModeRow*> row = core::known_mode(mode);
    if (!row) return row.status();
    return static_cast<const ModeInfo*>(*row);
  });
}

std::vector<ModeInfo> list_modes() {
  std::shared_lock lock(table().mutex);
  std::vector<ModeInfo> named;
  std::ranges::copy_if(table().modes, std::back_inserter(named), [](const ModeRow& mode) { return !mode.composed; });
  return named;
}

Result<ModeId> register_mode(const ModeSpec& spec) {
  return core::guarded([&]() -> Result<ModeId> {
    std::unique_lock lock(table().mutex);
    std::vector<std::string> names = {spec.name};
    names.insert(names.end(), spec.aliases.begin(), spec.aliases.end());
    for (auto name = names.begin(); name != names.end(); ++name) {
      const std::string what = name == names.begin() ? "name" : "alias";
      if (!is_plain_name(*name)) {
        return invalid_argument(what + " of a registered mode is " + core::quoted(*name) +
                                "; supported: 1 to 64 letters, digits, '_', '-' and '.'");
      }
      if (std::find(names.begin(), name, *name) != name) {
        return invalid_argument("alias of a registered mode is " + core::quoted(*name) +
                                ", which is its name or another alias already; give each once");
      }
      if (const ModeRow* mode = table().find(*name)) {
        return already_exists("mode " + core::quoted(*name) + " exists already (as '" + mode->name +
                              "'); registered names must be new");
      }
    }
    ModeRow mode;
    mode.id = static_cast<ModeId>(table().modes.size());
    mode.name = spec.name;
    mode.aliases = spec.aliases;
    mode.registered = true;
    table().modes.push_back(mode);
    return mode.id;
  });
}

std::string_view kv_quant_mode_name(KVQuantMode value) {
  for (const auto& [named, name] : kKVQuantModeNames) {
    if (named == value) return name;
  }
  return "unknown";
}

Result<KVQuantMode> kv_quant_mode_from_name(std::string_view name) {
  for (const auto& [value, known] : kKVQuantModeNames) {
    if (known == name) return value;
  }
  return not_found("KVQuantMode " + core::quoted(name) + " is not known; supported: " + kv_quant_mode_names());
}

bool is_per_token_head(KVQuantMode value) {
  const format::FormatInfo* format = key_format_of(value);
  return format != nullptr && format->meta_place == format::MetaPlace::kScaleCache;
}

Result<int> packing_factor(KVQuantMode value) {
  const format::FormatInfo* format = key_format_of(value);
  if (format == nullptr) return outside_the_enum();
  return format->packing_factor();
}

Result<int> packed_head_size(KVQuantMode value, int head_size) {
  const format::FormatInfo* format = key_format_of(value);
  if (format == nullptr) return outside_the_enum();
  Status status =
      core::check_multiple("KVQuantMode " + std::string(kv_quant_mode_name(value)), format->unit, head_size);
  if (!status) return status;
  return head_size / format->packing_factor();
}

KVQuantMode get_kv_quant_mode(std::string_view kv_cache_dtype) {
  if (const Result<ModeId> mode = parse_kv_cache_dtype(kv_cache_dtype)) {
    if (const std::optional<KVQuantMode> value = core::find_mode(*mode)->kv_quant_mode) return *value;
  }
  return kv_cache_dtype.starts_with("fp8") ? KVQuantMode::kFp8PerTensor : KVQuantMode::kNone;
}

bool is_quantized_kv_cache(std::string_view kv_cache_dtype) {
  return get_kv_quant_mode(kv_cache_dtype) != KVQuantMode::kNone;
}

bool kv_cache_uses_per_token_head_scales(std::string_view kv_cache_dtype) {
  return is_per_token_head(get_kv_quant_mode(kv_cache_dtype));
}

}  // namespace quire
