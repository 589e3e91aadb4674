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

// x, or NaN where x is infinite. x * 0 is a zero of x's sign, or NaN.
QUIRE_HD float nan_unless_finite(float x) {
#ifdef __CUDA_ARCH__
  return fmaf(x, 0.0F, x);
#else
  return x * 0.0F + x;
#endif
}

QUIRE_HD float abs(float x) { return from_bits(bits_of(x) & 0x7fffffffU); }

// A NaN in either place gives b.
QUIRE_HD float min(float a, float b) { return a < b ? a : b; }
QUIRE_HD float max(float a, float b) { return a > b ? a : b; }

// A NaN in either place gives NaN (of any payload). Of zeros with different signs it gives either, so that the order
// in which a row is reduced does not matter: what is stored must not depend on the sign of that zero.
QUIRE_HD float min_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a < b || a != a ? a : b;
#endif
}
QUIRE_HD float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b || a != a ? a : b;
#endif
}

// Limits x to [lo, hi], where hi > 0. A NaN becomes lo.
QUIRE_HD float clamp(float x, float lo, float hi) {
#ifdef __CUDA_ARCH__
  return fminf(fmaxf(x, lo), hi);  // of a NaN and a number the number; fmaxf(-0, 0) is 0
#else
  return min(max(x, lo), hi);
#endif
}

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

// The integer part of 0 <= x < 2^23.
QUIRE_HD std::uint32_t truncate_nonnegative(float x) {
#ifdef __CUDA_ARCH__
  return bits_of(__fadd_rz(x, 8388608.0F)) & 0xffffffU;  // faster than the conversion; 2^23 leaves no fraction bits
#else
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(x));
#endif
}

// round_half_away for 0 <= x < 2^22, as an integer.
QUIRE_HD std::uint32_t round_half_away_nonnegative(float x) {
#ifdef __CUDA_ARCH__
  return truncate_nonnegative(__fadd_rz(x, 0.5F));  // toward zero: reaches an integer only where the exact sum does
#else
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(round_half_away(x)));
#endif
}

// Nearest integer of [-128, 127], ties to even; NaN gives 0.
QUIRE_HD std::int32_t round_to_int8(float x) {
#ifdef __CUDA_ARCH__
  std::int32_t code;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(code) : "f"(x));
  return code;
#else
  return static_cast<std::int32_t>(round_half_even(clamp(x == x ? x : 0.0F, -128.0F, 127.0F)));
#endif
}

// low + high * 2^shift, modulo 2^32: packs codes. (Left to itself nvcc packs bytes in 8-bit arithmetic, three
// instructions instead of one.)
template <int kShift>
QUIRE_HD std::uint32_t join(std::uint32_t low, std::uint32_t high) {
#ifdef __CUDA_ARCH__
  std::uint32_t sum;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(high), "n"(1 << kShift), "r"(low));
  return sum;
#else
  return low + (high << kShift);
#endif
}

// Correctly rounded on every target (CUDA: sqrt.rn).
QUIRE_HD float sqrt(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

QUIRE_HD float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __frcp_rn(x);
#else
  return 1.0F / x;
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
