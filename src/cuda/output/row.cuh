// How a row leaves: rotated back and divided by its sum to the output and LSE, or as the partial result of a split.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "attention/softmax.h"
#include "cuda/attention_params.h"
#include "cuda/lane/rotate.cuh"
#include "format/float_types.h"

namespace quire::cuda {

// x in the dtype, as sixteen bits.
__device__ __forceinline__ std::uint32_t narrow_to_16(DType dtype, float x) {
  return dtype == DType::kFloat16 ? __half_as_ushort(__float2half_rn(x)) : __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// One warp writes one row: `row` [head_size_v] in shared memory holds sum p v for `state`, rotated and not yet divided.
template <class Map = WideMap>
__device__ __forceinline__ void finish_row(const OutputRule& rule, const float* row, attention::SoftmaxState state,
                                           std::int64_t token, int head, int lane, bool exists = true) {
  constexpr int kE = Map::kElements;
  const bool empty = state.sum == 0.0F;  // whatever its accumulator holds, the output is 0
  float factor = 1.0F;
  if (rule.sinks != nullptr) factor = attention::add_sink(state, rule.sinks[head * rule.sink_stride]);
  factor *= attention::output_factor(state);
  float y[kE] = {};
#pragma unroll
  for (int j = 0; j < kE; ++j) {
    const int i = lane * kE + j;
    if (i < rule.shape.head_size) y[j] = empty ? 0.0F : row[i] * factor;
  }
  rotate_back<Map>(rule.rotation, y, lane, rule.shape.block);
#pragma unroll
  for (int j = 0; j < kE; ++j) y[j] *= rule.unrotate;
  if (!exists) return;
  std::uint8_t* out = rule.out + token * rule.token_stride + head * rule.head_stride;
  if (rule.vectors) {
#pragma unroll
    for (int j = 0; j < kE; j += 8) {
      if (lane * kE + j >= rule.shape.head_size) break;
      std::uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] = narrow_to_16(rule.dtype, y[j + 2 * w]) | narrow_to_16(rule.dtype, y[j + 2 * w + 1]) << 16;
      }
      reinterpret_cast<uint4*>(out)[(lane * kE + j) / 8] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kE; ++j) {
      const int i = lane * kE + j;
      if (i >= rule.shape.head_size) break;
      if (rule.dtype == DType::kFloat32) {
        reinterpret_cast<float*>(out)[i] = y[j];
      } else if (rule.dtype == DType::kFloat8E4M3) {
        out[i] = format::E4M3::encode(__fdiv_rn(y[j], *rule.output_scale));
      } else {
        reinterpret_cast<std::uint16_t*>(out)[i] = static_cast<std::uint16_t>(narrow_to_16(rule.dtype, y[j]));
      }
    }
  }
  if (rule.lse != nullptr && lane == 0) {
    rule.lse[token * rule.lse_token_stride + head * rule.lse_head_stride] = attention::log_sum_exp(state);
  }
}

// The lanes of a Map write a row's result where it `exists`: as the output, or as this split's partial. All of a warp
// call.
template <class Map>
__device__ __forceinline__ void write_row(const AttentionParams& p, const float* row,
                                          const attention::SoftmaxState& state, std::int64_t token, int head, int split,
                                          int lane, bool exists = true) {
  if (p.max_splits == 1) {
    finish_row<Map>(p.output, row, state, token, head, lane, exists);
    return;
  }
  if (!exists) return;
  const std::int64_t at = (token * p.num_q_heads + head) * p.max_splits + split;
  float* to = p.partials.acc + at * p.head_size_v;
  for (int c = lane; c < p.head_size_v; c += Map::kLanes) to[c] = row[c];
  if (lane == 0) p.partials.state[at] = make_float2(state.max, state.sum);
}

}  // namespace quire::cuda
