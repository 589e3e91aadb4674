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
#include "format/lane.h"

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
  static QUIRE_HD Encoder finish(Stats stats, RowShape, float) {
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
#ifdef __CUDACC__
  // Without the clamp a code is floor(step + 0.5): 2^22 + 0.5, added toward zero, leaves it in bits 1 to 4 of the sum,
  // above a bit of fraction. Rows that need the clamp (the extremes round outwards, or an element is not finite) get
  // their steps clamped beforehand, as elements of a row of scale 1.
  template <int kN>
  static __device__ __forceinline__ void pack_lane(Encoder encoder, float (&y)[kN], std::uint8_t* bytes) {
    if (!encoder.in_range) {
#pragma unroll
      for (int j = 0; j < kN; ++j) y[j] = exact::clamp(step(encoder, y[j]), 0.0F, 15.0F);
      encoder.inverse = 1.0F;
      encoder.zero = 0.0F;
    }
#pragma unroll
    for (int first = 0; first < kN; first += 8) {
      std::uint32_t sum[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        // Four sums, a byte apart, add up to their codes: this bias of the second takes away what 2^22 leaves in all.
        const std::uint32_t bias = j / 2 == 1 ? 0x358000U : 0U;
        sum[j] = exact::bits_of(__fadd_rz(step(encoder, y[first + j]), exact::from_bits(0x4a800001U + bias)));
      }
      const std::uint32_t even = lane::join_all<8>(sum[0], sum[2], sum[4], sum[6]);
      const std::uint32_t odd = lane::join_all<8>(sum[1], sum[3], sum[5], sum[7]);
      store_as(bytes + first / 2, lane::select_bits(0x0f0f0f0fU, even >> 1, odd << 3));
    }
  }
#endif
  static QUIRE_HD void unpack(const std::uint8_t* bytes, float* level) {
    level[0] = static_cast<float>(static_cast<std::int32_t>(*bytes & 15U) - kCenter);
    level[1] = static_cast<float>(static_cast<std::int32_t>(*bytes >> 4) - kCenter);
  }
  static QUIRE_HD Affine read_meta(const std::uint8_t* meta, RowShape) {
    const std::uint32_t bits = load_as<std::uint32_t>(meta);
    const float scale = exact::from_bits(bits & ~15U);
    return {scale, static_cast<float>(kCenter - static_cast<std::int32_t>(bits & 15U)) * scale};
  }
  static QUIRE_HD constexpr float unrotate(RowShape shape) { return 1.0F / static_cast<float>(shape.block); }
};

}  // namespace quire::format
