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
  OperandFormat operands{};    // what 16-bit products take; kFloat32: the levels of load_tile are multiplied
  FloatRows float_rows{};      // what few rows of fp32 take; null: nothing
  std::int64_t row_bytes = 0;  // of codes and metadata in the row, where they are known
  const QuantKVBackend* backend = nullptr;    // decodes rows where load is null
  std::atomic<bool>* decode_threw = nullptr;  // set where it threw
  bool is_value = false;

  // Whether the scales of a token's KV heads are 4-byte neighbours in a tensor of their own.
  bool scales_side_by_side() const { return scales != nullptr && in_row_meta == 0 && scale_head_stride == 4; }

  // Of KV head 0; the rows of another are where tile_rows() says.
  RowAddress address(std::int64_t block, std::int64_t slot) const {
    const std::uint8_t* codes = row(block, slot, 0);
    const std::uint8_t* meta = scales != nullptr ? scale(block, slot, 0) : nullptr;
    return {codes, in_row_meta > 0 ? codes + in_row_meta : meta, side(block, 0).page};
  }
  TileRows tile_rows(const RowAddress* rows, int num_rows, int kv_head, Prefetch* prefetch) const {
    const std::int64_t data_step = kv_head * head_stride;
    const std::int64_t meta_step = in_row_meta > 0 ? data_step : kv_head * scale_head_stride;
    return {rows, num_rows, data_step, meta_step, kv_head * page_head_stride, prefetch};
  }

  // Rows of one KV head as fp32 levels.
  void load_tile(const TileRows& rows, int kv_head, LevelTile& tile) const;

 private:
  bool decode(const CacheRow& cache_row, float* levels) const;
};

// `cache` [num_blocks, block_size, Hk, row]; `id` is kNone where `backend` decodes rows.
// `exact`: levels are multiplied in fp32.
CacheReader make_reader(const ConstTensor& cache, const attention::SideTensors<const void>& side, format::FormatId id,
                        int head_size, const QuantKVBackend* backend, std::atomic<bool>* decode_threw, bool is_value,
                        bool exact);

}  // namespace quire::cpu
