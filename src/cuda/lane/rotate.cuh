// The rotations of format/rotation.h on a row over lanes. Butterflies h < kChunk are between registers of a lane, the
// next ones a shuffle with lane l ^ (h / kChunk), and then, in a chunked map, they are between registers again.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>

#include "cuda/lane/map.cuh"
#include "format/format.h"

namespace quire::cuda {

// format::rht_sign_word of every block size 2^n, in constant memory: a table inside a function would be built on each
// thread's stack.
struct SignWords {
  std::uint32_t words[10][format::kMaxHeadSize / 32];
};
__constant__ constexpr SignWords kSignWords = [] {
  static_assert(format::kMaxHeadSize == 1 << 9);
  SignWords table{};
  for (int n = 0; n < 10; ++n) {
    for (int w = 0; w < format::kMaxHeadSize / 32; ++w) table.words[n][w] = format::rht_sign_word(w, 1 << n);
  }
  return table;
}();

// The signs of an exact map, whose row is one block, as a mask for each pair of 16-bit elements.
__device__ constexpr std::array<std::uint32_t, format::kMaxHeadSize / 2> kPairSigns = [] {
  std::array<std::uint32_t, format::kMaxHeadSize / 2> masks{};
  for (int i = 0; i < format::kMaxHeadSize; ++i) {
    if ((format::rht_sign_word(i / 32, format::kMaxHeadSize) >> (i % 32)) & 1U)
      masks[i / 2] |= i % 2 == 0 ? 0x8000U : 0x80000000U;
  }
  return masks;
}();

template <class Map>
__device__ __forceinline__ void flip_signs(float (&y)[Map::kElements], int lane, int block) {
  constexpr int kE = Map::kElements;
  const int first = lane * kE;
  const std::uint32_t word = kSignWords.words[__ffs(block) - 1][first / 32] >> (first % 32);
#pragma unroll
  for (int j = 0; j < kE; ++j) y[j] = format::apply_sign(y[j], word, j);
}

// Brings a lane's signs into the constant cache. A kernel of a few microseconds does it before it has a row.
__device__ __forceinline__ void touch_signs(format::Rotation rotation, int block, int lane) {
  if (rotation != format::Rotation::kSignedHadamard) return;
  asm volatile("" ::"r"(kSignWords.words[__ffs(block) - 1][lane % (format::kMaxHeadSize / 32)]));
}

template <int kE>
__device__ __forceinline__ void butterflies(float (&y)[kE], int distance) {
#pragma unroll
  for (int pair = 0; pair < kE / 2; ++pair) {
    const int i = pair / distance * 2 * distance + pair % distance;
    const float a = y[i];
    const float b = y[i + distance];
    y[i] = a + b;
    y[i + distance] = a - b;
  }
}

template <class Map>
__device__ __forceinline__ void hadamard(float (&y)[Map::kElements], int lane, int block) {
  constexpr int kE = Map::kElements;
#pragma unroll
  for (int h = 1; h < Map::kChunk; h *= 2) {
    if (!Map::kRagged || h < block) butterflies(y, h);
  }
#pragma unroll
  for (int step = 1; step < Map::kLanes; step *= 2) {
    if (step * Map::kChunk < block) {
      // The lower lane adds, and the upper one subtracts its own. A product with +-1 is exact, so one rounding remains.
      const float sign = (lane & step) != 0 ? -1.0F : 1.0F;
#pragma unroll
      for (int j = 0; j < kE; ++j) {
        const float other = __shfl_xor_sync(kFullWarp, y[j], step, Map::kLanes);
        y[j] = __fmaf_rn(y[j], sign, other);
      }
    }
  }
#pragma unroll
  for (int distance = Map::kChunk; distance < kE; distance *= 2) butterflies(y, distance);
}

// y = H y or H (s .* y).
template <class Map>
__device__ __forceinline__ void rotate(format::Rotation rotation, float (&y)[Map::kElements], int lane, int block) {
  if (rotation == format::Rotation::kSignedHadamard) flip_signs<Map>(y, lane, block);
  if (rotation != format::Rotation::kNone) hadamard<Map>(y, lane, block);
}

// y = H y or s .* (H y).
template <class Map>
__device__ __forceinline__ void rotate_back(format::Rotation rotation, float (&y)[Map::kElements], int lane,
                                            int block) {
  if (rotation != format::Rotation::kNone) hadamard<Map>(y, lane, block);
  if (rotation == format::Rotation::kSignedHadamard) flip_signs<Map>(y, lane, block);
}

}  // namespace quire::cuda
