// How the elements of a row lie over neighbouring lanes of a warp, and what lanes tell one another.
//
//   A row of head_size elements lies over kLanes neighbouring lanes (2 to 32; a warp holds 32 / kLanes rows), lane
//   l holding the kElements contiguous elements from l * kElements on, or (kChunked) every kLanes-th chunk of kChunk.
//
// Elements past head_size hold zeros. Where head_size is not a multiple of kElements (kRagged) one lane is partly
// filled; the rotation's block is then smaller than kElements, so it never crosses lanes. Where every lane is known to
// be full (kExact) the head size is a constant. Every lane of the warp takes part in every shuffle, also lanes whose
// row is skipped.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace quire::cuda {

inline constexpr unsigned kFullWarp = 0xffffffffU;

// This thread's place in its warp.
__device__ __forceinline__ unsigned lane_index() {
  unsigned lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

template <int kElementsPerLane, int kLanesPerRow, bool kIsRagged, bool kIsExact = false,
          int kElementsPerChunk = kElementsPerLane>
struct LaneMap {
  static constexpr int kElements = kElementsPerLane;
  static constexpr int kLanes = kLanesPerRow;
  static constexpr int kChunk = kElementsPerChunk;
  static constexpr bool kChunked = kChunk < kElements;
  static constexpr bool kRagged = kIsRagged;
  static constexpr bool kExact = kIsExact;
  static_assert((kElements & (kElements - 1)) == 0 && kElements >= 8,
                "a power of two that every format's unit divides");
  static_assert(kLanes >= 2 && kLanes <= 32 && (kLanes & (kLanes - 1)) == 0);
  static_assert(!kChunked || (kExact && kChunk % 8 == 0), "chunks of 16-byte loads");

  static __host__ __device__ constexpr bool holds(int head_size) {
    if (kExact) return head_size == kElements * kLanes;
    return head_size <= kElements * kLanes && (kRagged || head_size % kElements == 0);
  }
  // Where element j of a lane stands in the row.
  static __device__ constexpr int element(int lane, int j) {
    return (j / kChunk * kLanes + lane) * kChunk + j % kChunk;
  }
  // The head size, a constant where it is known.
  static __device__ constexpr int head_size(int given) { return kExact ? kElements * kLanes : given; }
};

// Rows of any head size over a whole warp, for queries and outputs.
using WideMap = LaneMap<16, 32, true>;

// The value of lane `lane ^ lane_mask`, for any trivially copyable type.
template <int kLanes, class T>
__device__ __forceinline__ T shuffle_xor(const T& value, int lane_mask) {
  static_assert(std::is_trivially_copyable_v<T>);
  constexpr int kWords = (sizeof(T) + 3) / 4;
  unsigned words[kWords] = {};
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = __shfl_xor_sync(kFullWarp, words[w], lane_mask, kLanes);
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}
// The maximum over a warp, in which a NaN never wins.
__device__ __forceinline__ float warp_max(float x) {
  if (!(x == x)) x = -INFINITY;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

}  // namespace quire::cuda
