// Conversions between fp32 and the storage floats, by integer arithmetic only, so that host and device agree on every
// bit. Encoding rounds to nearest, ties to even (e4b15: away from zero). Decoding is exact. All functions are
// branch-free selects and vectorize.
//
//            sign exp man  bias  largest  infinities  NaN            on overflow
//   half       1   5   10   15    65504   yes         payload kept   infinity   (a cast)
//   bfloat16   1   8    7  127   3.39e38  yes         payload kept   infinity   (a cast)
//   e4m3fn     1   4    3    7      448   no          0x7f, 0xff     saturates  (NaN stays NaN)
//   e5m2       1   5    2   15    57344   yes         0x7f, 0xff     saturates  (NaN stays NaN)
//   e4b15      1   4    3   15    1.875   no          none           saturates  at 1.75 (NaN becomes 1.75)
//
// e4b15 is Triton's fp8 for GPUs older than sm_89, and encoding gives Triton's bytes: it never writes 0x7f and 0xff,
// which decode to 1.875.
// A NaN's payload is kept as far as it fits, so half -> fp32 -> half and bfloat16 -> fp32 -> bfloat16 return every bit.
#pragma once

#include <cstdint>

#include "format/exact.h"

namespace quire::format {

// The magnitude (bit pattern with the sign cleared) of a finite fp32 value, rounded to a float of kMantissaBits and
// kExponentBias with gradual underflow. The caller has limited it to the target's range.
template <int kMantissaBits, int kExponentBias>
QUIRE_HD std::uint32_t round_magnitude(std::uint32_t magnitude) {
  constexpr int kShift = 23 - kMantissaBits;
  constexpr std::uint32_t kRebias = static_cast<std::uint32_t>(127 - kExponentBias) << 23;
  constexpr std::uint32_t kMinNormal = kRebias + (1U << 23);
  // Normal: drop the low bits; the carry of rounding up may move into the exponent, as it should.
  const std::uint32_t rebased = magnitude - kRebias;
  const std::uint32_t normal = (rebased + ((1U << (kShift - 1)) - 1) + ((rebased >> kShift) & 1U)) >> kShift;
  // Subnormal: adding 2^(23 + exponent of the target's smallest step) makes the FPU round at that step.
  constexpr std::uint32_t kAnchor = static_cast<std::uint32_t>(127 + 24 - kExponentBias - kMantissaBits) << 23;
  const std::uint32_t subnormal = exact::bits_of(exact::from_bits(magnitude) + exact::from_bits(kAnchor)) - kAnchor;
  return magnitude < kMinNormal ? subnormal : normal;
}

// The inverse, for a finite code without its sign.
template <int kMantissaBits, int kExponentBias>
QUIRE_HD std::uint32_t widen_magnitude(std::uint32_t code) {
  constexpr int kShift = 23 - kMantissaBits;
  constexpr std::uint32_t kRebias = static_cast<std::uint32_t>(127 - kExponentBias) << 23;
  constexpr std::uint32_t kAnchor = kRebias + (1U << 23);
  const std::uint32_t normal = (code << kShift) + kRebias;
  const std::uint32_t subnormal =
      exact::bits_of(exact::from_bits((code << kShift) + kAnchor) - exact::from_bits(kAnchor));
  return code < (1U << kMantissaBits) ? subnormal : normal;
}

QUIRE_HD float bfloat16_to_float(std::uint16_t code) {
  return exact::from_bits(static_cast<std::uint32_t>(code) << 16);
}

QUIRE_HD std::uint16_t float_to_bfloat16(float x) {
  const std::uint32_t bits = exact::bits_of(x);
  const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const std::uint32_t nan = (bits >> 16) | ((bits & 0x007f0000U) == 0 ? 0x40U : 0U);
  return static_cast<std::uint16_t>((bits & 0x7fffffffU) > 0x7f800000U ? nan : rounded);
}

QUIRE_HD float half_to_float(std::uint16_t code) {
  const std::uint32_t magnitude = code & 0x7fffU;
#ifdef __CUDA_ARCH__
  // The instruction is exact, but changes NaNs.
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(code));
  const std::uint32_t nan = (static_cast<std::uint32_t>(code & 0x8000U) << 16) | 0x7f800000U | (magnitude << 13);
  return magnitude > 0x7c00U ? exact::from_bits(nan) : value;
#else
  const std::uint32_t special = (magnitude << 13) | 0x7f800000U;
  const std::uint32_t bits = magnitude >= 0x7c00U ? special : widen_magnitude<10, 15>(magnitude);
  return exact::from_bits(bits | (static_cast<std::uint32_t>(code & 0x8000U) << 16));
#endif
}
// For metadata: which NaN a NaN becomes is not said.
QUIRE_HD float half_to_float_any_nan(std::uint16_t code) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(code));
  return value;
#else
  return half_to_float(code);
#endif
}

QUIRE_HD std::uint16_t float_to_half(float x) {
  const std::uint32_t bits = exact::bits_of(x);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  const std::uint32_t payload = (magnitude >> 13) & 0x3ffU;
  const std::uint32_t nan = 0x7c00U | payload | (payload == 0 ? 0x200U : 0U);
#ifdef __CUDA_ARCH__
  std::uint16_t rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(exact::from_bits(magnitude)));
  const std::uint32_t code = magnitude > 0x7f800000U ? nan : rounded;
#else
  const std::uint32_t limited = magnitude < 0x47800000U ? magnitude : 0x47800000U;  // 65536 rounds to infinity
  const std::uint32_t code = magnitude > 0x7f800000U ? nan : round_magnitude<10, 15>(limited);
#endif
  return static_cast<std::uint16_t>(code | ((bits >> 16) & 0x8000U));
}

struct E4M3 {
  static constexpr float kMax = 448.0F;
  static QUIRE_HD std::uint8_t encode(float x) {
    const std::uint32_t bits = exact::bits_of(x);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    std::uint16_t pair;  // the instruction rounds two; it gives every NaN as 0x7f
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0F), "f"(x));
    return static_cast<std::uint8_t>(pair | ((bits >> 24) & 0x80U));
#else
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    const std::uint32_t limited = magnitude < 0x43e00000U ? magnitude : 0x43e00000U;
    const std::uint32_t code = magnitude > 0x7f800000U ? 0x7fU : round_magnitude<3, 7>(limited);
    return static_cast<std::uint8_t>(code | ((bits >> 24) & 0x80U));
#endif
  }
#ifdef __CUDACC__
  // Two codes, `low` in the low byte. A NaN is 0x7f of either sign.
  static __device__ __forceinline__ std::uint32_t encode_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    std::uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return encode(low) | (static_cast<std::uint32_t>(encode(high)) << 8);
#endif
  }
#endif
  static QUIRE_HD float decode(std::uint8_t code) {
    const std::uint32_t magnitude = code & 0x7fU;
    const std::uint32_t bits = magnitude == 0x7fU ? 0x7fc00000U : widen_magnitude<3, 7>(magnitude);
    return exact::from_bits(bits | (static_cast<std::uint32_t>(code & 0x80U) << 24));
  }
};

struct E5M2 {
  static constexpr float kMax = 57344.0F;
  static QUIRE_HD std::uint8_t encode(float x) {
    const std::uint32_t bits = exact::bits_of(x);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    std::uint16_t pair;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0F), "f"(x));
    return static_cast<std::uint8_t>(pair | ((bits >> 24) & 0x80U));
#else
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    const std::uint32_t limited = magnitude < 0x47600000U ? magnitude : 0x47600000U;
    const std::uint32_t code = magnitude > 0x7f800000U ? 0x7fU : round_magnitude<2, 15>(limited);
    return static_cast<std::uint8_t>(code | ((bits >> 24) & 0x80U));
#endif
  }
#ifdef __CUDACC__
  // Two codes, `low` in the low byte. A NaN is 0x7f of either sign.
  static __device__ __forceinline__ std::uint32_t encode_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    std::uint16_t pair;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return encode(low) | (static_cast<std::uint32_t>(encode(high)) << 8);
#endif
  }
#endif
  static QUIRE_HD float decode(std::uint8_t code) {
    return half_to_float(static_cast<std::uint16_t>(static_cast<std::uint16_t>(code) << 8));
  }
};

struct E4B15 {
  static constexpr float kMax = 1.75F;  // the largest value that encode gives
  // Triton goes by way of fp16, rounded toward zero, and then adds half of the step to come. Dropping bits below that
  // half first changes nothing, so one rounding of the fp32 value, ties away from zero, gives the same byte. Of a NaN
  // only the sign is left.
  static QUIRE_HD std::uint8_t encode(float x) {
    const std::uint32_t bits = exact::bits_of(x);
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    const std::uint32_t limited = magnitude < 0x3fe00000U ? magnitude : 0x3fe00000U;
    constexpr int kShift = 23 - 3;
    constexpr std::uint32_t kRebias = static_cast<std::uint32_t>(127 - 15) << 23;
    const std::uint32_t normal = (limited - kRebias + (1U << (kShift - 1))) >> kShift;
    const std::uint32_t subnormal = exact::round_half_away_nonnegative(exact::from_bits(limited) * 0x1p17F);
    const std::uint32_t code = limited < kRebias + (1U << 23) ? subnormal : normal;
    return static_cast<std::uint8_t>(code | ((bits >> 24) & 0x80U));
  }
  static QUIRE_HD float decode(std::uint8_t code) {
    return exact::from_bits(widen_magnitude<3, 15>(code & 0x7fU) | (static_cast<std::uint32_t>(code & 0x80U) << 24));
  }
};

}  // namespace quire::format
