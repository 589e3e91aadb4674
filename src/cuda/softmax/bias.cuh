// What is added to a logit: softcap, ALiBi, query-query bias.
#pragma once

#include <cstdint>

#include "attention/mask.h"
#include "cuda/attention_params.h"
#include "cuda/ptx/math.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

inline constexpr float kLog2E = 1.4426950408889634F;
inline constexpr float kLn2 = 0.6931471805599453F;

// The biases of query row `i` of its sequence; i < 0 for a row past the end.
__device__ __forceinline__ attention::LogitRule logit_rule(const AttentionParams& p, int head, int i) {
  attention::LogitRule rule;
  rule.softcap = p.softcap;
  rule.has_alibi = p.alibi_slopes != nullptr;
  rule.alibi_sqrt = p.alibi_sqrt;
  if (rule.has_alibi && i >= 0) rule.alibi_slope = p.alibi_slopes[head * p.alibi_stride];
  if (p.qq_bias != nullptr && i >= 0 && i < p.qq_size) rule.qq_bias = p.qq_bias + i * p.qq_row_stride;
  rule.qq_stride = p.qq_column_stride;
  rule.qq_size = p.qq_size;
  return rule;
}

// attention::logit with tanh y = 1 - 2 / (e^2y + 1), which is within 2^-22 of it: small enough to stand at every
// element.
struct BiasRow {
  float softcap, inverse_softcap, alibi_slope;
  bool has_alibi, alibi_sqrt;
  const float* qq_bias;
  std::int64_t qq_stride;
  int qq_size, context_len, position;
};
__device__ __forceinline__ BiasRow bias_row(const AttentionParams& p, const TileRows& tile, const RowInfo& info) {
  const attention::LogitRule rule = logit_rule(p, info.head, info.query);
  return {rule.softcap,
          __fdividef(1.0F, rule.softcap),
          rule.alibi_slope,
          rule.has_alibi,
          rule.alibi_sqrt,
          rule.qq_bias,
          rule.qq_stride,
          rule.qq_size,
          tile.sequence.context_len,
          info.position};
}
__device__ __forceinline__ float add_bias(const BiasRow& row, float s, int key) {
  if (row.softcap > 0.0F) {
    const float e = ptx::ex2_approx(s * row.inverse_softcap * (2.0F * kLog2E));
    s = row.softcap * (1.0F - __fdividef(2.0F, e + 1.0F));
  }
  const int column = key - row.context_len;
  if (row.has_alibi) {
    const float distance =
        row.alibi_sqrt ? -ptx::sqrt_approx(static_cast<float>(max(row.position - key, 0))) : static_cast<float>(column);
    s = fmaf(row.alibi_slope, distance, s);
  }
  if (row.qq_bias != nullptr && column >= 0 && column < row.qq_size) s += row.qq_bias[column * row.qq_stride];
  return s;
}

}  // namespace quire::cuda
