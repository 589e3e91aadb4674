// fp8 e4m3fn with one fp32 scale per row:
//
//     scale = max(absmax * r(448), 1e-6)      code = e4m3(clamp(x * (1 / scale), -448, 448))      value = code * scale
//
// r(448) is the fp32 number that is nearest to 1/448. The bytes are those of vLLM but for ties, because its reciprocal
// is approximate.
#pragma once

#include "format/float_types.h"
#include "format/format.h"

namespace quire::format {

struct Fp8PerTokenHead : ScaleCacheDefaults {
  static constexpr std::string_view kName = "fp8_per_token_head";
  static constexpr DType kCacheDType = DType::kFloat8E4M3;
  static constexpr StatsOf kStatsOf = StatsOf::kRotated;
  static constexpr double kMaxNmse = 1.5e-3;

  using Stats = AbsMax;
  static QUIRE_HD Stats stat(float y) { return AbsMax::of(y); }
  static QUIRE_HD Stats merge(Stats a, Stats b) { return AbsMax::merge(a, b); }

  static QUIRE_HD Encoder finish(Stats stats, RowShape, const SideInputs&) {
    if (!stats.finite()) return Encoder::poisoned();
    const float scale = exact::max(stats.value * (1.0F / 448.0F), 1e-6F);
    return {scale, exact::reciprocal(scale), 0.0F};
  }
  static QUIRE_HD void pack(const Encoder& encoder, const float* y, std::uint8_t* bytes) {
    const float code = y[0] * encoder.inverse;
    *bytes = E4M3::encode(code == code ? code : 0.0F);  // encode saturates at 448
  }
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* level) { *level = E4M3::decode(*bytes); }
};

}  // namespace quire::format
