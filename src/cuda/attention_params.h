// What the attention kernels receive: a call as plain data, strides in bytes unless a comment says elements.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "attention/mask.h"
#include "attention/paged_rows.h"
#include "attention/problem.h"
#include "call/plan_data.h"
#include "format/formats.h"
#include "quire/ops.h"
#include "quire/tensor.h"

namespace quire::cuda {

inline constexpr int kAttentionThreads = 128;
inline constexpr int kWarps = kAttentionThreads / 32;
inline constexpr int kChunk = 8;  // elements that a thread unpacks at a time where formats differ at run time

// K or V of the cache.
struct CacheSide : attention::PagedRows {
  format::FormatId format = format::FormatId::kNone;
  int access = 1;      // bytes per load of a row's codes by chunks of kChunk elements
  int row_access = 1;  // the power of two, at most 16, that divides every row's address
};

// The attention kernels and the merge share this rule: how a finished row leaves.
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
  bool plain_mask = false;  // no window, chunks or ranges: a sequence's last row sees all of its keys
  bool causal = true;
  const std::uint8_t* causal_per_seq = nullptr;  // [batch], may be null
  std::int64_t causal_stride = 1;
  const std::int32_t* ranges = nullptr;  // [batch, num_ranges, 2], may be null
  std::int64_t ranges_batch_stride = 0, range_stride = 0, bound_stride = 0;
  int num_ranges = 0;
  const std::int32_t* prefix_lens = nullptr;  // [batch], R-SWA; may be null
  std::int64_t prefix_stride = 1;

  float softcap = 0.0F;
  const float* alibi_slopes = nullptr;  // [num_q_heads], may be null
  std::int64_t alibi_stride = 1;
  bool alibi_sqrt = false;
  const float* qq_bias = nullptr;  // [qq_size, qq_size], may be null
  std::int64_t qq_row_stride = 0, qq_column_stride = 1;
  int qq_size = 0;

  float softmax_scale = 1.0F;
  format::Rotation key_rotation = format::Rotation::kNone;
  float key_unrotate = 1.0F;
  bool key_level_norm = false, value_level_norm = false;
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

  // The sequences of this launch have so many rows (query tokens times heads of a group); others are another kernel's.
  int min_rows = 0, max_rows = 0;
  int sequence_tiles = 0;  // row tiles of each sequence in the grid; 0: as many as its rows need

  // Of kernels that cut the keys of all sequences among the multiprocessors themselves.
  int num_multiprocessors = 0;
  bool batch_invariant = false;
  const attention::PageSlice* page_slice = nullptr;  // on the host, for launchers; null where the pages have none

  OutputRule output;
  Partials partials;                            // used with more than one split
  unsigned long long* error_counter = nullptr;  // [1], may be null
};

// Fills in what is the same for every launch of a call; the launch itself fills in the rest.
AttentionParams make_attention_params(const PlanData& plan, const UnifiedAttentionArgs& args,
                                      const AttentionShape& shape);

}  // namespace quire::cuda
