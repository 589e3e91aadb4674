// Which rows and keys a block works on: the way from its place in the grid to a sequence, the rows of a tile, and the
// keys that they see in its split.
#pragma once

#include <cstdint>

#include "attention/mask.h"
#include "cuda/attention_params.h"

namespace quire::cuda {

// A thread's place in the grid, which only the __global__ function reads.
struct BlockIndex {
  std::int64_t tile;  // the row tile
  int kv_head, split, thread;
};

// The number of a sequence's first row tile in the grid. It depends on cu_seqlens_q alone, and leaves every sequence at
// least as many tiles as its rows fill.
__host__ __device__ __forceinline__ std::int64_t first_tile(std::int64_t rows_before, std::int64_t sequence,
                                                            int tile_rows) {
  return rows_before / tile_rows + sequence;
}

// The sequence a row tile belongs to.
__device__ __forceinline__ int find_sequence(const AttentionParams& p, std::int64_t tile, int tile_rows) {
  int low = 0;
  int high = p.batch - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    const std::int64_t rows_before = static_cast<std::int64_t>(p.cu_seqlens_q[middle * p.cu_stride]) * p.group_size;
    if (first_tile(rows_before, middle, tile_rows) <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The rows of a block, all of one KV head of one sequence, and the keys that they see.
struct TileRows {
  int batch, kv_head, split;
  int query_begin;  // the first query token of the sequence
  int row_begin;    // the first row of the tile, counted within the sequence
  int num_rows;     // rows of the sequence (the plan bounds the sum over sequences by 2^31)
  attention::SequenceMask sequence;
  // The keys that some row sees in this split: [begin, end), and before it [first, prefix_end) where R-SWA's prefix has
  // keys in the split that do not touch the interval. Elsewhere first is begin and prefix_end is 0.
  int first, prefix_end;
  int begin, end;
  int full_begin, full_end;  // the keys that every row sees
};

// A sequence as the mask sees it.
__device__ __forceinline__ attention::SequenceMask load_sequence(const AttentionParams& p, int batch, int query_len) {
  attention::SequenceMask sequence;
  sequence.seq_len = p.seq_lens[batch * p.seq_stride];
  sequence.context_len = sequence.seq_len - query_len;
  sequence.causal = p.causal_per_seq != nullptr ? p.causal_per_seq[batch * p.causal_stride] != 0 : p.causal;
  sequence.prefix_len = p.prefix_lens == nullptr ? 0 : max(0, p.prefix_lens[batch * p.prefix_stride]);
  sequence.ranges = p.ranges == nullptr ? nullptr : p.ranges + batch * p.ranges_batch_stride;
  sequence.range_stride = p.range_stride;
  sequence.bound_stride = p.bound_stride;
  sequence.num_ranges = p.num_ranges;
  return sequence;
}

// attention::visible_range. Where nothing limits what rows see, most of the mask's rules need not be asked.
__device__ __forceinline__ attention::KeyRange visible_keys(const AttentionParams& p,
                                                            const attention::SequenceMask& sequence, int first,
                                                            int last) {
  if (!p.plain_mask) return attention::visible_range(p.mask, sequence, first, last);
  return {0, last < 0 ? 0 : (sequence.causal ? min(last + 1, sequence.seq_len) : sequence.seq_len)};
}

// Fills in a tile whose batch, KV head, split and row_begin are set. Returns false where it has no rows of this launch.
__device__ __forceinline__ bool complete_rows(const AttentionParams& p, int tile_rows, TileRows& tile) {
  tile.query_begin = p.cu_seqlens_q[tile.batch * p.cu_stride];
  const int query_len = p.cu_seqlens_q[(tile.batch + 1) * p.cu_stride] - tile.query_begin;
  tile.num_rows = query_len * p.group_size;
  if (tile.row_begin >= tile.num_rows || tile.num_rows < p.min_rows || tile.num_rows > p.max_rows) return false;

  tile.sequence = load_sequence(p, tile.batch, query_len);
  const attention::SequenceMask& sequence = tile.sequence;
  const int last_row = min(tile.row_begin + tile_rows, tile.num_rows) - 1;
  const int first = sequence.context_len + tile.row_begin / p.group_size;
  const int last = sequence.context_len + last_row / p.group_size;
  const attention::KeyRange range = visible_keys(p, sequence, first, last);
  const auto split = static_cast<std::int64_t>(tile.split);
  const attention::KeySpan span = attention::clip(
      range, split * p.split_size, split + 1 < p.max_splits ? (split + 1) * p.split_size : std::int64_t{range.end});
  tile.first = span.first;
  tile.prefix_end = span.prefix_end;
  tile.begin = span.begin;
  tile.end = span.end;
  const attention::FullRange full = attention::full_range(p.mask, sequence, first, last);
  tile.full_begin = full.begin;
  tile.full_end = full.end;
  return true;
}

// What the inner loops need to know of a row; it is kept in shared memory.
struct RowInfo {
  int query;         // the query token within the sequence, or -1 past the end
  int position;      // the position of that token; a row with a negative one sees nothing
  int head;          // the query head
  int begin, end;    // the keys it sees: every kind of mask leaves a row one interval (attention/mask.h),
  int prefix_end;    // and R-SWA also the keys below this; 0 where they touch the interval or there are none
  float scale, sum;  // the 16-bit query times `scale` is the rotated query; `sum` adds up the 16-bit one
};

__device__ __forceinline__ RowInfo row_info(const AttentionParams& p, const TileRows& tile, int row) {
  const int index = tile.row_begin + row;
  const int query = index / p.group_size;
  RowInfo info{};
  info.query = index < tile.num_rows && tile.query_begin + query < p.num_tokens ? query : -1;
  info.position = info.query < 0 ? -1 : tile.sequence.context_len + query;
  info.head = tile.kv_head * p.group_size + (index - query * p.group_size);
  if (info.position >= 0) {
    const attention::KeyRange range = visible_keys(p, tile.sequence, info.position, info.position);
    info.begin = range.begin;
    info.end = range.end;
    info.prefix_end = range.prefix_end;
  }
  return info;
}

// Finds the rows of a block. Returns false where it has none of this launch.
__device__ __forceinline__ bool find_rows(const AttentionParams& p, const BlockIndex& block, int tile_rows,
                                          TileRows& tile) {
  tile.kv_head = block.kv_head;
  tile.split = block.split;
  if (p.sequence_tiles > 0) {
    const int index = static_cast<int>(block.tile);
    tile.batch = index / p.sequence_tiles;
    tile.row_begin = index % p.sequence_tiles * tile_rows;
  } else {
    tile.batch = find_sequence(p, block.tile, tile_rows);
    const std::int64_t rows_before = static_cast<std::int64_t>(p.cu_seqlens_q[tile.batch * p.cu_stride]) * p.group_size;
    tile.row_begin = static_cast<int>(block.tile - first_tile(rows_before, tile.batch, tile_rows)) * tile_rows;
  }
  return complete_rows(p, tile_rows, tile);
}

// The factor of a query's product with a key: softmax_scale, the per-tensor scales and the rotation's norm.
__device__ __forceinline__ float logit_factor(const AttentionParams& p, const TileRows& tile) {
  return p.softmax_scale * p.q_scale.at(tile.batch, tile.kv_head) * p.k_scale.at(tile.batch, tile.kv_head) *
         p.key_unrotate;
}

}  // namespace quire::cuda
