// prefill_split for Hopper: the same tiles, arithmetic and results on `wgmma`, for head sizes up to 128.
//
//   block   three warpgroups. The first looks up, copies and converts K and V tiles of 128 keys; each of the other two
//           owns 64 of the 128 query rows and multiplies.
//   tile    levels lie in shared memory as wgmma reads them (128-byte swizzle), two stages of K and two of V, each with
//           a barrier that says full and one that says empty. 16-bit rows are copied there; codes land raw, pass
//           through registers and become levels.
//   turns   the consumers take turns at the tensor cores: one's softmax runs under the other's products, the
//           producer's copies and conversions under both.
//
// Compiled for sm_90a, the only architecture with wgmma. Budget: docs/kernels/prefill.md.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/format/formats.cuh"
#include "cuda/launch.h"
#include "cuda/output/rows.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/softmax/softmax.cuh"
#include "cuda/stage/levels.cuh"
#include "cuda/stage/query.cuh"
#include "cuda/stage/rows.cuh"
#include "cuda/work/pages.cuh"
#include "cuda/work/rows.cuh"

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
  static constexpr int kLookAhead = 4;    // tiles whose rows' places are kept: at least 3
  static constexpr int kWarpgroup = 128;  // threads
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kWarpRows = 16;
  static_assert(kRows == 2 * 4 * kWarpRows && kKeys == kWarpgroup);
  // Of a multiprocessor's 65536 registers: 128 x 88 + 256 x 208.
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
  // What a stage's levels mean.
  struct Meta {
    alignas(8) float scale[kKeys], offset[kKeys];
    std::uint32_t readable[kKeys / 32];       // K: one bit a key
    std::uint32_t largest_scale[kKeys / 32];  // V: of 32 keys, as bits
  };
  // Of K or V: what producer and consumers share besides the stages.
  template <class F>
  struct Side {
    alignas(16) std::uint8_t raw[kRaw16<F> ? 16 : kKeys * RawRow<F, kHead>::kPitch];
    Meta meta[kStages];
    std::int64_t offset[kLookAhead][kKeys];  // of rows; -1: not read
    float scales[kKeys];                     // where they come from a scale cache
    std::uint64_t full[kStages], empty[kStages];
  };
  struct Storage {
    Matrix query;
    union {
      Stages stages;
      Rows rows;
    };
    Side<KeyF> key;
    Side<ValueF> value;
    RowInfo row[kRows];
  };
  static constexpr int kStorageBytes = sizeof(Storage) + 1024;  // to start at a multiple of 1024
  static_assert(kStorageBytes <= 227 * 1024);
};

// Barriers of a block by number; 0 is __syncthreads. The last two are pairs, one for each consumer.
enum : int { kProducersBarrier = 1, kConsumersBarrier = 2, kConsumerBarrier = 3, kTurnBarrier = 5 };

// Fills the stages of K or V, tile after tile. A thread looks up and converts one row of a tile; all of the warpgroup
// copy every row.
template <class F, bool kIsKey, class Config>
class TileProducer {
 public:
  __device__ __forceinline__ TileProducer(const AttentionParams& p, const TileRows& tile, int kv_head,
                                          typename Config::Matrix* stages, typename Config::template Side<F>& shared,
                                          int first_key, int num_tiles, int thread)
      : p_(p),
        tile_(tile),
        stages_(stages),
        shared_(shared),
        kv_head_(kv_head),
        first_key_(first_key),
        num_tiles_(num_tiles),
        thread_(thread),
        dense_(is_dense<F, kHead>(side(), head_size())) {}

  // All of the warpgroup start together, and meet at kProducersBarrier after this.
  __device__ __forceinline__ void look_up_first() { readable_ = look_up(0); }

  // K's and V's groups of copies take turns from here on, which fill() counts on: empty ones where there is nothing
  // yet.
  __device__ __forceinline__ void start() {
    if constexpr (kConverts) {
      start_copies(0);
    } else {
      ptx::cp_async_commit();
    }
    next_readable_ = look_up(1);
  }

  __device__ __forceinline__ void fill(int j) {
    const int stage = j % Config::kStages;
    const std::uint32_t parity_before = (j / Config::kStages & 1) ^ 1;
    auto& meta = shared_.meta[stage];
    if constexpr (kConverts) {
      ptx::cp_async_wait<1>();                      // the other side's copies came later
      ptx::barrier_sync(kProducersBarrier, kKeys);  // everyone's copies, and what everyone looked up
      const bool aligned = side().row_access >= 16;
      const std::uint8_t* row = shared_.raw + thread_ * RawRow<F, kHead>::kPitch;
      if (!aligned) row += row_skew(side(), ::max(shared_.offset[j % Config::kLookAhead][thread_], std::int64_t{0}));
      std::uint32_t codes[kHead / 32][Levels16<F>::kWords];
#pragma unroll
      for (int g = 0; g < kHead / 32; ++g) load_codes<F>(row, aligned, g, codes[g]);
      format::Affine affine{};
      if constexpr (F::kMetaBytes > 0) {
        const auto* bytes = kScaleCache ? reinterpret_cast<const std::uint8_t*>(&shared_.scales[thread_])
                                        : row + format::code_bytes<F>(head_size());
        affine = F::read_meta(bytes, format::row_shape(head_size()));
      }
      ptx::barrier_sync(kProducersBarrier, kKeys);  // the raw rows have been read
      start_copies(j + 1);

      ptx::mbarrier_wait(&shared_.empty[stage], parity_before);
      float squares = 0.0F;
      std::uint8_t* to = stages_[stage].bytes;
      const int row_index = thread_;
#pragma unroll
      for (int g = 0; g < kHead / 32; ++g) {
        put_levels<F>(
            codes[g], [=](int chunk) { return to + Config::Matrix::offset(row_index, 4 * g + chunk); },
            head_size() - 32 * g, &squares);
      }
      if constexpr (F::kMetaBytes > 0) {
        if constexpr (F::kLevelNorm) affine.scale *= rsqrtf(squares);
        if constexpr (!kIsKey) {
          affine.scale /= level_unit<F>;  // a key's unit is in the softmax's factor
          const std::uint32_t largest = __reduce_max_sync(kFullWarp, __float_as_uint(fabsf(affine.scale)));
          if (thread_ % 32 == 0) meta.largest_scale[thread_ / 32] = largest;
        }
        meta.scale[thread_] = affine.scale;
        if constexpr (F::kHasOffset) meta.offset[thread_] = affine.offset;
      }
      ptx::fence_proxy_async();
    } else {
      ptx::barrier_sync(kProducersBarrier, kKeys);  // what everyone looked up
      ptx::mbarrier_wait(&shared_.empty[stage], parity_before);
      copy_rows<F, kHead, kKeys, kKeys>(
          side(), shared_.offset[j % Config::kLookAhead], dense_, row_bytes(),
          [to = ptx::shared_address(stages_[stage].bytes)](int row, int chunk) -> std::uint32_t {
            return to + Config::Matrix::offset(row, chunk);
          },
          thread_);
      ptx::mbarrier_arrive_after_copies(&shared_.full[stage]);
      ptx::cp_async_commit();
    }
    if (kIsKey && thread_ % 32 == 0) meta.readable[thread_ / 32] = readable_;
    ptx::mbarrier_arrive(&shared_.full[stage]);
    readable_ = next_readable_;
    next_readable_ = look_up(j + 2);
  }

 private:
  static constexpr int kHead = Config::kHead;
  static constexpr int kKeys = Config::kKeys;
  static constexpr bool kConverts = !kRaw16<F>;
  static constexpr bool kScaleCache = F::kMetaPlace == format::MetaPlace::kScaleCache;

  __device__ __forceinline__ const CacheSide& side() const { return kIsKey ? p_.key : p_.value; }
  __device__ __forceinline__ int head_size() const { return kIsKey ? p_.head_size : p_.head_size_v; }
  __device__ __forceinline__ int row_bytes() const { return static_cast<int>(format::row_bytes<F>(head_size())); }

  // Returns the warp's readable keys, one bit each.
  __device__ __forceinline__ std::uint32_t look_up(int j) {
    place_ =
        find_key(p_, tile_.batch, first_key_ + j * kKeys + thread_, tile_.begin, tile_.end, kIsKey && kv_head_ == 0);
    shared_.offset[j % Config::kLookAhead][thread_] = row_offset(side(), place_, kv_head_);
    return __ballot_sync(kFullWarp, place_.block >= 0);
  }

  __device__ __forceinline__ void start_copies(int j) {
    if (j < num_tiles_) {
      copy_rows<F, kHead, kKeys, kKeys>(side(), shared_.offset[j % Config::kLookAhead], dense_, row_bytes(),
                                        raw_rows<F, kHead>(shared_.raw), thread_);
      if constexpr (kScaleCache) copy_scale(side(), place_, kv_head_, &shared_.scales[thread_]);
    }
    ptx::cp_async_commit();
  }

  const AttentionParams& p_;
  const TileRows& tile_;
  typename Config::Matrix* const stages_;
  typename Config::template Side<F>& shared_;
  const int kv_head_, first_key_, num_tiles_, thread_;
  const bool dense_;
  KeyPlace place_{-1, 0};            // of the last tile looked up
  std::uint32_t readable_ = 0;       // of the next tile to fill
  std::uint32_t next_readable_ = 0;  // and of the one after
};

template <class KeyF, class ValueF>
__device__ __forceinline__ void prefill_rows_sm90(const AttentionParams& p) {
  using Config = PrefillSm90Config<KeyF, ValueF>;
  constexpr int kHead = Config::kHead;
  constexpr int kKeys = Config::kKeys;
  constexpr int kKeySteps = kKeys / 16;
  constexpr bool kKeyBf16 = std::is_same_v<KeyF, format::BFloat16>;
  constexpr bool kValueBf16 = std::is_same_v<ValueF, format::BFloat16>;
  constexpr bool kValueMeta = ValueF::kMetaBytes > 0;
  // A producer's thread arrives once, and once more with its copies where it does not convert them.
  constexpr int kKeyArrivals = Config::kWarpgroup * (kRaw16<KeyF> ? 2 : 1);
  constexpr int kValueArrivals = Config::kWarpgroup * (kRaw16<ValueF> ? 2 : 1);
  constexpr int kConsumerWarps = 8;

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
      ptx::mbarrier_init(&shared.key.full[s], kKeyArrivals);
      ptx::mbarrier_init(&shared.key.empty[s], kConsumerWarps);
      ptx::mbarrier_init(&shared.value.full[s], kValueArrivals);
      ptx::mbarrier_init(&shared.value.empty[s], kConsumerWarps);
    }
  }
  __syncthreads();

  if (warpgroup == 0) {
    ptx::give_registers<Config::kProducerRegisters>();
    TileProducer<KeyF, true, Config> keys(p, tile, kv_head, shared.stages.key, shared.key, first_key, num_tiles,
                                          thread);
    TileProducer<ValueF, false, Config> values(p, tile, kv_head, shared.stages.value, shared.value, first_key,
                                               num_tiles, thread);
    keys.look_up_first();
    values.look_up_first();
    ptx::barrier_sync(kProducersBarrier, Config::kWarpgroup);
    keys.start();
    values.start();
    for (int j = 0; j < num_tiles; ++j) {
      keys.fill(j);
      values.fill(j);
    }
    ptx::cp_async_wait<0>();
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    const int consumer = warpgroup - 1;
    const int lane = thread % 32;
    const int quad = lane / 4;
    const int pair = lane % 4 * 2;
    const int group_row = consumer * 64;
    const int first_row = group_row + thread / 32 * Config::kWarpRows;
    load_queries<KeyF, kHead, Config::kWarpRows>(
        p, tile, kv_head, first_row,
        [&](int row) {
          return [&shared, row](int chunk) { return shared.query.bytes + Config::Matrix::offset(row, chunk); };
        },
        shared.row, lane);
    ptx::fence_proxy_async();
    ptx::barrier_sync(kConsumerBarrier + consumer, Config::kWarpgroup);

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

    std::uint32_t weights[kKeySteps][4];
    const auto start_values = [&](int j) {
      const std::uint64_t values = value_matrix + (j & 1) * kStage;
      ptx::wgmma_fence();
#pragma unroll
      for (int t = 0; t < kKeySteps; ++t) {
        ptx::wgmma_64x128x16<kValueBf16>(acc[0], weights[t], values + t * (16 * 128 / 16));
      }
      ptx::wgmma_commit();
    };
    // The consumers take turns at the tensor cores, so that one's softmax falls under the other's products.
    const int own_turn = kTurnBarrier + consumer;
    const int other_turn = kTurnBarrier + 1 - consumer;
    if (consumer == 1 && num_tiles > 0) ptx::barrier_arrive(other_turn, 2 * Config::kWarpgroup);
#pragma unroll 1
    for (int j = 0; j < num_tiles; ++j) {
      const int stage = j & 1;
      const std::uint32_t parity = j >> 1 & 1;
      ptx::mbarrier_wait(&shared.key.full[stage], parity);
      if (j > 0) ptx::mbarrier_wait(&shared.value.full[stage ^ 1], (j - 1) >> 1 & 1);
      if constexpr (kRaw16<KeyF> || kRaw16<ValueF>) ptx::fence_proxy_async();  // converted rows come fenced
      ptx::barrier_sync(own_turn, 2 * Config::kWarpgroup);
      if (j > 0) {
        start_values(j - 1);
        ptx::wgmma_wait<0>();
      }
      float s[1][16][4];
      const std::uint64_t keys = key_matrix + stage * kStage;
      ptx::wgmma_fence();
      ptx::wgmma_64x128x16<kKeyBf16, false>(s[0], query_matrix, keys);
#pragma unroll
      for (int k = 1; k < kHead / 16; ++k) {
        const int step = (k / 4 * Config::kHalf + k % 4 * 32) / 16;
        ptx::wgmma_64x128x16<kKeyBf16, true>(s[0], query_matrix + step, keys + step);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      if (j + 1 < num_tiles || consumer == 0) ptx::barrier_arrive(other_turn, 2 * Config::kWarpgroup);
      if (j > 0) release(&shared.value.empty[stage ^ 1]);

      const auto& key_meta = shared.key.meta[stage];
      const int tile_key = first_key + j * kKeys;
      std::uint32_t readable[kKeys / 32];
      bool all_seen = tile_key >= tile.full_begin && tile_key + kKeys <= tile.full_end;
#pragma unroll
      for (int w = 0; w < kKeys / 32; ++w) {
        readable[w] = key_meta.readable[w];
        all_seen = all_seen && readable[w] == 0xffffffffU;
      }
      scale_logits<KeyF>(s, state, key_meta.scale, key_meta.offset, pair);
      release(&shared.key.empty[stage]);
      if (biased) bias_logits(s, state, p, tile, shared.row + first_row, tile_key, quad, pair);
      if (!all_seen) mask_logits(s, shared.row + first_row, readable, tile_key, quad, pair);
      float correction[1][2];
      bool moved = exponentials(s, state, biased, correction);

      if constexpr (kValueMeta) {
        ptx::mbarrier_wait(&shared.value.full[stage], parity);
        const auto& value_meta = shared.value.meta[stage];
        std::uint32_t largest = value_meta.largest_scale[0];
#pragma unroll
        for (int w = 1; w < kKeys / 32; ++w) largest = ::max(largest, value_meta.largest_scale[w]);
        moved |= weigh_values<ValueF>(s, state, value_meta.scale, value_meta.offset, largest, correction, pair);
      }
      if (__any_sync(kFullWarp, moved)) rescale(acc, correction);
#pragma unroll
      for (int t = 0; t < kKeySteps; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weights[t][i] = pack_pair<kValueBf16>(s[0][2 * t + i / 2][i % 2 * 2], s[0][2 * t + i / 2][i % 2 * 2 + 1]);
        }
      }
    }
    if (num_tiles > 0) {
      const int last = num_tiles - 1;
      ptx::mbarrier_wait(&shared.value.full[last & 1], last >> 1 & 1);
      if constexpr (kRaw16<ValueF>) ptx::fence_proxy_async();
      start_values(last);
      ptx::wgmma_wait<0>();
    }
    // The stages' memory becomes Rows.
    ptx::barrier_sync(kConsumersBarrier, 2 * Config::kWarpgroup);
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
