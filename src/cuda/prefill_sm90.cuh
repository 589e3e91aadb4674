// prefill_split for Hopper: the same tiles, arithmetic and results on `wgmma`, for head sizes up to 128.
//
//   block   three warpgroups. The first looks up, copies and converts K and V tiles of 128 keys; each of the other two
//           owns 64 of the 128 rows and multiplies.
//   tile    levels lie in shared memory as wgmma reads them (128-byte swizzle), two stages of K and two of V, each with
//           a barrier that says full and one that says empty. 16-bit rows are copied there; codes land raw and become
//           levels on the way from one place to the other.
//   overlap one consumer's softmax runs under the other's products, and the producer's copies and conversions under
//   both.
//
// Compiled for sm_90a, the only architecture with wgmma. Budget: docs/kernels/prefill.md.
#pragma once

#include "cuda/launch.h"
#include "cuda/softmax.cuh"

namespace quire::cuda {

inline constexpr int kMaxHeadSm90 = 128;

// Whether this pass of the compiler knows wgmma. runs_sm90_kernels() (launch.h) says the same of the device.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif

template <class KeyF, class ValueF>
struct PrefillSm90Config {
  static constexpr int kHead = kMaxHeadSm90;
  static constexpr int kRows = kPrefillRows<kHead>;
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;
  static constexpr int kWarpgroup = 128;  // threads
  static constexpr int kConsumers = 2;    // warpgroups
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kWarpRows = kRows / kConsumers / 4;
  static_assert(kWarpRows == 16 && kKeys == kWarpgroup);
  static constexpr bool kConvertsKey = !kRaw16<KeyF>;
  static constexpr bool kConvertsValue = !kRaw16<ValueF>;
  static constexpr int kKeyRaw = kConvertsKey ? kKeys * RawRow<KeyF, kHead>::kPitch : 0;
  static constexpr int kValueRaw = kConvertsValue ? kKeys * RawRow<ValueF, kHead>::kPitch : 0;
  // 65536 registers of a multiprocessor: 128 x 88 + 256 x 208.
  static constexpr int kProducerRegisters = 88;
  static constexpr int kConsumerRegisters = 208;

  // 128 rows of 128 elements: two halves of 64 columns, swizzled.
  static constexpr int kHalf = 128 * 128;
  struct Matrix {
    alignas(1024) std::uint8_t bytes[2 * kHalf];

    // Chunk c, 16 bytes, of a row.
    static __device__ __forceinline__ int offset(int row, int chunk) {
      return (chunk >> 3) * kHalf + row * 128 + ((chunk ^ row) & 7) * 16;
    }
  };
  struct Stages {
    Matrix key[kStages], value[kStages];
  };
  struct Rows {
    float acc[kRows][kHead + 4];
  };
  // What the softmax of a tile needs besides its logits, filled and emptied with its K (V) stage.
  struct KeyMeta {
    alignas(8) float scale[kKeys], offset[kKeys];
    std::uint32_t readable[kKeys / 32];  // one bit a key
  };
  struct ValueMeta {
    alignas(8) float scale[kKeys], offset[kKeys];
    std::uint32_t largest[kKeys / 32];  // scale of 32 keys, as bits
  };
  struct Storage {
    Matrix query;
    union {
      Stages stages;
      Rows rows;
    };
    alignas(16) std::uint8_t key_raw[kKeyRaw > 0 ? kKeyRaw : 16];
    alignas(16) std::uint8_t value_raw[kValueRaw > 0 ? kValueRaw : 16];
    KeyMeta key_meta[kStages];
    ValueMeta value_meta[kStages];
    std::int64_t offset[2][2][kKeys];  // of K and V rows, -1: not read; two tiles, used in turn
    float scales[2][kKeys];            // of K and V, where they come from a scale cache
    RowInfo row[kRows];
    std::uint64_t key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
  };
  static constexpr int kStorageBytes = sizeof(Storage) + 1024;  // to start at a multiple of 1024
  static_assert(kStorageBytes <= 227 * 1024);
};

// The producer's barrier, the consumers' own and their common one; 0 is __syncthreads.
enum PrefillBarrier : int { kProducerBarrier = 1, kConsumersBarrier = 2, kConsumerBarrier = 3 };

// The warpgroup that fills the stages, tile after tile.
template <class KeyF, class ValueF, class Config = PrefillSm90Config<KeyF, ValueF>>
__device__ __forceinline__ void produce_tiles(const AttentionParams& p, const TileRows& tile, int kv_head,
                                              typename Config::Storage& shared, int first_key, int num_tiles,
                                              int thread) {
  constexpr int kHead = Config::kHead;
  constexpr int kKeys = Config::kKeys;
  constexpr bool kKeyScales = KeyF::kMetaPlace == format::MetaPlace::kScaleCache;
  constexpr bool kValueScales = ValueF::kMetaPlace == format::MetaPlace::kScaleCache;
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int key_row_bytes = static_cast<int>(format::row_bytes<KeyF>(p.head_size));
  const int value_row_bytes = static_cast<int>(format::row_bytes<ValueF>(p.head_size_v));
  const bool key_aligned = p.key.row_access >= 16;
  const bool value_aligned = p.value.row_access >= 16;
  const bool key_dense = is_dense<KeyF, kHead>(p.key, p.head_size);
  const bool value_dense = is_dense<ValueF, kHead>(p.value, p.head_size_v);

  // A thread looks up and converts one key's rows; all of them copy every row.
  KeyPlace place{-1, 0};
  const auto look_up = [&](int j) {
    place = find_key(p, tile.batch, first_key + j * kKeys + thread, tile.begin, tile.end, kv_head == 0);
    shared.offset[j & 1][0][thread] = row_offset(p.key, place, kv_head);
    shared.offset[j & 1][1][thread] = row_offset(p.value, place, kv_head);
    return __ballot_sync(kFullWarp, place.block >= 0);
  };
  const auto stage_rows = [](typename Config::Matrix& matrix) {
    return [to = ptx::shared_address(matrix.bytes)](int row, int chunk) -> std::uint32_t {
      return to + Config::Matrix::offset(row, chunk);
    };
  };
  const auto copy_key = [&](int j) {
    if (j < num_tiles) {
      if constexpr (Config::kConvertsKey) {
        copy_rows<KeyF, kHead, kKeys, kKeys>(p.key, shared.offset[j & 1][0], key_dense, key_row_bytes,
                                             raw_rows<KeyF, kHead>(shared.key_raw), thread);
        if constexpr (kKeyScales) copy_scale(p.key, place, kv_head, &shared.scales[0][thread]);
      } else {
        ptx::mbarrier_wait(&shared.key_empty[j & 1], (j >> 1 & 1) ^ 1);
        copy_rows<KeyF, kHead, kKeys, kKeys>(p.key, shared.offset[j & 1][0], key_dense, key_row_bytes,
                                             stage_rows(shared.stages.key[j & 1]), thread);
      }
    }
    ptx::cp_async_commit();
  };
  const auto copy_value = [&](int j) {
    if (j < num_tiles) {
      if constexpr (Config::kConvertsValue) {
        copy_rows<ValueF, kHead, kKeys, kKeys>(p.value, shared.offset[j & 1][1], value_dense, value_row_bytes,
                                               raw_rows<ValueF, kHead>(shared.value_raw), thread);
        if constexpr (kValueScales) copy_scale(p.value, place, kv_head, &shared.scales[1][thread]);
      } else {
        ptx::mbarrier_wait(&shared.value_empty[j & 1], (j >> 1 & 1) ^ 1);
        copy_rows<ValueF, kHead, kKeys, kKeys>(p.value, shared.offset[j & 1][1], value_dense, value_row_bytes,
                                               stage_rows(shared.stages.value[j & 1]), thread);
      }
    }
    ptx::cp_async_commit();
  };

  std::uint32_t readable = look_up(0);
  ptx::barrier_sync(kProducerBarrier, kKeys);
  copy_key(0);
  copy_value(0);
  std::uint32_t next_readable = look_up(1);
  for (int j = 0; j < num_tiles; ++j) {
    const int stage = j & 1;
    const std::uint32_t parity = j >> 1 & 1;
    ptx::cp_async_wait<1>();
    ptx::barrier_sync(kProducerBarrier, kKeys);  // everyone's copies of K, and what everyone looked up
    auto& key_meta = shared.key_meta[stage];
    if constexpr (Config::kConvertsKey) {
      const std::uint8_t* row = shared.key_raw + thread * RawRow<KeyF, kHead>::kPitch;
      if (!key_aligned) row += row_skew(p.key, ::max(shared.offset[stage][0][thread], std::int64_t{0}));
      ptx::mbarrier_wait(&shared.key_empty[stage], parity ^ 1);
      float squares = 0.0F;
      std::uint8_t* to = shared.stages.key[stage].bytes;
      convert_part<KeyF, kHead / 32>(
          row, key_aligned, [=](int chunk) { return to + Config::Matrix::offset(thread, chunk); }, p.head_size,
          &squares);
      if constexpr (KeyF::kMetaBytes > 0) {
        const auto* meta = kKeyScales ? reinterpret_cast<const std::uint8_t*>(&shared.scales[0][thread])
                                      : row + format::code_bytes<KeyF>(p.head_size);
        format::Affine affine = KeyF::read_meta(meta, format::row_shape(p.head_size));
        if constexpr (KeyF::kLevelNorm) affine.scale *= rsqrtf(squares);
        key_meta.scale[thread] = affine.scale;
        if constexpr (KeyF::kHasOffset) key_meta.offset[thread] = affine.offset;
      }
    }
    if (lane == 0) key_meta.readable[warp] = readable;
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(&shared.key_full[stage]);
    if constexpr (Config::kConvertsKey) ptx::barrier_sync(kProducerBarrier, kKeys);  // the raw rows have been read
    copy_key(j + 1);

    ptx::cp_async_wait<1>();
    if constexpr (Config::kConvertsValue) {
      ptx::barrier_sync(kProducerBarrier, kKeys);
      const std::uint8_t* row = shared.value_raw + thread * RawRow<ValueF, kHead>::kPitch;
      if (!value_aligned) row += row_skew(p.value, ::max(shared.offset[stage][1][thread], std::int64_t{0}));
      ptx::mbarrier_wait(&shared.value_empty[stage], parity ^ 1);
      float unused = 0.0F;
      std::uint8_t* to = shared.stages.value[stage].bytes;
      convert_part<ValueF, kHead / 32>(
          row, value_aligned, [=](int chunk) { return to + Config::Matrix::offset(thread, chunk); }, p.head_size_v,
          &unused);
      if constexpr (ValueF::kMetaBytes > 0) {
        const auto* meta = kValueScales ? reinterpret_cast<const std::uint8_t*>(&shared.scales[1][thread])
                                        : row + format::code_bytes<ValueF>(p.head_size_v);
        const format::Affine affine = ValueF::read_meta(meta, format::row_shape(p.head_size_v));
        const float scale = affine.scale / level_unit<ValueF>;
        auto& value_meta = shared.value_meta[stage];
        value_meta.scale[thread] = scale;
        if constexpr (ValueF::kHasOffset) value_meta.offset[thread] = affine.offset;
        const std::uint32_t largest = __reduce_max_sync(kFullWarp, __float_as_uint(fabsf(scale)));
        if (lane == 0) value_meta.largest[warp] = largest;
      }
    }
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(&shared.value_full[stage]);
    if constexpr (Config::kConvertsValue) ptx::barrier_sync(kProducerBarrier, kKeys);
    copy_value(j + 1);
    readable = next_readable;
    next_readable = look_up(j + 2);
  }
}

template <class KeyF, class ValueF>
__device__ __forceinline__ void prefill_rows_sm90(const AttentionParams& p) {
  using Config = PrefillSm90Config<KeyF, ValueF>;
  constexpr int kHead = Config::kHead;
  constexpr int kKeys = Config::kKeys;
  constexpr int kKeySteps = kKeys / 16;
  constexpr bool kKeyBf16 = std::is_same_v<KeyF, format::BFloat16>;
  constexpr bool kValueBf16 = std::is_same_v<ValueF, format::BFloat16>;
  constexpr bool kValueMeta = ValueF::kMetaBytes > 0;
  constexpr int kConsumerWarps = Config::kConsumers * 4;

  extern __shared__ float4 shared_bytes[];
  const std::uint32_t skew = -ptx::shared_address(shared_bytes) & 1023U;
  auto& shared = *reinterpret_cast<typename Config::Storage*>(reinterpret_cast<std::uint8_t*>(shared_bytes) + skew);
  const int kv_head = static_cast<int>(blockIdx.y);
  TileRows tile;
  if (!find_tile_rows(p, gridDim.x - 1 - blockIdx.x, Config::kRows, tile)) return;
  const int first_key = tile.begin / kKeys * kKeys;
  const int num_tiles = tile.begin < tile.end ? (tile.end - first_key + kKeys - 1) / kKeys : 0;
  const int thread = static_cast<int>(threadIdx.x) % Config::kWarpgroup;
  // The same in all lanes, and known to be.
  const int warpgroup = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / Config::kWarpgroup, 0);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Config::kStages; ++s) {
      ptx::mbarrier_init(&shared.key_full[s], Config::kWarpgroup);
      ptx::mbarrier_init(&shared.value_full[s], Config::kWarpgroup);
      ptx::mbarrier_init(&shared.key_empty[s], kConsumerWarps);
      ptx::mbarrier_init(&shared.value_empty[s], kConsumerWarps);
    }
  }
  __syncthreads();

  if (warpgroup == 0) {
    ptx::give_registers<Config::kProducerRegisters>();
    produce_tiles<KeyF, ValueF>(p, tile, kv_head, shared, first_key, num_tiles, thread);
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    const int lane = thread % 32;
    const int quad = lane / 4;
    const int pair = lane % 4 * 2;
    const int group_row = (warpgroup - 1) * 64;
    const int first_row = group_row + thread / 32 * Config::kWarpRows;
    load_queries<KeyF, kHead, Config::kWarpRows>(
        p, tile, kv_head, first_row,
        [&](int row) {
          return [&shared, row](int chunk) { return shared.query.bytes + Config::Matrix::offset(row, chunk); };
        },
        shared.row, lane);
    ptx::fence_proxy_async();
    ptx::barrier_sync(kConsumerBarrier + warpgroup, Config::kWarpgroup);

    const float logit_factor = log2_factor<KeyF>(p, tile.batch, kv_head);
    const bool biased = has_bias(p, logit_factor);
    RunningSoftmax<1> state(logit_factor, shared.row + first_row, quad, kValueMeta ? 0.0F : 1.0F);
    float acc[1][16][4] = {};

    const std::uint64_t query_matrix = ptx::wgmma_matrix(ptx::shared_address(shared.query.bytes) + group_row * 128, 16);
    const std::uint64_t key_matrix = ptx::wgmma_matrix(ptx::shared_address(shared.stages.key[0].bytes), 16);
    const std::uint64_t value_matrix =
        ptx::wgmma_matrix(ptx::shared_address(shared.stages.value[0].bytes), Config::kHalf);
    constexpr int kStage = sizeof(typename Config::Matrix) / 16;  // in units of a matrix's address
    const auto release = [&](std::uint64_t* barrier) {
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(barrier);
    };

#pragma unroll 1
    for (int j = 0; j < num_tiles; ++j) {
      const int stage = j & 1;
      const std::uint32_t parity = j >> 1 & 1;

      float s[1][16][4];
      const std::uint64_t keys = key_matrix + stage * kStage;
      ptx::mbarrier_wait(&shared.key_full[stage], parity);
      ptx::wgmma_fence();
      ptx::wgmma_64x128x16<kKeyBf16, false>(s[0], query_matrix, keys);
#pragma unroll
      for (int k = 1; k < kHead / 16; ++k) {
        const int step = (k / 4 * Config::kHalf + k % 4 * 32) / 16;
        ptx::wgmma_64x128x16<kKeyBf16, true>(s[0], query_matrix + step, keys + step);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();

      const auto& key_meta = shared.key_meta[stage];
      const int tile_key = first_key + j * kKeys;
      std::uint32_t readable[kKeys / 32];
      bool all_seen = tile_key >= tile.full_begin && tile_key + kKeys <= tile.full_end;
#pragma unroll
      for (int w = 0; w < kKeys / 32; ++w) {
        readable[w] = key_meta.readable[w];
        all_seen = all_seen && readable[w] == 0xffffffffU;
      }
      scale_logits<KeyF>(s, state, key_meta.scale, key_meta.offset, pair);
      release(&shared.key_empty[stage]);
      if (biased) bias_logits(s, state, p, tile, shared.row + first_row, tile_key, quad, pair);
      if (!all_seen) mask_logits(s, shared.row + first_row, readable, tile_key, quad, pair);
      float correction[1][2];
      bool moved = exponentials(s, state, biased, correction);

      ptx::mbarrier_wait(&shared.value_full[stage], parity);
      if constexpr (kValueMeta) {
        const auto& value_meta = shared.value_meta[stage];
        std::uint32_t largest = value_meta.largest[0];
#pragma unroll
        for (int w = 1; w < kKeys / 32; ++w) largest = ::max(largest, value_meta.largest[w]);
        moved |= weigh_values<ValueF>(s, state, value_meta.scale, value_meta.offset, largest, correction, pair);
      }
      if (__any_sync(kFullWarp, moved)) rescale(acc, correction);
      std::uint32_t weights[kKeySteps][4];
#pragma unroll
      for (int t = 0; t < kKeySteps; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weights[t][i] = pack_pair<kValueBf16>(s[0][2 * t + i / 2][i % 2 * 2], s[0][2 * t + i / 2][i % 2 * 2 + 1]);
        }
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int t = 0; t < kKeySteps; ++t) {
        ptx::wgmma_64x128x16<kValueBf16>(acc[0], weights[t], value_matrix + stage * kStage + t * (16 * 128 / 16));
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      release(&shared.value_empty[stage]);
    }
    // The stages' memory becomes Rows.
    ptx::barrier_sync(kConsumersBarrier, Config::kConsumers * Config::kWarpgroup);
    finish_rows<KeyF, ValueF>(p, tile, kv_head, acc, state, biased, shared.rows.acc, shared.row, first_row, lane);
  }
}

template <format::Format KeyF, format::Format ValueF>
__global__ void __launch_bounds__(PrefillSm90Config<KeyF, ValueF>::kThreads, 1)
    prefill_split_sm90(const __grid_constant__ AttentionParams p) {
  if constexpr (kHasWgmma) {
    prefill_rows_sm90<KeyF, ValueF>(p);
  } else {
    __trap();
  }
}

template <format::Format KeyF, format::Format ValueF>
cudaError_t launch_prefill_sm90(const AttentionParams& params, std::int64_t tiles, int num_kv_heads,
                                cudaStream_t stream) {
  using Config = PrefillSm90Config<KeyF, ValueF>;
  const auto kernel = &prefill_split_sm90<KeyF, ValueF>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kStorageBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(num_kv_heads),
                  static_cast<unsigned>(params.max_splits));
  kernel<<<grid, Config::kThreads, Config::kStorageBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace quire::cuda
