// The host side of store_rows: which map of a row over lanes serves a call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "cuda/kernel/store_rows/kernel.cuh"
#include "cuda/launch.h"
#include "cuda/store_params.h"

namespace quire::cuda {

// Fewer rows than this leave multiprocessors idle if few lanes share a row; latency counts then, and not instructions.
inline constexpr std::int64_t kManyRows = 8192;

// Whether a map serves a side; an exact map also takes its input in 16-byte loads.
template <class Map>
bool map_serves(const StoreSide& side, std::int64_t num_rows) {
  if (!Map::kExact) return Map::holds(side.head_size);
  if (Map::kChunked && num_rows < kManyRows) return false;
  const auto fits_32_bits = [](std::int64_t distance) { return distance == static_cast<std::int32_t>(distance); };
  return Map::holds(side.head_size) && side.input_access == 16 && side.input_dtype != DType::kFloat32 &&
         fits_32_bits(side.input_token_stride) && fits_32_bits(side.input_head_stride) &&
         fits_32_bits(side.block_stride) && fits_32_bits(side.slot_stride) && fits_32_bits(side.head_stride) &&
         fits_32_bits(side.scale_block_stride) && fits_32_bits(side.scale_slot_stride) &&
         fits_32_bits(side.scale_head_stride);
}

// How staged rows are copied.
template <format::Format KeyF, format::Format ValueF, class Map>
void plan_stage(StoreParams& p) {
  const std::int64_t key_bytes = format::row_bytes<KeyF>(p.key.head_size);
  const std::int64_t value_bytes = format::row_bytes<ValueF>(p.value.head_size);
  const StoreSide& k = p.key;
  const StoreSide& v = p.value;
  p.stage_access = stage_access<KeyF, ValueF>(k.head_size, v.head_size);
  p.slots_adjoin = v.data == k.data + key_bytes && v.block_stride == k.block_stride && v.slot_stride == k.slot_stride &&
                   v.head_stride == k.head_stride;
  p.run_rows = 1;
  if (!p.slots_adjoin) {
    p.run_access = std::min(access_bytes(k.data, {k.block_stride, k.slot_stride, k.head_stride, key_bytes}),
                            access_bytes(v.data, {v.block_stride, v.slot_stride, v.head_stride, value_bytes}));
    return;
  }
  if (k.head_stride == key_bytes + value_bytes) {
    p.run_rows = std::gcd(static_cast<int>(p.num_heads.divisor), 32 / Map::kLanes);
  }
  p.run_access = access_bytes(
      k.data, {k.block_stride, k.slot_stride, p.run_rows * k.head_stride, p.run_rows * (key_bytes + value_bytes)});
}

// Whether the lanes of a map hold whole units of a format.
template <format::Format F, class Map>
inline constexpr bool kHoldsUnits = Map::kChunk % F::kUnit == 0;

// The first map that serves both sides.
template <format::Format KeyF, format::Format ValueF, class Map, class... Wider>
cudaError_t try_maps(StoreParams params, cudaStream_t stream) {
  const std::int64_t num_rows = params.num_tokens * params.num_heads.divisor;
  if constexpr (kHoldsUnits<KeyF, Map> && kHoldsUnits<ValueF, Map>) {
    if (map_serves<Map>(params.key, num_rows) && map_serves<Map>(params.value, num_rows) &&
        (!Map::kExact || params.slots_fit_31_bits)) {
      if constexpr (kStaged<KeyF, ValueF>) plan_stage<KeyF, ValueF, Map>(params);
      constexpr int kRowsPerBlock = kMapThreads<Map> / Map::kLanes;
      const dim3 grid(static_cast<unsigned>((num_rows + kRowsPerBlock - 1) / kRowsPerBlock));
      return launch_kernel(&store_rows<KeyF, ValueF, Map>, grid, kMapThreads<Map>, 0, params, stream);
    }
  }
  if constexpr (sizeof...(Wider) > 0) return try_maps<KeyF, ValueF, Wider...>(params, stream);
  return cudaErrorInvalidValue;
}

// Defined once per pair of formats, in a generated source each.
template <format::Format KeyF, format::Format ValueF>
cudaError_t launch_store_rows(const StoreParams& params, cudaStream_t stream) {
  // A rotation across lanes costs a shuffle per element and stage, so rotated formats take few lanes: two where K and V
  // share their instructions, four where the instructions of both would not stay in the multiprocessor's cache.
  constexpr bool kRotates = KeyF::kRotation != format::Rotation::kNone || ValueF::kRotation != format::Rotation::kNone;
  using Rotating =
      std::conditional_t<std::is_same_v<KeyF, ValueF>, LaneMap<64, 2, false, true, 32>, LaneMap<32, 4, false, true>>;
  using Map128 = std::conditional_t<kRotates, Rotating, LaneMap<16, 8, false, true>>;
  return try_maps<KeyF, ValueF, Map128, LaneMap<8, 8, false>, LaneMap<16, 8, false>, LaneMap<16, 16, false>,
                  LaneMap<16, 32, true>>(params, stream);
}

}  // namespace quire::cuda
