// The softmax between the two products of the tensor-core attention kernels, on logits in accumulator fragments.
//
// s[m][t][..] are a lane's logits of row tile m (16 rows) and keys 8 t + pair + {0, 1}: elements 0 and 1 belong to row
// `quad`, 2 and 3 to row quad + 8, where quad = lane / 4 and pair = lane % 4 * 2. Four neighbouring lanes share a row.
//
//   scale_logits   s = a_k s + b_k sum(q16)                            in units of 1 / factor; NaN if infinite
//   bias_logits    s = log2(e) (softcap, ALiBi and query-query bias of factor s)   where there is one
//   mask_logits    s = -inf where the row does not see the key
//   exponentials   s = 2^(factor s - factor max), running max and sum
//   weigh_values   s = s a_v / unit, running sum of p b_v; unit is a power of two no a_v has exceeded so far, so that
//                  s <= 1 fits 16 bits
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/attention_params.h"
#include "cuda/format/fragment.cuh"
#include "cuda/lane/map.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/softmax/bias.cuh"
#include "cuda/work/rows.cuh"
#include "format/format.h"

namespace quire::cuda {

// The power of two above x, for positive finite x; 0 otherwise.
__device__ __forceinline__ float power_above(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  return bits < 0x7e800000U && x > 0.0F ? __uint_as_float((bits & 0x7f800000U) + 0x00800000U)
                                        : (x > 0.0F && bits < 0x7f800000U ? x : 0.0F);
}

// power_above the largest finite magnitude of some scales in shared memory. For slices that hold a poisoned row.
template <int kCount>
__device__ __noinline__ float largest_finite(const float* scales) {
  float largest = 0.0F;
  for (int i = 0; i < kCount; ++i) {
    if (exact::is_finite(scales[i])) largest = fmaxf(largest, fabsf(scales[i]));
  }
  return power_above(largest);
}

template <bool kBFloat16>
__device__ __forceinline__ std::uint32_t pack_pair(float low, float high) {
  if constexpr (kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  } else {
    return pair_bits(__floats2half2_rn(low, high));
  }
}

// A lane's rows: quad + 8 r of each tile of 16.
template <int kTiles>
struct RunningSoftmax {
  float factor[kTiles][2];     // from units of s to log2
  float query_sum[kTiles][2];  // of the 16-bit query
  float max[kTiles][2];        // in units of s
  float sum[kTiles][2];        // this lane's keys only, as is `offset`
  float offset[kTiles][2];
  float unit;

  // `rows`: the first row of tile 0. `unit`: 1 where values carry no scale.
  __device__ __forceinline__ RunningSoftmax(float logit_factor, const RowInfo* rows, int quad, float first_unit)
      : sum{}, offset{}, unit(first_unit) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowInfo& row = rows[16 * m + 8 * r + quad];
        factor[m][r] = logit_factor * row.scale;
        query_sum[m][r] = row.sum;
        max[m][r] = -INFINITY;
      }
    }
  }

  // The state of a row as attention::SoftmaxState has it: natural logarithms. Call in all lanes.
  __device__ __forceinline__ void finish(bool has_bias) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int step = 1; step <= 2; step *= 2) {
          sum[m][r] += __shfl_xor_sync(kFullWarp, sum[m][r], step);
          offset[m][r] += __shfl_xor_sync(kFullWarp, offset[m][r], step);
        }
        if (max[m][r] != -INFINITY) max[m][r] *= has_bias ? kLn2 : factor[m][r] * kLn2;
      }
    }
  }
};

// From the 16-bit query's product with levels to a logit in log2, but for the row's scale.
template <class KeyF>
__device__ __forceinline__ float log2_factor(const AttentionParams& p, int batch, int kv_head) {
  return p.softmax_scale * p.q_scale.at(batch, kv_head) * p.k_scale.at(batch, kv_head) *
         KeyF::unrotate(format::row_shape(p.head_size)) / (KeyF::kLevelNorm ? 1.0F : level_unit<KeyF>)*kLog2E;
}

// Whether logits are scaled before the softmax. A factor that is not positive would turn maxima into minima.
__device__ __forceinline__ bool has_bias(const AttentionParams& p, float logit_factor) {
  return p.softcap > 0.0F || p.alibi_slopes != nullptr || p.qq_bias != nullptr || !(logit_factor > 0.0F);
}

// Whether a product of a query and a key can be infinite: 16-bit floats and e5m2 hold infinities, and fp32 scales can
// be near the largest number. Elsewhere levels (e4m3, e4b15, codebooks) and scales (none, fp16) are too small for it.
template <class KeyF>
inline constexpr bool kLogitsMayBeInfinite =
    KeyF::kMetaPlace == format::MetaPlace::kScaleCache || KeyF::kCacheDType == DType::kFloat16 ||
    KeyF::kCacheDType == DType::kBFloat16 || KeyF::kCacheDType == DType::kFloat8E5M2;

// key_scale, key_offset: of the tile's keys. An infinite logit becomes NaN here, since from here on -inf means a key
// that is not seen.
template <class KeyF, int kTiles, int kFragments>
__device__ __forceinline__ void scale_logits(float (&s)[kTiles][kFragments][4], const RunningSoftmax<kTiles>& state,
                                             const float* key_scale, const float* key_offset, int pair) {
  if constexpr (KeyF::kMetaBytes > 0) {
#pragma unroll
    for (int t = 0; t < kFragments; ++t) {
      const float2 scale = *reinterpret_cast<const float2*>(&key_scale[8 * t + pair]);
      float2 zero = make_float2(0.0F, 0.0F);
      if constexpr (KeyF::kHasOffset) zero = *reinterpret_cast<const float2*>(&key_offset[8 * t + pair]);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = s[m][t][i];
          x *= i % 2 == 0 ? scale.x : scale.y;
          if constexpr (KeyF::kHasOffset) x = fmaf(i % 2 == 0 ? zero.x : zero.y, state.query_sum[m][i / 2], x);
        }
      }
    }
  }
  if constexpr (kLogitsMayBeInfinite<KeyF>) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4 * kFragments; ++i) s[m][i / 4][i % 4] = exact::nan_unless_finite(s[m][i / 4][i % 4]);
    }
  }
}

template <int kTiles, int kFragments>
__device__ __forceinline__ void bias_logits(float (&s)[kTiles][kFragments][4], const RunningSoftmax<kTiles>& state,
                                            const AttentionParams& p, const TileRows& tile, const RowInfo* rows,
                                            int first_key, int quad, int pair) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const BiasRow bias = bias_row(p, tile, rows[16 * m + 8 * r + quad]);
#pragma unroll
      for (int i = 0; i < 2 * kFragments; ++i) {
        float& x = s[m][i / 2][2 * r + i % 2];
        const float logit = exact::nan_unless_finite(x * (state.factor[m][r] * kLn2));
        x = kLog2E * add_bias(bias, logit, first_key + 8 * (i / 2) + pair + i % 2);
      }
    }
  }
}

// readable: one bit a key of the tile, 32 a word.
template <int kTiles, int kFragments>
__device__ __forceinline__ void mask_logits(float (&s)[kTiles][kFragments][4], const RowInfo* rows,
                                            const std::uint32_t* readable, int first_key, int quad, int pair) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowInfo& seen = rows[16 * m + 8 * r + quad];
      const int begin = seen.begin - first_key;
      const int end = seen.end - first_key;
#pragma unroll
      for (int i = 0; i < 2 * kFragments; ++i) {
        const int n = 8 * (i / 2) + pair + i % 2;
        if (n < begin || n >= end || (readable[n / 32] >> (n % 32) & 1U) == 0) s[m][i / 2][2 * r + i % 2] = -INFINITY;
      }
    }
  }
}

// Returns whether this lane's accumulators have to be multiplied by `correction`.
template <int kTiles, int kFragments>
__device__ __forceinline__ bool exponentials(float (&s)[kTiles][kFragments][4], RunningSoftmax<kTiles>& state,
                                             bool has_bias, float (&correction)[kTiles][2]) {
  bool moved = false;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    // Four chains, two a row: an addition waits four clocks for the one before.
    float largest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) largest[i] = s[m][0][i];
#pragma unroll
    for (int t = 1; t < kFragments; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) largest[i] = fmaxf(largest[i], s[m][t][i]);
    }
    float slope[2], base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      slope[r] = has_bias ? 1.0F : state.factor[m][r];
      float next = fmaxf(largest[2 * r], largest[2 * r + 1]);
      next = fmaxf(next, __shfl_xor_sync(kFullWarp, next, 1));
      next = fmaxf(next, __shfl_xor_sync(kFullWarp, next, 2));
      float& max = state.max[m][r];
      next = fmaxf(max, next);
      base[r] = next == -INFINITY ? 0.0F : slope[r] * next;
      correction[m][r] = ptx::ex2_approx(max == -INFINITY ? -INFINITY : fmaf(slope[r], max, -base[r]));
      moved = moved || next != max;
      max = next;
    }
    float sum[4] = {};
#pragma unroll
    for (int t = 0; t < kFragments; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[m][t][i];
        x = ptx::ex2_approx(fmaf(slope[i / 2], x, -base[i / 2]));
        sum[i] += x;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      state.sum[m][r] = fmaf(state.sum[m][r], correction[m][r], sum[2 * r] + sum[2 * r + 1]);
      state.offset[m][r] *= correction[m][r];
    }
  }
  return moved;
}

// value_scale, value_offset: of the tile's keys; `largest`: the bits of the largest magnitude among the scales. Returns
// whether `unit`, and with it `correction`, changed.
template <class ValueF, int kTiles, int kFragments>
__device__ __forceinline__ bool weigh_values(float (&s)[kTiles][kFragments][4], RunningSoftmax<kTiles>& state,
                                             const float* value_scale, const float* value_offset, std::uint32_t largest,
                                             float (&correction)[kTiles][2], int pair) {
  bool moved = false;
  if constexpr (ValueF::kMetaBytes > 0) {
    const bool poisoned = largest >= 0x7f800000U;  // some scale of the tile is NaN
    const float next = fmaxf(
        state.unit, poisoned ? largest_finite<8 * kFragments>(value_scale) : power_above(__uint_as_float(largest)));
    if (next != state.unit) {
      moved = true;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        correction[m][0] *= state.unit / next;
        correction[m][1] *= state.unit / next;
      }
      state.unit = next;
    }
    const float inverse = next > 0.0F ? 1.0F / next : 0.0F;
    float offset[kTiles][4] = {};
    const auto weigh = [&](auto skips_zeros) {
#pragma unroll
      for (int t = 0; t < kFragments; ++t) {
        float2 scale = *reinterpret_cast<const float2*>(&value_scale[8 * t + pair]);
        scale.x *= inverse;
        scale.y *= inverse;
        float2 zero = make_float2(0.0F, 0.0F);
        if constexpr (ValueF::kHasOffset) zero = *reinterpret_cast<const float2*>(&value_offset[8 * t + pair]);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& x = s[m][t][i];
            if (decltype(skips_zeros)::value && x == 0.0F) continue;
            if constexpr (ValueF::kHasOffset) offset[m][i] = fmaf(x, i % 2 == 0 ? zero.x : zero.y, offset[m][i]);
            x *= i % 2 == 0 ? scale.x : scale.y;
          }
        }
      }
    };
    // 0 times a NaN scale is not 0: keys without weight must not meet it.
    if (poisoned) {
      weigh(std::true_type{});
    } else {
      weigh(std::false_type{});
    }
    if constexpr (ValueF::kHasOffset) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        state.offset[m][0] += offset[m][0] + offset[m][1];
        state.offset[m][1] += offset[m][2] + offset[m][3];
      }
    }
  }
  return moved;
}

template <int kTiles, int kFragments>
__device__ __forceinline__ void rescale(float (&acc)[kTiles][kFragments][4], const float (&correction)[kTiles][2]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] *= correction[m][i / 2];
    }
  }
}

}  // namespace quire::cuda
