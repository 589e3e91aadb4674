// 4 bits, asymmetric, after a randomized Hadamard transform; one fp32 per row holds the scale and, in its low 4
// mantissa bits, the zero point:
//
//     y     = RHT(x)                                       lo = min(min y, 0), hi = max(max y, 0)
//     scale = max((hi - lo) * r(15), 1e-6)                 zp = clamp(round(-lo * inv), 0, 15)       inv = 1 / scale
//     code  = clamp(round(y * inv + zp), 0, 15)            ties away from zero
//     value = (code - zp) * scale
//
//     byte i:   7 6 5 4 | 3 2 1 0             metadata (fp32):   31 ........... 4 | 3 2 1 0
//               code of | code of                                scale's own bits | zp
//               y[2i+1] | y[2i]
//
// y is quantized with the full scale; the reader's scale has the low bits cleared, 2^-19 relative at most.
#pragma once

#include "format/format.h"

namespace quire::format {

struct Int4PerTokenHead : ScaleCacheDefaults {
  static constexpr std::string_view kName = "int4_per_token_head";
  static constexpr int kUnit = 2;
  static constexpr Rotation kRotation = Rotation::kSignedHadamard;
  static constexpr bool kHasOffset = true;
  static constexpr StatsOf kStatsOf = StatsOf::kRotated;
  static constexpr double kMaxNmse = 2.5e-2;

  // Levels are codes - 8: attention adds up levels and offsets separately, and centred levels leave little to cancel.
  static constexpr std::int32_t kCenter = 8;

  using Stats = Range;
  static QUIRE_HD Stats stat(float y) { return Range::of(y); }
  static QUIRE_HD Stats merge(Stats a, Stats b) { return Range::merge(a, b); }

  struct Encoder : ScaledEncoder {
    bool in_range;  // no element needs the clamp
  };
  static QUIRE_HD void write_meta(const Encoder& encoder, std::uint8_t* meta) {
    const std::uint32_t zero = static_cast<std::uint32_t>(static_cast<std::int32_t>(encoder.zero));
    store_as(meta, (exact::bits_of(encoder.scale) & ~15U) | zero);
  }
  static QUIRE_HD Encoder finish(Stats stats, RowShape, const SideInputs&) {
    if (!stats.finite()) return {ScaledEncoder::poisoned(), false};
    const float low = exact::min(stats.low, 0.0F);
    const float high = exact::max(stats.high, 0.0F);
    const float scale = exact::max((high - low) * (1.0F / 15.0F), 1e-6F);
    const float inverse = exact::reciprocal(scale);
    const float zero = exact::min(static_cast<float>(exact::round_half_away_nonnegative(-low * inverse)), 15.0F);
    // step() never falls where y rises, so the row's extremes speak for every element.
    const Encoder encoder{{scale, inverse, zero}, false};
    return {encoder, step(encoder, low) >= -0.5F && step(encoder, high) < 15.5F};
  }
  static QUIRE_HD float step(const Encoder& encoder, float y) {
    const float scaled = y * encoder.inverse;
    return scaled + encoder.zero;
  }
  static QUIRE_HD std::uint32_t code(const Encoder& encoder, float y) {
    return exact::round_half_away_nonnegative(exact::clamp(step(encoder, y), 0.0F, 15.0F));
  }
  static QUIRE_HD void pack(const Encoder& encoder, const float* y, std::uint8_t* bytes) {
    *bytes = static_cast<std::uint8_t>(exact::join<4>(code(encoder, y[0]), code(encoder, y[1])));
  }
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* level) {
    level[0] = static_cast<float>(static_cast<std::int32_t>(*bytes & 15U) - kCenter);
    level[1] = static_cast<float>(static_cast<std::int32_t>(*bytes >> 4) - kCenter);
  }
  static QUIRE_HD Affine read_meta(const std::uint8_t* meta, RowShape) {
    const std::uint32_t bits = load_as<std::uint32_t>(meta);
    const float scale = exact::from_bits(bits & ~15U);
    // kCenter - zp: 2^23 + zp has zp in its low bits.
    const float zero = 0x1p23F + kCenter - exact::from_bits((bits & 15U) | 0x4b000000U);
    return {scale, zero * scale};
  }
  static QUIRE_HD constexpr float unrotate(RowShape shape) { return 1.0F / static_cast<float>(shape.block); }
};

}  // namespace quire::format
