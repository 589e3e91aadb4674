#include "cpu/attention_tile.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "cpu/load.h"

namespace quire::cpu {

using attention::KeySpan;
using attention::LogitRule;
using attention::SequenceMask;
using attention::SoftmaxState;

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

// Some keys of a tile, and where their rows are.
struct TileKeys {
  int first = 0, count = 0;
  RowAddress k[kKeyTile], v[kKeyTile];  // of KV head 0
};

// The next keys of a span from `next` on, which moves behind them. Tiles start at multiples of kKeyTile, so a row's
// arithmetic does not depend on where its tile's range begins.
void next_keys(const AttentionCall& call, int batch, const KeySpan& span, std::int64_t& next, TileKeys& keys) {
  if (next >= span.prefix_end && next < span.begin) next = span.begin;
  keys.first = static_cast<int>(next);
  if (next >= span.end) {
    keys.count = 0;
    return;
  }
  next = std::min<std::int64_t>((next / kKeyTile + 1) * kKeyTile, span.end);
  if (keys.first < span.prefix_end) next = std::min<std::int64_t>(next, span.prefix_end);
  keys.count = static_cast<int>(next - keys.first);
  const int size = call.shape.block_size;
  std::int64_t block = 0;
  for (int n = 0, slot = keys.first % size; n < keys.count; ++n, ++slot) {
    if (slot == size) slot = 0;
    if (n == 0 || slot == 0) block = call.block_of(batch, keys.first + n);
    keys.k[n] = call.key.address(block, slot);
    keys.v[n] = call.value.address(block, slot);
  }
}

// Masks and biases of a tile's logits; products with the keys have been scaled.
void apply_rules(const AttentionCall& call, const QueryTile& tile, const SequenceMask& sequence, const RowOf& rows,
                 const TileKeys& keys, float* scores) {
  const int first_position = sequence.context_len + tile.first_row;
  if (call.args.softcap > 0.0F || call.args.alibi_slopes.defined() || call.args.qq_bias.defined()) {
    for (int m = 0; m < tile.num_tokens * rows.group; ++m) {
      float* row = scores + static_cast<std::int64_t>(m) * kKeyTile;
      const LogitRule rule = logit_rule(call, rows.head(m), tile.first_row + rows.token(m));
      const int p = first_position + rows.token(m);
      for (int n = 0; n < keys.count; ++n) row[n] = attention::logit(rule, sequence, row[n], p, keys.first + n);
    }
  }
}

// Whether every row sees every key of the tile.
bool all_visible(const AttentionCall& call, const QueryTile& tile, const SequenceMask& sequence, const TileKeys& keys) {
  const int first = sequence.context_len + tile.first_row;
  const attention::FullRange full = attention::full_range(call.mask, sequence, first, first + tile.num_tokens - 1);
  return keys.first >= full.begin && keys.first + keys.count <= full.end;
}

void apply_mask(const AttentionCall& call, const QueryTile& tile, const SequenceMask& sequence, const RowOf& rows,
                const TileKeys& keys, float* scores) {
  for (int t = 0; t < tile.num_tokens; ++t) {
    const int p = sequence.context_len + tile.first_row + t;
    for (int n = 0; n < keys.count; ++n) {
      if (attention::visible(call.mask, sequence, p, keys.first + n)) continue;
      for (int g = 0; g < rows.group; ++g)
        scores[static_cast<std::int64_t>(t * rows.group + g) * kKeyTile + n] = -INFINITY;
    }
  }
}

// Scores of a tile: products of 16-bit operands, in scratch.scores.
void dot_keys(const AttentionCall& call, const TileRows& rows, const QueryOperands& queries, int num_rows,
              Scratch& scratch, Prefetch& prefetch) {
  const OperandFormat& format = call.key.operands;
  // The operands of a group are made while the group before is multiplied: read too soon, they would still be on
  // their way to memory.
  const auto group_size = [&](int first) { return std::min(kKeyGroup, rows.num_rows - first); };
  const auto operands = [&](int first) { return scratch.keys + first / kKeyGroup % 2 * kKeyGroup * call.k_positions; };
  const auto load = [&](int first) {
    if (format.keys_in_place || first >= rows.num_rows) return;
    format.load_keys(rows.from(first, group_size(first)), call.key.shape, operands(first));
  };
  const int bytes = 2 * (format.keys_in_place ? call.shape.head_size : call.k_positions);
  const bool few = num_rows <= kFewRows;
  const std::uint8_t* addresses[kKeyGroup];
  load(0);
  for (int first = 0; first < rows.num_rows; first += kKeyGroup) {
    const int count = group_size(first);
    load(first + kKeyGroup);
    if (format.divide_by_norms != nullptr) {
      format.divide_by_norms(operands(first), count, call.k_positions, scratch.scale + first);
    }
    const auto* at = reinterpret_cast<const std::uint8_t*>(operands(first));
    for (int n = 0; n < count; ++n, at += call.k_positions * 2) {
      addresses[n] = format.keys_in_place ? rows.data(first + n) : at;
    }
    for (int n = count; n < kKeyGroup; ++n) addresses[n] = addresses[0];
    if (few) {
      call.k.dot_keys(format.operand, queries, num_rows, addresses, bytes, scratch.scores + first, prefetch);
    } else {
      call.k.transpose_keys(addresses, bytes, scratch.columns + 2 * first);
    }
  }
  if (few) return;
  // Columns without a key hold some key: products are made for whole tiles.
  for (int first = (rows.num_rows + kKeyGroup - 1) / kKeyGroup * kKeyGroup; first < kKeyTile; first += kKeyGroup) {
    call.k.transpose_keys(addresses, bytes, scratch.columns + 2 * first);
  }
  call.k.dot_columns(format.operand, queries, num_rows, scratch.columns, scratch.scores, prefetch);
}

// The same of fp32 levels.
void dot_levels(const AttentionCall& call, const float* q, int num_rows, const LevelTile& k, int num_keys,
                Scratch& scratch) {
  if (num_rows <= kFewRows || call.k.transpose_keys == nullptr) {
    return call.k.dot_tile(q, num_rows, k, num_keys, scratch.scores);
  }
  for (int first = 0; first < kKeyTile; first += kKeyGroup) {
    const std::uint8_t* addresses[kKeyGroup];
    for (int n = 0; n < kKeyGroup; ++n) {
      const std::int64_t key = std::min(first + n, num_keys - 1);  // columns without a key hold some key
      addresses[n] = reinterpret_cast<const std::uint8_t*>(k.levels + key * k.stride);
    }
    call.k.transpose_keys(addresses, 4 * k.stride, scratch.columns + 2 * first);
  }
  std::fill_n(scratch.scores, static_cast<std::int64_t>(num_rows) * kKeyTile, 0.0F);
  // Some elements at a time: a sum of sums is nearer than one of all of them in turn.
  constexpr int kElements = 16;
  const auto* columns = reinterpret_cast<const float*>(scratch.columns);
  for (int i = 0; i < call.shape.head_size; i += kElements) {
    call.k.accumulate_tile(q + i, call.k_stride, num_rows, columns + static_cast<std::int64_t>(i) * kKeyTile, kKeyTile,
                           std::min(kElements, call.shape.head_size - i), scratch.scores, kKeyTile);
  }
}

// The logits of a tile, in scratch.scores.
void tile_logits(const AttentionCall& call, const QueryTile& tile, const SequenceMask& sequence, const RowOf& rows,
                 const TileKeys& keys, bool see_all, int head_index, Scratch& scratch, Prefetch& prefetch) {
  const Scratch::Head& head = scratch.heads[head_index];
  const int num_rows = tile.num_tokens * rows.group;
  const float factor = call.args.softmax_scale * call.q_scale.at(tile.batch, rows.kv_head) *
                       call.k_scale.at(tile.batch, rows.kv_head) * call.key.unrotate;
  TileRows k_rows = call.key.tile_rows(keys.k, keys.count, rows.kv_head, &prefetch);
  if (call.key.scales_side_by_side()) k_rows.scales = scratch.k_scales[head_index];
  if (call.key_floats(num_rows)) {
    const FloatRows& floats = call.key.float_rows;
    floats.dot(k_rows, call.shape.head_size, head.q, num_rows, call.k_stride, scratch.scores, prefetch);
    if (floats.load_affines != nullptr) {
      floats.load_affines(k_rows, call.key.shape, scratch.scale, scratch.offset);
    } else {
      std::fill_n(scratch.scale, kKeyTile, 1.0F);
    }
    call.k.make_logits(scratch.scores, num_rows, keys.count, scratch.scale, nullptr, factor, head.q_sum);
  } else if (!call.k_in_pairs()) {
    LevelTile& k = scratch.k_tile;
    call.key.load_tile(k_rows, rows.kv_head, k);
    dot_levels(call, head.q, num_rows, k, keys.count, scratch);
    call.k.make_logits(scratch.scores, num_rows, keys.count, k.scale, k.any_offset ? k.offset : nullptr, factor,
                       head.q_sum);
  } else {
    const OperandFormat& format = call.key.operands;
    format.load_affines(k_rows, call.key.shape, scratch.scale, scratch.offset);
    if (call.key_bytes && num_rows <= call.k.blocks) {
      format.dot_key_bytes(k_rows, call.key.shape, head.queries, scratch.scores, prefetch);
    } else {
      dot_keys(call, k_rows, head.queries, num_rows, scratch, prefetch);
    }
    call.k.make_logits(scratch.scores, num_rows, keys.count, scratch.scale,
                       format.has_offset ? scratch.offset : nullptr, factor, head.q_sum);
  }
  apply_rules(call, tile, sequence, rows, keys, scratch.scores);
  if (!see_all) apply_mask(call, tile, sequence, rows, keys, scratch.scores);
}

// acc += P V in fp32, key by key, where some value of the tile is NaN or infinite: rows that do not see it must not
// multiply it by 0.
void accumulate_visible(const AttentionCall& call, const QueryTile& tile, const SequenceMask& sequence,
                        const RowOf& rows, const TileKeys& keys, const LevelTile& v, const Scratch::Head& head,
                        Scratch& scratch) {
  for (int m = 0; m < tile.num_tokens * rows.group; ++m) {
    const int p = sequence.context_len + tile.first_row + rows.token(m);
    float* acc = head.acc + static_cast<std::int64_t>(m) * call.acc_stride;
    float* sum = call.v_in_pairs() ? scratch.row : acc;
    if (call.v_in_pairs()) std::fill_n(sum, call.v_stride, 0.0F);
    for (int n = 0; n < keys.count; ++n) {
      if (!attention::visible(call.mask, sequence, p, keys.first + n)) continue;
      const float weight = scratch.scores[static_cast<std::int64_t>(m) * kKeyTile + n];
      const float scaled = weight * v.scale[n];
      const float* level = v.levels + static_cast<std::int64_t>(n) * v.stride;
      call.k.accumulate_tile(&scaled, 1, 1, level, v.stride, 1, sum, call.acc_stride);
      head.offset_sum[m] += weight * v.offset[n];
    }
    if (!call.v_in_pairs()) continue;
    for (int i = 0; i < call.v_positions; ++i) {
      const int element = call.v_order[i];
      if (element >= 0) acc[i] += sum[element];
    }
  }
}

// acc += P V; scratch.scores holds the softmax weights.
void tile_output(const AttentionCall& call, const QueryTile& tile, const SequenceMask& sequence, const RowOf& rows,
                 const TileKeys& keys, bool see_all, int head_index, Scratch& scratch, Prefetch& prefetch) {
  const Scratch::Head& head = scratch.heads[head_index];
  const int num_rows = tile.num_tokens * rows.group;
  TileRows v_rows = call.value.tile_rows(keys.v, keys.count, rows.kv_head, &prefetch);
  if (call.value.scales_side_by_side()) v_rows.scales = scratch.v_scales[head_index];
  const OperandFormat& format = call.value.operands;
  if (call.v_in_pairs()) {
    // Numbers that are not finite: of a bf16, only in the way of rows that do not see them; a scale's always, as int16
    // weights cannot hold its product.
    bool finite = format.load_affines(v_rows, call.value.shape, scratch.scale, scratch.offset);
    // bf16 values that some row must not see are looked at first.
    const bool look = !see_all && format.values_finite != nullptr;
    const bool few = call.few_values && num_rows <= call.k.blocks && !look;
    if (few && call.value.float_rows.accumulate_operands != nullptr) {
      return call.value.float_rows.accumulate_operands(v_rows, call.shape.head_size_v, scratch.scores, num_rows,
                                                       head.acc, call.acc_stride, prefetch);
    }
    if (finite && !few) format.load_values(v_rows, call.value.shape, scratch.values);
    if (finite && look) {
      finite = format.values_finite(scratch.values, (keys.count + 1) / 2, call.v_positions);
    }
    if (finite) {
      call.k.make_weights(format.operand, scratch.scores, num_rows, keys.count, scratch.scale,
                          format.has_offset ? scratch.offset : nullptr, scratch.weights, scratch.unit, head.offset_sum);
      if (few) {
        return format.accumulate_few(v_rows, call.value.shape, scratch.weights, num_rows, scratch.unit, head.acc,
                                     call.acc_stride, prefetch);
      }
      return call.k.accumulate_values(format.operand, scratch.weights, num_rows, keys.count, scratch.values,
                                      call.v_positions, scratch.unit, head.acc, call.acc_stride, prefetch);
    }
  }
  // Values that some row must not see are looked at first.
  if (call.value_floats(num_rows) && see_all) {
    const FloatRows& floats = call.value.float_rows;
    bool finite = true;
    if (floats.load_affines != nullptr) {
      finite = floats.load_affines(v_rows, call.value.shape, scratch.scale, scratch.offset);
      if (finite) {
        call.k.make_weights(Operand::kFloat32, scratch.scores, num_rows, keys.count, scratch.scale, nullptr, nullptr,
                            nullptr, head.offset_sum);
      }
    }
    if (finite) {
      return floats.accumulate(v_rows, call.shape.head_size_v, scratch.scores, num_rows, head.acc, call.acc_stride,
                               prefetch);
    }
  }
  LevelTile& v = scratch.v_tile;
  call.value.load_tile(v_rows, rows.kv_head, v);
  if (!v.all_finite || call.v_in_pairs()) {
    return accumulate_visible(call, tile, sequence, rows, keys, v, head, scratch);
  }
  call.k.make_weights(Operand::kFloat32, scratch.scores, num_rows, keys.count, v.scale,
                      v.any_offset ? v.offset : nullptr, nullptr, nullptr, head.offset_sum);
  call.k.accumulate_tile(scratch.scores, kKeyTile, num_rows, v.levels, v.stride, keys.count, head.acc, call.acc_stride);
}

// The elements of a row of acc in order, offsets added.
void finish_rows(const AttentionCall& call, int num_rows, const Scratch::Head& head, Scratch& scratch) {
  const int size = call.shape.head_size_v;
  for (int m = 0; m < num_rows; ++m) {
    float* acc = head.acc + static_cast<std::int64_t>(m) * call.acc_stride;
    const float offset = head.offset_sum[m];
    if (call.v_in_pairs()) {
      std::copy_n(acc, call.v_positions, scratch.row);
      std::fill(acc + size, acc + call.v_stride, 0.0F);
      for (int i = 0; i < size; ++i) acc[i] = scratch.row[call.v_position[i]] + offset;
    } else {
      for (int i = 0; i < size; ++i) acc[i] += offset;
    }
  }
}

// The bytes of a tile's rows of some heads, in the order of their addresses where these ascend.
int prefetch_runs(const AttentionCall& call, const TileKeys& keys, HeadRange heads, Prefetch::Run* runs) {
  int count = 0;
  // Rows of `bytes` at every `stride` from `begin` on: one run where they touch.
  const auto add = [&](const std::uint8_t* begin, std::int64_t bytes, int num, std::int64_t stride) {
    const bool touch = stride > 0 && stride <= bytes + 64;
    for (int i = 0; i < (touch ? 1 : num) && count < Scratch::kMaxRuns; ++i) {
      const std::uint8_t* row = begin + i * stride;
      runs[count++] = {row, row + bytes + (touch ? (num - 1) * stride : 0)};
    }
  };
  const int size = call.shape.block_size;
  // Rows of V right behind those of K are read with them.
  const std::int64_t apart =
      reinterpret_cast<std::intptr_t>(keys.v[0].data) - reinterpret_cast<std::intptr_t>(keys.k[0].data);
  const bool in_one = apart >= 0 && apart <= call.key.row_bytes + 64 &&
                      call.key.block_stride == call.value.block_stride &&
                      call.key.slot_stride == call.value.slot_stride && call.key.head_stride == call.value.head_stride;
  for (int side = 0; side < 2; ++side) {
    const CacheReader& reader = side == 0 ? call.key : call.value;
    const RowAddress* rows = side == 0 ? keys.k : keys.v;
    const std::int64_t row_bytes = in_one ? apart + call.value.row_bytes : reader.row_bytes;
    const std::int64_t bytes = (heads.count - 1) * reader.head_stride + row_bytes;
    const bool whole = bytes <= 2 * heads.count * row_bytes;  // heads lie side by side
    const std::int64_t scale_bytes = (heads.count - 1) * reader.scale_head_stride + 4;
    const bool scales = reader.scales != nullptr && scale_bytes <= 64;  // neither among the rows nor heads apart
    for (int n = 0; n < keys.count;) {
      const int num = std::min(keys.count - n, size - (keys.first + n) % size);  // in one block
      for (int h = 0; h < (whole ? 1 : heads.count) && !(in_one && side == 1); ++h) {
        add(rows[n].data + (heads.first + h) * reader.head_stride, whole ? bytes : row_bytes, num, reader.slot_stride);
      }
      if (scales) {
        add(rows[n].meta + heads.first * reader.scale_head_stride, scale_bytes, num, reader.scale_slot_stride);
      }
      n += num;
    }
  }
  return count;
}

// What to ask for while a tile of `heads` is computed.
Prefetch next_lines(const AttentionCall& call, const QueryTile& tile, HeadRange heads, const TileKeys& ahead,
                    HeadRange ahead_heads, Scratch& scratch) {
  Prefetch prefetch;
  if (ahead.count == 0 || call.key.row_bytes == 0 || call.value.row_bytes == 0) return prefetch;
  const int num_runs = prefetch_runs(call, ahead, ahead_heads, scratch.runs);
  prefetch.run = scratch.runs;
  prefetch.end_of_runs = scratch.runs + num_runs;
  std::int64_t lines = 0;
  for (int i = 0; i < num_runs; ++i) lines += (scratch.runs[i].end - scratch.runs[i].begin + 63) / 64;
  const int num_rows = tile.num_tokens * call.shape.group_size();
  // Which cache is measured, not derived: docs/kernels/cpu.md, "Prefetch".
  prefetch.into_l1 = !call.key_floats(num_rows) && !call.value_floats(num_rows);
  const int key_rows = call.key_bytes ? std::max(num_rows, call.k.blocks) : num_rows;  // products of bytes: whole sets
  const auto float_products = [&](bool few, int head_size) {
    return std::int64_t{kKeyTile} * (few ? num_rows * head_size / (4 * call.k.blocks) : kProductsOfRow);
  };
  const std::int64_t k_products =
      call.k_in_pairs() && !call.key_floats(num_rows)
          ? std::int64_t{key_rows} * call.query_parts * (call.k_positions / (8 * call.k.blocks)) * kKeyTile
          : float_products(call.key_floats(num_rows), call.shape.head_size);
  const std::int64_t v_products = call.v_in_pairs()
                                      ? std::int64_t{num_rows} * weight_parts(call.value.operands.operand) *
                                            (call.v_positions / (4 * call.k.blocks)) * (kKeyTile / 2)
                                      : float_products(call.value_floats(num_rows), call.shape.head_size_v);
  // All of them by the time that most of the products have been made.
  const std::int64_t products = heads.count * (k_products + v_products) * 15 / 16;
  prefetch.pace = static_cast<int>(std::min<std::int64_t>(lines * Prefetch::kUnit / products + 1, 4 * Prefetch::kUnit));
  return prefetch;
}

}  // namespace

void attend_split(const AttentionCall& call, const QueryTile& tile, const SequenceMask& sequence, HeadRange heads,
                  const KeySpan& span, const NextKeysSource& source, Scratch& scratch) {
  const int num_rows = tile.num_tokens * call.shape.group_size();
  for (int h = 0; h < heads.count; ++h) {
    const Scratch::Head& head = scratch.heads[h];
    std::fill_n(head.acc, static_cast<std::int64_t>(num_rows) * call.acc_stride, 0.0F);
    std::fill_n(head.offset_sum, num_rows, 0.0F);
    std::fill_n(head.state, num_rows, SoftmaxState{});
  }
  TileKeys tiles[3];  // at hand and ahead in turns, and the first of what comes after
  std::int64_t next = span.first;
  next_keys(call, tile.batch, span, next, tiles[0]);
  for (int turn = 0; tiles[turn].count > 0; turn = 1 - turn) {
    const TileKeys& keys = tiles[turn];
    TileKeys& ahead = tiles[1 - turn];
    next_keys(call, tile.batch, span, next, ahead);
    const bool see_all = all_visible(call, tile, sequence, keys);
    HeadRange ahead_heads = heads;
    if (ahead.count == 0) {
      const NextKeys after = source.find(source.context);
      std::int64_t first = after.keys.first;
      if (after.tile != nullptr) next_keys(call, after.tile->batch, after.keys, first, tiles[2]);
      ahead_heads = after.heads;
    }
    Prefetch prefetch = next_lines(call, tile, heads, ahead.count > 0 ? ahead : tiles[2], ahead_heads, scratch);
    const auto collect = [&](const CacheReader& reader, const RowAddress* rows, Scratch::Scales scales) {
      if (!reader.scales_side_by_side()) return;
      call.k.collect_scales(reader.tile_rows(rows, keys.count, heads.first, nullptr), heads.count, scales);
    };
    collect(call.key, keys.k, scratch.k_scales);
    collect(call.value, keys.v, scratch.v_scales);
    for (int h = 0; h < heads.count; ++h) {
      const RowOf rows{call.shape.group_size(), heads.first + h};
      const Scratch::Head& head = scratch.heads[h];
      tile_logits(call, tile, sequence, rows, keys, see_all, h, scratch, prefetch);
      call.k.softmax_tile(scratch.scores, num_rows, keys.count, head.state, head.acc, call.acc_stride, head.offset_sum);
      tile_output(call, tile, sequence, rows, keys, see_all, h, scratch, prefetch);
    }
  }
  for (int h = 0; h < heads.count; ++h) finish_rows(call, num_rows, scratch.heads[h], scratch);
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
