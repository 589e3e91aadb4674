// One of the two cache tensors as attention reads it: the address of a row, and tiles of rows decoded to levels,
//
//   value[n][i] = scale[n] * levels[n][i] + offset[n]      in the rotated domain, times `unrotate`
//
// through the kernels of its format or, where a registered backend decodes its own rows, row by row through decode_row.
#pragma once

#include <atomic>
#include <cstdint>

#include "attention/paged_rows.h"
#include "cpu/kernels.h"
#include "quire/backend.h"

namespace quire::cpu {

struct CacheReader : attention::PagedRows {
  std::int64_t in_row_meta = 0;  // bytes from a row to its metadata, where that is in the row
  format::RowShape shape{};
  format::Rotation rotation = format::Rotation::kNone;
  float unrotate = 1.0F;
  Kernels::LoadTile load = nullptr;
  const QuantKVBackend* backend = nullptr;    // decodes rows where load is null
  std::atomic<bool>* decode_threw = nullptr;  // set where it threw
  bool is_value = false;

  RowAddress address(std::int64_t block, std::int64_t slot, std::int64_t head) const {
    const std::uint8_t* codes = row(block, slot, head);
    const std::uint8_t* meta = scales != nullptr ? scale(block, slot, head) : nullptr;
    return {codes, in_row_meta > 0 ? codes + in_row_meta : meta, side(block, head).page};
  }

  // Rows of one KV head.
  void load_tile(const RowAddress* rows, int num_rows, int kv_head, LevelTile& tile) const;

 private:
  bool decode(const CacheRow& cache_row, float* levels) const;
};

// `cache` [num_blocks, block_size, Hk, row]; `id` is kNone where `backend` decodes rows.
CacheReader make_reader(const ConstTensor& cache, const attention::SideTensors<const void>& side, format::FormatId id,
                        int head_size, const QuantKVBackend* backend, std::atomic<bool>* decode_threw, bool is_value);

}  // namespace quire::cpu
