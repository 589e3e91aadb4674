// Codes of rows in shared memory to 16-bit levels.
#pragma once

#include <cstdint>

#include "cuda/format/fragment.cuh"
#include "cuda/stage/rows.cuh"

namespace quire::cuda {

// The codes of 32 elements, group g of a part that starts at `at`; `aligned`: the part starts at a multiple of 16
// bytes.
template <class F>
__device__ __forceinline__ void load_codes(const std::uint8_t* at, bool aligned, int g,
                                           std::uint32_t (&codes)[Levels16<F>::kWords]) {
  constexpr int kWords = Levels16<F>::kWords;
  // Arithmetic on the pointer itself, so that the compiler still knows it is shared memory.
  const unsigned odd = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(at)) & 3U;
  const auto* words = reinterpret_cast<const std::uint32_t*>(at - odd) + g * kWords;
  if (aligned && kWords % 4 == 0) {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(words + w);
      codes[w] = four.x;
      codes[w + 1] = four.y;
      codes[w + 2] = four.z;
      codes[w + 3] = four.w;
    }
    return;
  }
  const unsigned shift = odd * 8;
  std::uint32_t low = words[0];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    // The word after the last one is the row's metadata or its padding: inside the pitch.
    const std::uint32_t high = words[w + 1];
    codes[w] = __funnelshift_r(low, high, shift);
    low = high;
  }
}

// Adds the squares of 32 levels, of which `elements` count.
__device__ __forceinline__ void add_squares(const std::uint32_t (&pairs)[16], int elements, float* squares) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float2 level = __half22float2(as_half2(pairs[i]));
    if (2 * i < elements) *squares = fmaf(level.x, level.x, fmaf(level.y, level.y, *squares));
  }
}

template <class F, int kGroups>
__device__ __forceinline__ void sum_squares(const std::uint8_t* at, bool aligned, int elements, float* squares) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    std::uint32_t codes[Levels16<F>::kWords], pairs[16];
    load_codes<F>(at, aligned, g, codes);
    Levels16<F>::convert(codes, pairs);
    add_squares(pairs, elements - g * 32, squares);
  }
}

// A row of 16-bit elements, by chunks of 16 bytes.
__device__ __forceinline__ auto row_chunks(std::uint8_t* row) {
  return [row](int chunk) { return row + 16 * chunk; };
}

// 32 elements as 16-bit levels, 16 bytes at a time to place(0) .. place(3); a kLevelNorm format adds their squares, as
// far as they are among `elements`.
template <class F, class Place>
__device__ __forceinline__ void put_levels(const std::uint32_t (&codes)[Levels16<F>::kWords], Place&& place,
                                           int elements, float* squares) {
  std::uint32_t pairs[16];
  Levels16<F>::convert(codes, pairs);
  if constexpr (F::kLevelNorm) add_squares(pairs, elements, squares);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<uint4*>(place(i)) =
        make_uint4(pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]);
  }
}

// 32 kGroups elements of a raw row from `at` on as levels to `to`.
template <class F, int kGroups>
__device__ __forceinline__ void convert_part(const std::uint8_t* at, bool aligned, std::uint8_t* to, int elements,
                                             float* squares) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    std::uint32_t codes[Levels16<F>::kWords];
    load_codes<F>(at, aligned, g, codes);
    put_levels<F>(codes, row_chunks(to + 64 * g), elements - 32 * g, squares);
  }
}

}  // namespace quire::cuda
