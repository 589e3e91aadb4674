// unified_attention on the CPU: its plan, and the tasks a call is cut into. The arithmetic is in attention_tile.h.
//
// Work is cut into tiles of query_tile tokens x the query heads of one KV head, and the keys into splits of split_size
// (absolute positions, so a sequence's splits do not depend on its neighbours).
//
// A split's result is folded into the row's running state in split order, whether the splits ran one after the other in
// one task or in parallel through the workspace: the bits depend on split_size alone.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "attention/mask.h"
#include "attention/softmax.h"
#include "cpu/attention_call.h"
#include "cpu/attention_tile.h"
#include "cpu/cache_reader.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "quire/mode.h"

namespace quire::cpu {
namespace {

using attention::KeySpan;
using attention::SequenceMask;
using attention::SoftmaxState;

// Sequences with at most this many query tokens have their splits computed in parallel.
constexpr int kParallelSplitTokens = 16;
constexpr std::int64_t kDefaultSplitSize = 1024;
constexpr int kQueryRows = 64;  // rows (tokens x heads) a query tile aims for

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
KeySpan split_keys(const AttentionCall& call, const QueryTile& tile, int index) {
  const std::int64_t start = (tile.first_split + index) * call.split_size;
  return attention::clip(tile.range, start, start + call.split_size);
}

void attend_all_splits(const AttentionCall& call, const QueryTile& tile, int kv_head, Scratch& scratch) {
  const RowOf rows{call.shape.group_size(), kv_head};
  const int num_rows = tile.num_tokens * rows.group;
  const SequenceMask sequence = call.sequence(tile.batch);
  std::fill_n(scratch.total, static_cast<std::int64_t>(num_rows) * call.v_stride, 0.0F);
  std::fill_n(scratch.total_state, num_rows, SoftmaxState{});
  if (tile.num_splits > 0) load_queries(call, tile, rows, scratch);
  for (int s = 0; s < tile.num_splits; ++s) {
    attend_split(call, tile, sequence, rows, split_keys(call, tile, s), scratch);
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

void attend_one_split(const AttentionCall& call, const QueryTile& tile, int kv_head, int split,
                      const Partials& partials, Scratch& scratch) {
  const RowOf rows{call.shape.group_size(), kv_head};
  load_queries(call, tile, rows, scratch);
  attend_split(call, tile, call.sequence(tile.batch), rows, split_keys(call, tile, split), scratch);
  for (int m = 0; m < tile.num_tokens * rows.group; ++m) {
    float* partial = partials.at(tile, rows.token(m), rows.head(m), call.shape.num_q_heads, split);
    std::copy_n(scratch.acc + static_cast<std::int64_t>(m) * call.v_stride, call.v_stride, partial);
    partial[call.v_stride] = scratch.state[m].max;
    partial[call.v_stride + 1] = scratch.state[m].sum;
  }
}

void fold_partials(const AttentionCall& call, const QueryTile& tile, int kv_head, const Partials& partials,
                   Scratch& scratch) {
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

// Fills in the tiles of a call, sequence by sequence; `partial_rows` counts the partial results that they leave in the
// workspace.
void cut_into_tiles(const AttentionCall& call, int query_tile, std::vector<QueryTile>& tiles,
                    std::int64_t& partial_rows) {
  tiles.clear();
  for (int b = 0; b < call.shape.batch; ++b) {
    const SequenceMask sequence = call.sequence(b);
    const int query_len = sequence.seq_len - sequence.context_len;
    for (int row = 0; row < query_len; row += std::min(query_tile, query_len - row)) {
      QueryTile tile{.batch = b, .first_row = row, .num_tokens = std::min(query_tile, query_len - row), .range = {}};
      const int first = sequence.context_len + row;
      tile.range = attention::visible_range(call.mask, sequence, first, first + tile.num_tokens - 1);
      if (tile.range.begin < tile.range.end) {
        const int first_key = tile.range.prefix_end > 0 ? 0 : tile.range.begin;
        tile.first_split = static_cast<int>(first_key / call.split_size);
        tile.num_splits = static_cast<int>((tile.range.end - 1) / call.split_size) - tile.first_split + 1;
      }
      if (query_len <= kParallelSplitTokens && tile.num_splits > 1) {
        tile.partial = partial_rows;
        partial_rows += static_cast<std::int64_t>(tile.num_tokens) * call.shape.num_q_heads * tile.num_splits;
      }
      tiles.push_back(tile);
    }
  }
}

// A task is one KV head of a tile, or one split of it.
struct Task {
  std::size_t tile;
  int kv_head;
  int split;  // -1: all of them, one after the other
};

// What a thread's calls need besides the workspace. It is kept from call to call, so that a call no larger than those
// before it allocates nothing. The call that runs takes it: one made from inside that call finds none, and makes its
// own.
struct CallMemory {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::vector<QueryTile> tiles;
  std::vector<Task> tasks, folds;
  std::unique_ptr<float, Free> scratch;
  std::size_t scratch_floats = 0;

  // False where the system has none. Aligned to 64 bytes.
  bool reserve_scratch(std::size_t floats) {
    if (floats <= scratch_floats) return true;
    scratch.reset(static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float))));
    scratch_floats = scratch == nullptr ? 0 : floats;
    return scratch != nullptr;
  }
};
thread_local CallMemory kept_memory;

class TakenMemory {
 public:
  TakenMemory() : memory_(std::exchange(kept_memory, {})) {}
  ~TakenMemory() { kept_memory = std::move(memory_); }
  TakenMemory(const TakenMemory&) = delete;
  TakenMemory& operator=(const TakenMemory&) = delete;
  CallMemory& operator*() { return memory_; }

 private:
  CallMemory memory_;
};

// A block id that would be read but does not exist, before anything is written.
Status check_blocks(const AttentionCall& call, const std::vector<QueryTile>& tiles) {
  for (const QueryTile& tile : tiles) {
    const KeySpan keys = attention::clip(tile.range, 0, tile.range.end);
    if (keys.begin >= keys.end) continue;
    const int size = call.shape.block_size;
    for (int block = keys.first / size; block <= (keys.end - 1) / size; ++block) {
      const std::int64_t first = static_cast<std::int64_t>(block) * size;
      if (first >= keys.prefix_end && first + size <= keys.begin) continue;
      const int id = call.block_of(tile.batch, first);
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

Status plan(PlanData& plan) {
  const AttentionProblem& problem = plan.problem;
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
  return {};
}

std::string describe(const PlanData&) { return std::string("cpu_tiles/") + kernels().target; }

Status run(const PlanData& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape,
           const QuantKVBackend* backend, void* workspace) {
  std::atomic<bool> decode_threw = false;
  const ConstKVCacheViews& cache = args.cache;
  const AttentionCall call{
      .args = args,
      .shape = shape,
      .k = kernels(),
      .key = make_reader(cache.key_cache, {cache.k_scale_cache, cache.k_page_meta, cache.k_head_vector},
                         shape.key_format, shape.head_size, backend, &decode_threw, false),
      .value = make_reader(cache.value_cache, {cache.v_scale_cache, cache.v_page_meta, cache.v_head_vector},
                           shape.value_format, shape.head_size_v, backend, &decode_threw, true),
      .mask = attention::make_mask_rule(args.mask.sliding_window, args.mask.chunk_lookback, args.mask.rswa_window,
                                        args.mask.mm_prefix_clamp_window),
      .q_scale = make_scale_view(args.q_descale),
      .k_scale = make_scale_view(args.k_descale),
      .v_scale = make_scale_view(args.v_descale),
      .split_size = plan.split_size,
      .k_stride = padded(shape.head_size),
      .v_stride = padded(shape.head_size_v),
  };

  TakenMemory taken;
  CallMemory& memory = *taken;
  std::int64_t partial_rows = 0;
  cut_into_tiles(call, plan.query_tile, memory.tiles, partial_rows);
  const std::vector<QueryTile>& tiles = memory.tiles;
  if (Status status = check_blocks(call, tiles); !status.ok()) return status;
  const auto partial_bytes = static_cast<std::size_t>(partial_rows * partial_floats(shape.head_size_v)) * sizeof(float);
  if (partial_bytes > plan.workspace_bytes) {
    return invalid_argument("plan.workspace_bytes is " + std::to_string(plan.workspace_bytes) +
                            ", but this call needs " + std::to_string(partial_bytes) +
                            "; take plans from plan_unified_attention");
  }

  std::vector<Task>& tasks = memory.tasks;
  std::vector<Task>& folds = memory.folds;
  tasks.clear();
  folds.clear();
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
  const int parts = static_cast<int>(std::min<std::size_t>(static_cast<std::size_t>(num_parts()), tasks.size()));
  // All parts have their memory before one of them writes to an output.
  const std::size_t floats = Scratch::num_floats(max_rows, call.k_stride, call.v_stride);
  if (parts > 0 && !memory.reserve_scratch(static_cast<std::size_t>(parts) * floats)) {
    return internal_error("no memory for the scratch of " + std::to_string(parts) + " threads, " +
                          std::to_string(max_rows) + " rows of queries, logits and results each");
  }
  // Each part takes the next task until there are none.
  const auto run_all = [&](const std::vector<Task>& list, const auto& run_task) {
    std::atomic<std::size_t> next = 0;
    const auto part = [&](int index) {
      Scratch scratch(memory.scratch.get() + static_cast<std::size_t>(index) * floats, max_rows, call.k_stride,
                      call.v_stride);
      for (std::size_t i = next++; i < list.size(); i = next++) run_task(list[i], scratch);
    };
    if (!list.empty()) run_parts(parts, part);
  };
  run_all(tasks, [&](const Task& task, Scratch& scratch) {
    if (task.split < 0) {
      attend_all_splits(call, tiles[task.tile], task.kv_head, scratch);
    } else {
      attend_one_split(call, tiles[task.tile], task.kv_head, task.split, partials, scratch);
    }
  });
  run_all(folds, [&](const Task& task, Scratch& scratch) {
    fold_partials(call, tiles[task.tile], task.kv_head, partials, scratch);
  });
  if (decode_threw) {
    const Result<const ModeInfo*> mode = mode_info(args.mode);
    return internal_error("decode_row of mode " + (mode ? (*mode)->name : "?") +
                          " threw an exception; rows of out that see a cache row it threw on are NaN");
  }
  return {};
}

}  // namespace quire::cpu
