#include "core/mode_table.h"

#include <algorithm>
#include <iterator>
#include <mutex>
#include <shared_mutex>

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

std::vector<ModeInfo> built_in_modes() {
  using namespace format;
  std::vector<ModeInfo> modes;
#define QUIRE_MODE(mode_name, enum_value, Key, Value) \
  {                                                   \
    ModeInfo mode;                                    \
    mode.id = static_cast<ModeId>(modes.size());      \
    mode.name = mode_name;                            \
    mode.kv_quant_mode = enum_value;                  \
    mode.key_format = Key::kName;                     \
    mode.value_format = Value::kName;                 \
    mode.shared_slot = shares_slot<Key, Value>();     \
    mode.compiled = mode_enabled(mode_name);          \
    modes.push_back(std::move(mode));                 \
  }
#define QUIRE_MODE_ALIAS(alias, name_of)                        \
  for (ModeInfo & mode : modes) {                               \
    if (mode.name == name_of) mode.aliases.emplace_back(alias); \
  }
  using enum KVQuantMode;
  [[maybe_unused]] constexpr std::optional<KVQuantMode> kNoEnum;
#include "core/modes.def"
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

// The mode that "k=<format>,v=<format>" describes, without an id; kNotFound for another spelling or an unknown format.
Result<ModeInfo> compose(std::string_view name) {
  const std::size_t comma = name.find(",v=");
  const format::FormatId key = format::find_format(name.substr(2, comma - 2));
  const format::FormatId value =
      comma == std::string_view::npos ? format::FormatId::kNone : format::find_format(name.substr(comma + 3));
  if (key == format::FormatId::kNone || value == format::FormatId::kNone) {
    return not_found("kv_cache_dtype '" + std::string(name) +
                     "' is not k=<format>,v=<format>; formats: " + format_names());
  }
  ModeInfo mode;
  mode.name = name;
  mode.key_format = format::format_info(key).name;
  mode.value_format = format::format_info(value).name;
  mode.shared_slot = shares_slot(format::format_info(key).meta_place, format::format_info(value).meta_place);
  mode.compiled = format_compiled(key) && format_compiled(value);
  mode.composed = true;
  return mode;
}

struct ModeTable {
  std::shared_mutex mutex;
  std::vector<ModeInfo> modes = built_in_modes();

  const ModeInfo* find(std::string_view name) const {
    for (const ModeInfo& mode : modes) {
      if (mode.name == name || std::ranges::find(mode.aliases, name) != mode.aliases.end()) return &mode;
    }
    return nullptr;
  }
};

ModeTable& table() {
  static ModeTable instance;
  return instance;
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

FormatPair formats_of(const ModeInfo& mode, DType key_cache_dtype, DType value_cache_dtype) {
  const auto resolve = [](std::string_view name, DType dtype) {
    return format::find_format(name == AutoFloat::kName ? dtype_name(dtype) : name);
  };
  return {resolve(mode.key_format, key_cache_dtype), resolve(mode.value_format, value_cache_dtype)};
}

}  // namespace core

Result<ModeId> parse_kv_cache_dtype(std::string_view name) {
  {
    std::shared_lock lock(table().mutex);
    if (const ModeInfo* mode = table().find(name)) return mode->id;
  }
  if (name.substr(0, 2) != "k=") {
    return not_found("kv_cache_dtype '" + std::string(name) + "' is not a mode; modes: " + core::mode_names() +
                     ", and any pair k=<format>,v=<format>");
  }
  Result<ModeInfo> composed = compose(name);
  if (!composed) return composed.status();
  std::unique_lock lock(table().mutex);
  for (const ModeInfo& mode : table().modes) {
    if (mode.key_format == composed->key_format && mode.value_format == composed->value_format) return mode.id;
  }
  composed->id = static_cast<ModeId>(table().modes.size());
  table().modes.push_back(*composed);
  return composed->id;
}

Result<ModeId> mode_from_kv_quant_mode(KVQuantMode value) {
  std::shared_lock lock(table().mutex);
  const ModeInfo* found = nullptr;
  std::string sharing;
  for (const ModeInfo& mode : table().modes) {
    if (mode.kv_quant_mode != value) continue;
    sharing += (found == nullptr ? "" : ", ") + mode.name;
    found = found == nullptr ? &mode : found;
  }
  const std::string number = std::to_string(static_cast<int>(value));
  if (found == nullptr) return not_found("KVQuantMode " + number + " is not a mode's");
  if (sharing != found->name) {
    return invalid_argument("KVQuantMode " + number + " is shared by the modes " + sharing + ": name one of them");
  }
  return found->id;
}

Result<ModeInfo> mode_info(ModeId mode) {
  std::shared_lock lock(table().mutex);
  const auto index = static_cast<std::size_t>(mode);
  if (static_cast<std::int32_t>(mode) < 0 || index >= table().modes.size()) {
    return not_found("mode id " + std::to_string(static_cast<std::int32_t>(mode)) +
                     " is not a mode's; take ids from parse_kv_cache_dtype or register_mode");
  }
  return table().modes[index];
}

std::vector<ModeInfo> list_modes() {
  std::shared_lock lock(table().mutex);
  std::vector<ModeInfo> named;
  std::ranges::copy_if(table().modes, std::back_inserter(named), [](const ModeInfo& mode) { return !mode.composed; });
  return named;
}

Result<ModeId> register_mode(const ModeSpec& spec) {
  std::unique_lock lock(table().mutex);
  if (spec.name.empty())
    return invalid_argument("name of a registered mode is empty; give the kv_cache_dtype it is called by");
  std::vector<std::string> names = spec.aliases;
  names.push_back(spec.name);
  for (const std::string& name : names) {
    if (const ModeInfo* mode = table().find(name)) {
      return already_exists("mode '" + name + "' exists already (as '" + mode->name +
                            "'); registered names must be new");
    }
  }
  ModeInfo mode;
  mode.id = static_cast<ModeId>(table().modes.size());
  mode.name = spec.name;
  mode.aliases = spec.aliases;
  mode.registered = true;
  table().modes.push_back(mode);
  return mode.id;
}

}  // namespace quire
