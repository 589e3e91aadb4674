// What the tensor-core attention kernels (decode.cuh, prefill.cuh) share: rows of the cache into shared memory, codes
// to 16-bit levels, query rows to 16 bits, the keys a block looks at, and how a finished row leaves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/attention.cuh"
#include "cuda/levels16.cuh"
#include "cuda/ptx.cuh"

namespace quire::cuda {

inline constexpr float kLog2E = 1.4426950408889634F;
inline constexpr float kLn2 = 0.6931471805599453F;

// Shared-memory rows of 16-bit elements: 16 bytes more than the row, so that ldmatrix meets every bank once.
template <int kHead>
inline constexpr int kPitch16 = kHead * 2 + 16;

// A row of a format as it lies in the cache, in shared memory.
template <class F, int kHead>
struct RawRow {
  static constexpr int kBytes =
      kHead / F::kUnit * F::kUnitBytes + (F::kMetaPlace == format::MetaPlace::kInRow ? F::kMetaBytes : 0);
  // Rows used in place are aligned; others may start up to 15 bytes into their cover.
  static constexpr int kCover = kRaw16<F> ? kBytes : (kBytes + 15 + 15) / 16 * 16;
  static constexpr int kChunks = kCover / 16;
  static constexpr int kPitch = kRaw16<F> ? kPitch16<kHead> : (kChunks % 2 == 1 ? kCover : kCover + 16);
};

// The codes of 32 elements, group g of a part that starts at `at`; `aligned`: the part starts at a multiple of 16
// bytes.
template <class F>
__device__ __forceinline__ void load_codes(const std::uint8_t* at, bool aligned, int g,
                                           std::uint32_t (&codes)[Levels16<F>::kWords]) {
  constexpr int kWords = Levels16<F>::kWords;
  // Arithmetic on the pointer itself, so that the compiler still knows it is shared memory.
  const unsigned odd = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(at)) & 3U;
  const auto* words = reinterpret_cast<const std::uint32_t*>(at - odd) + g * kWords;
  if (aligned && kWords % 4 == 0) {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(words + w);
      codes[w] = four.x;
      codes[w + 1] = four.y;
      codes[w + 2] = four.z;
      codes[w + 3] = four.w;
    }
    return;
  }
  const unsigned shift = odd * 8;
  std::uint32_t low = words[0];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    // The word after the last one is the row's metadata or its padding: inside the pitch.
    const std::uint32_t high = words[w + 1];
    codes[w] = __funnelshift_r(low, high, shift);
    low = high;
  }
}

// Adds the squares of 32 levels, of which `elements` count.
__device__ __forceinline__ void add_squares(const std::uint32_t (&pairs)[16], int elements, float* squares) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float2 level = __half22float2(as_half2(pairs[i]));
    if (2 * i < elements) *squares = fmaf(level.x, level.x, fmaf(level.y, level.y, *squares));
  }
}

template <class F, int kGroups>
__device__ __forceinline__ void sum_squares(const std::uint8_t* at, bool aligned, int elements, float* squares) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    std::uint32_t codes[Levels16<F>::kWords], pairs[16];
    load_codes<F>(at, aligned, g, codes);
    Levels16<F>::convert(codes, pairs);
    add_squares(pairs, elements - g * 32, squares);
  }
}

// A row of 16-bit elements, by chunks of 16 bytes.
__device__ __forceinline__ auto row_chunks(std::uint8_t* row) {
  return [row](int chunk) { return row + 16 * chunk; };
}

// 32 elements as 16-bit levels, 16 bytes at a time to place(0) .. place(3); a kLevelNorm format adds their squares, as
// far as they are among `elements`.
template <class F, class Place>
__device__ __forceinline__ void put_levels(const std::uint32_t (&codes)[Levels16<F>::kWords], Place&& place,
                                           int elements, float* squares) {
  std::uint32_t pairs[16];
  Levels16<F>::convert(codes, pairs);
  if constexpr (F::kLevelNorm) add_squares(pairs, elements, squares);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<uint4*>(place(i)) =
        make_uint4(pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]);
  }
}

// 32 kGroups elements of a raw row from `at` on as levels to `to`.
template <class F, int kGroups>
__device__ __forceinline__ void convert_part(const std::uint8_t* at, bool aligned, std::uint8_t* to, int elements,
                                             float* squares) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    std::uint32_t codes[Levels16<F>::kWords];
    load_codes<F>(at, aligned, g, codes);
    put_levels<F>(codes, row_chunks(to + 64 * g), elements - 32 * g, squares);
  }
}

// The physical place of a key: its entry of the block table and its slot there.
struct KeyPlace {
  std::int32_t block;  // -1: the key is not read
  int slot;
};
__device__ __forceinline__ KeyPlace find_key(const AttentionParams& p, int batch, int key, int begin, int end,
                                             bool counts_errors) {
  const int entry = p.block_shift >= 0 ? key >> p.block_shift : key / p.block_size;
  KeyPlace place{-1, key - entry * p.block_size};
  if (key < begin || key >= end || entry >= p.max_blocks) return place;
  place.block = p.block_table[batch * p.table_batch_stride + entry * p.table_block_stride];
  if (place.block < 0 || place.block >= p.num_blocks) {
    place.block = -1;
    if (counts_errors && p.error_counter != nullptr) atomicAdd(p.error_counter, 1ULL);
  }
  return place;
}

// Bytes from the cache's start to a row; -1 for a key that is not read.
__device__ __forceinline__ std::int64_t row_offset(const CacheSide& side, KeyPlace place, int head) {
  return place.block < 0 ? -1
                         : place.block * side.block_stride + place.slot * side.slot_stride + head * side.head_stride;
}

// Starts the copy of a scale to `to`; zeros for a key that is not read.
__device__ __forceinline__ void copy_scale(const CacheSide& side, KeyPlace place, int head, float* to) {
  const std::int64_t at = place.block < 0 ? 0
                                          : place.block * side.scale_block_stride +
                                                place.slot * side.scale_slot_stride + head * side.scale_head_stride;
  ptx::cp_async_4(ptx::shared_address(to), side.scales + at, place.block < 0 ? 0 : 4);
}

// Bytes from the start of a row's aligned cover to the row.
__device__ __forceinline__ int row_skew(const CacheSide& side, std::int64_t offset) {
  return static_cast<int>((reinterpret_cast<std::uintptr_t>(side.data) + static_cast<std::uintptr_t>(offset)) & 15U);
}

// Starts the copies of kNumRows rows by kThreads threads, neighbouring threads on neighbouring chunks of 16 bytes, to
// place(row, chunk) in shared memory. Rows that are not read (offset -1) become zeros. `dense`: aligned rows that fill
// the head-size class.
template <class F, int kHead, int kNumRows, int kThreads, class Place>
__device__ __forceinline__ void copy_rows(const CacheSide& side, const std::int64_t* offsets, bool dense, int row_bytes,
                                          Place&& place, int thread) {
  using Row = RawRow<F, kHead>;
  if (Row::kBytes % 16 == 0 && dense) {
    constexpr int kChunks = Row::kBytes / 16;
    static_assert(Row::kBytes % 16 != 0 || kThreads % kChunks == 0);
    constexpr int kRowsAtOnce = kThreads / kChunks;
    const int first_row = thread / kChunks;
    const int chunk = thread % kChunks;
    const std::uint8_t* from = side.data + 16 * chunk;
#pragma unroll
    for (int j = 0; j < (kNumRows + kRowsAtOnce - 1) / kRowsAtOnce; ++j) {
      const int row = first_row + j * kRowsAtOnce;
      if (kNumRows % kRowsAtOnce != 0 && row >= kNumRows) break;
      const std::int64_t offset = offsets[row];
      ptx::cp_async_16_unless(place(row, chunk), from + offset, offset < 0);
    }
    return;
  }
  constexpr int kChunks = Row::kChunks;
#pragma unroll 4
  for (int i = thread; i < kNumRows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const std::int64_t offset = offsets[row];
    const int skew = kRaw16<F> ? 0 : row_skew(side, offset < 0 ? 0 : offset);
    const std::uint8_t* cover = side.data + (offset < 0 ? 0 : offset) - skew;
    const int bytes = offset < 0 ? 0 : min(max(skew + row_bytes - 16 * chunk, 0), 16);
    ptx::cp_async_16(place(row, chunk), bytes > 0 ? cover + 16 * chunk : cover, bytes);
  }
}

// Raw rows one after the other, RawRow::kPitch apart.
template <class F, int kHead>
__device__ __forceinline__ auto raw_rows(const std::uint8_t* to) {
  return [target = ptx::shared_address(to)](int row, int chunk) -> std::uint32_t {
    return target + row * RawRow<F, kHead>::kPitch + 16 * chunk;
  };
}

template <class F, int kHead>
__device__ __forceinline__ bool is_dense(const CacheSide& side, int head_size) {
  return head_size == kHead && side.row_access >= 16;
}

// Rows of a prefill tile: as many as have room for their accumulators.
template <int kHead>
inline constexpr int kPrefillRows = kHead <= 128 ? 128 : 64;

// The rows of this block and the keys they see.
struct TileRows {
  int batch;
  int query_begin;  // first query token of the sequence
  int row_begin;    // first row of the tile, within the sequence
  int num_rows;     // rows of the sequence (the plan bounds all rows by 2^31)
  attention::SequenceMask sequence;
  int begin, end;            // keys of this block: seen by some row, in this split
  int full_begin, full_end;  // keys that every row sees
};

// Sequences of at most this many rows are the decode kernel's, longer ones the prefill kernel's, whatever else is in
// the batch.
inline constexpr int kDecodeRows = 2 * kRows;

// Fills in a tile whose batch and row_begin are set; false where it has no rows.
__device__ __forceinline__ bool complete_rows(const AttentionParams& p, int tile_rows, bool few_rows, TileRows& tile) {
  tile.query_begin = p.cu_seqlens_q[tile.batch * p.cu_stride];
  const int query_len = p.cu_seqlens_q[(tile.batch + 1) * p.cu_stride] - tile.query_begin;
  tile.num_rows = query_len * p.group_size;
  if (tile.row_begin >= tile.num_rows || (tile.num_rows <= kDecodeRows) != few_rows) return false;

  attention::SequenceMask& sequence = tile.sequence;
  sequence.seq_len = p.seq_lens[tile.batch * p.seq_stride];
  sequence.context_len = sequence.seq_len - query_len;
  sequence.causal = p.causal_per_seq != nullptr ? p.causal_per_seq[tile.batch * p.causal_stride] != 0 : p.causal;
  sequence.ranges = p.ranges == nullptr ? nullptr : p.ranges + tile.batch * p.ranges_batch_stride;
  sequence.range_stride = p.range_stride;
  sequence.bound_stride = p.bound_stride;
  sequence.num_ranges = p.num_ranges;

  const int last_row = min(tile.row_begin + tile_rows, tile.num_rows) - 1;
  const int first = sequence.context_len + tile.row_begin / p.group_size;
  const int last = sequence.context_len + last_row / p.group_size;
  const attention::KeyRange range = attention::visible_range(p.mask, sequence, first, last);
  const auto split = static_cast<std::int64_t>(blockIdx.z);
  tile.begin = static_cast<int>(max(static_cast<std::int64_t>(range.begin), split * p.split_size));
  tile.end = range.end;
  if (split + 1 < p.max_splits) {
    tile.end = static_cast<int>(min(static_cast<std::int64_t>(range.end), (split + 1) * p.split_size));
  }
  tile.full_begin = tile.full_end = 0;
  if (first >= 0 && p.num_ranges == 0 && p.mask.chunk == 0) {
    tile.full_end = sequence.causal ? first + 1 : sequence.seq_len;
    if (p.mask.window >= 0) {
      tile.full_begin = last - p.mask.window + 1;
      if (!sequence.causal && p.mask.window < tile.full_end - first) tile.full_end = first + p.mask.window;
    }
  }
  return true;
}

// What the inner loops need to know of a row, in shared memory.
struct RowInfo {
  int query;         // query token within the sequence; -1: past the end
  int position;      // of that token; negative: sees nothing
  int head;          // query head
  int begin, end;    // the keys it sees: every kind of mask leaves a row one interval (attention/mask.h)
  float scale, sum;  // its 16-bit query times `scale` is the rotated query; `sum` adds up the 16-bit one
};

__device__ __forceinline__ RowInfo row_info(const AttentionParams& p, const TileRows& tile, int kv_head, int row) {
  const int index = tile.row_begin + row;
  const int query = index / p.group_size;
  RowInfo info{};
  info.query = index < tile.num_rows && tile.query_begin + query < p.num_tokens ? query : -1;
  info.position = info.query < 0 ? -1 : tile.sequence.context_len + query;
  info.head = kv_head * p.group_size + (index - query * p.group_size);
  if (info.position >= 0) {
    const attention::KeyRange range = attention::visible_range(p.mask, tile.sequence, info.position, info.position);
    info.begin = range.begin;
    info.end = range.end;
  }
  return info;
}

// Decode: tile `index` of the grid, p.sequence_tiles tiles a sequence.
__device__ __forceinline__ bool find_sequence_rows(const AttentionParams& p, int index, TileRows& tile) {
  tile.batch = index / p.sequence_tiles;
  tile.row_begin = index % p.sequence_tiles * kRows;
  return complete_rows(p, kRows, true, tile);
}

// Prefill: tile `index` of the grid, as many tiles a sequence as its rows need.
__device__ __forceinline__ bool find_tile_rows(const AttentionParams& p, std::int64_t index, int tile_rows,
                                               TileRows& tile) {
  tile.batch = find_sequence(p, index, tile_rows);
  const std::int64_t rows_before = static_cast<std::int64_t>(p.cu_seqlens_q[tile.batch * p.cu_stride]) * p.group_size;
  tile.row_begin = static_cast<int>(index - first_tile(rows_before, tile.batch, tile_rows)) * tile_rows;
  return complete_rows(p, tile_rows, false, tile);
}

// A query row on its way from global to shared memory: 8 elements a lane, bf16 or (float8 too) fp16.
struct QueryRow {
  static constexpr int kPer = 8;
  RowInfo info;
  std::uint32_t words[kPer / 2];
};

// One warp: query row `row` of the tile; zeros for a row past the end.
__device__ __forceinline__ QueryRow fetch_query(const AttentionParams& p, const TileRows& tile, int kv_head, int row,
                                                int lane) {
  constexpr int kPer = QueryRow::kPer;
  QueryRow query{row_info(p, tile, kv_head, row), {}};
  if (query.info.query < 0) return query;
  const std::int64_t token = tile.query_begin + query.info.query;
  const std::uint8_t* from = p.query + token * p.query_token_stride + query.info.head * p.query_head_stride +
                             lane * kPer * p.query_element_bytes;
  const int elements = p.head_size - lane * kPer;
  if (p.query_vectors) {
    if (elements > 0) {
      const uint4 vector = *reinterpret_cast<const uint4*>(from);
      query.words[0] = vector.x;
      query.words[1] = vector.y;
      query.words[2] = vector.z;
      query.words[3] = vector.w;
    }
    return query;
  }
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    if (j >= elements) break;
    const std::uint32_t code = p.query_element_bytes == 2
                                   ? reinterpret_cast<const std::uint16_t*>(from)[j]
                                   : __half_as_ushort(__float2half_rn(load_float(from + j, p.query_dtype)));
    query.words[j / 2] |= code << (16 * (j % 2));
  }
  return query;
}

// The row rotated, over a power of two, as 16-bit elements, 8 of them to place(0), place(1), ..; its info, completed,
// to `info`.
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
  rotate<RowTile<kPer, 32, true>>(KeyF::kRotation, y, lane, format::row_shape(p.head_size).block);
  float unit = 1.0F;
  if constexpr (!std::is_same_v<KeyF, format::BFloat16>) {
    float largest = 0.0F;
#pragma unroll
    for (int j = 0; j < kPer; ++j) largest = fmaxf(largest, fabsf(y[j]));
    largest = warp_max(largest);
    // The power of two below the largest element: q16 lies in [-2, 2).
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

// One warp: its query rows, first_row on, to place(row) in shared memory; several loads under way at a time.
template <class KeyF, int kHead, int kNumRows, class PlaceOfRow>
__device__ __forceinline__ void load_queries(const AttentionParams& p, const TileRows& tile, int kv_head, int first_row,
                                             PlaceOfRow&& place, RowInfo* row_infos, int lane) {
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (int r = first_row; r < first_row + kNumRows; r += kAtOnce) {
    QueryRow query[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) query[i] = fetch_query(p, tile, kv_head, r + i, lane);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      put_query<KeyF, kHead>(p, query[i], place(r + i), row_infos[r + i], lane);
    }
  }
}

// The power of two above x, for positive finite x; 0 otherwise.
__device__ __forceinline__ float power_above(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  return bits < 0x7e800000U && x > 0.0F ? __uint_as_float((bits & 0x7f800000U) + 0x00800000U)
                                        : (x > 0.0F && bits < 0x7f800000U ? x : 0.0F);
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

// This lane's 16 elements of a stored row, from global memory, and the row's affine map.
template <class F>
__device__ __forceinline__ format::Affine read_row(const CacheSide& side, std::int64_t block, int slot, int head,
                                                   int head_size, float (&level)[16], int lane) {
  const std::uint8_t* row = side.data + block * side.block_stride + slot * side.slot_stride + head * side.head_stride;
  constexpr int kBytes = 16 / F::kUnit * F::kUnitBytes;
  alignas(16) std::uint8_t bytes[kBytes] = {};
  load_bytes(row + lane * kBytes, bytes, static_cast<int>(format::code_bytes<F>(head_size)) - lane * kBytes,
             min(side.access, F::kUnitBytes));
#pragma unroll
  for (int u = 0; u < 16 / F::kUnit; ++u) F::unpack(bytes + u * F::kUnitBytes, level + u * F::kUnit);
  float squares = 0.0F;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    if (lane * 16 + j >= head_size) level[j] = 0.0F;
    squares = fmaf(level[j], level[j], squares);
  }
  const float2 affine = load_affine<F>(side, block, slot, head, format::row_shape(head_size));
  return {F::kLevelNorm ? affine.x * rsqrtf(warp_sum(squares)) : affine.x, affine.y};
}

// One warp, one row, value by value in fp32: rows that do not see an infinite or NaN value do not meet it. Writes
// sum p v (times v_scale) to `row` [head_size_v].
template <class KeyF, class ValueF>
__device__ __noinline__ attention::SoftmaxState exact_row(const AttentionParams& p, const TileRows& tile, int kv_head,
                                                          std::int64_t token, int head, float* row, int lane) {
  const format::RowShape shape = format::row_shape(p.head_size);
  float q[16] = {};
  const std::uint8_t* from = p.query + token * p.query_token_stride + head * p.query_head_stride;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int i = lane * 16 + j;
    if (i < p.head_size) q[j] = load_float(from + i * p.query_element_bytes, p.query_dtype);
  }
  rotate<WideTile>(KeyF::kRotation, q, lane, shape.block);
  float query_sum = 0.0F;
#pragma unroll
  for (int j = 0; j < 16; ++j) query_sum += q[j];
  query_sum = warp_sum(query_sum);
  const float factor =
      p.softmax_scale * p.q_scale.at(tile.batch, kv_head) * p.k_scale.at(tile.batch, kv_head) * KeyF::unrotate(shape);
  const int query_index = static_cast<int>(token - tile.query_begin);
  const int position = tile.sequence.context_len + query_index;

  const attention::LogitRule rule = logit_rule(p, head, query_index);
  attention::SoftmaxState state;
  float acc[16] = {};
  float offset = 0.0F;
  for (int key = tile.begin; key < tile.end; ++key) {
    if (!attention::visible(p.mask, tile.sequence, position, key)) continue;
    const KeyPlace place = find_key(p, tile.batch, key, tile.begin, tile.end, false);
    if (place.block < 0) continue;
    float level[16];
    const format::Affine k = read_row<KeyF>(p.key, place.block, place.slot, kv_head, p.head_size, level, lane);
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
    const format::Affine v = read_row<ValueF>(p.value, place.block, place.slot, kv_head, p.head_size_v, level, lane);
    offset = fmaf(offset, correction, weight * v.offset);
#pragma unroll
    for (int j = 0; j < 16; ++j) acc[j] = fmaf(acc[j], correction, weight * v.scale * level[j]);
  }
  const float value_factor = p.v_scale.at(tile.batch, kv_head);
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int i = lane * 16 + j;
    if (i < p.head_size_v) row[i] = (acc[j] + offset) * value_factor;
  }
  return state;
}

// The lanes of a Tile: a row's result as the output, or as this split's partial, where it `exists`. All of a warp call.
template <class Tile>
__device__ __forceinline__ void write_row(const AttentionParams& p, const float* row,
                                          const attention::SoftmaxState& state, std::int64_t token, int head, int lane,
                                          bool exists = true) {
  if (p.max_splits == 1) {
    finish_row<Tile>(p.output, row, state, token, head, lane, exists);
    return;
  }
  if (!exists) return;
  const std::int64_t at = (token * p.num_q_heads + head) * p.max_splits + blockIdx.z;
  float* to = p.partials.acc + at * p.head_size_v;
  for (int c = lane; c < p.head_size_v; c += Tile::kLanes) to[c] = row[c];
  if (lane == 0) p.partials.state[at] = make_float2(state.max, state.sum);
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

}  // namespace quire::cuda
