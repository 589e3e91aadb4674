// The arithmetic of unified_attention on the CPU: a tile of queries against a range of keys, which come in tiles of
// kKeyTile: decode K levels, dot products, logits, online softmax, decode V levels, accumulate. Formats meet only in
// CacheReader, so any key format goes with any value format.
//
//   logit   = softmax_scale * q_scale * k_scale * unrotate * (scale[n] * (q' . level) + offset[n] * sum q')
//   output  = v_scale * unrotate * rotate_back(sum p * scale[n] * level + sum p * offset[n]) / sum p
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/softmax.h"
#include "cpu/attention_call.h"

namespace quire::cpu {

// The memory of one part of a call, cut out of `memory`.
struct Scratch {
  float* q;                              // [rows, k_stride]
  float* acc;                            // [rows, v_stride], of the split at hand
  float* total;                          // [rows, v_stride], folded
  float* scores;                         // [rows, kKeyTile]
  float* q_sum;                          // [rows]
  float* offset_sum;                     // [rows], sum p * offset of the split at hand
  attention::SoftmaxState* state;        // [rows], of the split at hand
  attention::SoftmaxState* total_state;  // [rows], folded
  LevelTile k_tile, v_tile;

  // How many floats it takes, a multiple of 64 bytes of them.
  static std::size_t num_floats(int rows, int k_stride, int v_stride);
  Scratch(float* memory, int rows, int k_stride, int v_stride);
};

// Row m of a tile is token m / group of the tile and query head kv_head * group + m % group.
struct RowOf {
  int group;
  int kv_head;
  int token(int m) const { return m / group; }
  int head(int m) const { return kv_head * group + m % group; }
};

// Fills the queries of the scratch, rotated as the keys are.
void load_queries(const AttentionCall& call, const QueryTile& tile, const RowOf& rows, Scratch& scratch);

// Attention of a query tile over keys: leaves acc and state, acc complete (offsets added).
void attend_split(const AttentionCall& call, const QueryTile& tile, const attention::SequenceMask& sequence,
                  const RowOf& rows, const attention::KeySpan& keys, Scratch& scratch);

// Folds one more part into a row's running state.
void fold(const float* part, const attention::SoftmaxState& part_state, int size, float* total,
          attention::SoftmaxState& total_state);

// Normalizes a row, rotates it back and writes it. `total` [v_stride] is overwritten.
void write_row(const AttentionCall& call, int batch, std::int64_t token, int head, float* total,
               attention::SoftmaxState state);

}  // namespace quire::cpu
