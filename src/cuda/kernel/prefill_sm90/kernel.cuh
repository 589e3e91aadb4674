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
// It is compiled for sm_90a, the only architecture with wgmma. The budget is in docs/kernels/prefill.md.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/format/formats.cuh"
#include "cuda/kernel/prefill_sm90/config.h"
#include "cuda/output/rows.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/softmax/softmax.cuh"
#include "cuda/stage/levels.cuh"
#include "cuda/stage/metadata.cuh"
#include "cuda/stage/query.cuh"
#include "cuda/stage/rows.cuh"
#include "cuda/work/pages.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

// Fills the stages of K or V, tile after tile. A thread looks up and converts one row of a tile, and all threads of the
// warpgroup copy every row.
template <class F, bool kIsKey, class Config>
class TileProducer {
 public:
  __device__ __forceinline__ TileProducer(const AttentionParams& p, const TileRows& tile,
                                          typename Config::Matrix* stages, typename Config::template Side<F>& shared,
                                          const Tables<F>& tables, int first_key, int num_tiles, int thread)
      : p_(p),
        tile_(tile),
        stages_(stages),
        shared_(shared),
        tables_(tables),
        first_key_(first_key),
        num_tiles_(num_tiles),
        thread_(thread),
        dense_(is_dense<F, kHead>(side(), head_size())) {}

  // All of the warpgroup start together, and meet at kProducersBarrier after this.
  __device__ __forceinline__ void look_up_first() { readable_ = look_up(0); }

  // From here on the groups of copies of K and of V take turns, which fill() counts on; where there is nothing to copy
  // yet, a group is empty.
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
      Codes<F> codes[kGroups];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) load_codes<F>(row, aligned, g, g == 0, codes[g]);
      format::Affine affine{};
      if constexpr (kHasMeta<F>) affine = raw_affine<F>(&shared_.scales[thread_], row, head_size());
      ptx::barrier_sync(kProducersBarrier, kKeys);  // the raw rows have been read
      start_copies(j + 1);

      ptx::mbarrier_wait(&shared_.empty[stage], parity_before);
      float squares = 0.0F;
      std::uint8_t* to = stages_[stage].bytes;
      const int row_index = thread_;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        put_levels<F>(
            codes[g], tables_,
            [=](int chunk) { return to + Config::Matrix::offset(row_index, kGroup / 8 * g + chunk); },
            head_size() - kGroup * g, &squares);
      }
      if constexpr (kHasMeta<F>) put_meta(meta, affine_of_levels<F, kIsKey>(affine, squares));
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
  static constexpr int kGroup = Fragment<F>::kElements;
  static constexpr int kGroups = kHead / kGroup;
  static_assert(kHead % kGroup == 0);

  __device__ __forceinline__ const CacheSide& side() const { return kIsKey ? p_.key : p_.value; }
  __device__ __forceinline__ int head_size() const { return kIsKey ? p_.head_size : p_.head_size_v; }
  __device__ __forceinline__ int row_bytes() const { return static_cast<int>(format::row_bytes<F>(head_size())); }

  // Returns the warp's readable keys, one bit each.
  __device__ __forceinline__ std::uint32_t look_up(int j) {
    place_ = find_key(p_, tile_, first_key_ + j * kKeys + thread_, kIsKey && tile_.kv_head == 0);
    shared_.offset[j % Config::kLookAhead][thread_] = row_offset(side(), place_, tile_.kv_head);
    return __ballot_sync(kFullWarp, place_.block >= 0);
  }

  // What this thread's row of the stage means.
  __device__ __forceinline__ void put_meta(typename Config::Meta& meta, format::Affine affine) {
    if constexpr (!kIsKey) {
      const std::uint32_t largest = __reduce_max_sync(kFullWarp, __float_as_uint(fabsf(affine.scale)));
      if (thread_ % 32 == 0) meta.largest_scale[thread_ / 32] = largest;
    }
    meta.scale[thread_] = affine.scale;
    if constexpr (F::kHasOffset) meta.offset[thread_] = affine.offset;
  }

  __device__ __forceinline__ void start_copies(int j) {
    if (j < num_tiles_) {
      copy_rows<F, kHead, kKeys, kKeys>(side(), shared_.offset[j % Config::kLookAhead], dense_, row_bytes(),
                                        raw_rows<F, kHead>(shared_.raw), thread_);
      if constexpr (kHasScaleCache<F>) copy_scale(side(), place_, tile_.kv_head, &shared_.scales[thread_]);
    }
    ptx::cp_async_commit();
  }

  const AttentionParams& p_;
  const TileRows& tile_;
  typename Config::Matrix* const stages_;
  typename Config::template Side<F>& shared_;
  const Tables<F>& tables_;
  const int first_key_, num_tiles_, thread_;
  const bool dense_;
  KeyPlace place_{-1, 0};            // of the last tile looked up
  std::uint32_t readable_ = 0;       // of the next tile to fill
  std::uint32_t next_readable_ = 0;  // and of the one after
};

// Whether every row sees all keys of a tile, and which of the keys are there.
template <class Meta, int kWords>
__device__ __forceinline__ bool read_visibility(const TileRows& tile, const Meta& meta, int tile_key,
                                                std::uint32_t (&readable)[kWords]) {
  bool all_seen = tile_key >= tile.full_begin && tile_key + 32 * kWords <= tile.full_end;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    readable[w] = meta.readable[w];
    all_seen = all_seen && readable[w] == 0xffffffffU;
  }
  return all_seen;
}

template <class KeyF, class ValueF, class Storage>
__device__ __forceinline__ void init_barriers(Storage& shared) {
  using Config = PrefillSm90Config<KeyF, ValueF>;
  // A producer's thread arrives once, and once more with its copies where it does not convert them.
  constexpr int kKeyArrivals = Config::kWarpgroup * (kRaw16<KeyF> ? 2 : 1);
  constexpr int kValueArrivals = Config::kWarpgroup * (kRaw16<ValueF> ? 2 : 1);
  constexpr int kConsumerWarps = 8;
  for (int s = 0; s < Config::kStages; ++s) {
    ptx::mbarrier_init(&shared.key.full[s], kKeyArrivals);
    ptx::mbarrier_init(&shared.key.empty[s], kConsumerWarps);
    ptx::mbarrier_init(&shared.value.full[s], kValueArrivals);
    ptx::mbarrier_init(&shared.value.empty[s], kConsumerWarps);
  }
}

// A block of prefill_sm90. One warpgroup is the producer. Each of the others is a consumer, 0 or 1, that multiplies 64
// query rows with every tile, and the values of a tile after the keys of the next one. (Both loops stand here: as
// functions or classes of their own they were slower in some modes, since the compiler then keeps the addresses of
// matrices and stages out of the uniform registers.)
template <class KeyF, class ValueF>
__device__ __forceinline__ void prefill_sm90_block(const AttentionParams& p, const BlockIndex& block,
                                                   std::uint8_t* shared_bytes) {
  using Config = PrefillSm90Config<KeyF, ValueF>;
  constexpr int kKeys = Config::kKeys;
  const std::uint32_t skew = -ptx::shared_address(shared_bytes) & 1023U;
  auto& shared = *reinterpret_cast<typename Config::Storage*>(shared_bytes + skew);
  TileRows tile;
  if (!find_rows(p, block, Config::kRows, tile)) return;
  const int first_key = tile.first / kKeys * kKeys;
  const int num_tiles = tile.begin < tile.end ? (tile.end - first_key + kKeys - 1) / kKeys : 0;
  const int thread = block.thread % Config::kWarpgroup;
  // The number is the same in all lanes, and the shuffle tells the compiler so.
  const int warpgroup = __shfl_sync(kFullWarp, block.thread / Config::kWarpgroup, 0);
  if (block.thread == 0) init_barriers<KeyF, ValueF>(shared);
  FragmentTables<KeyF>::fill(shared.key_tables, block.thread, Config::kThreads);
  FragmentTables<ValueF>::fill(shared.value_tables, block.thread, Config::kThreads);
  __syncthreads();

  if (warpgroup == 0) {
    ptx::give_registers<Config::kProducerRegisters>();
    TileProducer<KeyF, true, Config> keys(p, tile, shared.stages.key, shared.key, shared.key_tables, first_key,
                                          num_tiles, thread);
    TileProducer<ValueF, false, Config> values(p, tile, shared.stages.value, shared.value, shared.value_tables,
                                               first_key, num_tiles, thread);
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
    return;
  }
  ptx::take_registers<Config::kConsumerRegisters>();
  const int consumer = warpgroup - 1;
  constexpr bool kKeyBf16 = std::is_same_v<KeyF, format::BFloat16>;
  constexpr bool kValueBf16 = std::is_same_v<ValueF, format::BFloat16>;
  constexpr int kStage = sizeof(typename Config::Matrix) / 16;  // in units of a matrix's address
  const int lane = thread % 32;
  const int first_row = consumer * 64 + thread / 32 * Config::kWarpRows;
  const auto query_row = [&shared](int row) {
    return [&shared, row](int chunk) { return shared.query.bytes + Config::Matrix::offset(row, chunk); };
  };
  load_queries<KeyF, Config::kHead, Config::kWarpRows>(p, tile, first_row, query_row, shared.row, lane);
  ptx::fence_proxy_async();
  ptx::barrier_sync(kConsumerBarrier + consumer, Config::kWarpgroup);
  RunningSoftmax<RowsOnM, 1> state(p, log2_factor<KeyF>(p, tile), shared.row + first_row, lane,
                                   kHasMeta<ValueF> ? 0.0F : 1.0F);
  float acc[1][16][4] = {};
  std::uint32_t weights[kKeys / 16][4];
  const std::uint64_t queries = ptx::wgmma_matrix(ptx::shared_address(shared.query.bytes) + consumer * 64 * 128, 16);
  const std::uint64_t keys = ptx::wgmma_matrix(ptx::shared_address(shared.stages.key[0].bytes), 16);
  const std::uint64_t values = ptx::wgmma_matrix(ptx::shared_address(shared.stages.value[0].bytes), Config::kHalf);

  const auto release = [lane](std::uint64_t* barrier) {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(barrier);
  };
  const auto start_values = [&](int j) {
    ptx::wgmma_fence();
#pragma unroll
    for (int t = 0; t < kKeys / 16; ++t) {
      ptx::wgmma_64x128x16<kValueBf16>(acc[0], weights[t], values + (j & 1) * kStage + t * (16 * 128 / 16));
    }
    ptx::wgmma_commit();
  };
  const auto multiply_keys = [&](int j, float(&s)[1][16][4]) {
    const std::uint64_t tile_keys = keys + (j & 1) * kStage;
    ptx::wgmma_fence();
    ptx::wgmma_64x128x16<kKeyBf16, false>(s[0], queries, tile_keys);
#pragma unroll
    for (int k = 1; k < Config::kHead / 16; ++k) {
      const int step = (k / 4 * Config::kHalf + k % 4 * 32) / 16;
      ptx::wgmma_64x128x16<kKeyBf16, true>(s[0], queries + step, tile_keys + step);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
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
    multiply_keys(j, s);
    if (j + 1 < num_tiles || consumer == 0) ptx::barrier_arrive(other_turn, 2 * Config::kWarpgroup);
    if (j > 0) release(&shared.value.empty[stage ^ 1]);

    const auto& key_meta = shared.key.meta[stage];
    const int tile_key = first_key + j * kKeys;
    std::uint32_t readable[kKeys / 32];
    const bool all_seen = read_visibility(tile, key_meta, tile_key, readable);
    state.template scale_logits<KeyF>(s, key_meta.scale, key_meta.offset);
    release(&shared.key.empty[stage]);
    if (state.biased) state.bias_logits(s, p, tile, shared.row + first_row, tile_key);
    if (!all_seen) state.mask_logits(s, shared.row + first_row, readable, tile_key);
    float correction[1][2];
    bool moved = state.exponentials(s, correction);
    if constexpr (kHasMeta<ValueF>) {
      ptx::mbarrier_wait(&shared.value.full[stage], parity);
      const auto& meta = shared.value.meta[stage];
      std::uint32_t largest = meta.largest_scale[0];
#pragma unroll
      for (int w = 1; w < kKeys / 32; ++w) largest = ::max(largest, meta.largest_scale[w]);
      moved |= state.template weigh_values<ValueF>(s, meta.scale, meta.offset, largest, correction);
    }
    if (__any_sync(kFullWarp, moved)) state.rescale(acc, correction);
#pragma unroll
    for (int t = 0; t < kKeys / 16; ++t) pack_weights<kValueBf16>(s[0], 2 * t, weights[t]);
  }
  if (num_tiles > 0) {
    const int last = num_tiles - 1;
    ptx::mbarrier_wait(&shared.value.full[last & 1], last >> 1 & 1);
    if constexpr (kRaw16<ValueF>) ptx::fence_proxy_async();
    start_values(last);
    ptx::wgmma_wait<0>();
  }
  ptx::barrier_sync(kConsumersBarrier, 2 * Config::kWarpgroup);  // the stages' memory becomes Rows
  finish_rows<KeyF, ValueF>(p, tile, acc, state, shared.rows.acc, shared.row, first_row, lane);
}

template <format::Format KeyF, format::Format ValueF>
__global__ void __launch_bounds__((PrefillSm90Config<KeyF, ValueF>::kThreads), 1)
    prefill_sm90(const __grid_constant__ AttentionParams p) {
  if constexpr (kHasWgmma) {
    extern __shared__ float4 shared_bytes[];
    const BlockIndex block{gridDim.x - 1 - blockIdx.x, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z),
                           static_cast<int>(threadIdx.x)};
    prefill_sm90_block<KeyF, ValueF>(p, block, reinterpret_cast<std::uint8_t*>(shared_bytes));
  } else {
    __trap();
  }
}

}  // namespace quire::cuda
