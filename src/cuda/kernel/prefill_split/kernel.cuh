// unified_attention on tensor cores for many query rows: prefill, chunked prefill and mixed batches.
//
//   grid    (row tile, KV head, split). A tile is 128 (64) rows (query token, query head) of one KV head, token-major:
//           the heads of a group share every K and V row. Tiles run from the last to the first, long ones first under
//           a causal mask.
//   block   4 warps of 32 (16) rows each; keys in tiles of 64 (32), shared by the warps.
//   tile    rows come by cp.async, 16 bytes a copy. 16-bit rows are used where they land, two buffers; codes land in
//           one raw buffer and become 16-bit levels in shared memory once per tile, while the next tile's arrive.
//
// On Hopper prefill_sm90 serves head sizes up to 128. The arithmetic is decode_split's. Byte and instruction budget:
// docs/kernels/prefill.md.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/format/formats.cuh"
#include "cuda/kernel/prefill_sm90/config.h"
#include "cuda/kernel/prefill_split/config.h"
#include "cuda/output/rows.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/softmax/softmax.cuh"
#include "cuda/stage/levels.cuh"
#include "cuda/stage/metadata.cuh"
#include "cuda/stage/query.cuh"
#include "cuda/stage/rows.cuh"
#include "cuda/work/pages.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

// A block of prefill_split. All of its threads copy and convert; its warps multiply, each for rows of its own.
template <class KeyF, class ValueF, int kHead>
class PrefillBlock {
 public:
  using Config = PrefillConfig<KeyF, ValueF, kHead>;
  static constexpr int kKeys = Config::kKeys;
  static constexpr int kSteps = kHead / 16;              // of 16 elements
  static constexpr int kKeySteps = kKeys / 16;           // of 16 keys
  static constexpr int kTiles = Config::kWarpRows / 16;  // of 16 rows, a warp's
  using Softmax = RunningSoftmax<RowsOnM, kTiles>;
  using Accumulators = float[kTiles][2 * kSteps][4];

  __device__ __forceinline__ PrefillBlock(const AttentionParams& p, const TileRows& tile,
                                          typename Config::Storage& shared, int thread)
      : p_(p),
        tile_(tile),
        shared_(shared),
        tiles_(shared.tiles),
        thread_(thread),
        lane_(thread % 32),
        warp_(thread / 32),
        copy_key_(thread % kKeys),
        copy_part_(thread / kKeys),
        first_row_(warp_ * Config::kWarpRows),
        key_dense_(is_dense<KeyF, kHead>(p.key, p.head_size)),
        value_dense_(is_dense<ValueF, kHead>(p.value, p.head_size_v)) {}

  __device__ __forceinline__ int first_row() const { return first_row_; }

  // Look-ups run two tiles ahead of the products, and copies one.
  __device__ __forceinline__ void start(int first_key) {
    look_up(first_key, 0);
    __syncthreads();
    start_copies(0);
    look_up(first_key + kKeys, 1);
  }

  __device__ __forceinline__ void load_queries() {
    cuda::load_queries<KeyF, kHead, Config::kWarpRows>(
        p_, tile_, first_row_, [&](int row) { return row_chunks(tiles_.query + row * kPitch16<kHead>); }, shared_.row,
        lane_);
    __syncwarp();
  }

  __device__ __forceinline__ void attend(int first_key, int buffer, Softmax& state, Accumulators& acc) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if constexpr (Config::kConvertsKey || Config::kConvertsValue) {
      convert_tile(buffer);
      __syncthreads();
    }
    std::uint32_t readable[kKeys / 32];
    const bool all_seen = read_visibility(first_key, readable);
    if (first_key + kKeys < tile_.end) start_copies(buffer ^ 1);

    float s[kTiles][2 * kKeySteps][4] = {};
    multiply_keys(buffer, s);
    look_up(first_key + 2 * kKeys, buffer);
    state.template scale_logits<KeyF>(s, tiles_.key_scale, tiles_.key_offset);
    if (state.biased) state.bias_logits(s, p_, tile_, shared_.row + first_row_, first_key);
    if (!all_seen) state.mask_logits(s, shared_.row + first_row_, readable, first_key);
    float correction[kTiles][2];
    bool moved = state.exponentials(s, correction);
    if constexpr (kHasMeta<ValueF>) {
      std::uint32_t largest = shared_.largest_scale[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) largest = ::max(largest, shared_.largest_scale[w]);
      moved |= state.template weigh_values<ValueF>(s, tiles_.value_scale, tiles_.value_offset, largest, correction);
    }
    if (__any_sync(kFullWarp, moved)) state.rescale(acc, correction);
    multiply_values(buffer, s, acc);
  }

 private:
  static constexpr int kPart = kHead / Config::kParts;  // elements of a row that a thread converts
  static constexpr bool kKeyBf16 = std::is_same_v<KeyF, format::BFloat16>;
  static constexpr bool kValueBf16 = std::is_same_v<ValueF, format::BFloat16>;

  // Threads below kKeys look up K rows, the next kKeys V rows.
  __device__ __forceinline__ void look_up(int tile_key, int buffer) {
    if (copy_part_ >= 2) return;
    place_ = find_key(p_, tile_, tile_key + copy_key_, copy_part_ == 0 && tile_.kv_head == 0);
    tiles_.offset[buffer][copy_part_][copy_key_] =
        row_offset(copy_part_ == 0 ? p_.key : p_.value, place_, tile_.kv_head);
    const std::uint32_t readable = __ballot_sync(kFullWarp, place_.block >= 0);
    if (copy_part_ == 0 && lane_ == 0) shared_.readable[tile_key / kKeys % 4][warp_] = readable;
  }

  __device__ __forceinline__ void start_copies(int buffer) {
    copy_rows<KeyF, kHead, kKeys, kAttentionThreads>(
        p_.key, tiles_.offset[buffer][0], key_dense_, static_cast<int>(format::row_bytes<KeyF>(p_.head_size)),
        raw_rows<KeyF, kHead>(Config::kConvertsKey ? tiles_.key_raw : tiles_.key[buffer % Config::kKeyBuffers]),
        thread_);
    copy_rows<ValueF, kHead, kKeys, kAttentionThreads>(
        p_.value, tiles_.offset[buffer][1], value_dense_, static_cast<int>(format::row_bytes<ValueF>(p_.head_size_v)),
        raw_rows<ValueF, kHead>(Config::kConvertsValue ? tiles_.value_raw
                                                       : tiles_.value[buffer % Config::kValueBuffers]),
        thread_);
    if (kHasScaleCache<KeyF> && copy_part_ == 0) {
      copy_scale(p_.key, place_, tile_.kv_head, &tiles_.scales[0][copy_key_]);
    }
    if (kHasScaleCache<ValueF> && copy_part_ == 1) {
      copy_scale(p_.value, place_, tile_.kv_head, &tiles_.scales[1][copy_key_]);
    }
    ptx::cp_async_commit();
  }

  // Converts the raw tile to levels and metadata, with kParts threads for each row.
  __device__ __forceinline__ void convert_tile(int buffer) {
    const std::uint8_t* key_row = tiles_.key_raw + copy_key_ * RawRow<KeyF, kHead>::kPitch;
    const std::uint8_t* value_row = tiles_.value_raw + copy_key_ * RawRow<ValueF, kHead>::kPitch;
    const bool key_aligned = p_.key.row_access >= 16;
    const bool value_aligned = p_.value.row_access >= 16;
    if (!key_aligned) key_row += row_skew(p_.key, ::max(tiles_.offset[buffer][0][copy_key_], std::int64_t{0}));
    if (!value_aligned) value_row += row_skew(p_.value, ::max(tiles_.offset[buffer][1][copy_key_], std::int64_t{0}));
    const float key_squares = convert_row<KeyF>(key_row, key_aligned, p_.head_size, tiles_.key[0], shared_.key_tables);
    const float value_squares =
        convert_row<ValueF>(value_row, value_aligned, p_.head_size_v, tiles_.value[0], shared_.value_tables);
    if constexpr (kHasMeta<KeyF>) {
      if (copy_part_ == 0) {
        const format::Affine affine =
            staged_affine<KeyF, true>(&tiles_.scales[0][copy_key_], key_row, p_.head_size, key_squares);
        tiles_.key_scale[copy_key_] = affine.scale;
        if constexpr (KeyF::kHasOffset) tiles_.key_offset[copy_key_] = affine.offset;
      }
    }
    if constexpr (kHasMeta<ValueF>) {
      const format::Affine affine =
          staged_affine<ValueF, false>(&tiles_.scales[1][copy_key_], value_row, p_.head_size_v, value_squares);
      if (copy_part_ == 0) {
        tiles_.value_scale[copy_key_] = affine.scale;
        if constexpr (ValueF::kHasOffset) tiles_.value_offset[copy_key_] = affine.offset;
      }
      const std::uint32_t largest = __reduce_max_sync(kFullWarp, __float_as_uint(fabsf(affine.scale)));
      if (lane_ == 0) shared_.largest_scale[warp_] = largest;
    }
  }

  // Converts this thread's part of a row. Returns the squares of the whole row's levels, where the format divides by
  // their norm: each of the row's threads sums all parts, and keeps only its own levels.
  template <class F>
  __device__ __forceinline__ float convert_row(const std::uint8_t* row, bool aligned, int head_size, std::uint8_t* to,
                                               const Tables<F>& tables) {
    float squares = 0.0F;
    if constexpr (!kRaw16<F>) {
      constexpr int kPartBytes = static_cast<int>(format::code_bytes<F>(kPart));
      if constexpr (F::kLevelNorm) {
        for (int part = 0; part < Config::kParts; ++part) {
          if (part == copy_part_) continue;
          sum_squares<F, kPart>(row + part * kPartBytes, aligned, part * kPart, head_size, tables, &squares);
        }
      }
      convert_part<F, kPart>(row + copy_part_ * kPartBytes, aligned,
                             to + copy_key_ * kPitch16<kHead> + copy_part_ * kPart * 2, copy_part_ * kPart, head_size,
                             tables, &squares);
    }
    return squares;
  }

  // Whether every row of the tile sees all of its keys, and which keys are there.
  __device__ __forceinline__ bool read_visibility(int first_key, std::uint32_t (&readable)[kKeys / 32]) const {
    bool all_seen = first_key >= tile_.full_begin && first_key + kKeys <= tile_.full_end;
#pragma unroll
    for (int w = 0; w < kKeys / 32; ++w) {
      readable[w] = shared_.readable[first_key / kKeys % 4][w];
      all_seen = all_seen && readable[w] == 0xffffffffU;
    }
    return all_seen;
  }

  __device__ __forceinline__ void multiply_keys(int buffer, float (&s)[kTiles][2 * kKeySteps][4]) const {
    const int offset = ptx::second_operand(lane_, kPitch16<kHead>);
    const std::uint32_t key_address =
        ptx::shared_address(tiles_.key[buffer % Config::kKeyBuffers]) + static_cast<std::uint32_t>(offset);
    const std::uint32_t query_address =
        ptx::shared_address(tiles_.query) + first_row_ * kPitch16<kHead> + ptx::first_operand(lane_, kPitch16<kHead>);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      std::uint32_t query[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) ptx::ldmatrix_x4(query[m], query_address + 16 * m * kPitch16<kHead> + 32 * k);
#pragma unroll
      for (int t = 0; t < kKeySteps; ++t) {
        std::uint32_t b[4];
        ptx::ldmatrix_x4(b, key_address + 16 * t * kPitch16<kHead> + 32 * k);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          ptx::mma_16x8x16<kKeyBf16>(s[m][2 * t], query[m], b[0], b[1]);
          ptx::mma_16x8x16<kKeyBf16>(s[m][2 * t + 1], query[m], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_values(int buffer, const float (&s)[kTiles][2 * kKeySteps][4],
                                                  Accumulators& acc) const {
    const int offset = ptx::transposed_operand(lane_, kPitch16<kHead>);
    const std::uint32_t address =
        ptx::shared_address(tiles_.value[buffer % Config::kValueBuffers]) + static_cast<std::uint32_t>(offset);
#pragma unroll
    for (int t = 0; t < kKeySteps; ++t) {
      std::uint32_t weights[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) pack_weights<kValueBf16>(s[m], 2 * t, weights[m]);
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        std::uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, address + 16 * t * kPitch16<kHead> + 32 * n);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          ptx::mma_16x8x16<kValueBf16>(acc[m][2 * n], weights[m], b[0], b[1]);
          ptx::mma_16x8x16<kValueBf16>(acc[m][2 * n + 1], weights[m], b[2], b[3]);
        }
      }
    }
  }

  const AttentionParams& p_;
  const TileRows& tile_;
  typename Config::Storage& shared_;
  typename Config::Tiles& tiles_;
  const int thread_, lane_, warp_;
  const int copy_key_;   // this thread looks up a row of this key,
  const int copy_part_;  // and converts this part of it
  const int first_row_;  // of the warp's
  const bool key_dense_, value_dense_;
  KeyPlace place_{-1, 0};  // of this thread's row of the next tile to copy
};

// A block of prefill_split.
template <class KeyF, class ValueF, int kHead>
__device__ __forceinline__ void prefill_block(const AttentionParams& p, const BlockIndex& block,
                                              PrefillStorage<KeyF, ValueF, kHead>& shared) {
  using Config = PrefillConfig<KeyF, ValueF, kHead>;
  TileRows tile;
  if (!find_rows(p, block, Config::kRows, tile)) return;

  PrefillBlock<KeyF, ValueF, kHead> work(p, tile, shared, block.thread);
  FragmentTables<KeyF>::fill(shared.key_tables, block.thread, kAttentionThreads);
  FragmentTables<ValueF>::fill(shared.value_tables, block.thread, kAttentionThreads);
  const bool empty = tile.begin >= tile.end;
  int first_key = empty ? tile.end : tile.first / Config::kKeys * Config::kKeys;
  if (!empty) work.start(first_key);
  work.load_queries();
  RunningSoftmax<RowsOnM, Config::kWarpRows / 16> state(p, log2_factor<KeyF>(p, tile), shared.row + work.first_row(),
                                                        block.thread % 32, kHasMeta<ValueF> ? 0.0F : 1.0F);
  float acc[Config::kWarpRows / 16][kHead / 8][4] = {};
  for (int buffer = 0; first_key < tile.end; first_key += Config::kKeys, buffer ^= 1) {
    work.attend(first_key, buffer, state, acc);
  }
  __syncthreads();  // the tiles' memory becomes Rows
  finish_rows<KeyF, ValueF>(p, tile, acc, state, shared.rows.acc, shared.row, work.first_row(), block.thread % 32);
}

template <format::Format KeyF, format::Format ValueF, int kHead>
__global__ void __launch_bounds__(kAttentionThreads, (PrefillConfig<KeyF, ValueF, kHead>::kMinBlocks))
    prefill_split(const __grid_constant__ AttentionParams p) {
  extern __shared__ float4 shared_bytes[];
  const BlockIndex block{gridDim.x - 1 - blockIdx.x, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z),
                         static_cast<int>(threadIdx.x)};
  // Code for sm_90a has prefill_sm90 instead.
  if constexpr (kHasWgmma && kHead <= kMaxHeadSm90) {
    __trap();
  } else {
    prefill_block<KeyF, ValueF, kHead>(p, block, *reinterpret_cast<PrefillStorage<KeyF, ValueF, kHead>*>(shared_bytes));
  }
}

}  // namespace quire::cuda
