// Codes to 16-bit levels for the tensor cores, a fragment loader per format: Levels16<F> turns the codes of 32
// elements, already in registers, into 16 packed pairs. fp16 holds every level of the integer and fp8 formats exactly;
// codebook levels are scaled first, by a unit chosen so that all of them lie next to fp16 values (errors below).
// bfloat16 caches stay bfloat16.
//
//   Levels16<F>::kWords                                32-bit words that hold 32 elements' codes
//   Levels16<F>::convert(words, pairs)                 elements 2 i and 2 i + 1 in pairs[i]
//   level_unit<F>                                      what is written is level * level_unit<F>
//
// Small integers become fp16 by placing them in the mantissa of 1024 (0x6400 + n = 1024 + n) and subtracting; codebooks
// of 4 or 8 levels are looked up four at a time by byte permutes, low and high bytes apart.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "cuda/ptx.cuh"
#include "format/formats.h"
#include "format/turboquant.h"

namespace quire::cuda {

__device__ __forceinline__ std::uint32_t pair_bits(__half2 pair) { return *reinterpret_cast<std::uint32_t*>(&pair); }
__device__ __forceinline__ __half2 as_half2(std::uint32_t bits) { return *reinterpret_cast<__half2*>(&bits); }

// 1024 + n for the bytes n of `bytes`: the low two, then the high two; less `bias` (1024 + the code of level 0).
__device__ __forceinline__ void bytes_to_pairs(std::uint32_t bytes, std::uint32_t bias, std::uint32_t* pairs) {
  constexpr std::uint32_t kHigh = 0x64646464U;
  pairs[0] = pair_bits(__hsub2(as_half2(ptx::permute(bytes, kHigh, 0x4140U)), as_half2(bias)));
  pairs[1] = pair_bits(__hsub2(as_half2(ptx::permute(bytes, kHigh, 0x4342U)), as_half2(bias)));
}

// Eight fp16 levels as two tables of bytes.
struct ByteTables {
  std::uint32_t low[2], high[2];

  template <class Level>
  static constexpr ByteTables make(Level level, int count) {
    ByteTables tables{};
    for (int i = 0; i < count; ++i) {
      const std::uint32_t code = level(i);
      tables.low[i / 4] |= (code & 0xffU) << (8 * (i % 4));
      tables.high[i / 4] |= (code >> 8) << (8 * (i % 4));
    }
    return tables;
  }

  // Four levels by the four nibbles of `selector` (each below 8).
  __device__ __forceinline__ void look_up(std::uint32_t selector, std::uint32_t* pairs) const {
    const std::uint32_t lows = ptx::permute(low[0], low[1], selector);
    const std::uint32_t highs = ptx::permute(high[0], high[1], selector);
    pairs[0] = ptx::permute(lows, highs, 0x5140U);
    pairs[1] = ptx::permute(lows, highs, 0x7362U);
  }
};

// fp16 bits of x, at compile time: 2^-14 <= |x| < 65504, ties to even.
constexpr std::uint32_t constant_half(float x) {
  std::uint32_t sign = 0;
  double magnitude = x;
  if (magnitude < 0) {
    sign = 0x8000U;
    magnitude = -magnitude;
  }
  int exponent = 15;
  while (magnitude >= 2.0) {
    magnitude /= 2.0;
    ++exponent;
  }
  while (magnitude < 1.0) {
    magnitude *= 2.0;
    --exponent;
  }
  const double steps = (magnitude - 1.0) * 1024.0;
  auto whole = static_cast<std::uint32_t>(steps);
  const double rest = steps - whole;
  if (rest > 0.5 || (rest == 0.5 && whole % 2 == 1)) ++whole;
  return sign + (static_cast<std::uint32_t>(exponent) << 10) + whole;
}

// A codebook's levels times this are nearly fp16 values: largest relative error 6e-8 (int2), 2.5e-5 (3 bits), 7.4e-5
// (4 bits), against 3e-4 without. Found by trying two million units in [1, 2).
template <class F>
inline constexpr float level_unit = 1.0F;
template <>
inline constexpr float level_unit<format::Int2PerTokenHead> = 1.525879F;
template <>
inline constexpr float level_unit<format::TurboQuantK3> = 1.260678F;
template <>
inline constexpr float level_unit<format::TurboQuantK4> = 1.7335825F;

template <class F>
struct Levels16;

template <>
struct Levels16<format::Int8PerTokenHead> {
  static constexpr int kWords = 8;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) bytes_to_pairs(words[w] ^ 0x80808080U, 0x64806480U, pairs + 2 * w);
  }
};

struct LevelsE4M3 {
  static constexpr int kWords = 8;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      pairs[2 * w] = pair_bits(
          __half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(words[w] & 0xffffU), __NV_E4M3)));
      pairs[2 * w + 1] =
          pair_bits(__half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(words[w] >> 16), __NV_E4M3)));
    }
  }
};
template <>
struct Levels16<format::Fp8PerTensor> : LevelsE4M3 {};
template <>
struct Levels16<format::Fp8PerTokenHead> : LevelsE4M3 {};
template <>
struct Levels16<format::TurboQuantK8> : LevelsE4M3 {};

// The high byte of fp16.
template <>
struct Levels16<format::Fp8E5M2PerTensor> {
  static constexpr int kWords = 8;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      pairs[2 * w] = ptx::permute(words[w], 0U, 0x1404U);
      pairs[2 * w + 1] = ptx::permute(words[w], 0U, 0x3424U);
    }
  }
};

// e4b15 is fp16 with three mantissa bits and no exponents above 1: sign, then 7 bits below the top exponent bit.
template <>
struct Levels16<format::TurboQuantK8E4B15> {
  static constexpr int kWords = 8;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t codes = ptx::permute(words[w], 0U, half == 0 ? 0x1404U : 0x3424U);  // code << 8
        pairs[2 * w + half] = (codes & 0x80008000U) | ((codes & 0x7f007f00U) >> 1);
      }
    }
  }
};

// Nibbles, low first: codes of a word to the bytes of two words, in element order.
__device__ __forceinline__ void nibbles_to_pairs(std::uint32_t word, std::uint32_t bias, std::uint32_t* pairs) {
  const std::uint32_t even = word & 0x0f0f0f0fU;
  const std::uint32_t odd = (word >> 4) & 0x0f0f0f0fU;
  bytes_to_pairs(ptx::permute(even, odd, 0x5140U), bias, pairs);
  bytes_to_pairs(ptx::permute(even, odd, 0x7362U), bias, pairs + 2);
}

struct LevelsNibble {
  static constexpr int kWords = 4;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) nibbles_to_pairs(words[w], 0x64086408U, pairs + 4 * w);  // level = code - 8
  }
};
template <>
struct Levels16<format::Int4PerTokenHead> : LevelsNibble {};
template <>
struct Levels16<format::TurboQuantV4> : LevelsNibble {};

// Four 2-bit codes to four nibbles.
template <>
struct Levels16<format::Int2PerTokenHead> {
  static constexpr int kWords = 2;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
    using F = format::Int2PerTokenHead;
    constexpr ByteTables kTables = ByteTables::make(
        [](int code) {
          const float magnitude = code == 0 || code == 3 ? F::kOuter : F::kInner;
          return constant_half((code >= 2 ? magnitude : -magnitude) * level_unit<F>);
        },
        4);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        std::uint32_t x = half == 0 ? words[w] & 0xffffU : words[w] >> 16;
        x = (x | (x << 8)) & 0x00ff00ffU;
        x = (x | (x << 4)) & 0x0f0f0f0fU;
        x = (x | (x << 2)) & 0x33333333U;
        kTables.look_up(x, pairs + 8 * w + 4 * half);
        kTables.look_up(x >> 16, pairs + 8 * w + 4 * half + 2);
      }
    }
  }
};

// Eight 3-bit codes (the low 24 bits) to eight nibbles.
__device__ __forceinline__ std::uint32_t spread_3_to_4(std::uint32_t codes) {
  std::uint32_t x = (codes & 0xfffU) | ((codes & 0xfff000U) << 4);
  x = (x & 0x003f003fU) | ((x & 0x0fc00fc0U) << 2);
  return (x & 0x07070707U) | ((x & 0x38383838U) << 1);
}

// The 24 bits of eight codes, `group` of 32 elements' three words.
__device__ __forceinline__ std::uint32_t three_bytes(const std::uint32_t (&words)[3], int group) {
  switch (group) {
    case 0:
      return words[0];
    case 1:
      return __funnelshift_r(words[0], words[1], 24);
    case 2:
      return __funnelshift_r(words[1], words[2], 16);
    default:
      return words[2] >> 8;
  }
}

template <>
struct Levels16<format::TurboQuantK3> {
  static constexpr int kWords = 3;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
    constexpr ByteTables kTables = ByteTables::make(
        [](int code) { return constant_half(format::centroid<3>(code) * level_unit<format::TurboQuantK3>); }, 8);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const std::uint32_t nibbles = spread_3_to_4(three_bytes(words, g));
      kTables.look_up(nibbles, pairs + 4 * g);
      kTables.look_up(nibbles >> 16, pairs + 4 * g + 2);
    }
  }
};

template <>
struct Levels16<format::TurboQuantV3> {
  static constexpr int kWords = 3;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      nibbles_to_pairs(spread_3_to_4(three_bytes(words, g)), 0x64046404U, pairs + 4 * g);  // level = code - 4
    }
  }
};

// Sixteen centroids, symmetric: the magnitude is looked up, the sign set apart.
template <>
struct Levels16<format::TurboQuantK4> {
  static constexpr int kWords = 4;
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t (&pairs)[16]) {
    constexpr ByteTables kTables = ByteTables::make(
        [](int i) { return constant_half(format::Codebook<4>::positive(i) * level_unit<format::TurboQuantK4>); }, 8);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      // Codes below 8 are negative and count downwards.
      const std::uint32_t negative = ~words[w] & 0x88888888U;
      const std::uint32_t magnitude = (words[w] ^ ((negative >> 3) * 7U)) & 0x77777777U;
      kTables.look_up(magnitude, pairs + 4 * w);
      kTables.look_up(magnitude >> 16, pairs + 4 * w + 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t signs = negative >> (8 * i);
        pairs[4 * w + i] ^= ((signs & 0x8U) << 12) | ((signs & 0x80U) << 24);
      }
    }
  }
};

// Formats whose rows are used as they lie.
template <class F>
inline constexpr bool kRaw16 = std::is_same_v<F, format::Float16> || std::is_same_v<F, format::BFloat16>;

// Formats the tensor-core kernels read.
template <class F>
inline constexpr bool kHasLevels16 = !std::is_same_v<F, format::Float32>;

}  // namespace quire::cuda
