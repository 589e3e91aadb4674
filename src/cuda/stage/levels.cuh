// Turns the codes of rows in shared memory into 16-bit levels: in shared memory for ldmatrix and wgmma, or in registers
// in the order of a matrix operand.
#pragma once

#include <cstdint>

#include "cuda/format/fragment.cuh"
#include "cuda/stage/rows.cuh"

namespace quire::cuda {

// Loads the codes of group g of a part of a row that starts at `at`. `aligned` says that the part starts at a multiple
// of 16 bytes, `first` that the group is the row's first.
template <class F>
__device__ __forceinline__ void load_codes(const std::uint8_t* at, bool aligned, int g, bool first, Codes<F>& codes) {
  constexpr int kWords = Fragment<F>::kWords;
  if constexpr (F::kHistory) codes.before = first ? 0U : std::uint32_t{at[4 * g * kWords - 1]} << 24;
  // The arithmetic is on the pointer itself, so that the compiler still knows that it points to shared memory.
  const unsigned odd = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(at)) & 3U;
  const auto* words = reinterpret_cast<const std::uint32_t*>(at - odd) + g * kWords;
  if (aligned && kWords % 4 == 0) {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(words + w);
      codes.words[w] = four.x;
      codes.words[w + 1] = four.y;
      codes.words[w + 2] = four.z;
      codes.words[w + 3] = four.w;
    }
    return;
  }
  const unsigned shift = odd * 8;
  std::uint32_t low = words[0];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    // The word after the last one is the row's metadata or its padding, so it lies inside the pitch.
    const std::uint32_t high = words[w + 1];
    codes.words[w] = __funnelshift_r(low, high, shift);
    low = high;
  }
}

// Adds the squares of levels, of which the first `elements` count.
template <int kPairs>
__device__ __forceinline__ void add_squares(const std::uint32_t (&pairs)[kPairs], int elements, float* squares) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float2 level = __half22float2(as_half2(pairs[i]));
    if (2 * i < elements) *squares = fmaf(level.x, level.x, fmaf(level.y, level.y, *squares));
  }
}

// The squares of the levels of kPart elements from element `offset` of the row on, which come first at `at`.
template <class F, int kPart>
__device__ __forceinline__ void sum_squares(const std::uint8_t* at, bool aligned, int offset, int head_size,
                                            const Tables<F>& tables, float* squares) {
  constexpr int kElements = Fragment<F>::kElements;
  static_assert(kPart % kElements == 0);
#pragma unroll
  for (int g = 0; g < kPart / kElements; ++g) {
    Codes<F> codes;
    std::uint32_t pairs[kElements / 2];
    load_codes<F>(at, aligned, g, offset == 0 && g == 0, codes);
    convert<F>(codes, tables, pairs);
    add_squares(pairs, head_size - offset - g * kElements, squares);
  }
}

// The places of a row of 16-bit elements, by chunks of 16 bytes.
__device__ __forceinline__ auto row_chunks(std::uint8_t* row) {
  return [row](int chunk) { return row + 16 * chunk; };
}

// Writes the levels of a group to shared memory, 16 bytes at a time to place(0), place(1) and so on. A kLevelNorm
// format adds up their squares, as far as they are among `elements`.
template <class F, class Place>
__device__ __forceinline__ void put_levels(const Codes<F>& codes, const Tables<F>& tables, Place&& place, int elements,
                                           float* squares) {
  constexpr int kElements = Fragment<F>::kElements;
  std::uint32_t pairs[kElements / 2];
  convert<F>(codes, tables, pairs);
  if constexpr (F::kLevelNorm) add_squares(pairs, elements, squares);
#pragma unroll
  for (int i = 0; i < kElements / 8; ++i) {
    *reinterpret_cast<uint4*>(place(i)) =
        make_uint4(pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]);
  }
}

// Writes kPart elements of a raw row, from element `offset` on, which start at `at`, as levels to `to`.
template <class F, int kPart>
__device__ __forceinline__ void convert_part(const std::uint8_t* at, bool aligned, std::uint8_t* to, int offset,
                                             int head_size, const Tables<F>& tables, float* squares) {
  constexpr int kElements = Fragment<F>::kElements;
  static_assert(kPart % kElements == 0);
#pragma unroll
  for (int g = 0; g < kPart / kElements; ++g) {
    Codes<F> codes;
    load_codes<F>(at, aligned, g, offset == 0 && g == 0, codes);
    put_levels<F>(codes, tables, row_chunks(to + 2 * kElements * g), head_size - offset - kElements * g, squares);
  }
}

// Levels to registers in MMA order: operand[s] has the two registers of this lane in step s of a product over 16 k at a
// time. Lane t of a quad holds a group of its own. Which element stands at which k is free as long as the other operand
// is arranged alike: k = 2 t + e + 8 r of step s is element 4 s + 2 r + e of lane t's group.
template <class F>
__device__ __forceinline__ void levels_in_mma_order(const Codes<F>& codes, const Tables<F>& tables,
                                                    std::uint32_t (&operand)[Fragment<F>::kElements / 4][2]) {
  std::uint32_t pairs[Fragment<F>::kElements / 2];
  convert<F>(codes, tables, pairs);
#pragma unroll
  for (int s = 0; s < Fragment<F>::kElements / 4; ++s) {
    operand[s][0] = pairs[2 * s];
    operand[s][1] = pairs[2 * s + 1];
  }
}

}  // namespace quire::cuda
