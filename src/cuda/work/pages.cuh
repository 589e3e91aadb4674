// Where a key lies: the way from its position through the block table to the address of its row.
#pragma once

#include <cstdint>

#include "cuda/attention_params.h"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

// The physical place of a key: its entry of the block table and its slot there.
struct KeyPlace {
  std::int32_t block;  // -1 where the key is not read
  int slot;
};

// Whether a key below tile.begin is one of [tile.first, tile.prefix_end). It reads memory instead of those two fields:
// only R-SWA asks, and the fields would occupy registers throughout the kernels' loops.
__device__ __forceinline__ bool in_prefix(const AttentionParams& p, const TileRows& tile, int key) {
  return p.prefix_lens != nullptr && key >= tile.split * p.split_size &&
         key < p.prefix_lens[tile.batch * p.prefix_stride];
}

__device__ __forceinline__ KeyPlace find_key(const AttentionParams& p, const TileRows& tile, int key,
                                             bool counts_errors) {
  const int entry = p.block_shift >= 0 ? key >> p.block_shift : key / p.block_size;
  KeyPlace place{-1, key - entry * p.block_size};
  if (key >= tile.end || entry >= p.max_blocks || (key < tile.begin && !in_prefix(p, tile, key))) return place;
  place.block = p.block_table[tile.batch * p.table_batch_stride + entry * p.table_block_stride];
  if (place.block < 0 || place.block >= p.num_blocks) {
    place.block = -1;
    if (counts_errors && p.error_counter != nullptr) atomicAdd(p.error_counter, 1ULL);
  }
  return place;
}

// Bytes from the start of the cache to a row, or -1 for a key that is not read.
__device__ __forceinline__ std::int64_t row_offset(const CacheSide& side, KeyPlace place, int head) {
  return place.block < 0 ? -1 : side.offset(place.block, place.slot, head);
}

// Bytes from the start of the aligned 16 bytes that a row begins in, its cover, to the row.
__device__ __forceinline__ int row_skew(const CacheSide& side, std::int64_t offset) {
  return static_cast<int>((reinterpret_cast<std::uintptr_t>(side.data) + static_cast<std::uintptr_t>(offset)) & 15U);
}

}  // namespace quire::cuda
