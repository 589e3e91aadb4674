#include "cpu/attention_tile.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/load.h"

namespace quire::cpu {

using attention::KeySpan;
using attention::LogitRule;
using attention::SequenceMask;
using attention::SoftmaxState;

std::size_t Scratch::num_floats(int rows, int k_stride, int v_stride) {
  const auto row_floats = static_cast<std::size_t>(k_stride + 2 * v_stride + kKeyTile + 2 + 4);
  const std::size_t floats =
      static_cast<std::size_t>(rows) * row_floats + static_cast<std::size_t>(kKeyTile) * (k_stride + v_stride);
  return (floats + 15) / 16 * 16;
}

Scratch::Scratch(float* memory, int rows, int k_stride, int v_stride) {
  static_assert(sizeof(SoftmaxState) == 2 * sizeof(float));
  float* next = memory;
  const auto take = [&](std::int64_t count) { return std::exchange(next, next + count); };
  k_tile.levels = take(static_cast<std::int64_t>(kKeyTile) * k_stride);
  v_tile.levels = take(static_cast<std::int64_t>(kKeyTile) * v_stride);
  k_tile.stride = k_stride;
  v_tile.stride = v_stride;
  q = take(static_cast<std::int64_t>(rows) * k_stride);
  acc = take(static_cast<std::int64_t>(rows) * v_stride);
  total = take(static_cast<std::int64_t>(rows) * v_stride);
  scores = take(static_cast<std::int64_t>(rows) * kKeyTile);
  q_sum = take(rows);
  offset_sum = take(rows);
  const auto take_states = [&] {
    auto* states = reinterpret_cast<SoftmaxState*>(take(std::int64_t{2} * rows));
    std::uninitialized_fill_n(states, rows, SoftmaxState{});
    return states;
  };
  state = take_states();
  total_state = take_states();
}

void load_queries(const AttentionCall& call, const QueryTile& tile, const RowOf& rows, Scratch& scratch) {
  const ConstTensor& query = call.args.query;
  const std::int64_t first = call.int_at(call.args.cu_seqlens_q, tile.batch) + tile.first_row;
  for (int m = 0; m < tile.num_tokens * rows.group; ++m) {
    float* q = scratch.q + static_cast<std::int64_t>(m) * call.k_stride;
    const std::int64_t at = (first + rows.token(m)) * query.strides[0] + rows.head(m) * query.strides[1];
    load_floats(query.ptr<const std::uint8_t>() + at * static_cast<std::int64_t>(dtype_bytes(query.dtype)), query.dtype,
                call.shape.head_size, q);
    call.k.rotate(call.key.rotation, q, call.key.shape);
    std::fill(q + call.shape.head_size, q + call.k_stride, 0.0F);
    float sum = 0.0F;
    for (int i = 0; i < call.shape.head_size; ++i) sum += q[i];
    scratch.q_sum[m] = sum;
  }
}

namespace {

LogitRule logit_rule(const AttentionCall& call, int head, int row) {
  const UnifiedAttentionArgs& args = call.args;
  LogitRule rule;
  rule.softcap = args.softcap;
  if (args.alibi_slopes.defined()) {
    rule.has_alibi = true;
    rule.alibi_sqrt = args.use_alibi_sqrt;
    rule.alibi_slope = args.alibi_slopes.ptr<const float>()[head * args.alibi_slopes.strides[0]];
  }
  if (args.qq_bias.defined()) {
    rule.qq_bias = args.qq_bias.ptr<const float>() + row * args.qq_bias.strides[0];
    rule.qq_stride = args.qq_bias.strides[1];
    rule.qq_size = call.shape.qq_bias_size;
  }
  return rule;
}

// Scores of one tile of keys [first_key, first_key + num_keys) to masked logits.
void make_logits(const AttentionCall& call, const QueryTile& tile, const SequenceMask& sequence, const RowOf& rows,
                 int first_key, int num_keys, Scratch& scratch) {
  const float factor = call.args.softmax_scale * call.q_scale.at(tile.batch, rows.kv_head) *
                       call.k_scale.at(tile.batch, rows.kv_head) * call.key.unrotate;
  const bool has_rule = call.args.softcap > 0.0F || call.args.alibi_slopes.defined() || call.args.qq_bias.defined();
  const int first_position = sequence.context_len + tile.first_row;
  // Below the diagonal of a plain causal mask there is nothing to test.
  const bool all_visible = sequence.causal && call.mask.window < 0 && call.mask.rswa_window < 0 &&
                           call.mask.chunk == 0 && first_position >= 0 && first_key + num_keys <= first_position + 1;
  const LevelTile& k = scratch.k_tile;
  for (int m = 0; m < tile.num_tokens * rows.group; ++m) {
    float* scores = scratch.scores + static_cast<std::int64_t>(m) * kKeyTile;
    for (int n = 0; n < num_keys; ++n) scores[n] = factor * (k.scale[n] * scores[n]);
    if (k.any_offset) {
      const float q_sum = factor * scratch.q_sum[m];
      for (int n = 0; n < num_keys; ++n) scores[n] += k.offset[n] * q_sum;
    }
    // From here on -inf means "not seen": an infinite product must not pass for that.
    for (int n = 0; n < num_keys; ++n) scores[n] = exact::nan_unless_finite(scores[n]);
    const int p = first_position + rows.token(m);
    if (has_rule) {
      const LogitRule rule = logit_rule(call, rows.head(m), tile.first_row + rows.token(m));
      for (int n = 0; n < num_keys; ++n) scores[n] = attention::logit(rule, sequence, scores[n], p, first_key + n);
    }
    if (!all_visible) {
      for (int n = 0; n < num_keys; ++n) {
        if (!attention::visible(call.mask, sequence, p, first_key + n)) scores[n] = -INFINITY;
      }
    }
  }
}

// acc += P V, where some value of the tile is NaN or infinite: rows that do not see it must not multiply it by 0.
void accumulate_visible(const AttentionCall& call, const QueryTile& tile, const SequenceMask& sequence,
                        const RowOf& rows, int first_key, int num_keys, Scratch& scratch) {
  const LevelTile& v = scratch.v_tile;
  for (int m = 0; m < tile.num_tokens * rows.group; ++m) {
    const int p = sequence.context_len + tile.first_row + rows.token(m);
    for (int n = 0; n < num_keys; ++n) {
      if (!attention::visible(call.mask, sequence, p, first_key + n)) continue;
      const float weight = scratch.scores[static_cast<std::int64_t>(m) * kKeyTile + n];
      const float scaled = weight * v.scale[n];
      LevelTile one = v;
      one.levels += static_cast<std::int64_t>(n) * v.stride;
      call.k.accumulate_tile(&scaled, 1, one, 1, scratch.acc + static_cast<std::int64_t>(m) * call.v_stride);
      scratch.offset_sum[m] += weight * v.offset[n];
    }
  }
}

}  // namespace

void attend_split(const AttentionCall& call, const QueryTile& tile, const SequenceMask& sequence, const RowOf& rows,
                  const KeySpan& keys, Scratch& scratch) {
  const int num_rows = tile.num_tokens * rows.group;
  std::fill_n(scratch.acc, static_cast<std::int64_t>(num_rows) * call.v_stride, 0.0F);
  std::fill_n(scratch.offset_sum, num_rows, 0.0F);
  std::fill_n(scratch.state, num_rows, SoftmaxState{});

  // Tiles start at multiples of kKeyTile, so a row's arithmetic does not depend on where its tile's range begins.
  for (std::int64_t next = keys.first; next < keys.end;) {
    if (next >= keys.prefix_end && next < keys.begin) next = keys.begin;
    const auto first_key = static_cast<int>(next);
    next = std::min<std::int64_t>((next / kKeyTile + 1) * kKeyTile, keys.end);
    if (first_key < keys.prefix_end) next = std::min<std::int64_t>(next, keys.prefix_end);
    const auto num_keys = static_cast<int>(next - first_key);
    RowAddress k_rows[kKeyTile];
    RowAddress v_rows[kKeyTile];
    for (int n = 0; n < num_keys; ++n) {
      const int key = first_key + n;
      const std::int64_t block = call.block_of(tile.batch, key);
      const int slot = key % call.shape.block_size;
      k_rows[n] = call.key.address(block, slot, rows.kv_head);
      v_rows[n] = call.value.address(block, slot, rows.kv_head);
    }
    call.key.load_tile(k_rows, num_keys, rows.kv_head, scratch.k_tile);
    call.k.dot_tile(scratch.q, num_rows, scratch.k_tile, num_keys, scratch.scores);
    make_logits(call, tile, sequence, rows, first_key, num_keys, scratch);

    for (int m = 0; m < num_rows; ++m) {
      float* scores = scratch.scores + static_cast<std::int64_t>(m) * kKeyTile;
      SoftmaxState& state = scratch.state[m];
      float max = state.max;
      for (int n = 0; n < num_keys; ++n) max = exact::max(scores[n], max);
      const float sum = call.k.exp_row(scores, num_keys, max == -INFINITY ? 0.0F : max);
      if (max != state.max) {
        const float factor = attention::rescale(state.max, max);
        call.k.scale_row(scratch.acc + static_cast<std::int64_t>(m) * call.v_stride, call.v_stride, factor);
        scratch.offset_sum[m] *= factor;
        state.sum *= factor;
        state.max = max;
      }
      state.sum += sum;
    }

    call.value.load_tile(v_rows, num_keys, rows.kv_head, scratch.v_tile);
    const LevelTile& v = scratch.v_tile;
    if (!v.all_finite) {
      accumulate_visible(call, tile, sequence, rows, first_key, num_keys, scratch);
      continue;
    }
    for (int m = 0; m < num_rows; ++m) {
      float* weights = scratch.scores + static_cast<std::int64_t>(m) * kKeyTile;
      if (v.any_offset) {
        for (int n = 0; n < num_keys; ++n) scratch.offset_sum[m] += weights[n] * v.offset[n];
      }
      for (int n = 0; n < num_keys; ++n) weights[n] *= v.scale[n];
    }
    call.k.accumulate_tile(scratch.scores, num_rows, v, num_keys, scratch.acc);
  }
  for (int m = 0; m < num_rows; ++m) {
    float* acc = scratch.acc + static_cast<std::int64_t>(m) * call.v_stride;
    for (int i = 0; i < call.shape.head_size_v; ++i) acc[i] += scratch.offset_sum[m];
  }
}

void fold(const float* part, const SoftmaxState& part_state, int size, float* total, SoftmaxState& total_state) {
  const float max = exact::max(part_state.max, total_state.max);
  const float keep = attention::rescale(total_state.max, max);
  const float add = attention::rescale(part_state.max, max);
  for (int i = 0; i < size; ++i) total[i] = total[i] * keep + part[i] * add;
  total_state.sum = total_state.sum * keep + part_state.sum * add;
  total_state.max = max;
}

void write_row(const AttentionCall& call, int batch, std::int64_t token, int head, float* total, SoftmaxState state) {
  const UnifiedAttentionArgs& args = call.args;
  float sink_factor = 1.0F;
  if (args.sinks.defined()) {
    sink_factor = attention::add_sink(state, args.sinks.ptr<const float>()[head * args.sinks.strides[0]]);
  }
  const int kv_head = head / call.shape.group_size();
  const float factor =
      sink_factor * attention::output_factor(state) * call.v_scale.at(batch, kv_head) * call.value.unrotate;
  for (int i = 0; i < call.shape.head_size_v; ++i) total[i] *= factor;
  call.k.rotate_back(call.value.rotation, total, call.value.shape);
  if (args.output_scale.defined()) {
    const float scale = args.output_scale.ptr<const float>()[0];
    for (int i = 0; i < call.shape.head_size_v; ++i) total[i] /= scale;
  }
  const Tensor& out = args.out;
  const std::int64_t at = token * out.strides[0] + head * out.strides[1];
  store_floats(total, call.shape.head_size_v, out.dtype,
               out.ptr<std::uint8_t>() + at * static_cast<std::int64_t>(dtype_bytes(out.dtype)));
  if (args.lse.defined()) {
    args.lse.ptr<float>()[token * args.lse.strides[0] + head * args.lse.strides[1]] = attention::log_sum_exp(state);
  }
}

}  // namespace quire::cpu
