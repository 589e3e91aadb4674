// One of the two cache tensors as attention reads it: the address of a row, and tiles of rows decoded to levels,
//
//   value[n][i] = scale[n] * levels[n][i] + offset[n]      in the rotated domain, times `unrotate`
//
// through the kernels of its format or, where a registered backend decodes its own rows, row by row through decode_row.
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu/kernels.h"
#include "quire/backend.h"

namespace quire::cpu {

struct CacheReader {
  const std::uint8_t* base = nullptr;
  std::int64_t block_stride = 0, slot_stride = 0, head_stride = 0;  // bytes
  const std::uint8_t* meta_base = nullptr;
  std::int64_t meta_block_stride = 0, meta_slot_stride = 0, meta_head_stride = 0;  // bytes
  format::RowShape shape{};
  format::Rotation rotation = format::Rotation::kNone;
  float unrotate = 1.0F;
  Kernels::LoadTile load = nullptr;
  const QuantKVBackend* backend = nullptr;    // decodes rows where load is null
  std::atomic<bool>* decode_threw = nullptr;  // set where it threw
  bool is_value = false;

  RowAddress row(std::int64_t block, std::int64_t slot, std::int64_t head) const {
    return {base + block * block_stride + slot * slot_stride + head * head_stride,
            meta_base == nullptr
                ? nullptr
                : meta_base + block * meta_block_stride + slot * meta_slot_stride + head * meta_head_stride};
  }

  void load_tile(const RowAddress* rows, int num_rows, LevelTile& tile) const;

 private:
  bool decode(const CacheRow& cache_row, float* levels) const;
};

// `cache` [num_blocks, block_size, Hk, row], `scale_cache` [num_blocks, block_size, Hk] or not given; `id` is kNone
// where `backend` decodes rows.
CacheReader make_reader(const Tensor& cache, const Tensor& scale_cache, format::FormatId id, int head_size,
                        const QuantKVBackend* backend, std::atomic<bool>* decode_threw, bool is_value);

}  // namespace quire::cpu
