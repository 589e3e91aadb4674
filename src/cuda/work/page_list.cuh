// The work of a launch as one list, cut into runs: the slices (16 keys) of every row tile of every sequence, one after
// the other. decode_pages gives each block runs of it; merge_pages finds the runs of a tile.
//
//   slice    keys 16 i to 16 i + 15 of a sequence, from the first to the last that some row sees
//   grain    so many slices of a tile: 1, or what batch_invariant fixes
//   run      so many grains of the list, which may cross tiles; a block takes runs_per_block neighbouring ones
//   slot     where the partial result of the part of a tile that lies in a run goes: run + tile. No two parts have the
//            same, since the next part is of the next run or of the next tile or both.
//
// A run of batch_invariant is one grain: where it begins and ends depends on its sequence alone.
#pragma once

#include <cstdint>

#include "attention/mask.h"
#include "cuda/attention_params.h"
#include "cuda/lane/map.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

inline constexpr int kSliceKeys = 16;
inline constexpr int kInvariantGrain = 128;  // slices

struct PageListShape {
  int tile_rows, max_tiles;  // of a row tile; of a sequence
  int grain;                 // slices
  int blocks;                // that share the list
};

// One sequence's part of the list.
struct SequenceSlices {
  int tiles = 0, first = 0, slices = 0;  // row tiles; each has these slices
  __device__ __forceinline__ int grains(int grain) const { return (slices + grain - 1) / grain; }
};
__device__ __forceinline__ SequenceSlices sequence_slices(const AttentionParams& p, int tile_rows, int batch) {
  SequenceSlices work;
  const int begin = p.cu_seqlens_q[batch * p.cu_stride];
  const int query_len = p.cu_seqlens_q[(batch + 1) * p.cu_stride] - begin;
  const int rows = query_len * p.group_size;
  if (rows <= 0 || rows < p.min_rows || rows > p.max_rows) return work;
  work.tiles = (rows + tile_rows - 1) / tile_rows;
  const attention::SequenceMask sequence = load_sequence(p, batch, query_len);
  const attention::KeyRange range =
      attention::visible_range(p.mask, sequence, sequence.context_len, sequence.seq_len - 1);
  work.first = range.begin / kSliceKeys;
  if (range.end > range.begin) work.slices = (range.end + kSliceKeys - 1) / kSliceKeys - work.first;
  return work;
}

// How the list is cut, by its number of grains.
struct PageRuns {
  std::int64_t total;  // grains
  int length;          // grains of a run
  int runs_per_block;
  __device__ __forceinline__ PageRuns(const PageListShape& shape, std::int64_t total_grains) : total(total_grains) {
    const auto each = static_cast<int>((total + shape.blocks - 1) / shape.blocks);
    constexpr int kLeast = 2;  // slices of a run: a shorter one costs more to merge than it saves
    length = shape.grain > 1 ? 1 : max(each, kLeast);
    runs_per_block = shape.grain > 1 ? each : 1;
  }
};

// A warp's view of the list: lane l has the grains of sequences l n to l n + n - 1, and those before.
struct PageList {
  int per_lane;
  std::int64_t own = 0, through;  // grains of this lane's sequences; with those before
  __device__ __forceinline__ PageList(const AttentionParams& p, const PageListShape& shape, int lane)
      : per_lane((p.batch + 31) / 32) {
    const int first = lane * per_lane;
    const int last = min(first + per_lane, p.batch);
#pragma unroll 1
    for (int b = first; b < last; ++b) {
      const SequenceSlices work = sequence_slices(p, shape.tile_rows, b);
      own += static_cast<std::int64_t>(work.tiles) * work.grains(shape.grain);
    }
    through = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const std::int64_t before = __shfl_up_sync(kFullWarp, through, step);
      if (lane >= step) through += before;
    }
  }
  __device__ __forceinline__ std::int64_t total() const { return __shfl_sync(kFullWarp, through, 31); }
  // The grains before a sequence. All lanes call.
  __device__ __forceinline__ std::int64_t before(const AttentionParams& p, const PageListShape& shape, int batch) const {
    const int lane = batch / per_lane;
    std::int64_t sum = __shfl_sync(kFullWarp, through - own, lane);
    for (int b = lane * per_lane; b < batch; ++b) {
      const SequenceSlices work = sequence_slices(p, shape.tile_rows, b);
      sum += static_cast<std::int64_t>(work.tiles) * work.grains(shape.grain);
    }
    return sum;
  }
  // The first sequence of the lane whose sequences have grain `at`, and how many grains on that is. All lanes call.
  __device__ __forceinline__ int find(std::int64_t& at) const {
    const std::uint32_t after = __ballot_sync(kFullWarp, through > at);
    const int lane = after == 0 ? 31 : __ffs(static_cast<int>(after)) - 1;
    at -= __shfl_sync(kFullWarp, through - own, lane);
    return lane * per_lane;
  }
};

}  // namespace quire::cuda
