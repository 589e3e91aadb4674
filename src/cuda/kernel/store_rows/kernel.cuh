// reshape_and_cache of the K rows and V rows of a call in one launch. The lanes of a warp hold the K row and the V row
// of a token head (format/encode.cuh) and write them where the token's slot says.
//
// It is compiled without contraction, so that the bytes are the CPU's. The budget is in docs/kernels/store.md.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/format/formats.cuh"
#include "cuda/kernel/store_rows/config.h"
#include "cuda/stage/store.cuh"
#include "cuda/store_params.h"
#include "cuda/work/slots.cuh"

namespace quire::cuda {

// One row of one side, from its input to its place in the cache.
template <format::Format F, class Map>
__device__ __forceinline__ void store_input(const StoreSide& side, const LaneInput<Map>& input, const SlotAddress& slot,
                                            std::uint32_t head, int lane, std::uint8_t* to, int access) {
  float y[Map::kElements];
  input.template widen<F>(side.input_dtype, lane, side.head_size, y);
  store_row<F, Map>(side, y, slot, head, lane, to, access);
}

// Copies the staged rows of a warp to their slots, and runs of slots that adjoin together. `key_to` and `value_to` say
// where this lane's rows belong.
template <format::Format KeyF, format::Format ValueF, class Map>
__device__ __forceinline__ void copy_stage(const StoreParams& p, const std::uint8_t* staged, const SlotAddress& slot,
                                           std::uint8_t* key_to, std::uint8_t* value_to, int key_bytes,
                                           int value_bytes) {
  const int slot_bytes = key_bytes + value_bytes;
  for (int r = 0; r < StoreStage<KeyF, ValueF, Map>::kWarpRows; r += p.run_rows) {
    const int source = r * Map::kLanes;
    const bool stored = __shfl_sync(kFullWarp, slot.stored ? 1 : 0, source) != 0;
    std::uint8_t* const to = shuffle_pointer(p.key.data, key_to, source);
    std::uint8_t* const other = p.slots_adjoin ? nullptr : shuffle_pointer(p.value.data, value_to, source);
    if (!stored) continue;
    const std::uint8_t* const from = staged + r * slot_bytes;
    copy_by_warp(from, to, p.slots_adjoin ? p.run_rows * slot_bytes : key_bytes, p.run_access);
    if (other != nullptr) copy_by_warp(from + key_bytes, other, value_bytes, p.run_access);
  }
}

// The same lanes store K and V of a token head, so that the slot is found once. Both rows are loaded before the first
// is worked on; where a row takes most of the registers, V is loaded when K's words are free, or when K is stored.
template <format::Format KeyF, format::Format ValueF, class Map>
__global__ void __launch_bounds__(kMapThreads<Map>, kMinBlocks<Map>) store_rows(const __grid_constant__ StoreParams p) {
  constexpr int kRowsPerBlock = kMapThreads<Map> / Map::kLanes;
  const int lane = static_cast<int>(threadIdx.x) % Map::kLanes;
  const std::uint32_t row = blockIdx.x * kRowsPerBlock + threadIdx.x / Map::kLanes;
  const std::uint32_t token = p.num_heads.quotient(row);
  const std::uint32_t head = row - token * p.num_heads.divisor;
  // Lanes past the last row work on that row too, and store nothing. The inputs do not wait for the slot, so all loads
  // are on their way together.
  const bool exists = token < p.num_tokens;
  const std::uint32_t read = exists ? token : static_cast<std::uint32_t>(p.num_tokens) - 1;
  std::int64_t slot_index = load_slot(p, read);
  LaneInput<Map> input = load_input<Map>(p.key, read, head, lane);
  LaneInput<Map> value;
  if constexpr (!kRowByRow<Map> && !kOneBody<KeyF, ValueF, Map>) value = load_input<Map>(p.value, read, head, lane);
  if (!exists) slot_index = -1;
  const SlotAddress slot = find_slot(p, slot_index, Map::kExact || p.slots_fit_31_bits, head == 0 && lane == 0);
  if constexpr (kOneBody<KeyF, ValueF, Map>) {
    float y[Map::kElements];
#pragma unroll 1
    for (int s = 0;; ++s) {
      const StoreSide& side = s == 0 ? p.key : p.value;
      int own_lane = lane;
      asm volatile("" : "+r"(own_lane));  // else the masks of the signs are kept in registers from K to V
      input.template widen<KeyF>(side.input_dtype, own_lane, side.head_size, y);
      if (s == 0) input = load_input<Map>(p.value, read, head, lane);
      store_row<KeyF, Map>(side, y, slot, head, lane, row_address<Map>(side, slot, head), side.access);
      if (s == 1) return;
    }
  }
  std::uint8_t* const key_to = row_address<Map>(p.key, slot, head);
  std::uint8_t* const value_to = row_address<Map>(p.value, slot, head);
  if constexpr (!kStaged<KeyF, ValueF>) {
    store_input<KeyF, Map>(p.key, input, slot, head, lane, key_to, p.key.access);
    if constexpr (kRowByRow<Map>) value = load_input<Map>(p.value, read, head, lane);
    store_input<ValueF, Map>(p.value, value, slot, head, lane, value_to, p.value.access);
  } else {
    using Stage = StoreStage<KeyF, ValueF, Map>;
    __shared__ Stage stage;
    const int key_bytes = static_cast<int>(format::row_bytes<KeyF>(Map::head_size(p.key.head_size)));
    const int value_bytes = static_cast<int>(format::row_bytes<ValueF>(Map::head_size(p.value.head_size)));
    const int access = Map::kExact ? stage_access<KeyF, ValueF>(Stage::kHeadSize, Stage::kHeadSize) : p.stage_access;
    std::uint8_t* const staged = stage.warps[threadIdx.x / 32].bytes;
    std::uint8_t* const own = staged + static_cast<int>(threadIdx.x) % 32 / Map::kLanes * (key_bytes + value_bytes);
    store_input<KeyF, Map>(p.key, input, slot, head, lane, own, access);
    if constexpr (kRowByRow<Map>) value = load_input<Map>(p.value, read, head, lane);
    store_input<ValueF, Map>(p.value, value, slot, head, lane, own + key_bytes, access);
    __syncwarp();
    copy_stage<KeyF, ValueF, Map>(p, staged, slot, key_to, value_to, key_bytes, value_bytes);
  }
}

}  // namespace quire::cuda
