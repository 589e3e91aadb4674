// The metadata of rows: (scale, offset) of a row in global or in shared memory.
#pragma once

#include <cstdint>

#include "cuda/attention_params.h"
#include "cuda/lane/bytes.cuh"
#include "format/format.h"

namespace quire::cuda {

// Metadata of one row, loaded with one access where it lies in a scale cache.
template <format::Format F>
__device__ __forceinline__ float2 load_affine(const CacheSide& side, std::int64_t block, std::int64_t slot, int head,
                                              format::RowShape shape) {
  alignas(16) std::uint8_t meta[F::kMetaBytes > 0 ? F::kMetaBytes : 1] = {};
  if constexpr (F::kMetaPlace == format::MetaPlace::kScaleCache) {
    load_bytes(
        side.scales + block * side.scale_block_stride + slot * side.scale_slot_stride + head * side.scale_head_stride,
        meta, F::kMetaBytes, 4);
  } else if constexpr (F::kMetaPlace == format::MetaPlace::kInRow) {
    load_bytes(side.data + block * side.block_stride + slot * side.slot_stride + head * side.head_stride +
                   format::code_bytes<F>(shape.head_size),
               meta, F::kMetaBytes, side.access < 2 ? side.access : 2);
  }
  const format::Affine affine = F::read_meta(meta, shape);
  return {affine.scale, affine.offset};
}

}  // namespace quire::cuda
