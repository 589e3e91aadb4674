// unified_attention on tensor cores for few query rows: the decode and verify kernel.
//
//   grid    (row tile, KV head, split). A tile is 16 rows (query token, query head) of one KV head, token-major.
//   block   4 warps that share the rows and divide the keys: a slice is 16 keys at a multiple of 16, warp w takes every
//           fourth. Each warp runs its own pipeline of cp.async stages, conversion and products with warp barriers
//           only; the four running softmaxes meet once, at the end.
//   slice   raw rows arrive as they lie in the cache, 16 bytes a copy (rows at odd addresses with their aligned cover);
//           codes become 16-bit levels (levels16.cuh) in shared memory; two m16n8k16 products, heads on m, with fp32
//           accumulators.
//
//   logit = factor[row] * (a_k * (q16 . level_k) + b_k * sum(q16))      p = exp(logit - max)
//   acc  += fp16(p * a_v / unit) * level_v        offset += p * b_v        out = unit * acc + offset
//
// q16 is the rotated query over a power of two (factor takes it back); unit is a power of two no a_v has exceeded so
// far, so that p * a_v / unit <= 1 always fits fp16: when it grows, acc shrinks with the softmax correction. Byte and
// instruction budget: docs/kernels/decode.md.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/format/formats.cuh"
#include "cuda/output/redo.cuh"
#include "cuda/output/row.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/softmax/softmax.cuh"
#include "cuda/stage/levels.cuh"
#include "cuda/stage/query.cuh"
#include "cuda/stage/rows.cuh"
#include "cuda/work/pages.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

template <class KeyF, class ValueF, int kHead>
struct DecodeConfig {
  static constexpr int kSlice = 16;
  static constexpr int kKeyBytes = kSlice * RawRow<KeyF, kHead>::kPitch;
  static constexpr int kValueBytes = kSlice * RawRow<ValueF, kHead>::kPitch;
  static constexpr bool kConverts = !kRaw16<KeyF> || !kRaw16<ValueF>;
  static constexpr int kConvertedBytes = kConverts ? kSlice * kPitch16<kHead> : 0;
  static constexpr int kStageBytes = kKeyBytes + kValueBytes;
  // Three blocks a multiprocessor at head sizes up to 128: 74 KiB each.
  static constexpr int kBudget = (kHead <= 128 ? 18 : 48) * 1024;  // of a warp
  static constexpr int kFit = (kBudget - kConvertedBytes - 512) / (kStageBytes + 384);
  static constexpr int kStages = kFit < 2 ? 2 : (kFit > 4 ? 4 : kFit);
  static constexpr bool kQueryInRegisters = kHead <= 128;

  static constexpr int kAffineRows = KeyF::kMetaBytes + ValueF::kMetaBytes > 0 ? kSlice : 1;

  // One warp's part of shared memory.
  struct Warp {
    alignas(16) std::uint8_t raw[kStages][kStageBytes];
    alignas(16) std::uint8_t converted[kConvertedBytes > 0 ? kConvertedBytes : 16];
    alignas(8) float key_scale[kAffineRows], key_offset[kAffineRows];
    alignas(8) float value_scale[kAffineRows], value_offset[kAffineRows];
    float scales[kStages][2][kAffineRows];    // of K and V, where they come from a scale cache
    std::uint32_t readable[kStages];          // one bit a key
    std::int64_t offset[kStages][2][kSlice];  // of K and V rows; -1: not read
  };
  struct Merge {
    float acc[kWarps][kRows][kHead + 4];
    float max[kWarps][kRows], sum[kWarps][kRows];
  };
  static constexpr int kQueryBytes = kRows * kPitch16<kHead>;
  struct Storage {
    union {
      alignas(16) std::uint8_t query_at_first[kQueryBytes];  // until it is in registers
      Warp warp[kWarps];
      Merge merge;
    };
    alignas(16) std::uint8_t query_kept[kQueryInRegisters ? 16 : kQueryBytes];
    RowInfo row[kRows];
  };
  static_assert(sizeof(Storage) <= (kHead <= 128 ? 74 : 227) * 1024);
};

template <format::Format KeyF, format::Format ValueF, int kHead>
__global__ void __launch_bounds__(kAttentionThreads, kHead <= 128 ? 3 : 1)
    decode_split(const __grid_constant__ AttentionParams p) {
  using Config = DecodeConfig<KeyF, ValueF, kHead>;
  constexpr int kSlice = Config::kSlice;
  constexpr int kStages = Config::kStages;
  constexpr int kSteps = kHead / 16;
  constexpr bool kKeyBf16 = std::is_same_v<KeyF, format::BFloat16>;
  constexpr bool kValueBf16 = std::is_same_v<ValueF, format::BFloat16>;
  constexpr bool kKeyScales = KeyF::kMetaPlace == format::MetaPlace::kScaleCache;
  constexpr bool kValueScales = ValueF::kMetaPlace == format::MetaPlace::kScaleCache;
  constexpr bool kKeyMeta = KeyF::kMetaBytes > 0;
  constexpr bool kValueMeta = ValueF::kMetaBytes > 0;

  extern __shared__ float4 shared_bytes[];
  auto& shared = *reinterpret_cast<typename Config::Storage*>(shared_bytes);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int kv_head = static_cast<int>(blockIdx.y);
  TileRows tile;
  if (!find_sequence_rows(p, blockIdx.x, tile)) return;
  typename Config::Warp& own = shared.warp[warp];

  std::uint8_t* const query_rows = Config::kQueryInRegisters ? shared.query_at_first : shared.query_kept;
  for (int r = warp; r < kRows; r += kWarps) {
    QueryRow query = fetch_query(p, tile, kv_head, r, lane);
    put_query<KeyF, kHead>(p, query, row_chunks(query_rows + r * kPitch16<kHead>), shared.row[r], lane);
  }
  __syncthreads();

  // This lane's rows of the accumulators: lane / 4 and lane / 4 + 8.
  const int quad = lane / 4;
  const int pair = lane % 4 * 2;
  const float logit_factor = log2_factor<KeyF>(p, tile.batch, kv_head);
  const bool biased = has_bias(p, logit_factor);
  RunningSoftmax<1> state(logit_factor, shared.row, quad, kValueMeta ? 0.0F : 1.0F);

  const std::uint32_t query_address = ptx::shared_address(query_rows) + (lane % 16) * kPitch16<kHead> + lane / 16 * 16;
  std::uint32_t query[Config::kQueryInRegisters ? kSteps : 1][4];
  if constexpr (Config::kQueryInRegisters) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) ptx::ldmatrix_x4(query[k], query_address + 32 * k);
    __syncthreads();  // the queries' memory becomes the pipelines'
  }

  // The slices of this warp.
  const int first_slice = tile.begin / kSlice;
  const int last_slice = tile.end > tile.begin ? (tile.end - 1) / kSlice : first_slice - 1;
  int slice = first_slice + ((warp - first_slice) & (kWarps - 1));
  const int copy_key = lane % kSlice;   // lanes 0 to 15 look up K rows, 16 to 31 V rows
  const int copy_part = lane / kSlice;  // and convert one half of row copy_key each
  const int key_row_bytes = static_cast<int>(format::row_bytes<KeyF>(p.head_size));
  const int value_row_bytes = static_cast<int>(format::row_bytes<ValueF>(p.head_size_v));
  const bool key_aligned = p.key.row_access >= 16;
  const bool value_aligned = p.value.row_access >= 16;
  const bool key_dense = is_dense<KeyF, kHead>(p.key, p.head_size);
  const bool value_dense = is_dense<ValueF, kHead>(p.value, p.head_size_v);

  const auto place_of = [&](int s) {
    return find_key(p, tile.batch, s * kSlice + copy_key, tile.begin, tile.end, copy_part == 0 && kv_head == 0);
  };
  const auto start_copies = [&](int s, KeyPlace place, int stage) {
    if (s <= last_slice) {
      own.offset[stage][copy_part][copy_key] = row_offset(copy_part == 0 ? p.key : p.value, place, kv_head);
      if constexpr (kKeyScales) {
        if (copy_part == 0) copy_scale(p.key, place, kv_head, &own.scales[stage][0][copy_key]);
      }
      if constexpr (kValueScales) {
        if (copy_part == 1) copy_scale(p.value, place, kv_head, &own.scales[stage][1][copy_key]);
      }
      const std::uint32_t readable = __ballot_sync(kFullWarp, place.block >= 0);
      if (lane == 0) own.readable[stage] = readable & 0xffffU;
      __syncwarp();
      copy_rows<KeyF, kHead, kSlice, 32>(p.key, own.offset[stage][0], key_dense, key_row_bytes,
                                         raw_rows<KeyF, kHead>(own.raw[stage]), lane);
      copy_rows<ValueF, kHead, kSlice, 32>(p.value, own.offset[stage][1], value_dense, value_row_bytes,
                                           raw_rows<ValueF, kHead>(own.raw[stage] + Config::kKeyBytes), lane);
    }
    ptx::cp_async_commit();
  };

#pragma unroll
  for (int s = 0; s < kStages; ++s) start_copies(slice + s * kWarps, place_of(slice + s * kWarps), s);
  KeyPlace next_place = place_of(slice + kStages * kWarps);

  float acc[1][kSteps * 2][4] = {};

  // The lane's addresses for ldmatrix: K by rows of 8 keys and 8 + 8 elements, V transposed.
  const int key_offset = (lane / 16 * 8 + lane % 8) * kPitch16<kHead> + lane / 8 % 2 * 16;
  const int value_offset = (lane % 16) * kPitch16<kHead> + lane / 16 * 16;

  int stage = 0;
  for (; slice <= last_slice; slice += kWarps, stage = stage + 1 == kStages ? 0 : stage + 1) {
    ptx::cp_async_wait<kStages - 1>();
    __syncwarp();
    std::uint8_t* const raw_key = own.raw[stage];
    std::uint8_t* const raw_value = own.raw[stage] + Config::kKeyBytes;
    const std::uint32_t readable = own.readable[stage];

    // Two lanes convert a row, half each.
    const std::uint8_t* key_row = raw_key + copy_key * RawRow<KeyF, kHead>::kPitch;
    const std::uint8_t* value_row = raw_value + copy_key * RawRow<ValueF, kHead>::kPitch;
    if (!key_aligned) key_row += row_skew(p.key, ::max(own.offset[stage][0][copy_key], std::int64_t{0}));
    if (!value_aligned) value_row += row_skew(p.value, ::max(own.offset[stage][1][copy_key], std::int64_t{0}));
    float squares = 0.0F;
    if constexpr (!kRaw16<KeyF>) {
      convert_part<KeyF, kHead / 64>(key_row + copy_part * (kHead / 2 / KeyF::kUnit * KeyF::kUnitBytes), key_aligned,
                                     own.converted + copy_key * kPitch16<kHead> + copy_part * kHead,
                                     p.head_size - copy_part * kHead / 2, &squares);
    }
    if constexpr (KeyF::kLevelNorm) squares += __shfl_xor_sync(kFullWarp, squares, kSlice);
    float value_scale = 0.0F;
    if (copy_part == 0) {
      if constexpr (kKeyMeta) {
        const auto* meta = kKeyScales ? reinterpret_cast<const std::uint8_t*>(&own.scales[stage][0][copy_key])
                                      : key_row + format::code_bytes<KeyF>(p.head_size);
        format::Affine affine = KeyF::read_meta(meta, format::row_shape(p.head_size));
        if constexpr (KeyF::kLevelNorm) affine.scale *= rsqrtf(squares);
        own.key_scale[copy_key] = affine.scale;
        if constexpr (KeyF::kHasOffset) own.key_offset[copy_key] = affine.offset;
      }
    } else if constexpr (kValueMeta) {
      const auto* meta = kValueScales ? reinterpret_cast<const std::uint8_t*>(&own.scales[stage][1][copy_key])
                                      : value_row + format::code_bytes<ValueF>(p.head_size_v);
      const format::Affine affine = ValueF::read_meta(meta, format::row_shape(p.head_size_v));
      value_scale = affine.scale / level_unit<ValueF>;
      own.value_scale[copy_key] = value_scale;
      if constexpr (ValueF::kHasOffset) own.value_offset[copy_key] = affine.offset;
    }
    __syncwarp();

    // Logits of 16 rows x 16 keys: s[t][..] belongs to keys 8 t + pair + {0, 1}, rows quad and quad + 8.
    float s[1][2][4] = {};
    const std::uint32_t key_address =
        ptx::shared_address(kRaw16<KeyF> ? raw_key : own.converted) + static_cast<std::uint32_t>(key_offset);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      std::uint32_t b[4];
      ptx::ldmatrix_x4(b, key_address + 32 * k);
      if constexpr (Config::kQueryInRegisters) {
        ptx::mma_16x8x16<kKeyBf16>(s[0][0], query[k], b[0], b[1]);
        ptx::mma_16x8x16<kKeyBf16>(s[0][1], query[k], b[2], b[3]);
      } else {
        ptx::ldmatrix_x4(query[0], query_address + 32 * k);
        ptx::mma_16x8x16<kKeyBf16>(s[0][0], query[0], b[0], b[1]);
        ptx::mma_16x8x16<kKeyBf16>(s[0][1], query[0], b[2], b[3]);
      }
    }

    const int first_key = slice * kSlice;
    const bool all_seen = readable == 0xffffU && first_key >= tile.full_begin && first_key + kSlice <= tile.full_end;
    scale_logits<KeyF>(s, state, own.key_scale, own.key_offset, pair);
    if (biased) bias_logits(s, state, p, tile, shared.row, first_key, quad, pair);
    if (!all_seen) mask_logits(s, shared.row, &readable, first_key, quad, pair);
    float correction[1][2];
    bool moved = exponentials(s, state, biased, correction);
    if constexpr (kValueMeta) {
      const std::uint32_t largest = __reduce_max_sync(kFullWarp, __float_as_uint(fabsf(value_scale)));
      moved |= weigh_values<ValueF>(s, state, own.value_scale, own.value_offset, largest, correction, pair);
    }
    if (__any_sync(kFullWarp, moved)) rescale(acc, correction);
    std::uint32_t weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i] = pack_pair<kValueBf16>(s[0][i / 2][i % 2 * 2], s[0][i / 2][i % 2 * 2 + 1]);
    }

    if constexpr (!kRaw16<ValueF>) {
      if constexpr (!kRaw16<KeyF>) __syncwarp();  // K's levels have been read
      convert_part<ValueF, kHead / 64>(value_row + copy_part * (kHead / 2 / ValueF::kUnit * ValueF::kUnitBytes),
                                       value_aligned, own.converted + copy_key * kPitch16<kHead> + copy_part * kHead,
                                       p.head_size_v - copy_part * kHead / 2, &squares);
      __syncwarp();
    }
    const std::uint32_t value_address =
        ptx::shared_address(kRaw16<ValueF> ? raw_value : own.converted) + static_cast<std::uint32_t>(value_offset);
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      std::uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, value_address + 32 * n);
      ptx::mma_16x8x16<kValueBf16>(acc[0][2 * n], weights, b[0], b[1]);
      ptx::mma_16x8x16<kValueBf16>(acc[0][2 * n + 1], weights, b[2], b[3]);
    }
    __syncwarp();
    start_copies(slice + kStages * kWarps, next_place, stage);
    next_place = place_of(slice + (kStages + 1) * kWarps);
  }
  ptx::cp_async_wait<0>();
  state.finish(biased);
  __syncthreads();  // the pipelines' memory becomes Merge

#pragma unroll
  for (int n = 0; n < 2 * kSteps; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      *reinterpret_cast<float2*>(&shared.merge.acc[warp][quad + 8 * r][8 * n + pair]) = make_float2(
          acc[0][n][2 * r] * state.unit + state.offset[0][r], acc[0][n][2 * r + 1] * state.unit + state.offset[0][r]);
    }
  }
  if (pair == 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      shared.merge.max[warp][quad + 8 * r] = state.max[0][r];
      shared.merge.sum[warp][quad + 8 * r] = state.sum[0][r];
    }
  }
  __syncthreads();

  const float value_factor = p.v_scale.at(tile.batch, kv_head);
  for (int row = warp; row < kRows; row += kWarps) {
    const RowInfo& info = shared.row[row];
    if (info.query < 0) break;
    const std::int64_t token = tile.query_begin + info.query;
    const int query_head = info.head;
    attention::SoftmaxState merged_state;
    float weight[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) merged_state.max = fmaxf(merged_state.max, shared.merge.max[w][row]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      // A warp without a visible key is left out, whatever its accumulator holds.
      weight[w] =
          shared.merge.sum[w][row] == 0.0F ? 0.0F : attention::rescale(shared.merge.max[w][row], merged_state.max);
      merged_state.sum = fmaf(shared.merge.sum[w][row], weight[w], merged_state.sum);
    }
    float* merged = shared.merge.acc[0][row];
    bool finite = true;
    for (int c = lane; c < p.head_size_v; c += 32) {
      float x = 0.0F;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (shared.merge.sum[w][row] != 0.0F) x = fmaf(shared.merge.acc[w][row][c], weight[w], x);
      }
      finite = finite && exact::is_finite(x);
      merged[c] = x * value_factor;
    }
    if constexpr (ValueF::kStatsOf == format::StatsOf::kNothing) {
      // An infinite or NaN value has met weights of 0: again, value by value.
      if (!__all_sync(kFullWarp, finite)) {
        merged_state = exact_row<KeyF, ValueF>(p, tile, kv_head, token, query_head, merged, lane);
      }
    }
    __syncwarp();
    write_row<LaneMap<8, 32, true>>(p, merged, merged_state, token, query_head, lane);
  }
}

template <format::Format KeyF, format::Format ValueF, int kHead>
cudaError_t launch_decode(const AttentionParams& params, std::int64_t tiles, int num_kv_heads, cudaStream_t stream) {
  constexpr std::size_t kBytes = sizeof(typename DecodeConfig<KeyF, ValueF, kHead>::Storage);
  const auto kernel = &decode_split<KeyF, ValueF, kHead>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kBytes));
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(num_kv_heads),
                  static_cast<unsigned>(params.max_splits));
  kernel<<<grid, kAttentionThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace quire::cuda
