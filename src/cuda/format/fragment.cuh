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

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/math.cuh"
#include "format/float_cast.h"
#include "format/format.h"

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

// A codebook's levels times this are nearly fp16 values.
template <class F>
inline constexpr float level_unit = 1.0F;

template <class F>
struct Levels16;

// Formats whose rows are used as they lie.
template <class F>
inline constexpr bool kRaw16 = std::is_same_v<F, format::Float16> || std::is_same_v<F, format::BFloat16>;

}  // namespace quire::cuda
