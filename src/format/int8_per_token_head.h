// int8 with one fp32 scale per row:
//
//     scale = max(absmax * r(127), 1e-6)      code = round(clamp(x * (1 / scale), -128, 127))      value = code * scale
//
// r(127) is the fp32 number that is nearest to 1/127. Ties round to even. (vLLM 0.33.0 rounds them away from zero; pull
// request 39074 truncated: the same scales, codes within one.)
#pragma once

#include "format/format.h"

namespace quire::format {

struct Int8PerTokenHead : ScaleCacheDefaults {
  static constexpr std::string_view kName = "int8_per_token_head";
  static constexpr DType kCacheDType = DType::kInt8;
  static constexpr StatsOf kStatsOf = StatsOf::kRotated;
  static constexpr double kMaxNmse = 1.5e-4;

  using Stats = AbsMax;
  static QUIRE_HD Stats stat(float y) { return AbsMax::of(y); }
  static QUIRE_HD Stats merge(Stats a, Stats b) { return AbsMax::merge(a, b); }

  static QUIRE_HD Encoder finish(Stats stats, RowShape, const SideInputs&) {
    if (!stats.finite()) return Encoder::poisoned();
    const float scale = exact::max(stats.value * (1.0F / 127.0F), 1e-6F);
    return {scale, exact::reciprocal(scale), 0.0F};
  }
  static QUIRE_HD void pack(const Encoder& encoder, const float* y, std::uint8_t* bytes) {
    *bytes = static_cast<std::uint8_t>(exact::round_to_int8(y[0] * encoder.inverse));
  }
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* level) {
    *level = static_cast<float>(static_cast<std::int8_t>(*bytes));
  }
};

}  // namespace quire::format
