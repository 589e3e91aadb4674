// unified_attention on the CPU.
//
// Work is cut into tiles of query_tile tokens x the query heads of one KV head, and the keys into splits of split_size
// (absolute positions, so a sequence's splits do not depend on its neighbours). Within a split the keys come in tiles
// of kKeyTile: decode K levels, dot products, logits, online softmax, decode V levels, accumulate. Formats meet only in
// the two load_tile functions, so any key format goes with any value format.
//
//   logit   = softmax_scale * q_scale * k_scale * unrotate * (scale[n] * (q' . level) + offset[n] * sum q')
//   output  = v_scale * unrotate * rotate_back(sum p * scale[n] * level + sum p * offset[n]) / sum p
//
// A split's result is folded into the row's running state in split order, whether the splits ran one after the other in
// one task or in parallel through the workspace: the bits depend on split_size alone.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "attention/mask.h"
#include "attention/softmax.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/load.h"

namespace quire::cpu {
namespace {

using attention::KeyRange;
using attention::LogitRule;
using attention::MaskRule;
using attention::SequenceMask;
using attention::SoftmaxState;
using format::FormatInfo;
using format::MetaPlace;
using format::Rotation;

// Sequences with at most this many query tokens have their splits computed in parallel.
constexpr int kParallelSplitTokens = 16;
constexpr std::int64_t kDefaultSplitSize = 1024;
constexpr int kQueryRows = 64;  // rows (tokens x heads) a query tile aims for

// One of the two cache tensors and how its rows are decoded.
struct CacheReader {
  const std::uint8_t* base = nullptr;
  std::int64_t block_stride = 0, slot_stride = 0, head_stride = 0;  // bytes
  const std::uint8_t* meta_base = nullptr;
  std::int64_t meta_block_stride = 0, meta_slot_stride = 0, meta_head_stride = 0;  // bytes
  format::RowShape shape{};
  Rotation rotation = Rotation::kNone;
  float unrotate = 1.0F;
  Kernels::LoadTile load = nullptr;
  const QuantKVBackend* backend = nullptr;    // decodes rows where load is null
  std::atomic<bool>* decode_threw = nullptr;  // set where it threw
  bool is_value = false;

  RowAddress row(std::int64_t block, std::int64_t slot, std::int64_t head) const {
    return {base + block * block_stride + slot * slot_stride + head * head_stride,
            meta_base == nullptr
                ? nullptr
                : meta_base + block * meta_block_stride + slot * meta_slot_stride + head * meta_head_stride};
  }

  void load_tile(const RowAddress* rows, int num_rows, LevelTile& tile) const {
    if (load != nullptr) return load(rows, num_rows, shape, tile);
    tile.any_offset = false;
    tile.all_finite = false;  // unknown: take the careful path
    for (int n = 0; n < num_rows; ++n) {
      float* levels = tile.levels + static_cast<std::int64_t>(n) * tile.stride;
      const CacheRow cache_row{rows[n].data, reinterpret_cast<const float*>(rows[n].meta), shape.head_size, is_value};
      if (!decode(cache_row, levels)) std::fill_n(levels, shape.head_size, NAN);
      std::fill(levels + shape.head_size, levels + tile.stride, 0.0F);
      tile.scale[n] = 1.0F;
      tile.offset[n] = 0.0F;
    }
  }

  // An exception must not leave a parallel region.
  bool decode(const CacheRow& cache_row, float* levels) const {
    try {
      return backend->decode_row(cache_row, levels);
    } catch (...) {
      *decode_threw = true;
      return false;
    }
  }
};

CacheReader make_reader(const Tensor& cache, const Tensor& scale_cache, format::FormatId id, int head_size,
                        const QuantKVBackend* backend, std::atomic<bool>* decode_threw, bool is_value) {
  CacheReader reader;
  const auto element = static_cast<std::int64_t>(dtype_bytes(cache.dtype));
  reader.base = cache.ptr<const std::uint8_t>();
  reader.block_stride = cache.strides[0] * element;
  reader.slot_stride = cache.strides[1] * element;
  reader.head_stride = cache.strides[2] * element;
  reader.shape = format::row_shape(head_size);
  reader.backend = backend;
  reader.decode_threw = decode_threw;
  reader.is_value = is_value;
  if (scale_cache.defined()) {
    reader.meta_base = scale_cache.ptr<const std::uint8_t>();
    reader.meta_block_stride = scale_cache.strides[0] * 4;
    reader.meta_slot_stride = scale_cache.strides[1] * 4;
    reader.meta_head_stride = scale_cache.strides[2] * 4;
  }
  if (id == format::FormatId::kNone) return reader;
  const FormatInfo& info = format::format_info(id);
  if (info.meta_place == MetaPlace::kInRow) {
    reader.meta_base = reader.base + info.code_bytes(head_size);
    reader.meta_block_stride = reader.block_stride;
    reader.meta_slot_stride = reader.slot_stride;
    reader.meta_head_stride = reader.head_stride;
  }
  reader.rotation = info.rotation;
  reader.unrotate = info.unrotate(reader.shape);
  reader.load = kernels().load_tile[static_cast<std::size_t>(id)];
  return reader;
}

// Everything a task needs to know of the call.
struct Call {
  const UnifiedAttentionArgs& args;
  const AttentionShape& shape;
  const Kernels& k;
  CacheReader key, value;
  MaskRule mask;
  ScaleView q_scale, k_scale, v_scale;
  std::int64_t split_size;
  int k_stride, v_stride;  // padded head sizes

  int int_at(const Tensor& t, std::int64_t i) const { return t.ptr<const std::int32_t>()[i * t.strides[0]]; }

  SequenceMask sequence(int b) const {
    SequenceMask sequence;
    sequence.seq_len = int_at(args.seq_lens, b);
    sequence.context_len = sequence.seq_len - (int_at(args.cu_seqlens_q, b + 1) - int_at(args.cu_seqlens_q, b));
    sequence.causal = args.causal_per_seq.defined()
                          ? args.causal_per_seq.ptr<const std::uint8_t>()[b * args.causal_per_seq.strides[0]] != 0
                          : args.causal;
    if (const Tensor& ranges = args.mm_prefix_range; ranges.defined()) {
      sequence.ranges = ranges.ptr<const std::int32_t>() + b * ranges.strides[0];
      sequence.range_stride = ranges.strides[1];
      sequence.bound_stride = ranges.strides[2];
      sequence.num_ranges = shape.num_mm_ranges;
    }
    return sequence;
  }

  int block_of(int b, std::int64_t position) const {
    const Tensor& table = args.block_table;
    return table.ptr<const std::int32_t>()[b * table.strides[0] + position / shape.block_size * table.strides[1]];
  }
};

// Consecutive query tokens of one sequence and the keys they see.
struct QueryTile {
  int batch;
  int first_row;  // within the sequence
  int num_tokens;
  KeyRange range;
  std::int64_t partial = -1;  // first partial row in the workspace, or -1: splits run one after the other
  int first_split = 0;
  int num_splits = 0;
};

// One thread's memory. It is made inside a parallel region, which no exception may leave: without memory, the pointer
// is null and nothing else may be looked at.
struct Scratch {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory;
  float* q;                   // [rows, k_stride]
  float* acc;                 // [rows, v_stride], of the split at hand
  float* total;               // [rows, v_stride], folded
  float* scores;              // [rows, kKeyTile]
  float* q_sum;               // [rows]
  float* offset_sum;          // [rows], sum p * offset of the split at hand
  SoftmaxState* state;        // [rows], of the split at hand
  SoftmaxState* total_state;  // [rows], folded
  LevelTile k_tile, v_tile;

  Scratch(int rows, int k_stride, int v_stride) {
    static_assert(sizeof(SoftmaxState) == 2 * sizeof(float));
    const auto row_floats = static_cast<std::size_t>(k_stride + 2 * v_stride + kKeyTile + 2 + 4);
    const std::size_t floats =
        static_cast<std::size_t>(rows) * row_floats + static_cast<std::size_t>(kKeyTile) * (k_stride + v_stride);
    memory.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
    if (memory == nullptr) return;
    float* next = memory.get();
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
};

// Row m of a tile is token m / group of the tile and query head kv_head * group + m % group.
struct RowOf {
  int group;
  int kv_head;
  int token(int m) const { return m / group; }
  int head(int m) const { return kv_head * group + m % group; }
};

void load_queries(const Call& call, const QueryTile& tile, const RowOf& rows, Scratch& scratch) {
  const Tensor& query = call.args.query;
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

LogitRule logit_rule(const Call& call, int head, int row) {
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
void make_logits(const Call& call, const QueryTile& tile, const SequenceMask& sequence, const RowOf& rows,
                 int first_key, int num_keys, Scratch& scratch) {
  const float factor = call.args.softmax_scale * call.q_scale.at(tile.batch, rows.kv_head) *
                       call.k_scale.at(tile.batch, rows.kv_head) * call.key.unrotate;
  const bool has_rule = call.args.softcap > 0.0F || call.args.alibi_slopes.defined() || call.args.qq_bias.defined();
  const int first_position = sequence.context_len + tile.first_row;
  // Below the diagonal of a plain causal mask there is nothing to test.
  const bool all_visible = sequence.causal && call.mask.window < 0 && call.mask.chunk == 0 && first_position >= 0 &&
                           first_key + num_keys <= first_position + 1;
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
void accumulate_visible(const Call& call, const QueryTile& tile, const SequenceMask& sequence, const RowOf& rows,
                        int first_key, int num_keys, Scratch& scratch) {
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

// Attention of a query tile over keys [begin, end): leaves acc and state, acc complete (offsets added).
void attend_split(const Call& call, const QueryTile& tile, const SequenceMask& sequence, const RowOf& rows,
                  std::int64_t begin, std::int64_t end, Scratch& scratch) {
  const int num_rows = tile.num_tokens * rows.group;
  std::fill_n(scratch.acc, static_cast<std::int64_t>(num_rows) * call.v_stride, 0.0F);
  std::fill_n(scratch.offset_sum, num_rows, 0.0F);
  std::fill_n(scratch.state, num_rows, SoftmaxState{});

  // Tiles start at multiples of kKeyTile, so a row's arithmetic does not depend on where its tile's range begins.
  for (std::int64_t aligned = begin / kKeyTile * kKeyTile; aligned < end; aligned += kKeyTile) {
    const auto first_key = static_cast<int>(std::max(aligned, begin));
    const auto num_keys = static_cast<int>(std::min(aligned + kKeyTile, end) - first_key);
    RowAddress k_rows[kKeyTile];
    RowAddress v_rows[kKeyTile];
    for (int n = 0; n < num_keys; ++n) {
      const int key = first_key + n;
      const std::int64_t block = call.block_of(tile.batch, key);
      const int slot = key % call.shape.block_size;
      k_rows[n] = call.key.row(block, slot, rows.kv_head);
      v_rows[n] = call.value.row(block, slot, rows.kv_head);
    }
    call.key.load_tile(k_rows, num_keys, scratch.k_tile);
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

    call.value.load_tile(v_rows, num_keys, scratch.v_tile);
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

// Folds one more part into a row's running state.
void fold(const float* part, const SoftmaxState& part_state, int size, float* total, SoftmaxState& total_state) {
  const float max = exact::max(part_state.max, total_state.max);
  const float keep = attention::rescale(total_state.max, max);
  const float add = attention::rescale(part_state.max, max);
  for (int i = 0; i < size; ++i) total[i] = total[i] * keep + part[i] * add;
  total_state.sum = total_state.sum * keep + part_state.sum * add;
  total_state.max = max;
}

// Normalizes a row, rotates it back and writes it. `total` [v_stride] is overwritten.
void write_row(const Call& call, int batch, std::int64_t token, int head, float* total, SoftmaxState state) {
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

// A partial result in the workspace: acc [v_stride], max, sum. Row r of a tile's partials, split s:
// partial + (r * num_splits + s), with r = token * num_q_heads + head.
struct Partials {
  float* data;
  std::int64_t stride;
  float* at(const QueryTile& tile, int token, int head, int num_q_heads, int split) const {
    const std::int64_t row = static_cast<std::int64_t>(token) * num_q_heads + head;
    return data + (tile.partial + row * tile.num_splits + split) * stride;
  }
};

// The keys of split `index` (counted from the tile's first) inside the tile's range.
std::pair<std::int64_t, std::int64_t> split_keys(const Call& call, const QueryTile& tile, int index) {
  const std::int64_t start = (tile.first_split + index) * call.split_size;
  return {std::max<std::int64_t>(start, tile.range.begin),
          std::min<std::int64_t>(start + call.split_size, tile.range.end)};
}

void attend_all_splits(const Call& call, const QueryTile& tile, int kv_head, Scratch& scratch) {
  const RowOf rows{call.shape.group_size(), kv_head};
  const int num_rows = tile.num_tokens * rows.group;
  const SequenceMask sequence = call.sequence(tile.batch);
  std::fill_n(scratch.total, static_cast<std::int64_t>(num_rows) * call.v_stride, 0.0F);
  std::fill_n(scratch.total_state, num_rows, SoftmaxState{});
  if (tile.num_splits > 0) load_queries(call, tile, rows, scratch);
  for (int s = 0; s < tile.num_splits; ++s) {
    const auto [begin, end] = split_keys(call, tile, s);
    attend_split(call, tile, sequence, rows, begin, end, scratch);
    for (int m = 0; m < num_rows; ++m) {
      const std::int64_t at = static_cast<std::int64_t>(m) * call.v_stride;
      fold(scratch.acc + at, scratch.state[m], call.v_stride, scratch.total + at, scratch.total_state[m]);
    }
  }
  const std::int64_t first_token = call.int_at(call.args.cu_seqlens_q, tile.batch) + tile.first_row;
  for (int m = 0; m < num_rows; ++m) {
    write_row(call, tile.batch, first_token + rows.token(m), rows.head(m),
              scratch.total + static_cast<std::int64_t>(m) * call.v_stride, scratch.total_state[m]);
  }
}

void attend_one_split(const Call& call, const QueryTile& tile, int kv_head, int split, const Partials& partials,
                      Scratch& scratch) {
  const RowOf rows{call.shape.group_size(), kv_head};
  load_queries(call, tile, rows, scratch);
  const auto [begin, end] = split_keys(call, tile, split);
  attend_split(call, tile, call.sequence(tile.batch), rows, begin, end, scratch);
  for (int m = 0; m < tile.num_tokens * rows.group; ++m) {
    float* partial = partials.at(tile, rows.token(m), rows.head(m), call.shape.num_q_heads, split);
    std::copy_n(scratch.acc + static_cast<std::int64_t>(m) * call.v_stride, call.v_stride, partial);
    partial[call.v_stride] = scratch.state[m].max;
    partial[call.v_stride + 1] = scratch.state[m].sum;
  }
}

void fold_partials(const Call& call, const QueryTile& tile, int kv_head, const Partials& partials, Scratch& scratch) {
  const RowOf rows{call.shape.group_size(), kv_head};
  const std::int64_t first_token = call.int_at(call.args.cu_seqlens_q, tile.batch) + tile.first_row;
  for (int m = 0; m < tile.num_tokens * rows.group; ++m) {
    SoftmaxState state;
    std::fill_n(scratch.total, call.v_stride, 0.0F);
    for (int s = 0; s < tile.num_splits; ++s) {
      const float* partial = partials.at(tile, rows.token(m), rows.head(m), call.shape.num_q_heads, s);
      fold(partial, {partial[call.v_stride], partial[call.v_stride + 1]}, call.v_stride, scratch.total, state);
    }
    write_row(call, tile.batch, first_token + rows.token(m), rows.head(m), scratch.total, state);
  }
}

// A partial result is acc [v_stride], max, sum.
std::int64_t partial_floats(int head_size_v) { return padded(head_size_v) + 2; }

// A block id that would be read but does not exist, before anything is written.
Status check_blocks(const Call& call, const std::vector<QueryTile>& tiles) {
  for (const QueryTile& tile : tiles) {
    if (tile.range.begin >= tile.range.end) continue;
    const int size = call.shape.block_size;
    for (int block = tile.range.begin / size; block <= (tile.range.end - 1) / size; ++block) {
      const int id = call.block_of(tile.batch, static_cast<std::int64_t>(block) * size);
      if (id < 0 || id >= call.shape.num_blocks) {
        return out_of_range("block_table[" + std::to_string(tile.batch) + ", " + std::to_string(block) + "] is " +
                            std::to_string(id) + "; the cache has " +
                            (call.shape.num_blocks > 0 ? "blocks 0 to " + std::to_string(call.shape.num_blocks - 1)
                                                       : std::string("no blocks")));
      }
    }
  }
  return {};
}

}  // namespace

Result<AttentionPlan> plan(const AttentionProblem& problem) {
  AttentionPlan plan;
  plan.problem = problem;
  plan.kernel = std::string("cpu_tiles/") + kernels().target;
  plan.query_tile = std::max(1, kQueryRows / (problem.num_q_heads / problem.num_kv_heads));
  plan.split_size = kDefaultSplitSize;
  if (problem.num_splits > 0 && !problem.batch_invariant) {
    const std::int64_t keys = (problem.max_seq_len + problem.num_splits - 1) / problem.num_splits;
    plan.split_size = std::max<std::int64_t>(1, (keys + kKeyTile - 1) / kKeyTile) * kKeyTile;
  }
  plan.max_splits = std::max<std::int64_t>(1, (problem.max_seq_len + plan.split_size - 1) / plan.split_size);
  if (plan.max_splits > 1) {
    const std::int64_t tokens = std::min(problem.max_num_tokens, problem.max_batch * kParallelSplitTokens);
    const std::optional<std::int64_t> bytes = checked_product(
        {tokens, problem.num_q_heads, plan.max_splits, partial_floats(problem.head_size_v), sizeof(float)});
    if (!bytes) {
      return invalid_argument("max_num_tokens " + std::to_string(problem.max_num_tokens) + " and max_batch " +
                              std::to_string(problem.max_batch) + " with " + std::to_string(problem.num_q_heads) +
                              " query heads and max_seq_len " + std::to_string(problem.max_seq_len) +
                              " need a workspace of 2^63 bytes or more; plan for smaller bounds");
    }
    plan.workspace_bytes = static_cast<std::size_t>(*bytes);
  }
  return plan;
}

Status run(const AttentionPlan& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape,
           const QuantKVBackend* backend, void* workspace) {
  std::atomic<bool> decode_threw = false;
  const Call call{
      .args = args,
      .shape = shape,
      .k = kernels(),
      .key = make_reader(args.key_cache, args.k_scale_cache, shape.key_format, shape.head_size, backend, &decode_threw,
                         false),
      .value = make_reader(args.value_cache, args.v_scale_cache, shape.value_format, shape.head_size_v, backend,
                           &decode_threw, true),
      .mask = attention::make_mask_rule(args.sliding_window, args.chunk_lookback, args.mm_prefix_clamp_window),
      .q_scale = make_scale_view(args.q_scale),
      .k_scale = make_scale_view(args.k_scale),
      .v_scale = make_scale_view(args.v_scale),
      .split_size = plan.split_size,
      .k_stride = padded(shape.head_size),
      .v_stride = padded(shape.head_size_v),
  };

  std::vector<QueryTile> tiles;
  std::int64_t partial_rows = 0;
  for (int b = 0; b < shape.batch; ++b) {
    const SequenceMask sequence = call.sequence(b);
    const int query_len = sequence.seq_len - sequence.context_len;
    for (int row = 0; row < query_len; row += std::min(plan.query_tile, query_len - row)) {
      QueryTile tile{
          .batch = b, .first_row = row, .num_tokens = std::min(plan.query_tile, query_len - row), .range = {}};
      const int first = sequence.context_len + row;
      tile.range = attention::visible_range(call.mask, sequence, first, first + tile.num_tokens - 1);
      if (tile.range.begin < tile.range.end) {
        tile.first_split = static_cast<int>(tile.range.begin / plan.split_size);
        tile.num_splits = static_cast<int>((tile.range.end - 1) / plan.split_size) - tile.first_split + 1;
      }
      if (query_len <= kParallelSplitTokens && tile.num_splits > 1) {
        tile.partial = partial_rows;
        partial_rows += static_cast<std::int64_t>(tile.num_tokens) * shape.num_q_heads * tile.num_splits;
      }
      tiles.push_back(tile);
    }
  }
  if (Status status = check_blocks(call, tiles); !status.ok()) return status;
  const auto partial_bytes = static_cast<std::size_t>(partial_rows * partial_floats(shape.head_size_v)) * sizeof(float);
  if (partial_bytes > plan.workspace_bytes) {
    return invalid_argument("plan.workspace_bytes is " + std::to_string(plan.workspace_bytes) +
                            ", but this call needs " + std::to_string(partial_bytes) +
                            "; take plans from plan_unified_attention");
  }

  // A task is one KV head of a tile, or one split of it.
  struct Task {
    std::size_t tile;
    int kv_head;
    int split;
  };
  std::vector<Task> tasks;
  std::vector<Task> folds;
  for (std::size_t t = 0; t < tiles.size(); ++t) {
    for (int head = 0; head < shape.num_kv_heads; ++head) {
      if (tiles[t].partial < 0) {
        tasks.push_back({t, head, -1});
      } else {
        for (int s = 0; s < tiles[t].num_splits; ++s) tasks.push_back({t, head, s});
        folds.push_back({t, head, 0});
      }
    }
  }
  const Partials partials{static_cast<float*>(workspace), partial_floats(shape.head_size_v)};
  int most_tokens = 0;
  for (const QueryTile& tile : tiles) most_tokens = std::max(most_tokens, tile.num_tokens);
  const int max_rows = most_tokens * shape.group_size();
  // All threads have their memory before one of them writes to an output.
  std::atomic<bool> no_memory{false};
#pragma omp parallel
  {
    Scratch scratch(max_rows, call.k_stride, call.v_stride);
    if (scratch.memory == nullptr) no_memory = true;
#pragma omp barrier
    const std::size_t num_tasks = no_memory ? 0 : tasks.size();
    const std::size_t num_folds = no_memory ? 0 : folds.size();
#pragma omp for schedule(dynamic)
    for (std::size_t i = 0; i < num_tasks; ++i) {
      const Task& task = tasks[i];
      if (task.split < 0) {
        attend_all_splits(call, tiles[task.tile], task.kv_head, scratch);
      } else {
        attend_one_split(call, tiles[task.tile], task.kv_head, task.split, partials, scratch);
      }
    }
#pragma omp for schedule(dynamic)
    for (std::size_t i = 0; i < num_folds; ++i) {
      fold_partials(call, tiles[folds[i].tile], folds[i].kv_head, partials, scratch);
    }
  }
  if (no_memory) {
    return internal_error("no memory for the scratch of a thread, " + std::to_string(max_rows) +
                          " rows of queries, logits and results");
  }
  if (decode_threw) {
    const Result<ModeInfo> mode = mode_info(args.mode);
    return internal_error("decode_row of mode " + (mode ? mode->name : "?") +
                          " threw an exception; rows of out that see a cache row it threw on are NaN");
  }
  return {};
}

}  // namespace quire::cpu
