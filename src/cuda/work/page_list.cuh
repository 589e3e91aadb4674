// The work of a launch as one list that is cut into runs: the slices of every row tile of every sequence, one after the
// other. decode_pages gives each block runs of the list and notes the first and the last run of each tile for the
// merge.
//
//   slice    Keys 16 i to 16 i + 15 of a sequence. The list has those from the first to the last that some row sees,
//            without those between R-SWA's prefix and its windows.
//   grain    A fixed number of slices of a tile: 1, or what batch_invariant prescribes.
//   run      A fixed number of grains of the list. It may cross tiles; a block takes runs_per_block of them in a row.
//   slot     Where the partial result of the part of a tile that lies in a run goes: run + tile. No two parts share
//            one, since the next part lies in the next run, in the next tile, or both.
//
// With batch_invariant a run is one grain, so where it begins and ends depends on its sequence alone.
#pragma once

#include <climits>
#include <cstdint>

#include "attention/mask.h"
#include "cuda/attention_params.h"
#include "cuda/lane/map.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

inline constexpr int kSliceKeys = 16;
inline constexpr int kInvariantGrain = 7;  // log2 of the slices of a grain

struct PageListShape {
  int max_tiles;    // the most row tiles of a sequence
  int grain_shift;  // a grain has 2^grain_shift slices
  int blocks;       // blocks that share the list
};

// Consecutive slices of a sequence, from `first` on; from the gap_at-th on they are `gap` later.
struct SliceRun {
  int first = 0, gap_at = INT_MAX, gap = 0;
  __device__ __forceinline__ int slice(int i) const { return first + i + (i >= gap_at ? gap : 0); }
  // The number of a slice among those of the run.
  __device__ __forceinline__ int index(int slice) const {
    const int i = slice - first;
    return i >= gap_at ? i - gap : i;
  }
  __device__ __forceinline__ SliceRun from(int i) const {
    return {slice(i), i >= gap_at || gap == 0 ? INT_MAX : gap_at - i, gap};
  }
};

// One sequence's part of the list. The plan makes sure that the number of grains of a call fits an int.
struct SequenceSlices {
  int query_begin = 0, rows = 0;  // of this launch; 0 rows where another kernel has the sequence
  int tiles = 0, slices = 0;      // row tiles, and the slices that each of them has
  SliceRun run;
  __device__ __forceinline__ int grains(const PageListShape& shape) const {
    return (slices + (1 << shape.grain_shift) - 1) >> shape.grain_shift;
  }
};

template <int kTileRows>
__device__ __forceinline__ SequenceSlices sequence_rows(const AttentionParams& p, int batch) {
  SequenceSlices work;
  work.query_begin = p.cu_seqlens_q[batch * p.cu_stride];
  work.rows = (p.cu_seqlens_q[(batch + 1) * p.cu_stride] - work.query_begin) * p.group_size;
  if (work.rows < p.min_rows || work.rows > p.max_rows) work.rows = 0;
  work.tiles = (work.rows + kTileRows - 1) / kTileRows;
  return work;
}
// The slices of a sequence where nothing limits what rows see, so that most of a mask's rules need not be asked.
template <int kTileRows>
__device__ __forceinline__ SequenceSlices plain_slices(const AttentionParams& p, int batch) {
  SequenceSlices work = sequence_rows<kTileRows>(p, batch);
  const int seq_len = p.seq_lens[batch * p.seq_stride];
  work.slices = work.rows > 0 && seq_len > 0 ? (seq_len + kSliceKeys - 1) / kSliceKeys : 0;
  return work;
}
// The slices that a mask leaves of a sequence. It is a function call, since it is long and most launches have plain
// masks.
static __device__ __noinline__ SequenceSlices masked_slices(const AttentionParams& p, int batch, SequenceSlices work) {
  const attention::SequenceMask sequence = load_sequence(p, batch, work.rows / p.group_size);
  const attention::KeyRange range =
      attention::visible_range(p.mask, sequence, sequence.context_len, sequence.seq_len - 1);
  if (range.end <= range.begin) return work;
  const int begin = range.begin / kSliceKeys;
  const int end = (range.end + kSliceKeys - 1) / kSliceKeys;
  const int prefix = (range.prefix_end + kSliceKeys - 1) / kSliceKeys;
  work.slices = prefix + end - max(begin, prefix);
  if (prefix == 0) {
    work.run.first = begin;
  } else if (begin > prefix) {
    work.run = {0, prefix, begin - prefix};
  }
  return work;
}
template <int kTileRows>
__device__ __forceinline__ SequenceSlices sequence_slices(const AttentionParams& p, int batch) {
  if (p.plain_mask) return plain_slices<kTileRows>(p, batch);
  const SequenceSlices work = sequence_rows<kTileRows>(p, batch);
  return work.rows > 0 ? masked_slices(p, batch, work) : work;
}

// A row tile of the sequence whose work is `work`, and the keys that its rows see. The KV head is each warp's own.
static __device__ __noinline__ TileRows masked_tile(const AttentionParams& p, int batch, int row_begin, int tile_rows) {
  TileRows tile;
  tile.batch = batch;
  tile.kv_head = tile.split = 0;
  tile.row_begin = row_begin;
  complete_rows(p, tile_rows, tile);
  return tile;
}
template <int kTileRows>
__device__ __forceinline__ TileRows tile_of_sequence(const AttentionParams& p, const SequenceSlices& work, int batch,
                                                     int row_begin) {
  if (!p.plain_mask) return masked_tile(p, batch, row_begin, kTileRows);
  TileRows tile;
  tile.batch = batch;
  tile.kv_head = tile.split = 0;
  tile.query_begin = work.query_begin;
  tile.row_begin = row_begin;
  tile.num_rows = work.rows;
  tile.sequence = load_sequence(p, batch, work.rows / p.group_size);
  const int first = tile.sequence.context_len + row_begin / p.group_size;
  const int last = tile.sequence.context_len + (min(row_begin + kTileRows, work.rows) - 1) / p.group_size;
  tile.first = tile.prefix_end = tile.begin = tile.full_begin = 0;
  tile.end = visible_keys(p, tile.sequence, first, last).end;
  tile.full_end = first < 0 ? 0 : (tile.sequence.causal ? first + 1 : tile.sequence.seq_len);
  return tile;
}

// How the list is cut, given its number of grains.
struct PageRuns {
  int total;   // grains of the list
  int length;  // grains of a run
  int runs_per_block;
  __device__ __forceinline__ PageRuns(const PageListShape& shape, int total_grains) : total(total_grains) {
    const int each =
        static_cast<int>((static_cast<unsigned>(total) + shape.blocks - 1) / static_cast<unsigned>(shape.blocks));
    constexpr int kLeast = 2;  // slices of a run: to merge a shorter one costs more than it saves
    length = shape.grain_shift > 0 ? 1 : max(each, kLeast);
    runs_per_block = shape.grain_shift > 0 ? each : 1;
  }
};

// Notes for the merge what a row tile is, as an int4: the first and the last run that it lies in (set by the blocks
// that have them), its first query token, and its number of rows, which is negative where the tile has no slices.
template <int kTileRows>
__device__ __forceinline__ void note_tiles(const PageListShape& shape, const SequenceSlices& work, int4* tiles) {
#pragma unroll 1
  for (int t = 0; t < shape.max_tiles; ++t) {
    const int rows = max(work.rows - t * kTileRows, 0);
    if (rows == 0 || work.slices == 0) {  // no run contains it
      tiles[t] = make_int4(0, -1, work.query_begin, -rows);
    } else {
      tiles[t].z = work.query_begin;
      tiles[t].w = rows;
    }
  }
}

// A warp's view of the list. Lane l counts the grains of n = per_lane sequences from l n on, and of all before. One
// warp of the launch passes `tiles`, which receives what the merge needs; it is null in the others.
template <int kTileRows>
struct PageList {
  int per_lane;
  int own = 0, through;  // the grains of this lane's sequences, and those with all before
  __device__ __forceinline__ PageList(const AttentionParams& p, const PageListShape& shape, int4* tiles, int lane)
      : per_lane((p.batch + 31) / 32) {
    const int first = lane * per_lane;
    const int last = min(first + per_lane, p.batch);
    const auto add = [&](int b, const SequenceSlices& work) {
      own += work.tiles * work.grains(shape);
      if (tiles != nullptr) {
        note_tiles<kTileRows>(shape, work, tiles + static_cast<std::int64_t>(b) * shape.max_tiles);
      }
    };
    if (p.plain_mask) {
      constexpr int kAtOnce = 4;  // sequences whose lengths are loaded together
#pragma unroll 1
      for (int b = first; b < last; b += kAtOnce) {
        SequenceSlices works[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) works[i] = plain_slices<kTileRows>(p, min(b + i, last - 1));
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (b + i < last) add(b + i, works[i]);
        }
      }
    } else {
#pragma unroll 1
      for (int b = first; b < last; ++b) add(b, sequence_slices<kTileRows>(p, b));
    }
    through = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kFullWarp, through, step);
      if (lane >= step) through += before;
    }
  }
  __device__ __forceinline__ int total() const { return __shfl_sync(kFullWarp, through, 31); }
  // The first sequence of the lane that counts grain `at`; `at` becomes the grain's distance from its start. All lanes
  // call.
  __device__ __forceinline__ int find(int& at) const {
    const std::uint32_t after = __ballot_sync(kFullWarp, through > at);
    const int lane = after == 0 ? 31 : __ffs(static_cast<int>(after)) - 1;
    at -= __shfl_sync(kFullWarp, through - own, lane);
    return lane * per_lane;
  }
};

}  // namespace quire::cuda
