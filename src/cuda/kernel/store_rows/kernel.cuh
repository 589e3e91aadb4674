// reshape_and_cache as kernels: K rows and V rows of one call in one launch.
//
//   store_rows      any format: a token head's K row and V row over the lanes of a warp (format/encode.cuh), written where its
//                   slot says
//   store_elements  formats without statistics or rotation, one thread per element: the head-major layout, where a row
//                   is not contiguous, and float8 inputs, whose codes are copied
//
// All strides below are in bytes. Compiled without contraction: the bytes are the CPU's.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "cuda/format/encode.cuh"
#include "cuda/format/formats.cuh"
#include "cuda/lane/bytes.cuh"
#include "cuda/lane/input.cuh"
#include "cuda/launch.h"
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

  // Staged rows. Whether a V row starts where its K row ends; how many neighbouring heads' slots adjoin, as a divisor
  // of the rows of a warp; bytes per access to the stage and to the cache.
  bool slots_adjoin = false;
  int run_rows = 1, stage_access = 1, run_access = 1;

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

__device__ __forceinline__ SlotAddress find_slot(const StoreParams& p, std::int64_t slot, bool fits_31_bits,
                                                 bool counts_errors) {
  SlotAddress address;
  if (slot < 0) return address;
  if (slot >= p.num_slots) {
    if (counts_errors && p.error_counter != nullptr) atomicAdd(p.error_counter, 1ULL);
    return address;
  }
  if (fits_31_bits) {
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

inline constexpr int kStoreThreads = 128;  // of store_elements

// Whether a lane's part of a row takes so many registers that it holds one row at a time.
template <class Map>
inline constexpr bool kRowByRow = Map::kElements >= 32;

// Threads of a block of store_rows, and how many blocks are to share a multiprocessor (0: the compiler's choice). Long-
// lived warps come in small blocks: the launch ends sooner after the last one starts.
template <class Map>
inline constexpr int kMapThreads = Map::kElements >= 64 ? 64 : 128;
template <class Map>
inline constexpr int kMinBlocks = kRowByRow<Map> ? 8 : 0;

// Rows with metadata inside lie at odd addresses. Such pairs of formats are assembled in shared memory, K row and V row
// of a token head one behind the other, and copied from there: whole runs of slots where they adjoin, 16 bytes at a
// time, so that no sector is written in parts.
template <format::Format KeyF, format::Format ValueF>
inline constexpr bool kStaged =
    KeyF::kMetaPlace == format::MetaPlace::kInRow || ValueF::kMetaPlace == format::MetaPlace::kInRow;

// Bytes per access to a row in the stage.
template <format::Format KeyF, format::Format ValueF>
constexpr int stage_access(int head_size, int head_size_v) {
  const std::int64_t bits = 16 | format::row_bytes<KeyF>(head_size) | format::code_bytes<KeyF>(head_size) |
                            format::row_bytes<ValueF>(head_size_v) | format::code_bytes<ValueF>(head_size_v);
  return static_cast<int>(bits & -bits);
}

template <format::Format KeyF, format::Format ValueF, class Map>
struct StoreStage {
  static constexpr int kWarpRows = 32 / Map::kLanes;
  static constexpr int kHeadSize = Map::kElements * Map::kLanes;
  static constexpr int kBytes =
      kStaged<KeyF, ValueF>
          ? static_cast<int>(kWarpRows * (format::row_bytes<KeyF>(kHeadSize) + format::row_bytes<ValueF>(kHeadSize)))
          : 1;
  struct alignas(16) Warp {
    std::uint8_t bytes[kBytes];
  };
  Warp warps[kMapThreads<Map> / 32];
};

// pointer + index * stride. Where every lane is full the launcher has seen that both fit 32 bits.
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

// Where a token head lies in a tensor of [num_blocks, block_size, num_heads, ..].
template <class Map>
__device__ __forceinline__ std::uint8_t* paged(std::uint8_t* tensor, const SlotAddress& slot, std::uint32_t head,
                                               std::int64_t block_stride, std::int64_t slot_stride,
                                               std::int64_t head_stride) {
  return advance<Map>(advance<Map>(advance<Map>(tensor, slot.block, block_stride), slot.offset, slot_stride), head,
                      head_stride);
}
template <class Map>
__device__ __forceinline__ std::uint8_t* row_address(const StoreSide& side, const SlotAddress& slot,
                                                     std::uint32_t head) {
  return paged<Map>(side.cache, slot, head, side.block_stride, side.slot_stride, side.head_stride);
}

// Encodes one side's row, y, to `data`: its place in the cache, or in the stage.
template <format::Format F, class Map>
__device__ __forceinline__ void store_row(const StoreSide& side, float (&y)[Map::kElements], const SlotAddress& slot,
                                          std::uint32_t head, int lane, std::uint8_t* data, int access) {
  const int head_size = Map::head_size(side.head_size);
  float tensor_scale = 1.0F;
  if (F::kTensorScale && side.tensor_scale != nullptr)
    tensor_scale = side.tensor_scale[head * side.tensor_scale_stride];
  std::uint8_t* meta = nullptr;
  if constexpr (F::kMetaPlace == format::MetaPlace::kScaleCache) {
    meta = paged<Map>(side.scales, slot, head, side.scale_block_stride, side.scale_slot_stride, side.scale_head_stride);
  } else if constexpr (F::kMetaPlace == format::MetaPlace::kInRow) {
    meta = data + format::code_bytes<F>(head_size);
  }
  encode_row<F, Map>(y, lane, format::row_shape(head_size), tensor_scale, slot.stored, data, access, meta);
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

// The pointer into `base` of another lane. (As a distance: the compiler sees that it points to global memory.)
__device__ __forceinline__ std::uint8_t* shuffle_pointer(std::uint8_t* base, std::uint8_t* pointer, int lane) {
  return base + __shfl_sync(kFullWarp, static_cast<long long>(pointer - base), lane);
}

// Whether K and V run through one body: half the instructions to fetch, and half the library's. Not where both rows are
// to be on their way at once.
template <format::Format KeyF, format::Format ValueF, class Map>
inline constexpr bool kOneBody =
    std::is_same_v<KeyF, ValueF> && !kStaged<KeyF, ValueF> && (kRowByRow<Map> || !Map::kExact);

// K and V of a token head by the same lanes, so that the slot is found once. Both rows are loaded before the first is
// worked on; where a row takes most registers, V is loaded when K's words are free, or K is stored.
template <format::Format KeyF, format::Format ValueF, class Map>
__global__ void __launch_bounds__(kMapThreads<Map>, kMinBlocks<Map>) store_rows(const __grid_constant__ StoreParams p) {
  constexpr int kRowsPerBlock = kMapThreads<Map> / Map::kLanes;
  const int lane = static_cast<int>(threadIdx.x) % Map::kLanes;
  const std::uint32_t row = blockIdx.x * kRowsPerBlock + threadIdx.x / Map::kLanes;
  const std::uint32_t token = p.num_heads.quotient(row);
  const std::uint32_t head = row - token * p.num_heads.divisor;
  // Lanes past the last row work on it too, and store nothing. The inputs do not wait for the slot: all loads are on
  // their way together.
  const bool exists = token < p.num_tokens;
  const std::uint32_t read = exists ? token : static_cast<std::uint32_t>(p.num_tokens) - 1;
  std::int64_t slot_index = load_slot(p, read);
  LaneInput<Map> input = load_input<Map>(p.key, read, head, lane);
  LaneInput<Map> value;
  if constexpr (!kRowByRow<Map> && !kOneBody<KeyF, ValueF, Map>) value = load_input<Map>(p.value, read, head, lane);
  if (!exists) slot_index = -1;
  const SlotAddress slot = find_slot(p, slot_index, Map::kExact || p.slots_fit_31_bits, head == 0 && lane == 0);
  float y[Map::kElements];
  if constexpr (kOneBody<KeyF, ValueF, Map>) {
#pragma unroll 1
    for (int s = 0;; ++s) {
      const StoreSide& side = s == 0 ? p.key : p.value;
      int own_lane = lane;
      asm volatile("" : "+r"(own_lane));  // else the masks of the signs are kept in registers from K to V
      input.template widen<KeyF>(side.input_dtype, own_lane, side.head_size, y);
      if (s == 0) input = load_input<Map>(p.value, read, head, lane);
      store_row<KeyF, Map>(side, y, slot, head, lane, row_address<Map>(side, slot, head), side.cache_access);
      if (s == 1) return;
    }
  }
  input.template widen<KeyF>(p.key.input_dtype, lane, p.key.head_size, y);
  std::uint8_t* const key_to = row_address<Map>(p.key, slot, head);
  std::uint8_t* const value_to = row_address<Map>(p.value, slot, head);
  if constexpr (!kStaged<KeyF, ValueF>) {
    store_row<KeyF, Map>(p.key, y, slot, head, lane, key_to, p.key.cache_access);
    if constexpr (kRowByRow<Map>) value = load_input<Map>(p.value, read, head, lane);
    value.template widen<ValueF>(p.value.input_dtype, lane, p.value.head_size, y);
    store_row<ValueF, Map>(p.value, y, slot, head, lane, value_to, p.value.cache_access);
  } else {
    using Stage = StoreStage<KeyF, ValueF, Map>;
    __shared__ Stage stage;
    const int key_bytes = static_cast<int>(format::row_bytes<KeyF>(Map::head_size(p.key.head_size)));
    const int value_bytes = static_cast<int>(format::row_bytes<ValueF>(Map::head_size(p.value.head_size)));
    const int slot_bytes = key_bytes + value_bytes;
    const int access = Map::kExact ? stage_access<KeyF, ValueF>(Stage::kHeadSize, Stage::kHeadSize) : p.stage_access;
    std::uint8_t* const staged = stage.warps[threadIdx.x / 32].bytes;
    std::uint8_t* const own = staged + static_cast<int>(threadIdx.x) % 32 / Map::kLanes * slot_bytes;
    store_row<KeyF, Map>(p.key, y, slot, head, lane, own, access);
    if constexpr (kRowByRow<Map>) value = load_input<Map>(p.value, read, head, lane);
    value.template widen<ValueF>(p.value.input_dtype, lane, p.value.head_size, y);
    store_row<ValueF, Map>(p.value, y, slot, head, lane, own + key_bytes, access);
    __syncwarp();
    for (int r = 0; r < Stage::kWarpRows; r += p.run_rows) {
      const int source = r * Map::kLanes;
      const bool stored = __shfl_sync(kFullWarp, slot.stored ? 1 : 0, source) != 0;
      std::uint8_t* const to = shuffle_pointer(p.key.cache, key_to, source);
      std::uint8_t* const other = p.slots_adjoin ? nullptr : shuffle_pointer(p.value.cache, value_to, source);
      if (!stored) continue;
      const std::uint8_t* const from = staged + r * slot_bytes;
      copy_by_warp(from, to, p.slots_adjoin ? p.run_rows * slot_bytes : key_bytes, p.run_access);
      if (other != nullptr) copy_by_warp(from + key_bytes, other, value_bytes, p.run_access);
    }
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
  const SlotAddress slot = find_slot(p, load_slot(p, token), p.slots_fit_31_bits, counts_errors && head == 0 && i == 0);
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

inline unsigned blocks_for(std::int64_t items, std::int64_t items_per_block) {
  return static_cast<unsigned>((items + items_per_block - 1) / items_per_block);
}

// Fewer rows than this leave multiprocessors idle if few lanes share a row: then latency counts, not instructions.
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
  p.slots_adjoin = v.cache == k.cache + key_bytes && v.block_stride == k.block_stride &&
                   v.slot_stride == k.slot_stride && v.head_stride == k.head_stride;
  p.run_rows = 1;
  if (!p.slots_adjoin) {
    p.run_access = std::min(access_bytes(k.cache, {k.block_stride, k.slot_stride, k.head_stride, key_bytes}),
                            access_bytes(v.cache, {v.block_stride, v.slot_stride, v.head_stride, value_bytes}));
    return;
  }
  if (k.head_stride == key_bytes + value_bytes) {
    p.run_rows = std::gcd(static_cast<int>(p.num_heads.divisor), 32 / Map::kLanes);
  }
  p.run_access = access_bytes(
      k.cache, {k.block_stride, k.slot_stride, p.run_rows * k.head_stride, p.run_rows * (key_bytes + value_bytes)});
}

// The first map that serves both sides.
template <format::Format KeyF, format::Format ValueF, class Map, class... Wider>
cudaError_t launch_store_rows(StoreParams params, cudaStream_t stream) {
  const std::int64_t num_rows = params.num_tokens * params.num_heads.divisor;
  if (!map_serves<Map>(params.key, num_rows) || !map_serves<Map>(params.value, num_rows) ||
      (Map::kExact && !params.slots_fit_31_bits)) {
    if constexpr (sizeof...(Wider) > 0) return launch_store_rows<KeyF, ValueF, Wider...>(params, stream);
    return cudaErrorInvalidValue;
  }
  if constexpr (kStaged<KeyF, ValueF>) plan_stage<KeyF, ValueF, Map>(params);
  const unsigned blocks = blocks_for(num_rows, kMapThreads<Map> / Map::kLanes);
  store_rows<KeyF, ValueF, Map><<<blocks, kMapThreads<Map>, 0, stream>>>(params);
  return cudaGetLastError();
}

// Defined once per pair of formats, in a generated source each.
template <format::Format KeyF, format::Format ValueF>
cudaError_t launch_store(const StoreParams& params, bool by_element, cudaStream_t stream) {
  if (by_element) {
    if constexpr (kElementwise<KeyF> && kElementwise<ValueF>) {
      const int head_size =
          params.key.head_size > params.value.head_size ? params.key.head_size : params.value.head_size;
      const dim3 grid{blocks_for(params.num_tokens * params.num_heads.divisor * head_size, kStoreThreads), 2, 1};
      store_elements<KeyF, ValueF><<<grid, kStoreThreads, 0, stream>>>(params);
      return cudaGetLastError();
    } else {
      return cudaErrorInvalidValue;
    }
  }
  // A rotation across lanes costs a shuffle per element and stage, so rotated formats take few lanes: two where K and V
  // share their instructions, four where the instructions of both would not stay in the multiprocessor's cache.
  constexpr bool kRotates = KeyF::kRotation != format::Rotation::kNone || ValueF::kRotation != format::Rotation::kNone;
  using Rotating =
      std::conditional_t<std::is_same_v<KeyF, ValueF>, LaneMap<64, 2, false, true, 32>, LaneMap<32, 4, false, true>>;
  using Map128 = std::conditional_t<kRotates, Rotating, LaneMap<16, 8, false, true>>;
  return launch_store_rows<KeyF, ValueF, Map128, LaneMap<8, 8, false>, LaneMap<16, 8, false>, LaneMap<16, 16, false>,
                           LaneMap<16, 32, true>>(params, stream);
}

}  // namespace quire::cuda
