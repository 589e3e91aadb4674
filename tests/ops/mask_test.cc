// The ranges of attention/mask.h against its visible(), over every short sequence: what kernels read, and which keys
// they take without a test.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention/mask.h"

namespace quire::testing {
namespace {

using attention::clip;
using attention::FullRange;
using attention::KeyRange;
using attention::KeySpan;
using attention::MaskRule;
using attention::SequenceMask;
using attention::visible;

bool holds(const KeyRange& range, int j) { return j < range.prefix_end || (j >= range.begin && j < range.end); }

bool holds(const KeySpan& span, int j) {
  return (j >= span.first && j < span.prefix_end) || (j >= span.begin && j < span.end);
}

// Rows first to last of a sequence.
void check_ranges(const MaskRule& rule, const SequenceMask& sequence, int first, int last) {
  const KeyRange range = attention::visible_range(rule, sequence, first, last);
  const FullRange full = attention::full_range(rule, sequence, first, last);
  const int n = sequence.seq_len;
  ASSERT_GE(range.begin, 0);
  ASSERT_LE(range.end, n);
  ASSERT_GE(range.prefix_end, 0);
  if (range.prefix_end > 0) {
    ASSERT_LT(range.prefix_end, range.begin);
  }
  bool ends_seen = range.begin >= range.end;
  for (int j = 0; j < n; ++j) {
    bool any = false;
    bool every = true;
    for (int p = first; p <= last; ++p) {
      const bool sees = visible(rule, sequence, p, j);
      any = any || sees;
      every = every && sees;
    }
    if (any) {
      ASSERT_TRUE(holds(range, j)) << j;
    }
    if (j >= full.begin && j < full.end) {
      ASSERT_TRUE(every) << j;
    }
    // Without spans a range holds no key that no row sees.
    if (sequence.num_ranges == 0 && rule.chunk == 0 && holds(range, j)) {
      ASSERT_TRUE(any) << j;
    }
    ends_seen = ends_seen || (any && j + 1 == range.end);
  }
  ASSERT_TRUE(ends_seen);
  for (int from = 0; from <= n + 1; ++from) {
    for (int to = from; to <= n + 1; ++to) {
      const KeySpan span = clip(range, from, to);
      bool any = false;
      for (int j = 0; j < n; ++j) {
        ASSERT_EQ(holds(span, j), holds(range, j) && j >= from && j < to) << j << " in " << from << " to " << to;
        any = any || holds(span, j);
      }
      ASSERT_EQ(span.begin < span.end, any);
      if (!any) continue;
      ASSERT_TRUE(holds(span, span.first));
      ASSERT_TRUE(holds(span, span.end - 1));
      if (span.prefix_end == 0) {
        ASSERT_EQ(span.first, span.begin);
      } else {
        ASSERT_LT(span.first, span.prefix_end);
        ASSERT_LT(span.prefix_end, span.begin);
      }
    }
  }
}

void check_sequences(const MaskRule& rule, int prefix_len, int num_ranges) {
  constexpr std::int32_t kSpans[] = {1, 4, 3, 9};
  for (bool causal : {true, false}) {
    for (int seq_len : {1, 2, 7, 10}) {
      for (int query_len = 1; query_len <= seq_len + 1; ++query_len) {
        const SequenceMask sequence{.seq_len = seq_len,
                                    .context_len = seq_len - query_len,
                                    .causal = causal,
                                    .prefix_len = prefix_len,
                                    .ranges = kSpans,
                                    .range_stride = 2,
                                    .bound_stride = 1,
                                    .num_ranges = num_ranges};
        for (int first = sequence.context_len; first < seq_len; ++first) {
          for (int last = first; last < seq_len; ++last) {
            SCOPED_TRACE(::testing::Message()
                         << "window " << rule.window << " chunk " << rule.chunk << " rswa_window " << rule.rswa_window
                         << " prefix " << prefix_len << " ranges " << num_ranges << " causal " << causal << " seq_len "
                         << seq_len << " rows " << first << " to " << last);
            check_ranges(rule, sequence, first, last);
            if (::testing::Test::HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

constexpr int kWindows[] = {-1, 1, 2, 3, 5, 12, std::numeric_limits<int>::max()};

TEST(Mask, RangesOfWindowsAndChunks) {
  for (int window : kWindows) {
    for (int lookback : {-1, 0, 1}) {
      if (lookback >= 0 && window <= lookback) continue;
      for (int num_ranges : {0, 2}) {
        for (bool clamp : {false, true}) {
          check_sequences(attention::make_mask_rule(window, lookback, -1, clamp), 0, num_ranges);
        }
      }
    }
  }
}

TEST(Mask, RangesOfPrefixesAndTheirWindows) {
  for (int window : kWindows) {
    if (window < 0) continue;
    for (int prefix_len : {0, 1, 2, 4, 6, 9, 10, 11, std::numeric_limits<int>::max()}) {
      for (int num_ranges : {0, 2}) {
        check_sequences(attention::make_mask_rule(-1, -1, window, false), prefix_len, num_ranges);
      }
    }
  }
}

}  // namespace
}  // namespace quire::testing
