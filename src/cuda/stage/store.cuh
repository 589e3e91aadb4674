// A row on its way into the cache: what a lane loads of it, and how its bytes get to their address.
#pragma once

#include <cstdint>

#include "cuda/format/encode.cuh"
#include "cuda/lane/bytes.cuh"
#include "cuda/lane/input.cuh"
#include "cuda/lane/map.cuh"
#include "cuda/store_params.h"
#include "cuda/work/slots.cuh"
#include "format/format.h"

namespace quire::cuda {

// pointer + index * stride. Where every lane is full, the launcher has seen that both fit 32 bits.
template <class Map, class Byte>
__device__ __forceinline__ Byte* advance(Byte* pointer, std::int64_t index, std::int64_t stride) {
  if constexpr (Map::kExact) {
    std::int64_t distance;
    asm("mul.wide.s32 %0, %1, %2;"
        : "=l"(distance)
        : "r"(static_cast<std::int32_t>(index)), "r"(static_cast<std::int32_t>(stride)));
    return pointer + distance;
  } else {
    return pointer + index * stride;
  }
}

template <class Map>
__device__ __forceinline__ LaneInput<Map> load_input(const StoreSide& side, std::uint32_t token, std::uint32_t head,
                                                     int lane) {
  LaneInput<Map> input;
  const std::uint8_t* row =
      advance<Map>(advance<Map>(side.input, token, side.input_token_stride), head, side.input_head_stride);
  if constexpr (Map::kExact) {
    input.load(row, lane);
  } else if (side.input_access > 0) {
    load_lane<Map>(row, side.input_dtype, side.input_access, lane, side.head_size, input.y);
  } else {
#pragma unroll
    for (int j = 0; j < Map::kElements; ++j) {
      const int i = lane * Map::kElements + j;
      if (i < side.head_size) input.y[j] = load_float(row + i * side.input_element_stride, side.input_dtype);
    }
  }
  return input;
}

// side.row and side.scale of a token head.
template <class Map>
__device__ __forceinline__ std::uint8_t* row_address(const StoreSide& side, const SlotAddress& slot,
                                                     std::uint32_t head) {
  std::uint8_t* const page = advance<Map>(side.data, slot.block, side.block_stride);
  return advance<Map>(advance<Map>(page, slot.offset, side.slot_stride), head, side.head_stride);
}
template <class Map>
__device__ __forceinline__ std::uint8_t* scale_address(const StoreSide& side, const SlotAddress& slot,
                                                       std::uint32_t head) {
  std::uint8_t* const page = advance<Map>(side.scales, slot.block, side.scale_block_stride);
  return advance<Map>(advance<Map>(page, slot.offset, side.scale_slot_stride), head, side.scale_head_stride);
}

// Encodes one side's row, y, to `data`, which is its place in the cache or in a stage in shared memory.
template <format::Format F, class Map>
__device__ __forceinline__ void store_row(const StoreSide& side, float (&y)[Map::kElements], const SlotAddress& slot,
                                          std::uint32_t head, int lane, std::uint8_t* data, int access) {
  const int head_size = Map::head_size(side.head_size);
  format::SideInputs inputs;
  if constexpr (F::kCentre != format::Centre::kNone) inputs = side.side(slot.stored ? slot.block : 0, head);
  if (F::kTensorScale && side.tensor_scale != nullptr) {
    inputs.tensor_scale = side.tensor_scale[head * side.tensor_scale_stride];
  }
  std::uint8_t* meta = nullptr;
  if constexpr (F::kMetaPlace == format::MetaPlace::kScaleCache) {
    meta = scale_address<Map>(side, slot, head);
  } else if constexpr (F::kMetaPlace == format::MetaPlace::kInRow) {
    meta = data + format::code_bytes<F>(head_size);
  }
  encode_row<F, Map>(y, lane, format::row_shape(head_size), inputs, slot.stored, data, access, meta);
}

// A warp copies `bytes` bytes, `access` of them at a time, 16-byte aligned in shared memory or as `to` is.
template <class Word>
__device__ __forceinline__ void copy_words(const std::uint8_t* from, std::uint8_t* to, int bytes) {
  for (int i = static_cast<int>(lane_index() * sizeof(Word)); i < bytes; i += 32 * sizeof(Word)) {
    *reinterpret_cast<Word*>(to + i) = *reinterpret_cast<const Word*>(from + i);
  }
}
__device__ __forceinline__ void copy_by_warp(const std::uint8_t* from, std::uint8_t* to, int bytes, int access) {
  if (access == 16) return copy_words<uint4>(from, to, bytes);
  if (access >= 4) return copy_words<std::uint32_t>(from, to, bytes);
  if (access >= 2) return copy_words<std::uint16_t>(from, to, bytes);
  copy_words<std::uint8_t>(from, to, bytes);
}

// The pointer into `base` of another lane, passed as a distance so that the compiler sees that it points to global
// memory.
__device__ __forceinline__ std::uint8_t* shuffle_pointer(std::uint8_t* base, std::uint8_t* pointer, int lane) {
  return base + __shfl_sync(kFullWarp, static_cast<long long>(pointer - base), lane);
}

}  // namespace quire::cuda
