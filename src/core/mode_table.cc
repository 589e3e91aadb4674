#include "core/mode_table.h"

#include <algorithm>
#include <mutex>
#include <shared_mutex>

namespace quire {
namespace {

using format::AutoFloat;

// Whether two formats put K and V into one slot of one tensor: both keep their metadata in the row.
template <class Key, class Value>
constexpr bool shares_slot() {
  if constexpr (format::Format<Key> && format::Format<Value>) {
    return Key::kMetaPlace == format::MetaPlace::kInRow || Value::kMetaPlace == format::MetaPlace::kInRow;
  } else {
    return false;
  }
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
  return not_found("kv_cache_dtype '" + std::string(name) + "' is not a mode; modes: " + core::mode_names());
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
  return table().modes;
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
