// Every format as a type list, and the bridge from a run-time FormatId to a type. Expanded from format/modes.def.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>

#include "format/build_config.h"
#include "format/format.h"
#include "format/modes.def"

namespace quire::format {

template <class... Fs>
struct TypeList {
  static constexpr int kSize = sizeof...(Fs);
};

namespace detail {
template <class Ignored, class... Fs>
struct DropFirst {
  using type = TypeList<Fs...>;
};
}  // namespace detail

#define QUIRE_FORMAT(Type) , Type
using AllFormats = detail::DropFirst<void
#include "format/modes.def"
                                     >::type;
#undef QUIRE_FORMAT

// A format's position in modes.def.
enum class FormatId : std::int32_t { kNone = -1 };

template <class F, class... Fs>
constexpr FormatId index_in(TypeList<Fs...>) {
  int index = 0;
  int found = -1;
  ((found = std::is_same_v<F, Fs> ? index : found, ++index), ...);
  return static_cast<FormatId>(found);
}
template <class F>
inline constexpr FormatId format_id = index_in<F>(AllFormats{});

// Calls visit.template operator()<F>() for every format, in table order.
template <class Visit, class... Fs>
constexpr void for_each_in(TypeList<Fs...>, Visit&& visit) {
  (visit.template operator()<Fs>(), ...);
}
template <class Visit>
constexpr void for_each_format(Visit&& visit) {
  for_each_in(AllFormats{}, std::forward<Visit>(visit));
}

// What the run time needs to know of a format without its type.
struct FormatInfo {
  std::string_view name;
  DType cache_dtype;
  int unit;  // elements packed together: head sizes must be multiples of it
  int unit_bytes;
  MetaPlace meta_place;
  int meta_bytes;
  Rotation rotation;
  bool tensor_scale;
  bool level_norm;
  Centre centre;
  double max_nmse;
  float (*unrotate)(RowShape);
  int (*page_bytes)(int head_size);

  constexpr std::int64_t code_bytes(std::int64_t head_size) const { return head_size / unit * unit_bytes; }
  constexpr std::int64_t row_bytes(std::int64_t head_size) const {
    return code_bytes(head_size) + (meta_place == MetaPlace::kInRow ? meta_bytes : 0);
  }
  // Elements of a row per element of its cache tensor, 0 where that is no whole number: 3-bit codes, metadata in the
  // row.
  constexpr int packing_factor() const {
    const int elements = unit * static_cast<int>(dtype_bytes(cache_dtype));
    return meta_place == MetaPlace::kInRow || elements % unit_bytes != 0 ? 0 : elements / unit_bytes;
  }
};

template <Format F>
constexpr FormatInfo make_format_info() {
  return {.name = F::kName,
          .cache_dtype = F::kCacheDType,
          .unit = F::kUnit,
          .unit_bytes = F::kUnitBytes,
          .meta_place = F::kMetaPlace,
          .meta_bytes = F::kMetaBytes,
          .rotation = F::kRotation,
          .tensor_scale = F::kTensorScale,
          .level_norm = F::kLevelNorm,
          .centre = F::kCentre,
          .max_nmse = F::kMaxNmse,
          .unrotate = [](RowShape shape) { return F::unrotate(shape); },
          .page_bytes = [](int head_size) { return F::page_bytes(head_size); }};
}
template <class... Fs>
constexpr auto make_format_table(TypeList<Fs...>) {
  return std::array<FormatInfo, sizeof...(Fs)>{make_format_info<Fs>()...};
}
inline constexpr auto kFormatTable = make_format_table(AllFormats{});

inline const FormatInfo& format_info(FormatId id) { return kFormatTable[static_cast<std::size_t>(id)]; }

inline FormatId find_format(std::string_view name) {
  for (std::size_t i = 0; i < kFormatTable.size(); ++i) {
    if (kFormatTable[i].name == name) return static_cast<FormatId>(i);
  }
  return FormatId::kNone;
}

// ---- which modes this build holds (CMake's QUIRE_MODES) -------------------------------------------------------------

constexpr bool mode_enabled(std::string_view name) {
  constexpr std::string_view enabled[] = {QUIRE_ENABLED_MODES};
  for (std::string_view mode : enabled) {
    if (mode == "all" || mode == name) return true;
  }
  return false;
}

// A format is compiled where an enabled mode uses it, or where it is listed itself. "auto" uses the three floats.
template <class F>
constexpr bool format_enabled() {
  bool enabled = mode_enabled(F::kName);
#define QUIRE_MODE(name, enum_value, Key, Value)                                          \
  enabled = enabled ||                                                                    \
            (mode_enabled(name) && (std::is_same_v<Key, F> || std::is_same_v<Value, F> || \
                                    (std::is_same_v<Key, AutoFloat> && std::is_base_of_v<FloatCastDefaults, F>)));
#include "format/modes.def"
#undef QUIRE_MODE
  return enabled;
}

}  // namespace quire::format
