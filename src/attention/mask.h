// Which keys a query row sees, and what is added to its logits: host+device, used by every attention kernel. (The
// oracle in src/reference states the same rules again, independently.)
//
// p is the query's absolute position, j the key's, both counted from the start of the sequence; a row with p < 0 sees
// nothing. A row's visible keys lie in one interval around p and, under R-SWA, in a prefix of the sequence. So do those
// of a tile of consecutive rows: visible_range() is the smallest such range, and keys outside it (and their block-table
// entries) are never touched.
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
  int rswa_window = -1;       // >= 1: R-SWA, keys with p - j < rswa_window and those of the prefix; -1: off
  bool clamp_ranges = false;  // the window also limits mm_prefix ranges, to their keys with p - j < window
};

// chunk_lookback L >= 0 with window W: chunks of W / (L + 1). With R-SWA there is neither.
QUIRE_HD MaskRule make_mask_rule(int sliding_window, int chunk_lookback, int rswa_window, bool clamp_ranges) {
  MaskRule rule;
  rule.window = sliding_window;
  rule.rswa_window = rswa_window;
  rule.clamp_ranges = clamp_ranges;
  if (chunk_lookback >= 0) {
    rule.lookback = chunk_lookback;
    rule.chunk = sliding_window / (chunk_lookback + 1);
  }
  return rule;
}

// This is what the mask knows of one sequence of the batch.
struct SequenceMask {
  int seq_len = 0;
  int context_len = 0;  // seq_len - query_len: position of the first query row, may be negative
  bool causal = true;
  int prefix_len = 0;                    // R-SWA: >= 0, keys below it are in every row's window; may be past seq_len
  const std::int32_t* ranges = nullptr;  // [num_ranges, 2] inclusive mm_prefix spans, may be null
  std::int64_t range_stride = 0;         // elements between spans
  std::int64_t bound_stride = 0;         // elements between a span's start and end
  int num_ranges = 0;
};

QUIRE_HD bool in_window(const MaskRule& rule, const SequenceMask& sequence, int p, int j) {
  if (rule.chunk > 0) return p / rule.chunk - j / rule.chunk <= rule.lookback;
  if (rule.rswa_window >= 0) return j < sequence.prefix_len || p - j < rule.rswa_window;
  if (rule.window < 0) return true;
  return p - j < rule.window && (sequence.causal || j - p < rule.window);
}

QUIRE_HD bool visible(const MaskRule& rule, const SequenceMask& sequence, int p, int j) {
  if (p < 0 || j < 0 || j >= sequence.seq_len) return false;
  if ((!sequence.causal || j <= p) && in_window(rule, sequence, p, j)) return true;
  for (int r = 0; r < sequence.num_ranges; ++r) {
    const int start = sequence.ranges[r * sequence.range_stride];
    const int end = sequence.ranges[r * sequence.range_stride + sequence.bound_stride];
    if (start < end && p >= start && p <= end && j >= start && j <= end) {
      if (!rule.clamp_ranges || rule.window < 0 || p - j < rule.window) return true;
    }
  }
  return false;
}

// Keys [begin, end) and [0, prefix_end), which contain everything rows p_first to p_last (inclusive) see; empty where
// begin >= end. prefix_end is 0 where there is no prefix or no key between the two; otherwise 0 < prefix_end < begin.
struct KeyRange {
  int begin = 0;
  int end = 0;
  int prefix_end = 0;
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
  } else if (rule.rswa_window >= 0) {
    range.begin = p_first - rule.rswa_window + 1;
  }
  for (int r = 0; r < sequence.num_ranges; ++r) {
    int start = sequence.ranges[r * sequence.range_stride];
    const int end = sequence.ranges[r * sequence.range_stride + sequence.bound_stride];
    if (start >= end || end < p_first || start > p_last) continue;
    if (rule.clamp_ranges && rule.window >= 0 && start < p_first - rule.window + 1) {
      start = p_first - rule.window + 1;
    }
    if (start < range.begin) range.begin = start;
    if (end >= range.end) range.end = end < sequence.seq_len ? end + 1 : sequence.seq_len;
  }
  if (range.begin < 0) range.begin = 0;
  if (rule.rswa_window >= 0 && sequence.prefix_len > 0) {
    if (sequence.prefix_len < range.begin) {
      range.prefix_end = sequence.prefix_len;
    } else {
      range.begin = 0;
    }
  }
  return range;
}

// The part of a range in a split: keys [begin, end) and, where the split has keys of the prefix besides, [first,
// prefix_end) before them. Empty where begin >= end.
struct KeySpan {
  int first = 0;       // the first key of all: begin where there is no prefix
  int prefix_end = 0;  // 0 where there is none
  int begin = 0;
  int end = 0;
};

// Gives the keys of a range that lie in [from, to), where from >= 0.
QUIRE_HD KeySpan clip(const KeyRange& range, std::int64_t from, std::int64_t to) {
  KeySpan span;
  span.begin = range.begin;
  span.end = range.end;
  if (from < range.prefix_end) {
    if (to > range.begin) {
      span.first = static_cast<int>(from);
      span.prefix_end = range.prefix_end;
      if (to < span.end) span.end = static_cast<int>(to);
      return span;
    }
    span.begin = 0;
    span.end = range.prefix_end;
  }
  if (from > span.begin) span.begin = static_cast<int>(from < span.end ? from : span.end);
  if (to < span.end) span.end = static_cast<int>(to);
  span.first = span.begin;
  return span;
}

// Keys [begin, end) that each of rows p_first to p_last (inclusive) sees: there no row needs the test. Other keys may
// be seen by all of them too.
struct FullRange {
  int begin = 0;  // may be negative
  int end = 0;
};

QUIRE_HD FullRange full_range(const MaskRule& rule, const SequenceMask& sequence, int p_first, int p_last) {
  FullRange full;
  if (p_first < 0 || sequence.num_ranges > 0 || rule.chunk > 0) return full;
  full.end = sequence.causal ? p_first + 1 : sequence.seq_len;
  if (rule.window >= 0) {
    full.begin = p_last - rule.window + 1;
    if (!sequence.causal && rule.window < full.end - p_first) full.end = p_first + rule.window;
  } else if (rule.rswa_window >= 0) {
    // The windows and the prefix where they meet, the longer of them where they do not.
    full.begin = p_last - rule.rswa_window + 1;
    if (sequence.prefix_len >= full.begin) {
      full.begin = 0;
    } else if (sequence.prefix_len > full.end - full.begin) {
      full.begin = 0;
      if (sequence.prefix_len < full.end) full.end = sequence.prefix_len;
    }
  }
  return full;
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
