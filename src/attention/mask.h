// Which keys a query row sees, and what is added to its logits: host+device, used by every attention kernel. (The
// oracle in src/reference states the same rules again, independently.)
//
// p is the query's absolute position, j the key's, both counted from the start of the sequence; a row with p < 0 sees
// nothing. A row's visible keys lie in one interval around p, so a tile of consecutive rows needs one interval too:
// visible_range() is the smallest one, and keys outside it (and their block-table entries) are never touched.
#pragma once

#include <cmath>
#include <cstdint>

#include "format/exact.h"

namespace quire::attention {

// The part of the mask that is the same for all sequences of a call.
struct MaskRule {
  int window = -1;            // keys with p - j < window; -1: off
  int chunk = 0;              // > 0: chunked local attention with chunks of this size, instead of the window
  int lookback = 0;           // how many earlier chunks a row sees
  bool clamp_ranges = false;  // the window also limits mm_prefix ranges
};

// chunk_lookback L >= 0 with window W: chunks of W / (L + 1).
QUIRE_HD MaskRule make_mask_rule(int sliding_window, int chunk_lookback, bool clamp_ranges) {
  MaskRule rule;
  rule.window = sliding_window;
  rule.clamp_ranges = clamp_ranges;
  if (chunk_lookback >= 0) {
    rule.lookback = chunk_lookback;
    rule.chunk = sliding_window / (chunk_lookback + 1);
  }
  return rule;
}

// One sequence of the batch.
struct SequenceMask {
  int seq_len = 0;
  int context_len = 0;  // seq_len - query_len: position of the first query row, may be negative
  bool causal = true;
  const std::int32_t* ranges = nullptr;  // [num_ranges, 2] inclusive mm_prefix spans, may be null
  std::int64_t range_stride = 0;         // elements between spans
  std::int64_t bound_stride = 0;         // elements between a span's start and end
  int num_ranges = 0;
};

QUIRE_HD bool in_window(const MaskRule& rule, bool causal, int p, int j) {
  if (rule.chunk > 0) return p / rule.chunk - j / rule.chunk <= rule.lookback;
  if (rule.window < 0) return true;
  return p - j < rule.window && (causal || j - p < rule.window);
}

QUIRE_HD bool visible(const MaskRule& rule, const SequenceMask& sequence, int p, int j) {
  if (p < 0 || j < 0 || j >= sequence.seq_len) return false;
  if ((!sequence.causal || j <= p) && in_window(rule, sequence.causal, p, j)) return true;
  for (int r = 0; r < sequence.num_ranges; ++r) {
    const int start = sequence.ranges[r * sequence.range_stride];
    const int end = sequence.ranges[r * sequence.range_stride + sequence.bound_stride];
    if (start < end && p >= start && p <= end && j >= start && j <= end) {
      const int distance = p < j ? j - p : p - j;
      if (!rule.clamp_ranges || rule.window < 0 || distance < rule.window) return true;
    }
  }
  return false;
}

// Keys [begin, end) that contain everything rows p_first .. p_last (inclusive) see; empty where begin >= end.
struct KeyRange {
  int begin = 0;
  int end = 0;
};

QUIRE_HD KeyRange visible_range(const MaskRule& rule, const SequenceMask& sequence, int p_first, int p_last) {
  if (p_first < 0) p_first = 0;
  KeyRange range{0, 0};
  if (p_last < 0 || p_last < p_first) return range;
  range.end = sequence.causal && p_last + 1 < sequence.seq_len ? p_last + 1 : sequence.seq_len;
  if (rule.chunk > 0) {
    range.begin = (p_first / rule.chunk - rule.lookback) * rule.chunk;
  } else if (rule.window >= 0) {
    range.begin = p_first - rule.window + 1;
    // p_last + window may not fit an int.
    if (!sequence.causal && rule.window < range.end - p_last) range.end = p_last + rule.window;
  }
  for (int r = 0; r < sequence.num_ranges; ++r) {
    int start = sequence.ranges[r * sequence.range_stride];
    int end = sequence.ranges[r * sequence.range_stride + sequence.bound_stride];
    if (start >= end || end < p_first || start > p_last) continue;
    if (rule.clamp_ranges && rule.window >= 0) {
      if (start < p_first - rule.window + 1) start = p_first - rule.window + 1;
      if (rule.window <= end - p_last) end = p_last + rule.window - 1;
    }
    if (start < range.begin) range.begin = start;
    if (end >= range.end) range.end = end < sequence.seq_len ? end + 1 : sequence.seq_len;
  }
  if (range.begin < 0) range.begin = 0;
  return range;
}

// Everything that turns softmax_scale * (q . k) into a logit, for one query head. The mask comes between softcap and
// the biases, so it is applied to the result.
struct LogitRule {
  float softcap = 0.0F;  // 0: off
  bool has_alibi = false;
  bool alibi_sqrt = false;
  float alibi_slope = 0.0F;
  const float* qq_bias = nullptr;  // row i of qq_bias, may be null
  std::int64_t qq_stride = 0;
  int qq_size = 0;
};

QUIRE_HD float logit(const LogitRule& rule, const SequenceMask& sequence, float s, int p, int j) {
  if (rule.softcap > 0.0F) s = rule.softcap * tanhf(s / rule.softcap);
  const int column = j - sequence.context_len;
  if (rule.has_alibi) {
    if (rule.alibi_sqrt) {
      s -= j <= p ? rule.alibi_slope * sqrtf(static_cast<float>(p - j)) : 0.0F;
    } else {
      s += rule.alibi_slope * static_cast<float>(column);
    }
  }
  if (rule.qq_bias != nullptr && column >= 0 && column < rule.qq_size) s += rule.qq_bias[column * rule.qq_stride];
  return s;
}

}  // namespace quire::attention
