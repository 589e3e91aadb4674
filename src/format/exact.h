// Arithmetic that decides stored bytes. Everything here, and everything in src/format, is plain IEEE fp32 with one
// rounding per written operation: no fused multiply-add (the build turns contraction off), no fast-math, no
// transcendental functions. Under those rules scalar code, auto-vectorized code and CUDA produce the same bits.
//
// Comparisons are written so that a NaN takes a known branch; each function says which.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define QUIRE_HD __host__ __device__ __forceinline__
#else
#define QUIRE_HD inline __attribute__((always_inline))
#endif

namespace quire::exact {

QUIRE_HD std::uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  return std::bit_cast<std::uint32_t>(x);
#endif
}

QUIRE_HD float from_bits(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

QUIRE_HD float quiet_nan() { return from_bits(0x7fc00000U); }

// Neither infinite nor NaN.
QUIRE_HD bool is_finite(float x) { return (bits_of(x) & 0x7f800000U) != 0x7f800000U; }

QUIRE_HD float abs(float x) { return from_bits(bits_of(x) & 0x7fffffffU); }

// A NaN in either place gives b.
QUIRE_HD float min(float a, float b) { return a < b ? a : b; }
QUIRE_HD float max(float a, float b) { return a > b ? a : b; }

// x limited to [lo, hi]; NaN becomes lo.
QUIRE_HD float clamp(float x, float lo, float hi) { return min(max(x, lo), hi); }

// Nearest integer, ties to even, for |x| <= 2^22: adding 1.5 * 2^23 leaves no fraction bits, so the add rounds.
QUIRE_HD float round_half_even(float x) {
  const float magic = 12582912.0F;
  return (x + magic) - magic;
}

// Nearest integer, ties away from zero, for |x| < 2^31. The fraction is exact, so 0.49999997 rounds to 0.
QUIRE_HD float round_half_away(float x) {
  const float whole = static_cast<float>(static_cast<std::int32_t>(x));
  const float fraction = x - whole;
  return whole + (fraction >= 0.5F ? 1.0F : 0.0F) - (fraction <= -0.5F ? 1.0F : 0.0F);
}

// Correctly rounded on every target (CUDA: sqrt.rn).
QUIRE_HD float sqrt(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

QUIRE_HD float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

}  // namespace quire::exact
