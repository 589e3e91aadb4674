// unified_attention on tensor cores for few query rows: the decode and verify kernel.
//
//   grid    (row tile, KV head, split). A tile is 16 rows (query token, query head) of one KV head, token-major.
//   block   4 warps that share the rows and divide the keys: a slice is 16 keys at a multiple of 16, warp w takes every
//           fourth. Each warp runs its own pipeline of cp.async stages, conversion and products with warp barriers
//           only; the four running softmaxes meet once, at the end.
//   slice   raw rows arrive as they lie in the cache, 16 bytes a copy (rows at odd addresses with their aligned cover);
//           codes become 16-bit levels (stage/levels.cuh) in shared memory; two m16n8k16 products, heads on m, with
//           fp32 accumulators.
//
//   logit = factor[row] * (a_k * (q16 . level_k) + b_k * sum(q16))      p = exp(logit - max)
//   acc  += fp16(p * a_v / unit) * level_v        offset += p * b_v        out = unit * acc + offset
//
// q16 is the rotated query divided by a power of two, which factor takes back. unit is a power of two that no a_v has
// exceeded so far, so that p * a_v / unit <= 1 always fits fp16; when unit grows, acc shrinks with the softmax
// correction. The budget of bytes and instructions is in docs/kernels/decode.md.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/format/formats.cuh"
#include "cuda/kernel/decode_split/config.h"
#include "cuda/output/warp_merge.cuh"
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

// One warp of decode_split: its slices of the keys, one after the other.
template <class KeyF, class ValueF, int kHead>
class DecodeWarp {
 public:
  using Config = DecodeConfig<KeyF, ValueF, kHead>;
  using Softmax = RunningSoftmax<RowsOnM, 1>;

  __device__ __forceinline__ DecodeWarp(const AttentionParams& p, const TileRows& tile,
                                        typename Config::Storage& shared, int warp, int lane)
      : p_(p),
        tile_(tile),
        shared_(shared),
        own_(shared.warp[warp]),
        lane_(lane),
        copy_key_(lane % kSlice),
        copy_part_(lane / kSlice),
        key_offset_(ptx::second_operand(lane, kPitch16<kHead>)),
        value_offset_(ptx::transposed_operand(lane, kPitch16<kHead>)),
        key_row_bytes_(static_cast<int>(format::row_bytes<KeyF>(p.head_size))),
        value_row_bytes_(static_cast<int>(format::row_bytes<ValueF>(p.head_size_v))),
        key_aligned_(p.key.row_access >= 16),
        value_aligned_(p.value.row_access >= 16),
        key_dense_(is_dense<KeyF, kHead>(p.key, p.head_size)),
        value_dense_(is_dense<ValueF, kHead>(p.value, p.head_size_v)),
        query_rows_(Config::kQueryInRegisters ? shared.query_at_first : shared.query_kept),
        query_address_(ptx::shared_address(query_rows_) + ptx::first_operand(lane, kPitch16<kHead>)),
        first_slice_(tile.first / kSlice),
        last_slice_(tile.end > tile.begin ? (tile.end - 1) / kSlice : first_slice_ - 1) {}

  // All warps share this work.
  __device__ __forceinline__ void load_queries(int warp) {
    for (int r = warp; r < Config::kRows; r += kWarps) {
      QueryRow query = fetch_query(p_, tile_, row_info(p_, tile_, r), lane_);
      put_query<KeyF, kHead>(p_, query, row_chunks(query_rows_ + r * kPitch16<kHead>), shared_.row[r], lane_);
    }
  }

  // Brings the queries into registers; the block meets after it.
  __device__ __forceinline__ void keep_queries() {
    if constexpr (Config::kQueryInRegisters) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) ptx::ldmatrix_x4(query_[k], query_address_ + 32 * k);
    }
  }

  // Attends over every fourth slice of the block's keys, from the warp's own number on.
  __device__ __forceinline__ void run(int warp, Softmax& state, float (&acc)[1][kHead / 8][4]) {
    int slice = first_slice_ + ((warp - first_slice_) & (kWarps - 1));
#pragma unroll
    for (int s = 0; s < kStages; ++s) start_copies(slice + s * kWarps, place_of(slice + s * kWarps), s);
    KeyPlace next_place = place_of(slice + kStages * kWarps);
    int stage = 0;
    for (; slice <= last_slice_; slice += kWarps, stage = stage + 1 == kStages ? 0 : stage + 1) {
      ptx::cp_async_wait<kStages - 1>();
      __syncwarp();
      attend(slice, stage, state, acc);
      __syncwarp();
      start_copies(slice + kStages * kWarps, next_place, stage);
      next_place = place_of(slice + (kStages + 1) * kWarps);
    }
    ptx::cp_async_wait<0>();
  }

 private:
  static constexpr int kSlice = Config::kSlice;
  static constexpr int kStages = Config::kStages;
  static constexpr int kSteps = kHead / 16;
  static constexpr int kPart = kHead / 2;  // elements of a row that a lane converts
  template <class F>
  static constexpr int kPartBytes = static_cast<int>(format::code_bytes<F>(kPart));
  static constexpr bool kKeyBf16 = std::is_same_v<KeyF, format::BFloat16>;
  static constexpr bool kValueBf16 = std::is_same_v<ValueF, format::BFloat16>;

  // Lanes 0 to 15 look up K rows, 16 to 31 V rows.
  __device__ __forceinline__ KeyPlace place_of(int slice) const {
    return find_key(p_, tile_, slice * kSlice + copy_key_, copy_part_ == 0 && tile_.kv_head == 0);
  }

  __device__ __forceinline__ void start_copies(int slice, KeyPlace place, int stage) {
    if (slice <= last_slice_) {
      own_.offset[stage][copy_part_][copy_key_] = row_offset(copy_part_ == 0 ? p_.key : p_.value, place, tile_.kv_head);
      if constexpr (kHasScaleCache<KeyF>) {
        if (copy_part_ == 0) copy_scale(p_.key, place, tile_.kv_head, &own_.scales[stage][0][copy_key_]);
      }
      if constexpr (kHasScaleCache<ValueF>) {
        if (copy_part_ == 1) copy_scale(p_.value, place, tile_.kv_head, &own_.scales[stage][1][copy_key_]);
      }
      const std::uint32_t readable = __ballot_sync(kFullWarp, place.block >= 0);
      if (lane_ == 0) own_.readable[stage] = readable & 0xffffU;
      __syncwarp();
      copy_rows<KeyF, kHead, kSlice, 32>(p_.key, own_.offset[stage][0], key_dense_, key_row_bytes_,
                                         raw_rows<KeyF, kHead>(own_.raw[stage]), lane_);
      copy_rows<ValueF, kHead, kSlice, 32>(p_.value, own_.offset[stage][1], value_dense_, value_row_bytes_,
                                           raw_rows<ValueF, kHead>(own_.raw[stage] + Config::kKeyBytes), lane_);
    }
    ptx::cp_async_commit();
  }

  // Attends over one slice: logits, softmax, weighted values.
  __device__ __forceinline__ void attend(int slice, int stage, Softmax& state, float (&acc)[1][kHead / 8][4]) {
    // Two lanes convert a row, each half of it.
    const std::uint8_t* key_row = own_.raw[stage] + copy_key_ * RawRow<KeyF, kHead>::kPitch;
    const std::uint8_t* value_row = own_.raw[stage] + Config::kKeyBytes + copy_key_ * RawRow<ValueF, kHead>::kPitch;
    if (!key_aligned_) key_row += row_skew(p_.key, ::max(own_.offset[stage][0][copy_key_], std::int64_t{0}));
    if (!value_aligned_) value_row += row_skew(p_.value, ::max(own_.offset[stage][1][copy_key_], std::int64_t{0}));
    const float key_squares = convert_half<KeyF>(key_row, key_aligned_, p_.head_size, shared_.key_tables);
    const float value_scale = read_meta(stage, key_row, value_row, key_squares);
    __syncwarp();

    float s[1][2][4] = {};
    multiply_keys(own_.raw[stage], s);
    float correction[1][2];
    bool moved = weigh(slice, stage, state, s, correction);
    if constexpr (kHasMeta<ValueF>) {
      const std::uint32_t largest = __reduce_max_sync(kFullWarp, __float_as_uint(fabsf(value_scale)));
      moved |= state.template weigh_values<ValueF>(s, own_.value_scale, own_.value_offset, largest, correction);
    }
    if (__any_sync(kFullWarp, moved)) state.rescale(acc, correction);
    std::uint32_t weights[4];
    pack_weights<kValueBf16>(s[0], 0, weights);

    if constexpr (!kRaw16<ValueF>) {
      if constexpr (!kRaw16<KeyF>) __syncwarp();  // K's levels have been read
      convert_half<ValueF>(value_row, value_aligned_, p_.head_size_v, shared_.value_tables);
      __syncwarp();
    }
    multiply_values(own_.raw[stage] + Config::kKeyBytes, weights, acc);
  }

  // Converts half of a raw row to levels. Returns the squares of the whole row's, where the format divides by their
  // norm.
  template <class F>
  __device__ __forceinline__ float convert_half(const std::uint8_t* row, bool aligned, int head_size,
                                                const Tables<F>& tables) {
    float squares = 0.0F;
    if constexpr (!kRaw16<F>) {
      convert_part<F, kPart>(row + copy_part_ * kPartBytes<F>, aligned,
                             own_.converted + copy_key_ * kPitch16<kHead> + 2 * copy_part_ * kPart, copy_part_ * kPart,
                             head_size, tables, &squares);
    }
    if constexpr (F::kLevelNorm) squares += __shfl_xor_sync(kFullWarp, squares, kSlice);
    return squares;
  }

  // Lanes 0 to 15 read the metadata of K rows, and lanes 16 to 31 that of V rows, whose scale they return.
  __device__ __forceinline__ float read_meta(int stage, const std::uint8_t* key_row, const std::uint8_t* value_row,
                                             float key_squares) {
    float value_squares = 0.0F;
    if constexpr (ValueF::kLevelNorm) {
      sum_squares<ValueF, kPart>(value_row + copy_part_ * kPartBytes<ValueF>, value_aligned_, copy_part_ * kPart,
                                 p_.head_size_v, shared_.value_tables, &value_squares);
      value_squares += __shfl_xor_sync(kFullWarp, value_squares, kSlice);
    }
    float value_scale = 0.0F;
    if (copy_part_ == 0) {
      if constexpr (kHasMeta<KeyF>) {
        const format::Affine affine =
            staged_affine<KeyF, true>(&own_.scales[stage][0][copy_key_], key_row, p_.head_size, key_squares);
        own_.key_scale[copy_key_] = affine.scale;
        if constexpr (KeyF::kHasOffset) own_.key_offset[copy_key_] = affine.offset;
      }
    } else if constexpr (kHasMeta<ValueF>) {
      const format::Affine affine =
          staged_affine<ValueF, false>(&own_.scales[stage][1][copy_key_], value_row, p_.head_size_v, value_squares);
      value_scale = affine.scale;
      own_.value_scale[copy_key_] = affine.scale;
      if constexpr (ValueF::kHasOffset) own_.value_offset[copy_key_] = affine.offset;
    }
    return value_scale;
  }

  // Products of 16 rows and 16 keys.
  __device__ __forceinline__ void multiply_keys(const std::uint8_t* raw, float (&s)[1][2][4]) {
    const std::uint32_t address =
        ptx::shared_address(kRaw16<KeyF> ? raw : own_.converted) + static_cast<std::uint32_t>(key_offset_);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      std::uint32_t b[4];
      ptx::ldmatrix_x4(b, address + 32 * k);
      std::uint32_t(&query)[4] = query_[Config::kQueryInRegisters ? k : 0];
      if constexpr (!Config::kQueryInRegisters) ptx::ldmatrix_x4(query, query_address_ + 32 * k);
      ptx::mma_16x8x16<kKeyBf16>(s[0][0], query, b[0], b[1]);
      ptx::mma_16x8x16<kKeyBf16>(s[0][1], query, b[2], b[3]);
    }
  }

  // Turns products into weights.
  __device__ __forceinline__ bool weigh(int slice, int stage, Softmax& state, float (&s)[1][2][4],
                                        float (&correction)[1][2]) {
    const std::uint32_t readable = own_.readable[stage];
    const int first_key = slice * kSlice;
    const bool all_seen = readable == 0xffffU && first_key >= tile_.full_begin && first_key + kSlice <= tile_.full_end;
    state.template scale_logits<KeyF>(s, own_.key_scale, own_.key_offset);
    if (state.biased) state.bias_logits(s, p_, tile_, shared_.row, first_key);
    if (!all_seen) state.mask_logits(s, shared_.row, &readable, first_key);
    return state.exponentials(s, correction);
  }

  __device__ __forceinline__ void multiply_values(const std::uint8_t* raw, const std::uint32_t (&weights)[4],
                                                  float (&acc)[1][kHead / 8][4]) {
    const std::uint32_t address =
        ptx::shared_address(kRaw16<ValueF> ? raw : own_.converted) + static_cast<std::uint32_t>(value_offset_);
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      std::uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, address + 32 * n);
      ptx::mma_16x8x16<kValueBf16>(acc[0][2 * n], weights, b[0], b[1]);
      ptx::mma_16x8x16<kValueBf16>(acc[0][2 * n + 1], weights, b[2], b[3]);
    }
  }

  const AttentionParams& p_;
  const TileRows& tile_;
  typename Config::Storage& shared_;
  typename Config::Warp& own_;
  const int lane_, copy_key_, copy_part_;
  const int key_offset_, value_offset_;  // of the lane's rows for ldmatrix
  const int key_row_bytes_, value_row_bytes_;
  const bool key_aligned_, value_aligned_, key_dense_, value_dense_;
  std::uint8_t* const query_rows_;
  const std::uint32_t query_address_;
  const int first_slice_, last_slice_;
  std::uint32_t query_[Config::kQueryInRegisters ? kSteps : 1][4];
};

template <format::Format KeyF, format::Format ValueF, int kHead>
__global__ void __launch_bounds__(kAttentionThreads, (DecodeConfig<KeyF, ValueF, kHead>::kMinBlocks))
    decode_split(const __grid_constant__ AttentionParams p) {
  using Config = DecodeConfig<KeyF, ValueF, kHead>;
  extern __shared__ float4 shared_bytes[];
  auto& shared = *reinterpret_cast<typename Config::Storage*>(shared_bytes);
  const BlockIndex block{blockIdx.x, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z),
                         static_cast<int>(threadIdx.x)};
  const int lane = block.thread % 32;
  const int warp = block.thread / 32;
  TileRows tile;
  if (!find_rows(p, block, Config::kRows, tile)) return;

  DecodeWarp<KeyF, ValueF, kHead> work(p, tile, shared, warp, lane);
  FragmentTables<KeyF>::fill(shared.key_tables, block.thread, kAttentionThreads);
  FragmentTables<ValueF>::fill(shared.value_tables, block.thread, kAttentionThreads);
  work.load_queries(warp);
  __syncthreads();
  RunningSoftmax<RowsOnM, 1> state(p, log2_factor<KeyF>(p, tile), shared.row, lane, kHasMeta<ValueF> ? 0.0F : 1.0F);
  work.keep_queries();
  if constexpr (Config::kQueryInRegisters) __syncthreads();  // the queries' memory becomes the pipelines'
  float acc[1][kHead / 8][4] = {};
  work.run(warp, state, acc);
  state.finish();
  __syncthreads();  // the pipelines' memory becomes Merge
  put_partial(shared.merge, warp, state, acc);
  __syncthreads();
  merge_warps<KeyF, ValueF, Config::kRows>(p, tile, shared.merge, shared.row, warp, lane);
}

}  // namespace quire::cuda
