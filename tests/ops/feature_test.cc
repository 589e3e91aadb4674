// Features of unified_attention against the oracle: alone, in every pair, and at their borders.
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "support/attention_case.h"
#include "support/modes.h"
#include "support/paged_cache.h"
#include "support/tested_ops.h"

namespace quire::testing {
namespace {

using Options = AttentionCase::Options;

struct Feature {
  const char* name;
  void (*apply)(Options& options);
};

const Feature kFeatures[] = {
    {"window", [](Options& o) { o.window = 17; }},
    {"chunk_lookback",
     [](Options& o) {
       o.window = 18;
       o.chunk_lookback = 1;
     }},
    {"mm_prefix", [](Options& o) { o.mm_prefix = true; }},
    {"mm_prefix clamped",
     [](Options& o) {
       o.mm_prefix = o.clamp_mm_prefix = true;
       if (o.window == -1) o.window = 7;
     }},
    {"rswa", [](Options& o) { o.rswa_window = 11; }},
    {"softcap", [](Options& o) { o.softcap = 3.0F; }},
    {"sinks", [](Options& o) { o.sinks = true; }},
    {"alibi", [](Options& o) { o.alibi = true; }},
    {"alibi_sqrt", [](Options& o) { o.alibi = o.alibi_sqrt = true; }},
    {"qq_bias", [](Options& o) { o.qq_bias = true; }},
    {"non-causal", [](Options& o) { o.causal = false; }},
    {"causal_per_seq", [](Options& o) { o.causal_per_seq = true; }},
    {"k_scale", [](Options& o) { o.k_scale = ScaleShape::kPerHead; }},
    {"v_scale", [](Options& o) { o.v_scale = ScaleShape::kPerSequence; }},
    {"fp8 query",
     [](Options& o) {
       o.dtype = DType::kFloat8E4M3;
       o.q_scale = ScaleShape::kPerSequence;
     }},
    {"fp8 out",
     [](Options& o) {
       o.out_dtype = DType::kFloat8E4M3;
       o.output_scale = 0.003F;
     }},
    {"bf16",
     [](Options& o) {
       o.dtype = DType::kBFloat16;
       if (o.output_scale == 0.0F) o.out_dtype = DType::kBFloat16;
     }},
    {"diffkv", [](Options& o) { o.head_size_v = 96; }},
    {"packed", [](Options& o) { o.layout = Layout::kPackedInline; }},
};

class Features : public ::testing::TestWithParam<std::string> {};

TEST_P(Features, AloneAndInPairs) {
  std::uint64_t seed = 1;
  for (const Feature& first : kFeatures) {
    for (const Feature& second : kFeatures) {
      if (&second < &first) continue;
      SCOPED_TRACE(std::string(first.name) + " + " + second.name);
      Options options;
      options.mode = GetParam();
      options.seed = ++seed;
      options.sequences = {{1, 70}, {40, 50}, {9, 9}};  // 40 queries: two query tiles
      first.apply(options);
      second.apply(options);
      if (dtype_bytes(options.dtype) != 1) options.q_scale = ScaleShape::kNone;
      if (options.rswa_window != -1 && options.window != -1) continue;  // refused
      AttentionCase problem(options);
      ASSERT_TRUE(problem.check());
    }
  }
}

TEST_P(Features, WindowsAtTheirBorders) {
  const int block = 8;
  for (int window : {1, 2, block - 1, block, block + 1, 63, 64, 65, 200, std::numeric_limits<int>::max()}) {
    for (bool causal : {true, false}) {
      Options options;
      options.mode = GetParam();
      options.block_size = block;
      options.window = window;
      options.causal = causal;
      options.sequences = {{1, 65}, {1, 8}, {1, 9}, {11, 70}, {17, 17}, {1, 1}, {70, 90}};
      options.seed = static_cast<std::uint64_t>(window % 97) + 1;
      AttentionCase problem(options);
      ASSERT_TRUE(problem.check());
    }
  }
}

TEST_P(Features, ChunkedLocalAttention) {
  for (int lookback : {0, 1, 2, 3}) {
    for (int window : {lookback + 1, 8, 16, 21, 100, std::numeric_limits<int>::max()}) {
      for (bool causal : {true, false}) {
        Options options;
        options.mode = GetParam();
        options.block_size = 8;
        options.window = window;
        options.chunk_lookback = lookback;
        options.causal = causal;
        options.sequences = {{1, 40}, {11, 70}, {17, 17}, {70, 90}};
        AttentionCase problem(options);
        ASSERT_TRUE(problem.check());
      }
    }
  }
}

// Windows and prefixes of R-SWA: none, of one page, ending inside a page, meeting the window, and past the sequence's
// end.
TEST_P(Features, PrefixesAndTheirWindows) {
  const int block = 8;
  for (int window : {1, 2, block - 1, block, block + 1, 40, 200, std::numeric_limits<int>::max()}) {
    for (bool causal : {true, false}) {
      Options options;
      options.mode = GetParam();
      options.block_size = block;
      options.rswa_window = window;
      options.causal = causal;
      options.sequences = {{1, 65}, {1, 140},  {1, 9},   {11, 150}, {17, 17},
                           {1, 1},  {70, 160}, {3, 200}, {5, 90},   {3, 2}};
      options.seed = static_cast<std::uint64_t>(window % 97) + 1;
      for (const std::vector<std::int64_t>& prefix_lens :
           std::vector<std::vector<std::int64_t>>{{0},
                                                  {1},
                                                  {64, 63, 8, 65},
                                                  {33, 0, -5, 1000, 12, std::numeric_limits<std::int32_t>::max(), 70},
                                                  {std::numeric_limits<std::int32_t>::min()}}) {
        options.rswa_prefix_lens = prefix_lens;
        AttentionCase problem(options);
        ASSERT_TRUE(problem.check());
      }
    }
  }
}

// Splits that end in the prefix, in the gap and in the window.
TEST_P(Features, PrefixesInSplits) {
  for (int num_splits : {0, 1, 3, 7, 30}) {
    Options options;
    options.mode = GetParam();
    options.num_kv_heads = 1;
    options.group = 3;
    options.sequences = {{1, 2500}, {2, 1025}, {1, 300}, {18, 1330}, {40, 700}};
    options.rswa_window = num_splits == 7 ? 500 : 100;
    options.rswa_prefix_lens = {num_splits == 3 ? 1100 : 130, 64, 0, 400, 700};
    options.sinks = num_splits % 2 == 0;
    options.seed = static_cast<std::uint64_t>(num_splits) + 1;
    AttentionCase problem(options);
    ASSERT_TRUE(problem.check(num_splits));
    ASSERT_TRUE(problem.check(0, true));
  }
}

TEST_P(Features, ScaleShapes) {
  for (ScaleShape k : {ScaleShape::kOne, ScaleShape::kPerHead, ScaleShape::kPerSequence}) {
    for (ScaleShape v : {ScaleShape::kOne, ScaleShape::kPerHead, ScaleShape::kPerSequence}) {
      for (ScaleShape q : {ScaleShape::kNone, ScaleShape::kOne, ScaleShape::kPerSequence}) {
        for (DType dtype : {DType::kFloat8E4M3, DType::kFloat8E5M2}) {
          Options options;
          options.mode = GetParam();
          options.k_scale = k;
          options.v_scale = v;
          options.q_scale = q;
          options.dtype = dtype;
          AttentionCase problem(options);
          ASSERT_TRUE(problem.check());
        }
      }
    }
  }
}

// Rows have 64 and 96 elements with fp32 queries, and 128 with 16-bit ones, for which a device may have its own
// kernels.
TEST_P(Features, LayoutsAndBlockSizes) {
  for (DType dtype : ops.query_dtypes) {
    for (Layout layout : kAllLayouts) {
      for (int block_size : {1, 3, 16, 32, 64}) {
        Options options;
        options.mode = GetParam();
        options.dtype = dtype;
        options.layout = layout;
        options.block_size = block_size;
        options.head_size = dtype == DType::kFloat32 ? 64 : 128;
        options.head_size_v = dtype == DType::kFloat32 ? 96 : 128;
        options.sequences = {{1, 90}, {6, 43}};
        AttentionCase problem(options);
        ASSERT_TRUE(problem.check());
      }
    }
  }
}

TEST_P(Features, OutputTypes) {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (DType out : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3}) {
      Options options;
      options.mode = GetParam();
      options.dtype = dtype;
      options.out_dtype = out;
      if (out == DType::kFloat8E4M3) options.output_scale = 0.0011F;  // some elements saturate
      AttentionCase problem(options);
      ASSERT_TRUE(problem.check());
    }
  }
}

// Lengths around the borders of the key tile (64) and of the query tile (64 rows).
TEST_P(Features, LengthsAroundTileBorders) {
  for (int group : {1, 3}) {
    for (int seq_len : {1, 2, 63, 64, 65, 127, 128, 129}) {
      for (int query_len : {1, 2, 21, 22, 63, 64, 65, 129}) {
        if (query_len > seq_len) continue;
        Options options;
        options.mode = GetParam();
        options.num_kv_heads = 1;
        options.group = group;
        options.sequences = {{query_len, seq_len}};
        options.sinks = seq_len % 2 == 0;
        AttentionCase problem(options);
        ASSERT_TRUE(problem.check());
      }
    }
  }
}

TEST_P(Features, LongContextInSplits) {
  for (int num_splits : {0, 1, 2, 3, 7, 100}) {
    Options options;
    options.mode = GetParam();
    options.num_kv_heads = 1;
    options.group = 3;
    options.sequences = {{1, 2100}, {2, 1025}, {1, 64}, {1, 1}, {18, 1030}};
    options.sinks = num_splits % 2 == 0;
    options.window = num_splits == 7 ? 1500 : -1;
    options.softcap = num_splits == 3 ? 4.0F : 0.0F;
    options.seed = static_cast<std::uint64_t>(num_splits) + 1;
    AttentionCase problem(options);
    ASSERT_TRUE(problem.check(num_splits));
    ASSERT_TRUE(problem.check(0, true));
  }
}

// Values lie far from zero and there are many keys. Partial sums are folded per split, so the error is that of a short
// sequence.
TEST_P(Features, ErrorDoesNotGrowWithLength) {
  Options options;
  options.mode = GetParam();
  options.num_kv_heads = options.group = 1;
  options.sequences = {{1, 16000}};
  AttentionCase problem(options);
  for (std::int64_t n = 0; n < problem.value.view.numel(); ++n) problem.value.view.ptr<float>()[n] += 3.0F;
  ReshapeAndCacheArgs store;
  problem.cache->apply(store);
  store.key = problem.key.view;
  store.value = problem.value.view;
  store.slot_mapping = problem.slot_mapping.view;
  ASSERT_TRUE(reshape_and_cache(store, nullptr).ok());
  problem.options.sequences = {{1, 1000}};  // the tolerance of a thousand keys
  ASSERT_TRUE(problem.check());
}

TEST_P(Features, AutoStoresTheCachesFloat) {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    Options options;
    options.mode = "auto";
    options.auto_dtype = dtype;
    AttentionCase problem(options);
    ASSERT_TRUE(problem.check());
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, Features, ::testing::ValuesIn(table_modes()),
                         [](const auto& param) { return test_name(param.param); });

}  // namespace
}  // namespace quire::testing
