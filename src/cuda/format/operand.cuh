// Turns codes in registers into the first operand of m16n8k16 with keys on its rows (softmax/orientation.cuh, KeysOnM),
// which is what decode_pages asks of a format. Nothing goes through shared memory. The order of elements is free,
// because the other operand is arranged alike.
//
// K: lane t of a quad holds pieces of kElements neighbouring elements of a row. KeyOperand<F> has
//
//   convert(words, table, lane4, pairs)   The piece's elements, two in each of kElements / 2 registers, for each of
//                                   kPlanes. `table` is kTableBytes of shared memory that fill() has written.
//   element(pair, half)             Which element of the piece that is.
//   weight(pair)                    A power of two by which the pair is too large.
//
//   level = sum over planes of plane(p) * pair / weight - kBias
//
// V: lane g = lane / 4 holds pieces of kElements neighbouring elements of a row, of tokens a and b. ValueOperand<F> has
//
//   convert(a, b, values)           values[p][n] = (element n of a, element n of b), for each of kPlanes.
//   weight(n)                       A power of two by which that is too large.
//   kCenter                         Is taken from every code, but later: as kCenter times the sum of the weights.
//
//   level = kScale * sum over planes of plane(p) * value / weight - kCenter - kBias
//
// The primary templates are built on Fragment<F>, so every format has both; a specialization needs fewer instructions.
// An integer n below 1024 in the low bits of fp16 is exactly n 2^-24, which the tensor cores multiply at full speed, so
// one mask is the whole conversion. kBias corrects what such codes add to the level of a key. In a value that excess
// would grow with the sum over all keys and cost bits, so it is kCenter, which is taken away every few slices. int2's
// bits are so small that it needs no kCenter.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/format/fragment.cuh"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/math.cuh"
#include "format/format.h"

namespace quire::cuda {

template <class F>
inline constexpr int kCodeBits = 8 * F::kUnitBytes / F::kUnit;

// How a row of kHead elements is cut among kLanes lanes: into pieces of at most 16 bytes, where piece i belongs to lane
// i % kLanes.
template <class F, int kHead, int kLanes>
struct Pieces {
  static constexpr int largest() {
    int elements = 8;
    while (2 * elements <= kHead / kLanes && 2 * elements * kCodeBits<F> <= 128 && elements < 32) elements *= 2;
    return elements;
  }
  static constexpr int kElements = largest();
  static constexpr int kCount = kHead / (kLanes * kElements);
  static constexpr int kBytes = kElements * kCodeBits<F> / 8;
  static constexpr int kWords = (kBytes + 3) / 4;
};

// Whether a format can be read in pieces: its codes fill whole words at 32 elements, and its units do not see one
// another.
template <class F>
constexpr bool has_pieces() {
  if constexpr (kRaw16<F>) return true;
  if constexpr (!kRaw16<F>) {
    return Fragment<F>::kElements == 32 && 8 % F::kUnit == 0 && !F::kHistory && std::is_same_v<Tables<F>, NoTables> &&
           !std::is_same_v<F, format::Float32>;
  }
}

// The levels of a piece, as pairs in the order of elements.
template <class F, int kElements, int kWords>
__device__ __forceinline__ void piece_levels(const std::uint32_t (&words)[kWords],
                                             std::uint32_t (&pairs)[kElements / 2]) {
  if constexpr (kRaw16<F>) {
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) pairs[i] = words[i];
  } else {
    Codes<F> codes{};
#pragma unroll
    for (int w = 0; w < kWords; ++w) codes.words[w] = words[w];
    std::uint32_t all[16];
    convert<F>(codes, NoTables{}, all);
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) pairs[i] = all[i];
  }
}

struct NoOperandTable {
  static constexpr int kTableBytes = 0;
  static __device__ __forceinline__ void fill(std::uint8_t*, int, int) {}
};

template <class F>
struct KeyOperand : NoOperandTable {
  static constexpr int kPlanes = 1;
  static constexpr float kBias = 0.0F;
  static constexpr float plane(int) { return 1.0F / level_unit<F>; }
  static constexpr int element(int pair, int half) { return 2 * pair + half; }
  static constexpr float weight(int) { return 1.0F; }
  template <int kElements, int kWords>
  static __device__ __forceinline__ void convert(const std::uint32_t (&words)[kWords], const std::uint8_t*,
                                                 std::uint32_t, std::uint32_t (&pairs)[1][kElements / 2]) {
    piece_levels<F, kElements>(words, pairs[0]);
  }
};

template <class F>
struct ValueOperand {
  static constexpr int kPlanes = 1;
  static constexpr float kBias = 0.0F, kScale = 1.0F / level_unit<F>;
  static constexpr int kCenter = 0;
  static constexpr float plane(int) { return 1.0F; }
  static constexpr float weight(int) { return 1.0F; }
  template <int kElements, int kWords>
  static __device__ __forceinline__ void convert(const std::uint32_t (&a)[kWords], const std::uint32_t (&b)[kWords],
                                                 std::uint32_t (&values)[1][kElements]) {
    std::uint32_t of_a[kElements / 2], of_b[kElements / 2];
    piece_levels<F, kElements>(a, of_a);
    piece_levels<F, kElements>(b, of_b);
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) {
      values[0][2 * i] = ptx::permute(of_a[i], of_b[i], 0x5410U);
      values[0][2 * i + 1] = ptx::permute(of_a[i], of_b[i], 0x7632U);
    }
  }
};

// The integers below 1024 in the bits that `mask` selects of a pair, plus 1024, as fp16.
__device__ __forceinline__ std::uint32_t plus_1024(std::uint32_t bits, std::uint32_t mask) {
  return ptx::and_or(bits, mask, 0x64006400U);
}

// Loads kBytes bytes from an address of shared memory; words past the piece hold anything. kAccess is a power of two
// from 2 to 16 that divides the address of every row.
template <int kBytes, int kAccess>
__device__ __forceinline__ void load_piece(std::uint32_t at, std::uint32_t (&words)[(kBytes + 3) / 4]) {
  constexpr int kWords = (kBytes + 3) / 4;
  if constexpr (kAccess >= 16 && kBytes % 16 == 0) {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) ptx::load_shared_128(at + 4 * w, words + w);
  } else if constexpr (kAccess >= 8 && kBytes % 8 == 0) {
#pragma unroll
    for (int w = 0; w < kWords; w += 2) ptx::load_shared_64(at + 4 * w, words + w);
  } else if constexpr (kAccess >= 4 && kBytes % 4 == 0) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = ptx::load_shared_32(at + 4 * w);
  } else if constexpr (kBytes == 2) {
    words[0] = ptx::load_shared_16(at);
  } else {
    // A piece of an odd number of bytes may start at any address, any other at even ones.
    constexpr int kLoads = (kBytes + (kBytes % 2 == 0 ? 2 : 3) + 3) / 4;
    const std::uint32_t shift = (at & 3U) * 8;
    at &= ~3U;
    std::uint32_t raw[kWords + 1] = {};
#pragma unroll
    for (int w = 0; w < kLoads; ++w) raw[w] = ptx::load_shared_32(at + 4 * w);
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = __funnelshift_r(raw[w], raw[w + 1], shift);
  }
}

}  // namespace quire::cuda
