// unified_attention as one kernel template over (key format, value format), any head sizes, any query lengths.
//
//   grid    (row tile, KV head, split). Rows are the (query token, query head) pairs of one KV head, token-major, so a
//           tile of kRows rows holds several heads of a group and several tokens: any GQA ratio fills it.
//   block   4 warps; warp w owns rows 4w .. 4w+3: it loads and rotates their queries, computes their logits (lane =
//           key) and keeps their running softmax. Accumulators are spread over threads by output column.
//   tile    kKeys keys are unpacked to fp32 levels in shared memory, once for all rows. Only keys that some row of the
//           tile sees are looked up in the block table and read.
//
//   logit  = factor * (a_k * (q' . level_k) + b_k * sum(q'))      factor = softmax_scale * q_scale * k_scale * unrotate
//   out    = v_scale * unrotate * back(sum_k p_k a_k level_k + sum_k p_k b_k) / sum_k p_k
//
// With one split the block finishes its rows; with more it writes fp32 partials that merge_splits (attention.cu) folds.
// Keys are grouped by absolute position, so a sequence's bits depend only on the split size.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "attention/mask.h"
#include "attention/softmax.h"
#include "cuda/attention_params.h"
#include "cuda/lane/bytes.cuh"
#include "cuda/lane/rotate.cuh"
#include "cuda/output/row.cuh"
#include "cuda/softmax/bias.cuh"
#include "cuda/stage/metadata.cuh"
#include "cuda/work/rows.cuh"
#include "format/formats.h"

namespace quire::cuda {

inline constexpr int kKeys = 32;
inline constexpr int kRowsPerWarp = kRows / kWarps;
inline constexpr int kChunk = 8;  // elements unpacked by a thread at a time: a multiple of every format's unit
inline constexpr int kMaxColumns = format::kMaxHeadSize / kAttentionThreads;  // output columns of a thread

// Distance of rows in shared memory, in floats: a multiple of 4 whose quarter is odd, so that 32 lanes reading 16 bytes
// each from 32 rows meet every bank once per phase.
__host__ __device__ constexpr int padded_row(int head_size) { return (head_size + kChunk - 1) / kChunk * kChunk + 4; }

// Shared memory of the attention kernel; `floats` goes on with q [kRows][key pitch], keys [kKeys][key pitch] and
// values [kKeys][value pitch].
struct AttentionStorage {
  std::uint32_t warp_sees[2][kWarps];  // keys some row of the warp sees; two copies, used in turn
  std::uint32_t row_sees[kRows];
  std::int32_t block[kKeys];  // physical block of each key; -1: not read
  float2 key_affine[kKeys], value_affine[kKeys];
  float weight[kKeys][kRows];  // p_k a_k
  float correction[kRows];
  float offset[kRows];  // sum_k p_k b_k
  float4 floats[1];
};

__host__ __device__ constexpr std::size_t attention_storage_bytes(int head_size, int head_size_v) {
  return sizeof(AttentionStorage) +
         sizeof(float) * ((kRows + kKeys) * padded_row(head_size) + kKeys * padded_row(head_size_v));
}
static_assert(attention_storage_bytes(format::kMaxHeadSize, format::kMaxHeadSize) <= 227 * 1024);

// Unpacks the rows of kKeys keys into `levels` [kKeys][pitch]; rows that are not read become zeros. Returns whether
// this thread met a level that is not finite.
template <format::Format F>
__device__ __forceinline__ bool unpack_tile(const CacheSide& side, const std::int32_t* blocks, int first_key,
                                            int block_size, int head, int head_size, float* levels, int thread) {
  constexpr int kChunkBytes = kChunk / F::kUnit * F::kUnitBytes;
  const int pitch = padded_row(head_size);
  const int chunks = pitch / kChunk;
  const int row_bytes = static_cast<int>(format::code_bytes<F>(head_size));
  bool all_finite = true;
  for (int c = thread; c < kKeys * chunks; c += kAttentionThreads) {
    const int k = c / chunks;
    const int chunk = c - k * chunks;
    float level[kChunk] = {};
    if (blocks[k] >= 0) {
      const std::uint8_t* row = side.data + blocks[k] * side.block_stride +
                                (first_key + k) % block_size * side.slot_stride + head * side.head_stride;
      alignas(16) std::uint8_t bytes[kChunkBytes] = {};
      load_bytes(row + chunk * kChunkBytes, bytes, row_bytes - chunk * kChunkBytes, side.access);
#pragma unroll
      for (int u = 0; u < kChunk / F::kUnit; ++u) F::unpack(bytes + u * F::kUnitBytes, level + u * F::kUnit);
      const int held = head_size - chunk * kChunk;
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        level[j] = j < held ? level[j] : 0.0F;
        all_finite = all_finite && exact::is_finite(level[j]);
      }
    }
    auto* to = reinterpret_cast<float4*>(levels + k * pitch + chunk * kChunk);
    to[0] = make_float4(level[0], level[1], level[2], level[3]);
    to[1] = make_float4(level[4], level[5], level[6], level[7]);
  }
  return !all_finite;
}

__device__ __forceinline__ float dot4(float sum, float4 a, float4 b) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// affine.scale over the norm of the row's levels (kLevelNorm formats).
__device__ __forceinline__ void divide_by_norm(float2& affine, const float* levels, int pitch) {
  float squares = 0.0F;
  for (int c = 0; c < pitch / 4 - 1; ++c) {
    const float4 level = reinterpret_cast<const float4*>(levels)[c];
    squares = dot4(squares, level, level);
  }
  affine.x = affine.x / sqrtf(squares);
}

template <format::Format KeyF, format::Format ValueF, int kColumns>
__global__ void __launch_bounds__(kAttentionThreads, kColumns == 1 ? 4 : 2)
    attend_split(const __grid_constant__ AttentionParams p) {
  extern __shared__ float4 shared_bytes[];
  auto& shared = *reinterpret_cast<AttentionStorage*>(shared_bytes);
  const int pitch_k = padded_row(p.head_size);
  const int pitch_v = padded_row(p.head_size_v);
  float* const queries = reinterpret_cast<float*>(shared.floats);  // [kRows][pitch_k]
  float* const keys = queries + kRows * pitch_k;                   // [kKeys][pitch_k]
  float* const values = keys + kKeys * pitch_k;                    // [kKeys][pitch_v]

  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int kv_head = static_cast<int>(blockIdx.y);
  const int split = static_cast<int>(blockIdx.z);

  // The tile's rows.
  const int b = find_sequence(p, blockIdx.x);
  const int query_begin = p.cu_seqlens_q[b * p.cu_stride];
  const int query_len = p.cu_seqlens_q[(b + 1) * p.cu_stride] - query_begin;
  const std::int64_t num_rows = static_cast<std::int64_t>(query_len) * p.group_size;
  const std::int64_t row_begin =
      (blockIdx.x - first_tile(static_cast<std::int64_t>(query_begin) * p.group_size, b)) * kRows;
  if (row_begin >= num_rows) return;

  attention::SequenceMask sequence;
  sequence.seq_len = p.seq_lens[b * p.seq_stride];
  sequence.context_len = sequence.seq_len - query_len;
  sequence.causal = p.causal_per_seq != nullptr ? p.causal_per_seq[b * p.causal_stride] != 0 : p.causal;
  sequence.ranges = p.ranges == nullptr ? nullptr : p.ranges + b * p.ranges_batch_stride;
  sequence.range_stride = p.range_stride;
  sequence.bound_stride = p.bound_stride;
  sequence.num_ranges = p.num_ranges;

  // This warp's rows: query token (-1: past the end), query head, position.
  int token[kRowsPerWarp], head[kRowsPerWarp], position[kRowsPerWarp];
  float query_sum[kRowsPerWarp], offset[kRowsPerWarp] = {};
  attention::SoftmaxState state[kRowsPerWarp];
  const format::RowShape key_shape = format::row_shape(p.head_size);
  const float logit_factor =
      p.softmax_scale * p.q_scale.at(b, kv_head) * p.k_scale.at(b, kv_head) * KeyF::unrotate(key_shape);
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const std::int64_t row = row_begin + warp * kRowsPerWarp + r;
    const int i = static_cast<int>(row / p.group_size);
    const bool exists = row < num_rows && query_begin + i < p.num_tokens;
    token[r] = exists ? query_begin + i : -1;
    head[r] = kv_head * p.group_size + static_cast<int>(row % p.group_size);
    position[r] = exists ? sequence.context_len + i : -1;

    // The query, rotated as the keys are.
    float* q = queries + (warp * kRowsPerWarp + r) * pitch_k;
    const std::uint8_t* from = p.query + token[r] * p.query_token_stride + head[r] * p.query_head_stride;
    for (int c = lane; c < pitch_k; c += 32) {
      q[c] = exists && c < p.head_size ? load_float(from + c * p.query_element_bytes, p.query_dtype) : 0.0F;
    }
    if constexpr (KeyF::kRotation != format::Rotation::kNone) {
      __syncwarp();
      float y[WideMap::kElements];
#pragma unroll
      for (int j = 0; j < WideMap::kElements; ++j) {
        const int c = lane * WideMap::kElements + j;
        y[j] = c < p.head_size ? q[c] : 0.0F;
      }
      rotate<WideMap>(KeyF::kRotation, y, lane, key_shape.block);
      __syncwarp();
#pragma unroll
      for (int j = 0; j < WideMap::kElements; ++j) {
        const int c = lane * WideMap::kElements + j;
        if (c < p.head_size) q[c] = y[j];
      }
    }
    __syncwarp();
    float sum = 0.0F;
    for (int c = lane; c < p.head_size; c += 32) sum += q[c];
    query_sum[r] = warp_sum(sum);
  }

  // The keys this block looks at.
  const std::int64_t last_row = min(row_begin + kRows, num_rows) - 1;
  attention::KeyRange range =
      attention::visible_range(p.mask, sequence, sequence.context_len + static_cast<int>(row_begin / p.group_size),
                               sequence.context_len + static_cast<int>(last_row / p.group_size));
  const std::int64_t split_begin = split * p.split_size;
  const int begin = static_cast<int>(max(static_cast<std::int64_t>(range.begin), split_begin));
  const int end = static_cast<int>(split + 1 == p.max_splits
                                       ? static_cast<std::int64_t>(range.end)
                                       : min(static_cast<std::int64_t>(range.end), split_begin + p.split_size));

  float acc[kColumns][kRows] = {};
  int turn = 0;
  for (int key0 = begin / kKeys * kKeys; key0 < end; key0 += kKeys) {
    // Who sees whom.
    const int key = key0 + lane;
    std::uint32_t sees[kRowsPerWarp];
    std::uint32_t warp_sees = 0;
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const bool seen = key >= begin && key < end && attention::visible(p.mask, sequence, position[r], key);
      sees[r] = __ballot_sync(kFullWarp, seen);
      warp_sees |= sees[r];
    }
    if (lane == 0) shared.warp_sees[turn][warp] = warp_sees;
    __syncthreads();
    std::uint32_t wanted = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) wanted |= shared.warp_sees[turn][w];
    turn ^= 1;
    if (wanted == 0) continue;

    // Where those keys are, and their metadata.
    if (warp == 0) {
      std::int32_t block = -1;
      if ((wanted >> lane & 1U) != 0) {
        const std::int64_t entry = key / p.block_size;
        if (entry < p.max_blocks) {
          block = p.block_table[b * p.table_batch_stride + entry * p.table_block_stride];
        }
        if (block < 0 || block >= p.num_blocks) {
          block = -1;
          if (kv_head == 0 && p.error_counter != nullptr) atomicAdd(p.error_counter, 1ULL);
        }
      }
      shared.block[lane] = block;
      if (block >= 0) {
        const int slot = key % p.block_size;
        shared.key_affine[lane] = load_affine<KeyF>(p.key, block, slot, kv_head, key_shape);
        shared.value_affine[lane] =
            load_affine<ValueF>(p.value, block, slot, kv_head, format::row_shape(p.head_size_v));
      }
    }
    __syncthreads();

    unpack_tile<KeyF>(p.key, shared.block, key0, p.block_size, kv_head, p.head_size, keys, thread);
    const bool odd_values =
        unpack_tile<ValueF>(p.value, shared.block, key0, p.block_size, kv_head, p.head_size_v, values, thread);
    const bool any_odd_value = __syncthreads_or(odd_values) != 0;

    // Logits and the running softmax: lane = key.
    const std::uint32_t readable = __ballot_sync(kFullWarp, shared.block[lane] >= 0);
    float2 key_affine = readable >> lane & 1U ? shared.key_affine[lane] : make_float2(0.0F, 0.0F);
    float2 value_affine = readable >> lane & 1U ? shared.value_affine[lane] : make_float2(0.0F, 0.0F);
    if constexpr (KeyF::kLevelNorm) divide_by_norm(key_affine, keys + lane * pitch_k, pitch_k);
    if constexpr (ValueF::kLevelNorm) divide_by_norm(value_affine, values + lane * pitch_v, pitch_v);
    float dot[kRowsPerWarp] = {};
    for (int c = 0; c < pitch_k / 4 - 1; ++c) {
      const float4 level = reinterpret_cast<const float4*>(keys + lane * pitch_k)[c];
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) {
        dot[r] = dot4(dot[r], reinterpret_cast<const float4*>(queries + (warp * kRowsPerWarp + r) * pitch_k)[c], level);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const int row = warp * kRowsPerWarp + r;
      sees[r] &= readable;
      const bool seen = (sees[r] >> lane & 1U) != 0;
      float s = exact::nan_unless_finite(logit_factor * (key_affine.x * dot[r] + key_affine.y * query_sum[r]));
      s = attention::logit(logit_rule(p, head[r], token[r] - query_begin), sequence, s, position[r], key);
      s = seen ? s : -INFINITY;
      const float new_max = exact::max(state[r].max, warp_max(s));
      const float correction = attention::rescale(state[r].max, new_max);
      const float weight = s == -INFINITY ? 0.0F : expf(s - new_max);
      state[r].sum = state[r].sum * correction + warp_sum(weight);
      state[r].max = new_max;
      offset[r] = offset[r] * correction + warp_sum(seen ? weight * value_affine.y : 0.0F);
      shared.weight[lane][row] = seen ? weight * value_affine.x : 0.0F;
      if (lane == 0) {
        shared.correction[row] = correction;
        shared.row_sees[row] = sees[r];
      }
    }
    __syncthreads();

    // Weighted values: a thread owns columns thread, thread + 128, ..
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = thread + i * kAttentionThreads;
      if (column >= p.head_size_v) break;
#pragma unroll
      for (int r = 0; r < kRows; ++r) acc[i][r] *= shared.correction[r];
      for (std::uint32_t left = readable; left != 0; left &= left - 1) {
        const int k = __ffs(static_cast<int>(left)) - 1;
        const float level = values[k * pitch_v + column];
        if (any_odd_value) {
          // A NaN or an infinity must reach only the rows that see its key: 0 * NaN is not 0.
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if ((shared.row_sees[r] >> k & 1U) != 0) acc[i][r] = fmaf(shared.weight[k][r], level, acc[i][r]);
          }
        } else {
#pragma unroll
          for (int r = 0; r < kRows; ++r) acc[i][r] = fmaf(shared.weight[k][r], level, acc[i][r]);
        }
      }
    }
  }

  // Rows leave through shared memory: [kRows][pitch_v] in the values' place.
  if (lane == 0) {
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) shared.offset[warp * kRowsPerWarp + r] = offset[r];
  }
  __syncthreads();
  const float value_scale = p.v_scale.at(b, kv_head);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int column = thread + i * kAttentionThreads;
    if (column >= p.head_size_v) break;
#pragma unroll
    for (int r = 0; r < kRows; ++r) values[r * pitch_v + column] = (acc[i][r] + shared.offset[r]) * value_scale;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    if (token[r] < 0) continue;
    const float* row = values + (warp * kRowsPerWarp + r) * pitch_v;
    if (p.max_splits == 1) {
      finish_row(p.output, row, state[r], token[r], head[r], lane);
    } else {
      const std::int64_t at = (static_cast<std::int64_t>(token[r]) * p.num_q_heads + head[r]) * p.max_splits + split;
      float* to = p.partials.acc + at * p.head_size_v;
      for (int c = lane; c < p.head_size_v; c += 32) to[c] = row[c];
      if (lane == 0) p.partials.state[at] = make_float2(state[r].max, state[r].sum);
    }
  }
}

// Defined once per pair of formats, in a generated source each. `tiles` is the extent of the grid in row tiles.
template <format::Format KeyF, format::Format ValueF>
cudaError_t launch_attention(const AttentionParams& params, std::int64_t tiles, int num_kv_heads, cudaStream_t stream) {
  const std::size_t bytes = attention_storage_bytes(params.head_size, params.head_size_v);
  const auto kernel = params.head_size_v <= kAttentionThreads ? &attend_split<KeyF, ValueF, 1>
                                                              : &attend_split<KeyF, ValueF, kMaxColumns>;
  if (bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(num_kv_heads),
                  static_cast<unsigned>(params.max_splits));
  kernel<<<grid, kAttentionThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace quire::cuda
