// A call of unified_attention as its tasks see it, and the tiles of queries it is cut into. A call is made once, before
// the threads start, and only read from then on.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/mask.h"
#include "attention/problem.h"
#include "cpu/cache_reader.h"
#include "cpu/kernels.h"
#include "quire/ops.h"

namespace quire::cpu {

// Everything a task needs to know of the call.
struct AttentionCall {
  const UnifiedAttentionArgs& args;
  const AttentionShape& shape;
  const Kernels& k;
  CacheReader key, value;
  attention::MaskRule mask;
  ScaleView q_scale, k_scale, v_scale;
  std::int64_t split_size;
  int k_stride, v_stride;  // padded head sizes
  // 16-bit operands, where the readers have them.
  int k_positions, v_positions;
  const std::int16_t *k_order, *v_order;  // elements at the positions
  const std::int16_t* v_position;         // positions of the elements
  int query_parts;
  int acc_stride;   // v_stride and v_positions fit
  bool key_bytes;   // tiles of few rows multiply bytes of keys
  bool few_values;  // and make operands of values in registers

  bool k_in_pairs() const { return key.operands.operand != Operand::kFloat32; }
  bool v_in_pairs() const { return value.operands.operand != Operand::kFloat32; }

  // Whether a tile of so many rows multiplies floats as they are stored by fp32. bf16 has dot products of twice the
  // rate, but where few rows meet a key memory sets the pace, and it comes in sooner beside these.
  bool key_floats(int num_rows) const {
    return key.float_rows.dot != nullptr && num_rows <= (k_in_pairs() ? k.blocks : kFewRows);
  }
  bool value_floats(int num_rows) const {
    return !v_in_pairs() && value.float_rows.accumulate != nullptr && num_rows <= kFewRows;
  }

  int int_at(const ConstTensor& t, std::int64_t i) const { return t.ptr<const std::int32_t>()[i * t.strides[0]]; }

  attention::SequenceMask sequence(int b) const {
    attention::SequenceMask sequence;
    sequence.seq_len = int_at(args.seq_lens, b);
    sequence.context_len = sequence.seq_len - (int_at(args.cu_seqlens_q, b + 1) - int_at(args.cu_seqlens_q, b));
    sequence.causal =
        args.mask.causal_per_seq.defined()
            ? args.mask.causal_per_seq.ptr<const std::uint8_t>()[b * args.mask.causal_per_seq.strides[0]] != 0
            : args.mask.causal;
    if (args.mask.rswa_prefix_lens.defined()) sequence.prefix_len = std::max(0, int_at(args.mask.rswa_prefix_lens, b));
    if (const ConstTensor& ranges = args.mask.mm_prefix_range; ranges.defined()) {
      sequence.ranges = ranges.ptr<const std::int32_t>() + b * ranges.strides[0];
      sequence.range_stride = ranges.strides[1];
      sequence.bound_stride = ranges.strides[2];
      sequence.num_ranges = shape.num_mm_ranges;
    }
    return sequence;
  }

  int block_of(int b, std::int64_t position) const {
    const ConstTensor& table = args.block_table;
    return table.ptr<const std::int32_t>()[b * table.strides[0] + position / shape.block_size * table.strides[1]];
  }
};

// Consecutive query tokens of one sequence and the keys they see.
struct QueryTile {
  int batch;
  int first_row;  // within the sequence
  int num_tokens;
  attention::KeyRange range;
  std::int64_t partial = -1;  // first partial row in the workspace, or -1: splits run one after the other
  int first_split = 0;
  int num_splits = 0;
};

}  // namespace quire::cpu
