// unified_attention in fp32 arithmetic, for every pair of formats, every dtype, alignment and head size: the formats
// are looked up at run time, so there is one kernel for all of them.
//
//   grid    (row tile, KV head, split). Rows are the (query token, query head) pairs of one KV head, token-major, so a
//           tile of kRows rows holds several heads of a group and several tokens: any GQA ratio fills it.
//   block   4 warps; warp w owns rows 4w to 4w+3: it loads and rotates their queries, computes their logits (lane =
//           key) and keeps their running softmax. Accumulators are spread over threads by output column.
//   tile    kKeys keys are unpacked to fp32 levels in shared memory, once for all rows. Only keys that some row of the
//           tile sees are looked up in the block table and read.
//
//   logit  = factor * (a_k * (q' . level_k) + b_k * sum(q'))      factor = softmax_scale * q_scale * k_scale * unrotate
//   out    = v_scale * unrotate * back(sum_k p_k a_k level_k + sum_k p_k b_k) / sum_k p_k
//
// Keys are grouped by absolute position, so a sequence's bits depend only on the split size.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "attention/mask.h"
#include "attention/softmax.h"
#include "cuda/attention_params.h"
#include "cuda/format/dispatch.cuh"
#include "cuda/kernel/attend_any/config.h"
#include "cuda/lane/bytes.cuh"
#include "cuda/lane/rotate.cuh"
#include "cuda/output/row.cuh"
#include "cuda/softmax/bias.cuh"
#include "cuda/stage/metadata.cuh"
#include "cuda/work/pages.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

__device__ __forceinline__ float dot4(float sum, float4 a, float4 b) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// Unpacks kChunk or more levels of a row, from byte codes of whole units.
template <class F>
inline constexpr int kUnpacked = F::kUnit > kChunk ? F::kUnit : kChunk;

// Unpacks the rows of a tile's keys to fp32 levels [kKeys][pitch], zeros past the head size and for keys that are not
// read, and their (scale, offset). Returns whether this thread met a level that is not finite.
template <format::Format F>
__device__ __forceinline__ bool unpack_rows(const CacheSide& side, const AttendAnyConfig::Storage& shared, int kv_head,
                                            int head_size, float* levels, float2* affine, int thread) {
  constexpr int kKeys = AttendAnyConfig::kKeys;
  constexpr int kElements = kUnpacked<F>;
  constexpr int kBytes = kElements / F::kUnit * F::kUnitBytes;
  const int pitch = AttendAnyConfig::pitch(head_size);
  const int chunks = (pitch - 4 + kElements - 1) / kElements;
  const int row_bytes = static_cast<int>(format::code_bytes<F>(head_size));
  bool all_finite = true;
  for (int c = thread; c < kKeys * chunks; c += kAttentionThreads) {
    const int k = c / chunks;
    const int chunk = c - k * chunks;
    float level[kElements] = {};
    if (shared.block[k] >= 0) {
      const std::uint8_t* row = side.row(shared.block[k], shared.slot[k], kv_head);
      const int access = kElements == kChunk ? side.access : 1;
      // The byte before the codes is there for units that see it.
      alignas(16) std::uint8_t bytes[16 + kBytes] = {};
      alignas(16) std::uint8_t codes[kBytes] = {};
      load_bytes(row + chunk * kBytes, codes, row_bytes - chunk * kBytes, access);
      memcpy(bytes + 16, codes, kBytes);
      if constexpr (F::kHistory) bytes[15] = chunk == 0 ? std::uint8_t{0} : row[chunk * kBytes - 1];
#pragma unroll
      for (int u = 0; u < kElements / F::kUnit; ++u) F::unpack(bytes + 16 + u * F::kUnitBytes, level + u * F::kUnit);
      const int held = head_size - chunk * kElements;
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        level[j] = j < held ? level[j] : 0.0F;
        all_finite = all_finite && exact::is_finite(level[j]);
      }
    }
    float* const to = levels + k * pitch + chunk * kElements;
#pragma unroll
    for (int j = 0; j < kElements; j += 4) {
      if (kElements > kChunk && chunk * kElements + j >= pitch - 4) break;
      *reinterpret_cast<float4*>(to + j) = make_float4(level[j], level[j + 1], level[j + 2], level[j + 3]);
    }
  }
  if (thread < kKeys) {
    format::Affine own{0.0F, 0.0F};
    if (shared.block[thread] >= 0) {
      own = load_affine<F>(side, shared.block[thread], shared.slot[thread], kv_head, format::row_shape(head_size));
    }
    affine[thread] = make_float2(own.scale, own.offset);
  }
  return !all_finite;
}

// Turns levels into values where the rows have a centre: scale * level + offset + centre, in place, after which (scale,
// offset) are (1, 0). Each warp takes a row at a time. All threads call it, after unpack_rows.
template <format::Format F>
__device__ __noinline__ void add_centre(const CacheSide& side, AttendAnyConfig::Storage& shared, int kv_head,
                                        int head_size, float* levels, float2* affine, int thread) {
  const int pitch = AttendAnyConfig::pitch(head_size);
  const format::RowShape shape = format::row_shape(head_size);
  __syncthreads();
  for (int k = thread / 32; k < AttendAnyConfig::kKeys; k += kWarps) {
    if (shared.block[k] < 0) continue;
    const format::SideInputs inputs = side.side(shared.block[k], kv_head);
    float2 own = affine[k];
    float squares = 0.0F;
    for (int i = thread % 32; i < head_size; i += 32)
      squares = fmaf(levels[k * pitch + i], levels[k * pitch + i], squares);
    if constexpr (F::kLevelNorm) own.x /= sqrtf(warp_sum(squares));
    for (int i = thread % 32; i < head_size; i += 32) {
      levels[k * pitch + i] = fmaf(own.x, levels[k * pitch + i], own.y) + F::centre(inputs, shape, i);
    }
    __syncwarp();
    if (thread % 32 == 0) affine[k] = make_float2(1.0F, 0.0F);
  }
}

// A block of attend_any.
template <int kColumns>
class AttendAnyBlock {
 public:
  using Config = AttendAnyConfig;
  static constexpr int kRows = Config::kRows;
  static constexpr int kKeys = Config::kKeys;
  static constexpr int kRowsPerWarp = Config::kRowsPerWarp;

  __device__ __forceinline__ AttendAnyBlock(const AttentionParams& p, const TileRows& tile, Config::Storage& shared,
                                            int thread)
      : p_(p),
        tile_(tile),
        shared_(shared),
        thread_(thread),
        lane_(thread % 32),
        warp_(thread / 32),
        pitch_k_(Config::pitch(p.head_size)),
        pitch_v_(Config::pitch(p.head_size_v)),
        queries_(reinterpret_cast<float*>(shared.floats)),
        keys_(queries_ + kRows * pitch_k_),
        values_(keys_ + kKeys * pitch_k_),
        factor_(logit_factor(p, tile)) {}

  // This warp's query rows, rotated as the keys are.
  __device__ __forceinline__ void load_queries() {
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const int row = warp_ * kRowsPerWarp + r;
      const RowInfo info = row_info(p_, tile_, row);
      query_[r] = info.query;
      head_[r] = info.head;
      position_[r] = info.position;
      float* q = queries_ + row * pitch_k_;
      const std::int64_t token = tile_.query_begin + info.query;
      const std::uint8_t* from = p_.query + token * p_.query_token_stride + info.head * p_.query_head_stride;
      for (int c = lane_; c < pitch_k_; c += 32) {
        q[c] =
            info.query >= 0 && c < p_.head_size ? load_float(from + c * p_.query_element_bytes, p_.query_dtype) : 0.0F;
      }
      if (p_.key_rotation != format::Rotation::kNone) rotate_query(q);
      __syncwarp();
      float sum = 0.0F;
      for (int c = lane_; c < p_.head_size; c += 32) sum += q[c];
      query_sum_[r] = warp_sum(sum);
    }
  }

  __device__ __forceinline__ void attend(int key0) {
    if (!find_keys(key0)) return;
    unpack_keys();
    weigh(key0);
    __syncthreads();
    add_values();
  }

  // The rows leave through shared memory, [kRows][pitch_v], in the place of the values.
  __device__ __forceinline__ void finish() {
    if (lane_ == 0) {
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) shared_.offset[warp_ * kRowsPerWarp + r] = offset_[r];
    }
    __syncthreads();
    const float value_scale = p_.v_scale.at(tile_.batch, tile_.kv_head);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = thread_ + i * kAttentionThreads;
      if (column >= p_.head_size_v) break;
#pragma unroll
      for (int r = 0; r < kRows; ++r) values_[r * pitch_v_ + column] = (acc_[i][r] + shared_.offset[r]) * value_scale;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      if (query_[r] < 0) continue;
      write_row<WideMap>(p_, values_ + (warp_ * kRowsPerWarp + r) * pitch_v_, state_[r], tile_.query_begin + query_[r],
                         head_[r], tile_.split, lane_);
    }
  }

 private:
  __device__ __forceinline__ void rotate_query(float* q) {
    __syncwarp();
    float y[WideMap::kElements];
#pragma unroll
    for (int j = 0; j < WideMap::kElements; ++j) {
      const int c = lane_ * WideMap::kElements + j;
      y[j] = c < p_.head_size ? q[c] : 0.0F;
    }
    rotate<WideMap>(p_.key_rotation, y, lane_, format::rotation_block(p_.head_size));
    __syncwarp();
#pragma unroll
    for (int j = 0; j < WideMap::kElements; ++j) {
      const int c = lane_ * WideMap::kElements + j;
      if (c < p_.head_size) q[c] = y[j];
    }
  }

  // Finds who sees which key (each lane has a key) and where the seen ones are. Returns false where no row sees any.
  __device__ __forceinline__ bool find_keys(int key0) {
    const int key = key0 + lane_;
    std::uint32_t warp_sees = 0;
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const bool seen =
          key >= tile_.first && key < tile_.end && attention::visible(p_.mask, tile_.sequence, position_[r], key);
      sees_[r] = __ballot_sync(kFullWarp, seen);
      warp_sees |= sees_[r];
    }
    if (lane_ == 0) shared_.warp_sees[turn_][warp_] = warp_sees;
    __syncthreads();
    std::uint32_t wanted = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) wanted |= shared_.warp_sees[turn_][w];
    turn_ ^= 1;
    if (wanted == 0) return false;
    if (warp_ == 0) {
      KeyPlace place{-1, 0};
      if ((wanted >> lane_ & 1U) != 0) place = find_key(p_, tile_, key, tile_.kv_head == 0);
      shared_.block[lane_] = place.block;
      shared_.slot[lane_] = place.slot;
    }
    __syncthreads();
    return true;
  }

  __device__ __forceinline__ bool unpack(const CacheSide& side, int head_size, float* levels, float2* affine) {
    bool odd = false;
    with_format(side.format, [&]<class F>() {
      odd = unpack_rows<F>(side, shared_, tile_.kv_head, head_size, levels, affine, thread_);
      if constexpr (F::kCentre != format::Centre::kNone) {
        if (side.pages != nullptr || side.head_vectors != nullptr) {
          add_centre<F>(side, shared_, tile_.kv_head, head_size, levels, affine, thread_);
          odd = true;  // a centre may hold anything
        }
      }
    });
    return odd;
  }

  __device__ __forceinline__ void unpack_keys() {
    unpack(p_.key, p_.head_size, keys_, shared_.key_affine);
    const bool odd_values = unpack(p_.value, p_.head_size_v, values_, shared_.value_affine);
    any_odd_value_ = __syncthreads_or(odd_values) != 0;
  }

  // Divides affine.scale by the norm of the row's levels.
  static __device__ __forceinline__ void divide_by_norm(float2& affine, const float* levels, int pitch) {
    float squares = 0.0F;
    for (int c = 0; c < pitch / 4 - 1; ++c) {
      const float4 level = reinterpret_cast<const float4*>(levels)[c];
      squares = dot4(squares, level, level);
    }
    affine.x = affine.x / sqrtf(squares);
  }

  // Computes the logits and the running softmax; each lane has a key.
  __device__ __forceinline__ void weigh(int key0) {
    readable_ = __ballot_sync(kFullWarp, shared_.block[lane_] >= 0);
    float2 key_affine = shared_.key_affine[lane_];
    float2 value_affine = shared_.value_affine[lane_];
    if (p_.key_level_norm && (readable_ >> lane_ & 1U)) divide_by_norm(key_affine, keys_ + lane_ * pitch_k_, pitch_k_);
    if (p_.value_level_norm && (readable_ >> lane_ & 1U)) {
      divide_by_norm(value_affine, values_ + lane_ * pitch_v_, pitch_v_);
    }
    float dot[kRowsPerWarp] = {};
    for (int c = 0; c < pitch_k_ / 4 - 1; ++c) {
      const float4 level = reinterpret_cast<const float4*>(keys_ + lane_ * pitch_k_)[c];
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) {
        dot[r] =
            dot4(dot[r], reinterpret_cast<const float4*>(queries_ + (warp_ * kRowsPerWarp + r) * pitch_k_)[c], level);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const int row = warp_ * kRowsPerWarp + r;
      const int key = key0 + lane_;
      sees_[r] &= readable_;
      const bool seen = (sees_[r] >> lane_ & 1U) != 0;
      float s = exact::nan_unless_finite(factor_ * (key_affine.x * dot[r] + key_affine.y * query_sum_[r]));
      s = attention::logit(logit_rule(p_, head_[r], query_[r]), tile_.sequence, s, position_[r], key);
      s = seen ? s : -INFINITY;
      const float new_max = exact::max(state_[r].max, warp_max(s));
      const float correction = attention::rescale(state_[r].max, new_max);
      const float weight = s == -INFINITY ? 0.0F : expf(s - new_max);
      state_[r].sum = state_[r].sum * correction + warp_sum(weight);
      state_[r].max = new_max;
      offset_[r] = offset_[r] * correction + warp_sum(seen ? weight * value_affine.y : 0.0F);
      shared_.weight[lane_][row] = seen ? weight * value_affine.x : 0.0F;
      if (lane_ == 0) {
        shared_.correction[row] = correction;
        shared_.row_sees[row] = sees_[r];
      }
    }
  }

  // Adds the weighted values; a thread owns columns thread, thread + 128 and so on.
  __device__ __forceinline__ void add_values() {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = thread_ + i * kAttentionThreads;
      if (column >= p_.head_size_v) break;
#pragma unroll
      for (int r = 0; r < kRows; ++r) acc_[i][r] *= shared_.correction[r];
      for (std::uint32_t left = readable_; left != 0; left &= left - 1) {
        const int k = __ffs(static_cast<int>(left)) - 1;
        const float level = values_[k * pitch_v_ + column];
        if (any_odd_value_) {
          // A NaN or an infinity must reach only the rows that see its key, and 0 * NaN is not 0.
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if ((shared_.row_sees[r] >> k & 1U) != 0) acc_[i][r] = fmaf(shared_.weight[k][r], level, acc_[i][r]);
          }
        } else {
#pragma unroll
          for (int r = 0; r < kRows; ++r) acc_[i][r] = fmaf(shared_.weight[k][r], level, acc_[i][r]);
        }
      }
    }
  }

  const AttentionParams& p_;
  const TileRows& tile_;
  Config::Storage& shared_;
  const int thread_, lane_, warp_, pitch_k_, pitch_v_;
  float* const queries_;  // [kRows][pitch_k]
  float* const keys_;     // [kKeys][pitch_k]
  float* const values_;   // [kKeys][pitch_v]
  const float factor_;
  // This warp's rows: query token of the sequence (-1: past the end), query head, position.
  int query_[kRowsPerWarp], head_[kRowsPerWarp], position_[kRowsPerWarp];
  float query_sum_[kRowsPerWarp], offset_[kRowsPerWarp] = {};
  std::uint32_t sees_[kRowsPerWarp];  // of the tile's keys
  attention::SoftmaxState state_[kRowsPerWarp];
  std::uint32_t readable_ = 0;
  bool any_odd_value_ = false;
  int turn_ = 0;
  float acc_[kColumns][kRows] = {};
};

template <int kColumns>
__global__ void __launch_bounds__(kAttentionThreads, kColumns == 1 ? 4 : 2)
    attend_any(const __grid_constant__ AttentionParams p) {
  using Config = AttendAnyConfig;
  extern __shared__ float4 shared_bytes[];
  auto& shared = *reinterpret_cast<Config::Storage*>(shared_bytes);
  const BlockIndex block{blockIdx.x, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z),
                         static_cast<int>(threadIdx.x)};
  TileRows tile;
  if (!find_rows(p, block, Config::kRows, tile)) return;
  AttendAnyBlock<kColumns> work(p, tile, shared, block.thread);
  work.load_queries();
  for (int key0 = tile.first / Config::kKeys * Config::kKeys; key0 < tile.end; key0 += Config::kKeys) work.attend(key0);
  work.finish();
}

}  // namespace quire::cuda
