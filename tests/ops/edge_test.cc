// What must not be read, what is empty, and what lies at a border.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "format/formats.h"
#include "support/attention_case.h"
#include "support/modes.h"
#include "support/owned_tensor.h"
#include "support/tested_ops.h"

namespace quire::testing {
namespace {

using Options = AttentionCase::Options;

class Edge : public ::testing::TestWithParam<ModeAndQuery> {
 protected:
  Options base() const {
    Options options;
    options.mode = GetParam().mode;
    options.dtype = GetParam().query_dtype;
    return options;
  }
};

// seq_len is 0, there are more queries than keys (the first rows sit before the sequence), or a row's window sees
// nothing.
TEST_P(Edge, RowsWithoutKeysGiveZeroAndMinusInfinity) {
  for (bool causal : {true, false}) {
    for (bool sinks : {false, true}) {
      for (int num_splits : {0, 3}) {
        Options options = base();
        options.causal = causal;
        options.sinks = sinks;
        options.sequences = {{1, 0}, {3, 0}, {5, 2}, {0, 17}, {1, 300}, {0, 0}, {4, 4}};
        AttentionCase problem(options);
        ASSERT_TRUE(problem.check(num_splits));
        // Tokens 0 to 3 have no keys; 4 to 6 sit at positions -3 to -1.
        for (std::int64_t t = 0; t < 7; ++t) {
          for (std::int64_t h = 0; h < 4; ++h) {
            const float lse = problem.lse.get(t, h);
            if (sinks) {
              EXPECT_NEAR(lse, problem.sinks.get(h), 1e-6);
            } else {
              EXPECT_EQ(lse, -std::numeric_limits<float>::infinity());
            }
            for (int i = 0; i < options.head_size; ++i) ASSERT_EQ(problem.out.get(t, h, i), 0.0F) << t;
          }
        }
      }
    }
  }
}

TEST_P(Edge, EmptyBatchWritesNothing) {
  Options options = base();
  options.sequences = {};
  AttentionCase problem(options);
  ASSERT_TRUE(problem.check());
  for (std::uint8_t byte : problem.out.bytes) ASSERT_EQ(byte, 0xFF);
}

// A stored row that is NaN (or infinite, where the format can say so) reaches the queries that see it and no others:
// masked keys are not multiplied by zero.
TEST_P(Edge, APoisonedRowReachesOnlyThoseWhoSeeIt) {
  for (bool key_side : {true, false}) {
    for (int window : {-1, 4}) {
      Options options = base();
      options.sequences = {{20, 30}};
      options.window = window;
      options.num_kv_heads = 2;
      AttentionCase problem(options);
      // Token 17 of the sequence, KV head 1, gets a NaN.
      OwnedTensor& side = key_side ? problem.key : problem.value;
      const std::int64_t poisoned_key = 17;
      side.view.ptr<float>()[(poisoned_key * 2 + 1) * options.head_size + 5] = std::numeric_limits<float>::quiet_NaN();
      ASSERT_TRUE(problem.store().ok());
      ASSERT_TRUE(problem.check());
      for (std::int64_t t = 0; t < 20; ++t) {
        const std::int64_t p = 10 + t;
        const bool sees = p >= poisoned_key && (window < 0 || p - poisoned_key < window);
        for (std::int64_t h = 0; h < 4; ++h) {
          EXPECT_EQ(std::isnan(problem.out.get(t, h, 5)), sees && h >= 2) << "token " << t << " head " << h;
        }
      }
    }
  }
}

// Under R-SWA a NaN in the prefix reaches every row, one behind the prefix the rows whose window it is in, and no
// others. The first row that does not see it has a prefix and a window of its own, in a tile with rows whose ranges are
// whole.
TEST_P(Edge, APoisonedRowBehindThePrefixReachesOnlyTheWindow) {
  for (bool key_side : {true, false}) {
    for (const std::int64_t poisoned_key : {std::int64_t{3}, std::int64_t{17}, std::int64_t{40}}) {
      Options options = base();
      options.sequences = {{30, 80}};
      options.rswa_window = 35;
      options.rswa_prefix_lens = {17};
      AttentionCase problem(options);
      OwnedTensor& side = key_side ? problem.key : problem.value;
      side.view.ptr<float>()[(poisoned_key * 2 + 1) * options.head_size + 5] = std::numeric_limits<float>::quiet_NaN();
      ASSERT_TRUE(problem.store().ok());
      ASSERT_TRUE(problem.check());
      for (std::int64_t t = 0; t < 30; ++t) {
        const bool sees = poisoned_key < 17 || 50 + t - poisoned_key < 35;
        for (std::int64_t h = 0; h < 4; ++h) {
          EXPECT_EQ(std::isnan(problem.out.get(t, h, 5)), sees && h >= 2) << "token " << t << " head " << h;
        }
      }
    }
  }
}

// Rows in the gap that no query sees, and their pages, may hold anything: NaNs overwrite what was stored there.
TEST_P(Edge, TheGapIsNotRead) {
  for (const int query_len : {1, 4, 40}) {
    Options options = base();
    options.block_size = 8;
    options.sequences = {{query_len, 300}};
    options.rswa_window = 50;
    options.rswa_prefix_lens = {37};
    AttentionCase problem(options);
    const std::int64_t gap_end = 300 - query_len - 50 + 1;
    for (OwnedTensor* side : {&problem.key, &problem.value}) {
      float* row = side->view.ptr<float>();
      const std::int64_t row_floats = 2 * options.head_size;
      std::fill(row + 37 * row_floats, row + gap_end * row_floats, std::numeric_limits<float>::quiet_NaN());
    }
    ASSERT_TRUE(problem.store().ok());
    for (int num_splits : {0, 1, 5}) ASSERT_TRUE(problem.check(num_splits));
    for (std::int64_t t = 0; t < query_len; ++t) ASSERT_TRUE(std::isfinite(problem.out.get(t, 3, 5)));
  }
}

// Rows that nobody sees may hold numbers of any size, and the results stay the same, bit by bit.
TEST_P(Edge, EnormousRowsThatNobodySeesLeaveNoTrace) {
  for (const int query_len : {1, 4}) {
    Options options = base();
    options.sequences = {{query_len, 300}};
    options.window = 5;
    AttentionCase problem(options);
    ASSERT_TRUE(problem.check());
    const std::vector<std::uint8_t> out = problem.out.bytes, lse = problem.lse.bytes;
    const std::int64_t first_seen = 300 - query_len - 5 + 1;
    for (OwnedTensor* side : {&problem.key, &problem.value}) {
      float* row = side->view.ptr<float>();
      std::fill(row, row + first_seen * 2 * options.head_size, 1e30F);
    }
    ASSERT_TRUE(problem.store().ok());
    ASSERT_TRUE(problem.run().ok());
    EXPECT_EQ(problem.out.bytes, out);
    EXPECT_EQ(problem.lse.bytes, lse);
  }
}

// A product q . k that is infinite, of either sign, is not a masked key, and softcap does not hide it: whoever sees it
// gets NaN.
TEST_P(Edge, AnInfiniteKeyIsSeenAsNaN) {
  for (float infinity : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    for (float softcap : {0.0F, 20.0F}) {
      for (int window : {-1, 4}) {
        Options options = base();
        options.sequences = {{20, 30}, {1, 1}};
        options.window = window;
        options.softcap = softcap;
        options.num_kv_heads = 2;
        AttentionCase problem(options);
        const std::int64_t poisoned_key = 17;
        const auto poison = [&](std::int64_t token) {
          problem.key.view.ptr<float>()[(token * 2 + 1) * options.head_size + 5] = infinity;
        };
        poison(poisoned_key);
        poison(30);  // the second sequence's only key
        ASSERT_TRUE(problem.store().ok());
        const bool keeps_it = dtype_bytes(problem.args.cache.key_cache.dtype) > 1;
        const std::string format = (*mode_info(problem.args.mode))->key_format;
        if (!keeps_it && format::format_info(format::find_format(format)).meta_bytes == 0) {
          // fp8 saturates. The logit is then so large that only its order means anything, as in FarLogits.
          ASSERT_TRUE(problem.run().ok());
          EXPECT_TRUE(std::isfinite(problem.out.get(20, 3, 0)));
          continue;
        }
        ASSERT_TRUE(problem.check());
        if (!keeps_it) continue;
        for (std::int64_t t = 0; t < 21; ++t) {
          const std::int64_t p = t < 20 ? 10 + t : poisoned_key;
          const bool sees = p >= poisoned_key && (window < 0 || p - poisoned_key < window);
          for (std::int64_t h = 0; h < 4; ++h) {
            EXPECT_EQ(std::isnan(problem.out.get(t, h, 0)), sees && h >= 2) << "token " << t << " head " << h;
            EXPECT_EQ(std::isnan(problem.lse.get(t, h)), sees && h >= 2) << "token " << t << " head " << h;
          }
        }
      }
    }
  }
}

// The same holds where finite elements multiply beyond fp32, and a row sees nothing else.
TEST_P(Edge, AnOverflowingProductIsSeenAsNaN) {
  Options options = base();
  options.sequences = {{1, 1}, {1, 40}};
  options.num_kv_heads = 1;
  AttentionCase problem(options);
  problem.query.fill(std::vector<float>(static_cast<std::size_t>(problem.query.view.numel()), -1.0F));
  for (std::int64_t i = 0; i < options.head_size; ++i) {
    problem.key.view.ptr<float>()[i] = -3e38F;  // the first sequence's only key
    problem.key.view.ptr<float>()[5 * options.head_size + i] = 3e38F;
  }
  ASSERT_TRUE(problem.store().ok());
  ASSERT_TRUE(problem.check());
}

TEST_P(Edge, FarLogits) {
  // Logits around +-1e5 and spikes that grow along the sequence: the running maximum changes at every tile.
  for (float scale : {30.0F, -30.0F, 1e4F}) {
    Options options = base();
    options.sequences = {{1, 200}, {70, 140}};
    options.num_kv_heads = 1;
    AttentionCase problem(options);
    problem.args.softmax_scale = scale;
    // The logits' own rounding error is what counts here: u * |logit| * sqrt(d), so only order and finiteness are
    // compared, by asking for the key with the largest logit. A query rounded after its rotation moves a logit as
    // AttentionCase::lse_tolerance() says.
    ASSERT_TRUE(problem.run().ok());
    problem.run_oracle();
    for (std::int64_t t = 0; t < problem.num_tokens; ++t) {
      for (std::int64_t h = 0; h < 2; ++h) {
        const double expected = problem.expected_lse.get(t, h);
        const double rounded_query = problem.query_unit > 0x1p-24 ? 6 * problem.query_unit * 2 * 8 : 0.0;
        EXPECT_NEAR(problem.lse.get(t, h), expected,
                    64 * 0x1p-24 * (std::abs(expected) + 8 * std::abs(scale) * 64) + rounded_query * std::abs(scale));
        for (int i = 0; i < options.head_size; ++i) ASSERT_TRUE(std::isfinite(problem.out.get(t, h, i)));
      }
    }
  }
}

TEST_P(Edge, TablesExactlyAsWideAsTheSequence) {
  for (std::uint64_t seed : {2, 4, 6}) {  // even seeds: no column more than the longest sequence needs
    Options options = base();
    options.seed = seed;
    options.block_size = 16;
    options.sequences = {{1, 64}, {16, 16}, {1, 1}};
    AttentionCase problem(options);
    ASSERT_EQ(problem.block_table.view.shape[1], 4);
    ASSERT_TRUE(problem.check());
  }
}

TEST_P(Edge, WithoutLse) {
  Options options = base();
  options.lse = false;
  AttentionCase problem(options);
  ASSERT_TRUE(problem.check());
}

TEST_P(Edge, LseInAnyLayout) {
  Options options = base();
  AttentionCase problem(options);
  // [Hq, N] in memory.
  std::vector<float> memory(static_cast<std::size_t>(problem.lse.view.numel()), -7.0F);
  const std::int64_t tokens = problem.lse.view.shape[0];
  problem.args.lse = Tensor::strided(memory.data(), DType::kFloat32, {tokens, 4}, {1, tokens});
  ASSERT_TRUE(problem.run().ok());
  problem.run_oracle();
  for (std::int64_t t = 0; t < problem.num_tokens; ++t) {
    for (std::int64_t h = 0; h < 4; ++h) {
      EXPECT_NEAR(memory[static_cast<std::size_t>(h * tokens + t)], problem.expected_lse.get(t, h),
                  1e-5 + problem.lse_tolerance());
    }
  }
}

TEST_P(Edge, OneTokenAndLengthsAtBlockBorders) {
  for (int block_size : {1, 8, 16}) {
    Options options = base();
    options.block_size = block_size;
    options.sequences = {{1, 1}, {block_size, block_size}};
    for (int seq_len : {block_size - 1, block_size, block_size + 1, 2 * block_size}) {
      if (seq_len > 0) options.sequences.push_back({1, seq_len});
      if (seq_len > 0) options.sequences.push_back({seq_len, seq_len});
    }
    AttentionCase problem(options);
    ASSERT_TRUE(problem.check());
    ASSERT_TRUE(problem.check(2));
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, Edge, ::testing::ValuesIn(modes_and_queries()),
                         [](const auto& param) { return test_name(param.param); });

}  // namespace
}  // namespace quire::testing
