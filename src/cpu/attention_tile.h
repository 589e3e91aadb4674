// The arithmetic of unified_attention on the CPU: a tile of queries against a range of keys, which come in tiles of
// kKeyTile: K as operands, dot products, logits, online softmax, V as operands, accumulate. Formats meet only in
// CacheReader, so any key format goes with any value format.
//
//   logit   = softmax_scale * q_scale * k_scale * unrotate * (scale[n] * (q' . level) + offset[n] * sum q')
//   output  = v_scale * unrotate * rotate_back(sum p * scale[n] * level + sum p * offset[n]) / sum p
//
// Several KV heads take turns at each tile of keys, where their rows lie side by side: memory is read in order.
#pragma once

#include <cstdint>

#include "cpu/scratch.h"

namespace quire::cpu {

// Keys that a thread probably attends to next: it asks for their first cache lines while it computes its last ones.
struct NextKeys {
  const QueryTile* tile = nullptr;  // none: null
  HeadRange heads{};
  attention::KeySpan keys{};
};
// Asked when the time has come: which task is next is not known before.
struct NextKeysSource {
  NextKeys (*find)(const void* context);
  const void* context;
};

// Attention of a query tile over keys: leaves acc [rows, acc_stride] and state of each head; the first head_size_v
// elements of a row of acc are complete and in order.
void attend_split(const AttentionCall& call, const QueryTile& tile, const attention::SequenceMask& sequence,
                  HeadRange heads, const attention::KeySpan& keys, const NextKeysSource& source, Scratch& scratch);

// Folds one more part into a row's running state.
void fold(const float* part, const attention::SoftmaxState& part_state, int size, float* total,
          attention::SoftmaxState& total_state);

// Normalizes a row, rotates it back and writes it. `total` [v_stride] is overwritten.
void write_row(const AttentionCall& call, int batch, std::int64_t token, int head, float* total,
               attention::SoftmaxState state);

}  // namespace quire::cpu
