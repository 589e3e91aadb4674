// reshape_and_cache as kernels: K rows and V rows of one call in one launch (blockIdx.y says which).
//
//   store_rows      any format: a row over the lanes of a warp (row.cuh), written where its slot says
//   store_elements  formats without statistics or rotation, one thread per element: the head-major layout, where a row
//                   is not contiguous, and float8 inputs, whose codes are copied
//
// All strides below are in bytes. Compiled without contraction: the bytes are the CPU's.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/row.cuh"
#include "format/formats.h"

namespace quire::cuda {

// One of key and value.
struct StoreSide {
  const std::uint8_t* input = nullptr;  // [num_tokens, num_heads, head_size]
  std::int64_t input_token_stride = 0, input_head_stride = 0, input_element_stride = 0;
  DType input_dtype = DType::kFloat32;
  int input_access = 0;  // bytes per load; 0: elements are not neighbours, or not aligned to their size

  std::uint8_t* cache = nullptr;  // [num_blocks, block_size, num_heads, row bytes]
  std::int64_t block_stride = 0, slot_stride = 0, head_stride = 0;
  int cache_access = 1;  // bytes per store

  std::uint8_t* scales = nullptr;  // [num_blocks, block_size, num_heads] fp32, null where the format has none
  std::int64_t scale_block_stride = 0, scale_slot_stride = 0, scale_head_stride = 0;

  const float* tensor_scale = nullptr;  // [1] or [num_heads], may be null: 1
  std::int64_t tensor_scale_stride = 0;

  int head_size = 0;

  // store_elements: element i lies at (i / group) * group_stride + (i % group) * element_stride in its row.
  int group = 1;
  std::int64_t group_stride = 0, element_stride = 0;
  bool copy_codes = false;  // the input holds codes of the cache's float8
};

// n / divisor for 0 <= n < 2^31 by a multiplication: multiplier = ceil(2^(31 + shift) / divisor), shift = ceil(log2
// divisor), is too large by less than 2^-31 of itself.
struct Divider {
  std::uint32_t divisor = 1, multiplier = 0, shift = 0;

  static Divider by(std::uint32_t divisor) {
    std::uint32_t shift = 0;
    while ((std::uint64_t{1} << shift) < divisor) ++shift;
    return {divisor, static_cast<std::uint32_t>(((std::uint64_t{1} << (31 + shift)) + divisor - 1) / divisor), shift};
  }
  __device__ __forceinline__ std::uint32_t quotient(std::uint32_t n) const {
    return __umulhi(2 * n, multiplier) >> shift;
  }
};

struct StoreParams {
  StoreSide key, value;
  const std::uint8_t* slot_mapping = nullptr;  // [num_tokens] int32 or int64
  std::int64_t slot_mapping_stride = 0;
  bool slots_are_int64 = false;
  std::int64_t num_tokens = 0;
  Divider num_heads;
  std::int64_t num_slots = 0, block_size = 0;
  Divider block;  // of block_size, where slots fit 31 bits
  bool slots_fit_31_bits = false;
  unsigned long long* error_counter = nullptr;  // [1], may be null
};

// Where a token goes. Not stored: its slot is negative, or outside the cache.
struct SlotAddress {
  std::int64_t block = 0, offset = 0;
  bool stored = false;
};

__device__ __forceinline__ std::int64_t load_slot(const StoreParams& p, std::int64_t token) {
  const std::uint8_t* at = p.slot_mapping + token * p.slot_mapping_stride;
  return p.slots_are_int64 ? *reinterpret_cast<const std::int64_t*>(at) : *reinterpret_cast<const std::int32_t*>(at);
}

__device__ __forceinline__ SlotAddress find_slot(const StoreParams& p, std::int64_t slot, bool counts_errors) {
  SlotAddress address;
  if (slot < 0) return address;
  if (slot >= p.num_slots) {
    if (counts_errors && p.error_counter != nullptr) atomicAdd(p.error_counter, 1ULL);
    return address;
  }
  if (p.slots_fit_31_bits) {
    const std::uint32_t block = p.block.quotient(static_cast<std::uint32_t>(slot));
    address.block = block;
    address.offset = static_cast<std::uint32_t>(slot) - block * p.block.divisor;
  } else {
    address.block = slot / p.block_size;
    address.offset = slot - address.block * p.block_size;
  }
  address.stored = true;
  return address;
}

template <format::Format F, class Tile>
__device__ __forceinline__ void store_row(const StoreParams& p, const StoreSide& side, std::uint32_t row, int lane,
                                          bool counts_errors) {
  const int head_size = Tile::head_size(side.head_size);
  const std::uint32_t token = p.num_heads.quotient(row);
  const std::uint32_t head = row - token * p.num_heads.divisor;
  float y[Tile::kElements] = {};
  SlotAddress slot;
  if (token < p.num_tokens) {
    // The input does not wait for the slot: both loads are on their way together.
    const std::int64_t slot_index = load_slot(p, token);
    const std::uint8_t* input = side.input + token * side.input_token_stride + head * side.input_head_stride;
    if (Tile::kExact || side.input_access > 0) {
      load_lane<Tile>(input, side.input_dtype, Tile::kExact ? 16 : side.input_access, lane, head_size, y);
    } else {
#pragma unroll
      for (int j = 0; j < Tile::kElements; ++j) {
        const int i = lane * Tile::kElements + j;
        if (i < head_size) y[j] = load_float(input + i * side.input_element_stride, side.input_dtype);
      }
    }
    slot = find_slot(p, slot_index, counts_errors && head == 0 && lane == 0);
  }
  float tensor_scale = 1.0F;
  if (F::kTensorScale && side.tensor_scale != nullptr)
    tensor_scale = side.tensor_scale[head * side.tensor_scale_stride];

  std::uint8_t* data =
      side.cache + slot.block * side.block_stride + slot.offset * side.slot_stride + head * side.head_stride;
  std::uint8_t* meta = nullptr;
  if constexpr (F::kMetaPlace == format::MetaPlace::kScaleCache) {
    meta = side.scales + slot.block * side.scale_block_stride + slot.offset * side.scale_slot_stride +
           head * side.scale_head_stride;
  } else if constexpr (F::kMetaPlace == format::MetaPlace::kInRow) {
    meta = data + format::code_bytes<F>(head_size);
  }
  encode_row<F, Tile>(y, lane, format::row_shape(head_size), tensor_scale, slot.stored, data, side.cache_access, meta);
}

inline constexpr int kStoreThreads = 128;

template <format::Format KeyF, format::Format ValueF, class Tile>
__global__ void __launch_bounds__(kStoreThreads) store_rows(const __grid_constant__ StoreParams p) {
  constexpr int kRowsPerBlock = kStoreThreads / Tile::kLanes;
  const int lane = static_cast<int>(threadIdx.x) % Tile::kLanes;
  const std::uint32_t row = blockIdx.x * kRowsPerBlock + threadIdx.x / Tile::kLanes;
  const bool is_key = blockIdx.y == 0;
  if constexpr (std::is_same_v<KeyF, ValueF>) {
    store_row<KeyF, Tile>(p, is_key ? p.key : p.value, row, lane, is_key);
  } else if (is_key) {
    store_row<KeyF, Tile>(p, p.key, row, lane, true);
  } else {
    store_row<ValueF, Tile>(p, p.value, row, lane, false);
  }
}

// Formats whose elements do not depend on each other.
template <format::Format F>
inline constexpr bool kElementwise =
    F::kStatsOf == format::StatsOf::kNothing&& F::kRotation == format::Rotation::kNone&& F::kUnit == 1;

template <format::Format F>
__device__ __forceinline__ void store_element(const StoreParams& p, const StoreSide& side, std::int64_t index,
                                              bool counts_errors) {
  const int i = static_cast<int>(index % side.head_size);
  const std::int64_t row = index / side.head_size;
  const std::int64_t token = row / p.num_heads.divisor;
  const int head = static_cast<int>(row - token * p.num_heads.divisor);
  if (token >= p.num_tokens) return;
  const SlotAddress slot = find_slot(p, load_slot(p, token), counts_errors && head == 0 && i == 0);
  if (!slot.stored) return;
  const std::uint8_t* input =
      side.input + token * side.input_token_stride + head * side.input_head_stride + i * side.input_element_stride;
  std::uint8_t* to = side.cache + slot.block * side.block_stride + slot.offset * side.slot_stride +
                     head * side.head_stride + (i / side.group) * side.group_stride +
                     (i % side.group) * side.element_stride;
  alignas(16) std::uint8_t code[F::kUnitBytes];
  if (side.copy_codes) {
    code[0] = *input;
  } else {
    const float tensor_scale = side.tensor_scale != nullptr ? side.tensor_scale[head * side.tensor_scale_stride] : 1.0F;
    const float y = load_float(input, side.input_dtype);
    F::pack(F::finish({}, format::row_shape(side.head_size), tensor_scale), &y, code);
  }
  store_bytes(code, to, F::kUnitBytes, F::kUnitBytes);
}

template <format::Format KeyF, format::Format ValueF>
__global__ void __launch_bounds__(kStoreThreads) store_elements(const __grid_constant__ StoreParams p) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kStoreThreads + threadIdx.x;
  if (blockIdx.y == 0) {
    store_element<KeyF>(p, p.key, index, true);
  } else {
    store_element<ValueF>(p, p.value, index, false);
  }
}

inline dim3 store_grid(std::int64_t items, std::int64_t items_per_block) {
  return {static_cast<unsigned>((items + items_per_block - 1) / items_per_block), 2, 1};
}

// Whether a tile serves a side; an exact tile also takes its input in 16-byte loads.
template <class Tile>
bool tile_serves(const StoreSide& side) {
  return Tile::holds(side.head_size) && (!Tile::kExact || side.input_access == 16);
}

// The first tile that serves both sides.
template <format::Format KeyF, format::Format ValueF, class Tile, class... Wider>
cudaError_t launch_store_rows(const StoreParams& params, cudaStream_t stream) {
  if (!tile_serves<Tile>(params.key) || !tile_serves<Tile>(params.value)) {
    if constexpr (sizeof...(Wider) > 0) return launch_store_rows<KeyF, ValueF, Wider...>(params, stream);
    return cudaErrorInvalidValue;
  }
  const dim3 grid = store_grid(params.num_tokens * params.num_heads.divisor, kStoreThreads / Tile::kLanes);
  store_rows<KeyF, ValueF, Tile><<<grid, kStoreThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

// Defined once per pair of formats, in a generated source each.
template <format::Format KeyF, format::Format ValueF>
cudaError_t launch_store(const StoreParams& params, bool by_element, cudaStream_t stream) {
  if (by_element) {
    if constexpr (kElementwise<KeyF> && kElementwise<ValueF>) {
      const int head_size =
          params.key.head_size > params.value.head_size ? params.key.head_size : params.value.head_size;
      const dim3 grid = store_grid(params.num_tokens * params.num_heads.divisor * head_size, kStoreThreads);
      store_elements<KeyF, ValueF><<<grid, kStoreThreads, 0, stream>>>(params);
      return cudaGetLastError();
    } else {
      return cudaErrorInvalidValue;
    }
  }
  // A rotation across lanes costs a shuffle per element and stage: rotated formats take half as many lanes.
  constexpr bool kRotates = KeyF::kRotation != format::Rotation::kNone || ValueF::kRotation != format::Rotation::kNone;
  using Tile128 = std::conditional_t<kRotates, RowTile<32, 4, false, true>, RowTile<16, 8, false, true>>;
  return launch_store_rows<KeyF, ValueF, Tile128, RowTile<8, 8, false>, RowTile<16, 8, false>, RowTile<16, 16, false>,
                           RowTile<16, 32, false>, RowTile<16, 32, true>>(params, stream);
}

}  // namespace quire::cuda
