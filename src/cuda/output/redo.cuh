// Computes a row again, value by value in fp32, where an infinite or NaN value has met weights of 0.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "attention/mask.h"
#include "attention/softmax.h"
#include "cuda/attention_params.h"
#include "cuda/lane/bytes.cuh"
#include "cuda/lane/rotate.cuh"
#include "cuda/softmax/bias.cuh"
#include "cuda/stage/metadata.cuh"
#include "cuda/work/pages.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

// This lane's 16 elements of a stored row, from global memory, and the row's affine map.
template <class F>
__device__ __forceinline__ format::Affine read_row(const CacheSide& side, std::int64_t block, int slot, int head,
                                                   int head_size, float (&level)[16], int lane) {
  const std::uint8_t* row = side.row(block, slot, head);
  constexpr int kBytes = 16 / F::kUnit * F::kUnitBytes;
  alignas(16) std::uint8_t bytes[kBytes] = {};
  // A unit is read in words as narrow as every row's alignment allows.
  using Word = std::conditional_t<F::kUnitBytes % 4 == 0, std::uint32_t,
                                  std::conditional_t<F::kUnitBytes % 2 == 0, std::uint16_t, std::uint8_t>>;
  load_words<Word>(row + lane * kBytes, bytes, static_cast<int>(format::code_bytes<F>(head_size)) - lane * kBytes);
#pragma unroll
  for (int u = 0; u < 16 / F::kUnit; ++u) F::unpack(bytes + u * F::kUnitBytes, level + u * F::kUnit);
  float squares = 0.0F;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    if (lane * 16 + j >= head_size) level[j] = 0.0F;
    squares = fmaf(level[j], level[j], squares);
  }
  const format::Affine affine = load_affine<F>(side, block, slot, head, format::row_shape(head_size));
  return {F::kLevelNorm ? affine.scale * rsqrtf(warp_sum(squares)) : affine.scale, affine.offset};
}

// load_float as a function call, since the caller would hold sixteen copies of it.
static __device__ __noinline__ float query_element(const std::uint8_t* at, DType dtype) {
  return load_float(at, dtype);
}

struct AllKeys {
  __device__ __forceinline__ bool operator()(int) const { return true; }
};

// One warp computes one row, value by value in fp32, over those of the tile's keys for which `has` is true. A row that
// does not see an infinite or NaN value does not meet it. Writes sum p v (times v_scale) to `row` [head_size_v].
template <class KeyF, class ValueF, class Has = AllKeys>
__device__ __noinline__ attention::SoftmaxState exact_row(const AttentionParams& p, const TileRows& tile,
                                                          std::int64_t token, int head, float* row, int lane,
                                                          Has has = {}) {
  const format::RowShape shape = format::row_shape(p.head_size);
  float q[16] = {};
  const std::uint8_t* from = p.query + token * p.query_token_stride + head * p.query_head_stride;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int i = lane * 16 + j;
    if (i < p.head_size) q[j] = query_element(from + i * p.query_element_bytes, p.query_dtype);
  }
  rotate<WideMap>(KeyF::kRotation, q, lane, shape.block);
  float query_sum = 0.0F;
#pragma unroll
  for (int j = 0; j < 16; ++j) query_sum += q[j];
  query_sum = warp_sum(query_sum);
  const float factor = logit_factor(p, tile);
  const int query_index = static_cast<int>(token - tile.query_begin);
  const int position = tile.sequence.context_len + query_index;

  const attention::LogitRule rule = logit_rule(p, head, query_index);
  attention::SoftmaxState state;
  float acc[16] = {};
  float offset = 0.0F;
#pragma unroll 1
  for (int key = tile.first; key < tile.end; ++key) {
    if (!has(key) || !attention::visible(p.mask, tile.sequence, position, key)) continue;
    const KeyPlace place = find_key(p, tile, key, false);
    if (place.block < 0) continue;
    float level[16];
    const format::Affine k = read_row<KeyF>(p.key, place.block, place.slot, tile.kv_head, p.head_size, level, lane);
    float dot = 0.0F;
#pragma unroll
    for (int j = 0; j < 16; ++j) dot = fmaf(q[j], level[j], dot);
    float s = exact::nan_unless_finite(factor * fmaf(k.scale, warp_sum(dot), k.offset * query_sum));
    s = attention::logit(rule, tile.sequence, s, position, key);
    if (s == -INFINITY) continue;
    const float next = exact::max(s, state.max);
    const float correction = attention::rescale(state.max, next);
    const float weight = expf(s - next);
    state.max = next;
    state.sum = fmaf(state.sum, correction, weight);
    const format::Affine v =
        read_row<ValueF>(p.value, place.block, place.slot, tile.kv_head, p.head_size_v, level, lane);
    offset = fmaf(offset, correction, weight * v.offset);
#pragma unroll
    for (int j = 0; j < 16; ++j) acc[j] = fmaf(acc[j], correction, weight * v.scale * level[j]);
  }
  const float value_factor = p.v_scale.at(tile.batch, tile.kv_head);
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int i = lane * 16 + j;
    if (i < p.head_size_v) row[i] = (acc[j] + offset) * value_factor;
  }
  return state;
}

}  // namespace quire::cuda
