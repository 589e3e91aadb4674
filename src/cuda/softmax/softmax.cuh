// The softmax between the two products of the tensor-core attention kernels, on logits in accumulator fragments, in
// either orientation (orientation.cuh): s[m][t][i] are a lane's logits of row tile m and key tile t.
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
#include "cuda/softmax/orientation.cuh"
#include "cuda/work/rows.cuh"
#include "format/format.h"

namespace quire::cuda {

// The power of two above x, for positive finite x; 0 otherwise.
__device__ __forceinline__ float power_above(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  return bits < 0x7e800000U && x > 0.0F ? __uint_as_float((bits & 0x7f800000U) + 0x00800000U)
                                        : (x > 0.0F && bits < 0x7f800000U ? x : 0.0F);
}

// power_above the largest finite magnitude of some scales in shared memory; slices that hold a poisoned row need it.
template <int kCount>
__device__ __noinline__ float largest_finite(const float* scales) {
  float largest = 0.0F;
  for (int i = 0; i < kCount; ++i) {
    if (exact::is_finite(scales[i])) largest = fmaxf(largest, fabsf(scales[i]));
  }
  return power_above(largest);
}

// The factor from the 16-bit query's product with levels to a logit in log2, without the row's scale.
template <class KeyF>
__device__ __forceinline__ float log2_factor(const AttentionParams& p, const TileRows& tile) {
  return logit_factor(p, tile) / (KeyF::kLevelNorm ? 1.0F : level_unit<KeyF>)*kLog2E;
}

// Whether logits are scaled before the softmax. They are also where the factor is not positive, since it would turn
// maxima into minima.
__device__ __forceinline__ bool has_bias(const AttentionParams& p, float logit_factor) {
  return p.softcap > 0.0F || p.alibi_slopes != nullptr || p.qq_bias != nullptr || !(logit_factor > 0.0F);
}

// The state of a lane's rows, two of each row tile.
template <class Orientation, int kTiles>
struct RunningSoftmax {
  Orientation at;
  bool biased;
  float factor[kTiles][2];     // from units of s to log2
  float query_sum[kTiles][2];  // of the 16-bit query
  float max[kTiles][2];        // in units of s
  float sum[kTiles][2];        // of this lane's keys only, and so is `offset`
  float offset[kTiles][2];
  float unit;

  // `rows` starts with the first row of tile 0. `first_unit` is 1 where values carry no scale, and 0 elsewhere.
  __device__ __forceinline__ RunningSoftmax(const AttentionParams& p, float log2_factor, const RowInfo* rows, int lane,
                                            float first_unit)
      : at(lane), biased(has_bias(p, log2_factor)), sum{}, offset{}, unit(first_unit) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowInfo& row = rows[at.row(m, r)];
        factor[m][r] = log2_factor * row.scale;
        query_sum[m][r] = row.sum;
        max[m][r] = -INFINITY;
      }
    }
  }

  // key_scale and key_offset are those of the tile's keys. An infinite logit becomes NaN here, because from here on
  // -inf means a key that is not seen.
  template <class KeyF, int kFragments>
  __device__ __forceinline__ void scale_logits(float (&s)[kTiles][kFragments][4], const float* key_scale,
                                               const float* key_offset) const {
    if constexpr (KeyF::kMetaBytes > 0) {
#pragma unroll
      for (int t = 0; t < kFragments; ++t) {
        const float2 scale = at.of_keys(key_scale, t);
        float2 zero = make_float2(0.0F, 0.0F);
        if constexpr (KeyF::kHasOffset) zero = at.of_keys(key_offset, t);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& x = s[m][t][i];
            x *= at.key_of(i) == 0 ? scale.x : scale.y;
            if constexpr (KeyF::kHasOffset)
              x = fmaf(at.key_of(i) == 0 ? zero.x : zero.y, query_sum[m][at.row_of(i)], x);
          }
        }
      }
    }
    if constexpr (KeyF::kLogitsMayBeInfinite) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4 * kFragments; ++i) s[m][i / 4][i % 4] = exact::nan_unless_finite(s[m][i / 4][i % 4]);
      }
    }
  }

  template <int kFragments>
  __device__ __forceinline__ void bias_logits(float (&s)[kTiles][kFragments][4], const AttentionParams& p,
                                              const TileRows& tile, const RowInfo* rows, int first_key) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const BiasRow bias = bias_row(p, tile, rows[at.row(m, r)]);
#pragma unroll
        for (int t = 0; t < kFragments; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (at.row_of(i) != r) continue;
            float& x = s[m][t][i];
            const float logit = exact::nan_unless_finite(x * (factor[m][r] * kLn2));
            x = kLog2E * add_bias(bias, logit, first_key + at.key(t, at.key_of(i)));
          }
        }
      }
    }
  }

  // `readable` has one bit for each key of the tile, 32 in a word.
  template <int kFragments>
  __device__ __forceinline__ void mask_logits(float (&s)[kTiles][kFragments][4], const RowInfo* rows,
                                              const std::uint32_t* readable, int first_key) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const RowInfo& seen = rows[at.row(m, r)];
        // The keys of [prefix_end, begin), which one comparison finds, and those from `end` on are not seen.
        const int prefix_end = seen.prefix_end - first_key;
        const auto gap_keys = static_cast<unsigned>(seen.begin - seen.prefix_end);
        const int end = seen.end - first_key;
#pragma unroll
        for (int t = 0; t < kFragments; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (at.row_of(i) != r) continue;
            const int n = at.key(t, at.key_of(i));
            const bool outside = static_cast<unsigned>(n - prefix_end) < gap_keys || n >= end;
            if (outside || (readable[n / 32] >> (n % 32) & 1U) == 0) s[m][t][i] = -INFINITY;
          }
        }
      }
    }
  }

  // Returns whether this lane's accumulators have to be multiplied by `correction`.
  template <int kFragments>
  __device__ __forceinline__ bool exponentials(float (&s)[kTiles][kFragments][4], float (&correction)[kTiles][2]) {
    bool moved = false;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      // There are four chains, two a row, because an addition waits four clocks for the one before.
      float largest[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) largest[at.row_of(i)][at.key_of(i)] = s[m][0][i];
#pragma unroll
      for (int t = 1; t < kFragments; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& chain = largest[at.row_of(i)][at.key_of(i)];
          chain = fmaxf(chain, s[m][t][i]);
        }
      }
      float slope[2], base[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        slope[r] = biased ? 1.0F : factor[m][r];
        float next = at.over_row(fmaxf(largest[r][0], largest[r][1]), [](float a, float b) { return fmaxf(a, b); });
        float& own = max[m][r];
        next = fmaxf(own, next);
        base[r] = next == -INFINITY ? 0.0F : slope[r] * next;
        correction[m][r] = ptx::ex2_approx(own == -INFINITY ? -INFINITY : fmaf(slope[r], own, -base[r]));
        moved = moved || next != own;
        own = next;
      }
      float added[2][2] = {};
#pragma unroll
      for (int t = 0; t < kFragments; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = s[m][t][i];
          x = ptx::ex2_approx(fmaf(slope[at.row_of(i)], x, -base[at.row_of(i)]));
          added[at.row_of(i)][at.key_of(i)] += x;
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sum[m][r] = fmaf(sum[m][r], correction[m][r], added[r][0] + added[r][1]);
        offset[m][r] *= correction[m][r];
      }
    }
    return moved;
  }

  // value_scale and value_offset are those of the tile's keys; `largest` has the bits of the largest magnitude among
  // the scales. Returns whether `unit`, and with it `correction`, changed.
  template <class ValueF, int kFragments>
  __device__ __forceinline__ bool weigh_values(float (&s)[kTiles][kFragments][4], const float* value_scale,
                                               const float* value_offset, std::uint32_t largest,
                                               float (&correction)[kTiles][2]) {
    bool moved = false;
    if constexpr (ValueF::kMetaBytes > 0) {
      const bool poisoned = largest >= 0x7f800000U;  // some scale of the tile is NaN
      const float next = fmaxf(unit, poisoned ? largest_finite<Orientation::kTileKeys * kFragments>(value_scale)
                                              : power_above(__uint_as_float(largest)));
      if (next != unit) {
        moved = true;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          correction[m][0] *= unit / next;
          correction[m][1] *= unit / next;
        }
        unit = next;
      }
      const float inverse = next > 0.0F ? 1.0F / next : 0.0F;
      float added[kTiles][2][2] = {};
      const auto weigh = [&](auto skips_zeros) {
#pragma unroll
        for (int t = 0; t < kFragments; ++t) {
          float2 scale = at.of_keys(value_scale, t);
          scale.x *= inverse;
          scale.y *= inverse;
          float2 zero = make_float2(0.0F, 0.0F);
          if constexpr (ValueF::kHasOffset) zero = at.of_keys(value_offset, t);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              float& x = s[m][t][i];
              if (decltype(skips_zeros)::value && x == 0.0F) continue;
              if constexpr (ValueF::kHasOffset) {
                float& chain = added[m][at.row_of(i)][at.key_of(i)];
                chain = fmaf(x, at.key_of(i) == 0 ? zero.x : zero.y, chain);
              }
              x *= at.key_of(i) == 0 ? scale.x : scale.y;
            }
          }
        }
      };
      // 0 times a NaN scale is not 0, so keys without weight must not meet it.
      if (poisoned) {
        weigh(std::true_type{});
      } else {
        weigh(std::false_type{});
      }
      if constexpr (ValueF::kHasOffset) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          offset[m][0] += added[m][0][0] + added[m][0][1];
          offset[m][1] += added[m][1][0] + added[m][1][1];
        }
      }
    }
    return moved;
  }

  template <int kFragments>
  static __device__ __forceinline__ void rescale(float (&acc)[kTiles][kFragments][4],
                                                 const float (&correction)[kTiles][2]) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] *= correction[m][Orientation::row_of(i)];
      }
    }
  }

  // Brings the state of the rows into the form of attention::SoftmaxState, with natural logarithms. All lanes call.
  __device__ __forceinline__ void finish() {
    const auto add = [](float a, float b) { return a + b; };
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sum[m][r] = at.over_row(sum[m][r], add);
        offset[m][r] = at.over_row(offset[m][r], add);
        if (max[m][r] != -INFINITY) max[m][r] *= biased ? kLn2 : factor[m][r] * kLn2;
      }
    }
  }

  // What a lane's accumulators mean: x[m][n][i] of an output row, before v_scale.
  __device__ __forceinline__ float output(float acc, int m, int i) const {
    return acc * unit + offset[m][Orientation::row_of(i)];
  }
};

template <bool kBFloat16>
__device__ __forceinline__ std::uint32_t pack_pair(float low, float high) {
  if constexpr (kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  } else {
    return pair_bits(__floats2half2_rn(low, high));
  }
}

// Weights of 16 keys as the first operand of m16n8k16 (RowsOnM): key tiles t and t + 1.
template <bool kBFloat16, int kFragments>
__device__ __forceinline__ void pack_weights(const float (&s)[kFragments][4], int t, std::uint32_t (&weights)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weights[i] = pack_pair<kBFloat16>(s[t + i / 2][i % 2 * 2], s[t + i / 2][i % 2 * 2 + 1]);
  }
}

}  // namespace quire::cuda
