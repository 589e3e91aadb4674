// Brings query rows from global to shared memory, rotated as the keys are and rounded to 16 bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/attention_params.h"
#include "cuda/format/fragment.cuh"
#include "cuda/lane/bytes.cuh"
#include "cuda/lane/rotate.cuh"
#include "cuda/work/rows.cuh"

namespace quire::cuda {

// A query row on its way from global to shared memory: 8 elements a lane, bf16 or (float8 too) fp16.
struct QueryRow {
  static constexpr int kPer = 8;
  RowInfo info;
  std::uint32_t words[kPer / 2];
};

// This lane's elements of a row that is not made of whole vectors. It is a function call, since it is long and rare.
static __device__ __noinline__ uint4 fetch_elements(const std::uint8_t* from, int elements, DType dtype, int bytes) {
  std::uint64_t halves[2] = {};
#pragma unroll 1
  for (int j = 0; j < min(elements, QueryRow::kPer); ++j) {
    const std::uint64_t code = bytes == 2 ? reinterpret_cast<const std::uint16_t*>(from)[j]
                                          : __half_as_ushort(__float2half_rn(load_float(from + j, dtype)));
    (j < 4 ? halves[0] : halves[1]) |= code << (16 * (j % 4));
  }
  return make_uint4(static_cast<std::uint32_t>(halves[0]), static_cast<std::uint32_t>(halves[0] >> 32),
                    static_cast<std::uint32_t>(halves[1]), static_cast<std::uint32_t>(halves[1] >> 32));
}

// One warp fetches the query row of an info of the tile, or zeros for a row past the end.
__device__ __forceinline__ QueryRow fetch_query(const AttentionParams& p, const TileRows& tile, const RowInfo& info,
                                                int lane) {
  constexpr int kPer = QueryRow::kPer;
  QueryRow query{info, {}};
  if (query.info.query < 0) return query;
  const std::int64_t token = tile.query_begin + query.info.query;
  const std::uint8_t* from = p.query + token * p.query_token_stride + query.info.head * p.query_head_stride +
                             lane * kPer * p.query_element_bytes;
  const int elements = p.head_size - lane * kPer;
  if (elements <= 0) return query;
  const uint4 vector = p.query_vectors ? *reinterpret_cast<const uint4*>(from)
                                       : fetch_elements(from, elements, p.query_dtype, p.query_element_bytes);
  query.words[0] = vector.x;
  query.words[1] = vector.y;
  query.words[2] = vector.z;
  query.words[3] = vector.w;
  return query;
}

// Rotates the row, divides it by a power of two, and writes it as 16-bit elements, 8 of them to place(0), place(1) and
// so on. Its completed info goes to `info`.
template <class KeyF, int kHead, class Place>
__device__ __forceinline__ void put_query(const AttentionParams& p, QueryRow& query, Place&& place, RowInfo& info,
                                          int lane) {
  constexpr int kPer = QueryRow::kPer;
  static_assert(kHead <= 32 * kPer);
  float y[kPer];
#pragma unroll
  for (int w = 0; w < kPer / 2; ++w) {
    const bool is_half = p.query_dtype != DType::kBFloat16;
    const float2 halves = __half22float2(as_half2(query.words[w]));
    y[2 * w] = is_half ? halves.x : __uint_as_float(query.words[w] << 16);
    y[2 * w + 1] = is_half ? halves.y : __uint_as_float(query.words[w] & 0xffff0000U);
  }
  rotate<LaneMap<kPer, 32, true>>(KeyF::kRotation, y, lane, format::row_shape(p.head_size).block);
  float unit = 1.0F;
  if constexpr (!std::is_same_v<KeyF, format::BFloat16>) {
    float largest = 0.0F;
#pragma unroll
    for (int j = 0; j < kPer; ++j) largest = fmaxf(largest, fabsf(y[j]));
    largest = warp_max(largest);
    // The power of two below the largest element, so that q16 lies in [-2, 2).
    const std::uint32_t exponent = __float_as_uint(largest) & 0x7f800000U;
    if (exponent > 0x08000000U && exponent < 0x7f000000U) unit = __uint_as_float(exponent);
  }
  float total = 0.0F;
  alignas(16) std::uint16_t codes[kPer];
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    if constexpr (std::is_same_v<KeyF, format::BFloat16>) {
      codes[j] = format::float_to_bfloat16(y[j]);
      total += format::bfloat16_to_float(codes[j]);
    } else {
      const __half code = __float2half_rn(y[j] * (1.0F / unit));
      codes[j] = __half_as_ushort(code);
      total += __half2float(code);
    }
  }
  if (lane * kPer < kHead) *reinterpret_cast<uint4*>(place(lane)) = *reinterpret_cast<const uint4*>(codes);
  query.info.scale = unit;
  query.info.sum = warp_sum(total);
  if (lane == 0) info = query.info;
}

// One warp puts its query rows, from first_row on, to place(row) in shared memory, with several loads under way at a
// time.
template <class KeyF, int kHead, int kNumRows, class PlaceOfRow>
__device__ __forceinline__ void load_queries(const AttentionParams& p, const TileRows& tile, int first_row,
                                             PlaceOfRow&& place, RowInfo* row_infos, int lane) {
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (int r = first_row; r < first_row + kNumRows; r += kAtOnce) {
    QueryRow query[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) query[i] = fetch_query(p, tile, row_info(p, tile, r + i), lane);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      put_query<KeyF, kHead>(p, query[i], place(r + i), row_infos[r + i], lane);
    }
  }
}

// One warp puts four query rows of a tile at once into shared memory, `pitch` bytes apart: eight lanes a row, rotated
// and rounded as put_query does it. All of their infos but scale and sum are there already.
template <class KeyF, int kHead>
__device__ __forceinline__ void put_four_queries(const AttentionParams& p, const TileRows& tile, RowInfo* infos,
                                                 std::uint8_t* rows, int pitch, int lane) {
  constexpr int kPer = kHead / 8;
  constexpr bool kBFloat16 = std::is_same_v<KeyF, format::BFloat16>;
  const int row = lane / 8;
  const int first = lane % 8 * kPer;
  RowInfo& info = infos[row];
  std::uint32_t words[kPer / 2] = {};
  if (info.query >= 0) {
    const std::uint8_t* from = p.query + (tile.query_begin + info.query) * p.query_token_stride +
                               info.head * p.query_head_stride + first * p.query_element_bytes;
#pragma unroll
    for (int w = 0; w < kPer / 2; w += 4) {
      const int elements = p.head_size - first - 2 * w;
      if (elements <= 0) break;
      const std::uint8_t* at = from + 2 * w * p.query_element_bytes;
      const uint4 vector = p.query_vectors ? *reinterpret_cast<const uint4*>(at)
                                           : fetch_elements(at, elements, p.query_dtype, p.query_element_bytes);
      words[w] = vector.x;
      words[w + 1] = vector.y;
      words[w + 2] = vector.z;
      words[w + 3] = vector.w;
    }
  }
  float y[kPer];
  const bool is_half = p.query_dtype != DType::kBFloat16;
#pragma unroll
  for (int w = 0; w < kPer / 2; ++w) {
    const float2 halves = __half22float2(as_half2(words[w]));
    y[2 * w] = is_half ? halves.x : __uint_as_float(words[w] << 16);
    y[2 * w + 1] = is_half ? halves.y : __uint_as_float(words[w] & 0xffff0000U);
  }
  rotate<LaneMap<kPer, 8, true>>(KeyF::kRotation, y, lane % 8, format::row_shape(p.head_size).block);
  float unit = 1.0F;
  if constexpr (!kBFloat16) {
    float largest = 0.0F;
#pragma unroll
    for (int j = 0; j < kPer; ++j) largest = fmaxf(largest, fabsf(y[j]));
#pragma unroll
    for (int step = 1; step < 8; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, step));
    const std::uint32_t exponent = __float_as_uint(largest) & 0x7f800000U;
    if (exponent > 0x08000000U && exponent < 0x7f000000U) unit = __uint_as_float(exponent);
  }
  const float inverse = 1.0F / unit;
  float total = 0.0F;
  std::uint32_t codes[kPer / 2];
#pragma unroll
  for (int w = 0; w < kPer / 2; ++w) {
    if constexpr (kBFloat16) {
      codes[w] = format::float_to_bfloat16(y[2 * w]) |
                 static_cast<std::uint32_t>(format::float_to_bfloat16(y[2 * w + 1])) << 16;
      total += __uint_as_float(codes[w] << 16) + __uint_as_float(codes[w] & 0xffff0000U);
    } else {
      const __half2 pair = __floats2half2_rn(y[2 * w] * inverse, y[2 * w + 1] * inverse);
      codes[w] = pair_bits(pair);
      total += __low2float(pair) + __high2float(pair);
    }
  }
#pragma unroll
  for (int step = 1; step < 8; step *= 2) total += __shfl_xor_sync(kFullWarp, total, step);
  std::uint8_t* to = rows + row * pitch + 2 * first;
#pragma unroll
  for (int w = 0; w < kPer / 2; w += 4) {
    *reinterpret_cast<uint4*>(to + 4 * w) = make_uint4(codes[w], codes[w + 1], codes[w + 2], codes[w + 3]);
  }
  if (lane % 8 == 0) {
    info.scale = unit;
    info.sum = total;
  }
}

}  // namespace quire::cuda
