// Brings rows of the cache into shared memory by cp.async, as they lie there, 16 bytes a copy. Rows at odd addresses
// come with their aligned cover.
#pragma once

#include <cstdint>

#include "cuda/attention_params.h"
#include "cuda/format/fragment.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/work/pages.cuh"
#include "format/format.h"

namespace quire::cuda {

// A row of 16-bit elements in shared memory: 16 bytes longer than the row, so that ldmatrix meets every bank once.
template <int kHead>
inline constexpr int kPitch16 = kHead * 2 + 16;

// A row of a format as it lies in the cache, in shared memory.
template <class F, int kHead>
struct RawRow {
  static constexpr int kBytes = static_cast<int>(format::row_bytes<F>(kHead));
  // Rows that are used in place are aligned; others may start up to 15 bytes into their cover.
  static constexpr int kCover = kRaw16<F> ? kBytes : (kBytes + 15 + 15) / 16 * 16;
  static constexpr int kChunks = kCover / 16;
  static constexpr int kPitch = kRaw16<F> ? kPitch16<kHead> : (kChunks % 2 == 1 ? kCover : kCover + 16);
};

// Starts the copy of a scale to `to`; zeros for a key that is not read.
__device__ __forceinline__ void copy_scale(const CacheSide& side, KeyPlace place, int head, float* to) {
  const std::int64_t at = place.block < 0 ? 0 : side.scale_offset(place.block, place.slot, head);
  ptx::cp_async_4(ptx::shared_address(to), side.scales + at, place.block < 0 ? 0 : 4);
}

// Starts the copies of kNumRows rows by kThreads threads to place(row, chunk) in shared memory; neighbouring threads
// copy neighbouring chunks of 16 bytes. Rows that are not read (offset -1) become zeros. `dense` says that rows are
// aligned and fill the head-size class.
template <class F, int kHead, int kNumRows, int kThreads, class Place>
__device__ __forceinline__ void copy_rows(const CacheSide& side, const std::int64_t* offsets, bool dense, int row_bytes,
                                          Place&& place, int thread) {
  using Row = RawRow<F, kHead>;
  if (Row::kBytes % 16 == 0 && kThreads % (Row::kBytes / 16) == 0 && dense) {
    constexpr int kChunks = Row::kBytes / 16;
    constexpr int kRowsAtOnce = kThreads / kChunks;
    const int first_row = thread / kChunks;
    const int chunk = thread % kChunks;
    const std::uint8_t* from = side.data + 16 * chunk;
#pragma unroll
    for (int j = 0; j < (kNumRows + kRowsAtOnce - 1) / kRowsAtOnce; ++j) {
      const int row = first_row + j * kRowsAtOnce;
      if (kNumRows % kRowsAtOnce != 0 && row >= kNumRows) break;
      const std::int64_t offset = offsets[row];
      ptx::cp_async_16_unless(place(row, chunk), from + offset, offset < 0);
    }
    return;
  }
  constexpr int kChunks = Row::kChunks;
#pragma unroll 4
  for (int i = thread; i < kNumRows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const std::int64_t offset = offsets[row];
    const int skew = kRaw16<F> ? 0 : row_skew(side, offset < 0 ? 0 : offset);
    const std::uint8_t* cover = side.data + (offset < 0 ? 0 : offset) - skew;
    const int bytes = offset < 0 ? 0 : min(max(skew + row_bytes - 16 * chunk, 0), 16);
    ptx::cp_async_16(place(row, chunk), bytes > 0 ? cover + 16 * chunk : cover, bytes);
  }
}

// The places of raw rows one after the other, RawRow::kPitch apart.
template <class F, int kHead>
__device__ __forceinline__ auto raw_rows(const std::uint8_t* to) {
  return [target = ptx::shared_address(to)](int row, int chunk) -> std::uint32_t {
    return target + row * RawRow<F, kHead>::kPitch + 16 * chunk;
  };
}

template <class F, int kHead>
__device__ __forceinline__ bool is_dense(const CacheSide& side, int head_size) {
  return head_size == kHead && side.row_access >= 16;
}

}  // namespace quire::cuda
