// The memory in which a thread computes attention, and the queries there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/softmax.h"
#include "cpu/attention_call.h"

namespace quire::cpu {

// Rows of one KV head: m is token m / group of the tile and query head kv_head * group + m % group.
struct RowOf {
  int group;
  int kv_head;
  int token(int m) const { return m / group; }
  int head(int m) const { return kv_head * group + m % group; }
};

// The KV heads of a task.
struct HeadRange {
  int first, count;
};

// One thread's memory, for `heads` KV heads of `rows` query rows each; what is said of one head is repeated for each.
struct Scratch {
  // Of one KV head.
  struct Head {
    float* q;                        // [rows, k_stride]
    float* q_sum;                    // [rows]
    QueryOperands queries;           // of all rows
    float* acc;                      // [rows, acc_stride], of the split at hand
    float* offset_sum;               // [rows], sum p * offset of the split at hand
    attention::SoftmaxState* state;  // [rows], of the split at hand
    float* total;                    // [rows, v_stride], folded
    attention::SoftmaxState* total_state;
  };
  static constexpr int kMaxHeads = 64;
  static constexpr int kMaxRuns = 512;

  Head heads[kMaxHeads];
  float* scores;           // [rows, kKeyTile]
  std::uint16_t* weights;  // [2, rows, kKeyTile]
  float* unit;             // [rows]
  float* row;              // [acc_stride]
  std::uint16_t* keys;     // [2, kKeyGroup, k_positions]
  std::uint16_t* columns;  // [k_positions / 2, kKeyTile, 2] or fp32 [k_stride, kKeyTile], for more than kFewRows rows
  std::uint16_t* values;   // [kKeyTile / 2, v_positions, 2]
  float* scale;            // [kKeyTile] each
  float* offset;
  // Collected scales of the tile at hand, [heads]; null where the rows do not lie as that takes.
  using Scales = float (*)[kKeyTile];
  Scales k_scales, v_scales;
  LevelTile k_tile, v_tile;
  Prefetch::Run runs[kMaxRuns];
  const QueryTile* loaded;  // whose queries it holds, of the KV heads from loaded_head on
  int loaded_head;

  // Lays the pointers out from `base` on, which may be null, and returns how many bytes that takes.
  std::size_t lay_out(const AttentionCall& call, int num_heads, int rows, std::uint8_t* base);
};

// Fills the queries of the scratch, rotated as the keys are; nothing is done where they are there already.
void load_queries(const AttentionCall& call, const QueryTile& tile, HeadRange heads, Scratch& scratch);

}  // namespace quire::cpu
