// What the attention kernels receive: the bytes and strides of a call, as plain data.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "attention/mask.h"
#include "attention/problem.h"
#include "format/format.h"
#include "quire/tensor.h"

namespace quire::cuda {

inline constexpr int kRows = 16;  // of a row tile of few rows
inline constexpr int kAttentionThreads = 128;
inline constexpr int kWarps = kAttentionThreads / 32;

// K or V of the cache. Strides in bytes.
struct CacheSide {
  const std::uint8_t* data = nullptr;  // [num_blocks, block_size, num_kv_heads, row bytes]
  std::int64_t block_stride = 0, slot_stride = 0, head_stride = 0;
  const std::uint8_t* scales = nullptr;  // [num_blocks, block_size, num_kv_heads] fp32, null where the format has none
  std::int64_t scale_block_stride = 0, scale_slot_stride = 0, scale_head_stride = 0;
  int access = 1;      // bytes per load
  int row_access = 1;  // the power of two, at most 16, that divides every row's address
};

// How a finished row leaves: shared by the attention kernel and the merge.
struct OutputRule {
  std::uint8_t* out = nullptr;  // [num_tokens, num_q_heads, head_size_v], strides in bytes
  std::int64_t token_stride = 0, head_stride = 0;
  DType dtype = DType::kFloat32;
  bool vectors = false;                 // 16-bit elements, rows of whole aligned 16-byte vectors
  const float* output_scale = nullptr;  // [1], float8 output only
  float* lse = nullptr;                 // [num_tokens, num_q_heads], may be null
  std::int64_t lse_token_stride = 0, lse_head_stride = 0;
  const float* sinks = nullptr;  // [num_q_heads], may be null
  std::int64_t sink_stride = 0;
  format::Rotation rotation = format::Rotation::kNone;
  float unrotate = 1.0F;
  format::RowShape shape{};
};

// What a split leaves of a row: its softmax state, and its unnormalized output row, still rotated.
struct Partials {
  float* acc = nullptr;     // [num_tokens, num_q_heads, max_splits, head_size_v]
  float2* state = nullptr;  // [num_tokens, num_q_heads, max_splits] (max, sum)
};

struct AttentionParams {
  const std::uint8_t* query = nullptr;  // [num_tokens, num_q_heads, head_size], strides in bytes
  std::int64_t query_token_stride = 0, query_head_stride = 0;
  DType query_dtype = DType::kFloat32;
  int query_element_bytes = 4;
  bool query_vectors = false;  // 16-bit elements, rows of whole aligned 16-byte vectors
  CacheSide key, value;

  const std::int32_t* cu_seqlens_q = nullptr;  // [batch + 1]
  std::int64_t cu_stride = 1;
  const std::int32_t* seq_lens = nullptr;  // [batch]
  std::int64_t seq_stride = 1;
  const std::int32_t* block_table = nullptr;  // [batch, max_blocks]
  std::int64_t table_batch_stride = 0, table_block_stride = 1;

  attention::MaskRule mask;
  bool causal = true;
  const std::uint8_t* causal_per_seq = nullptr;  // [batch], may be null
  std::int64_t causal_stride = 1;
  const std::int32_t* ranges = nullptr;  // [batch, num_ranges, 2], may be null
  std::int64_t ranges_batch_stride = 0, range_stride = 0, bound_stride = 0;
  int num_ranges = 0;

  float softcap = 0.0F;
  const float* alibi_slopes = nullptr;  // [num_q_heads], may be null
  std::int64_t alibi_stride = 1;
  bool alibi_sqrt = false;
  const float* qq_bias = nullptr;  // [qq_size, qq_size], may be null
  std::int64_t qq_row_stride = 0, qq_column_stride = 1;
  int qq_size = 0;

  float softmax_scale = 1.0F;
  ScaleView q_scale, k_scale, v_scale;

  std::int64_t num_tokens = 0;
  int batch = 0;
  int num_q_heads = 0, group_size = 1;
  int head_size = 0, head_size_v = 0;
  std::int64_t num_blocks = 0, max_blocks = 0;
  int block_size = 1;
  int block_shift = -1;  // log2(block_size) where that is a power of two
  std::int64_t split_size = 0;
  int max_splits = 1;
  int sequence_tiles = 1;  // decode: row tiles of a sequence in the grid

  OutputRule output;
  Partials partials;                            // used with more than one split
  unsigned long long* error_counter = nullptr;  // [1], may be null
};

}  // namespace quire::cuda
