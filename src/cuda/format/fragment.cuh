// Fragment<F> turns the codes of a group of elements, already in registers, into packed pairs of 16-bit levels for the
// tensor cores. bfloat16 and float16 caches are used as they lie (kRaw16); every other format comes through here.
//
//   kElements                The elements of a group: 32, or as many as fill whole words.
//   kWords                   The 32-bit words that hold their codes.
//   Tables                   Optional: what the kernels keep in shared memory for convert; fill(tables, thread,
//                            num_threads) writes it.
//   convert(words, pairs)    Writes elements 2 i and 2 i + 1, times level_unit<F>, to pairs[i]. Words past the end of
//                            the row may hold anything. A format with kHistory takes the byte before the words too,
//                            and one with Tables takes these: (words, before, tables, pairs).
//
// The primary template is built on the format's own unpack, so one header is enough for a format. Its levels should be
// fp16 values; a level that is not is rounded, by at most 2^-11 of it. A specialization, in the format's file of this
// folder, gives the same pairs in fewer instructions. fp16 holds every level of the integer and fp8 formats exactly;
// the levels of codebooks are scaled first, by a unit that brings all of them next to fp16 values.
//
// A small integer n becomes fp16 when it is placed in the mantissa of 1024 (0x6400 + n is 1024 + n) and 1024 is
// subtracted. Codebooks of 4 or 8 levels are looked up four codes at a time by byte permutes, low and high bytes apart.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/ptx/math.cuh"
#include "format/float_cast.h"
#include "format/format.h"

namespace quire::cuda {

__device__ __forceinline__ std::uint32_t pair_bits(__half2 pair) { return *reinterpret_cast<std::uint32_t*>(&pair); }
__device__ __forceinline__ __half2 as_half2(std::uint32_t bits) { return *reinterpret_cast<__half2*>(&bits); }

// Turns each byte n of `bytes` into 1024 + n less `bias`, which is 1024 plus the code of level 0: pairs[0] has the low
// two bytes, pairs[1] the high two.
__device__ __forceinline__ void bytes_to_pairs(std::uint32_t bytes, std::uint32_t bias, std::uint32_t* pairs) {
  constexpr std::uint32_t kHigh = 0x64646464U;
  pairs[0] = pair_bits(__hsub2(as_half2(ptx::permute(bytes, kHigh, 0x4140U)), as_half2(bias)));
  pairs[1] = pair_bits(__hsub2(as_half2(ptx::permute(bytes, kHigh, 0x4342U)), as_half2(bias)));
}

// Eight fp16 levels, as a table of their low bytes and one of their high bytes.
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

  // Looks up four levels by the low four nibbles of `selector`, each of which is below 8.
  __device__ __forceinline__ void look_up(std::uint32_t selector, std::uint32_t* pairs) const {
    const std::uint32_t lows = ptx::permute(low[0], low[1], selector);
    const std::uint32_t highs = ptx::permute(high[0], high[1], selector);
    pairs[0] = ptx::permute(lows, highs, 0x5140U);
    pairs[1] = ptx::permute(lows, highs, 0x7362U);
  }
};

// The fp16 bits of x, at compile time, for 2^-14 <= |x| < 65504; ties go to even.
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

// The levels of a codebook, times this unit, are nearly fp16 values.
template <class F>
inline constexpr float level_unit = 1.0F;

// The smallest group of 32, 64, 128 and so on elements that fills whole packs and whole words.
template <class F>
constexpr int group_elements() {
  int elements = 32;
  while (elements % F::kUnit != 0 || elements / F::kUnit * F::kUnitBytes % 4 != 0) elements *= 2;
  return elements;
}

template <class F>
struct Fragment {
  static constexpr int kElements = group_elements<F>();
  static constexpr int kWords = kElements / F::kUnit * F::kUnitBytes / 4;

  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], std::uint32_t before,
                                                 std::uint32_t (&pairs)[kElements / 2]) {
    // The byte before the codes is there for units that see it.
    std::uint8_t bytes[4 + 4 * kWords];
    memcpy(bytes, &before, 4);
    memcpy(bytes + 4, words, sizeof(words));
    float level[kElements];
#pragma unroll
    for (int u = 0; u < kElements / F::kUnit; ++u) F::unpack(bytes + 4 + u * F::kUnitBytes, level + u * F::kUnit);
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) {
      pairs[i] = pair_bits(__floats2half2_rn(level[2 * i] * level_unit<F>, level[2 * i + 1] * level_unit<F>));
    }
  }
};

// The tables in shared memory that a format's fragments use.
struct NoTables {};
template <class F>
struct FragmentTables {
  using Type = NoTables;
  static __device__ __forceinline__ void fill(NoTables&, int, int) {}
};
template <class F>
requires requires { typename Fragment<F>::Tables; }
struct FragmentTables<F> {
  using Type = typename Fragment<F>::Tables;
  static __device__ __forceinline__ void fill(Type& tables, int thread, int num_threads) {
    Fragment<F>::fill(tables, thread, num_threads);
  }
};
template <class F>
using Tables = typename FragmentTables<F>::Type;

// The codes of one group.
template <class F>
struct Codes {
  std::uint32_t words[Fragment<F>::kWords];
  std::uint32_t before;  // for kHistory: its last byte is the one before the codes, 0 at the start of the row
};

template <class F>
__device__ __forceinline__ void convert(const Codes<F>& codes, const Tables<F>& tables,
                                        std::uint32_t (&pairs)[Fragment<F>::kElements / 2]) {
  if constexpr (requires { Fragment<F>::convert(codes.words, pairs); }) {
    Fragment<F>::convert(codes.words, pairs);
  } else if constexpr (requires { Fragment<F>::convert(codes.words, codes.before, pairs); }) {
    Fragment<F>::convert(codes.words, codes.before, pairs);
  } else {
    Fragment<F>::convert(codes.words, codes.before, tables, pairs);
  }
}

// Formats whose rows are used as they lie.
template <class F>
inline constexpr bool kRaw16 = std::is_same_v<F, format::Float16> || std::is_same_v<F, format::BFloat16>;

}  // namespace quire::cuda
