// What must not be read, what is empty, and what is far away.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "format/formats.h"
#include "reference/attention.h"
#include "support/problem.h"

namespace quire::testing {
namespace {

using Options = AttentionCase::Options;

class Edge : public ::testing::TestWithParam<std::string> {
 protected:
  Options base() const {
    Options options;
    options.mode = GetParam();
    return options;
  }
};

// seq_len 0, more queries than keys (the first rows sit before the sequence), and rows whose window sees nothing.
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
        // Tokens 0 .. 3 have no keys; 4 .. 6 sit at positions -3 .. -1.
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

// A stored row that is NaN (or infinite, where the format can say so) reaches the queries that see it, and no other:
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
      ReshapeAndCacheArgs store;
      problem.cache->apply(store);
      store.key = problem.key.view;
      store.value = problem.value.view;
      store.slot_mapping = problem.slot_mapping.view;
      ASSERT_TRUE(reshape_and_cache(store).ok());
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

TEST_P(Edge, FarLogits) {
  // Logits around +-1e5 and spikes that grow along the sequence: the running maximum changes at every tile.
  for (float scale : {30.0F, -30.0F, 1e4F}) {
    Options options = base();
    options.sequences = {{1, 200}, {70, 140}};
    options.num_kv_heads = 1;
    AttentionCase problem(options);
    problem.args.softmax_scale = scale;
    // The logits' own rounding error is what counts here: u * |logit| * sqrt(d), so only order and finiteness are
    // compared, by asking for the key with the largest logit.
    ASSERT_TRUE(problem.run().ok());
    problem.run_oracle();
    for (std::int64_t t = 0; t < problem.num_tokens; ++t) {
      for (std::int64_t h = 0; h < 2; ++h) {
        const double expected = problem.expected_lse.get(t, h);
        EXPECT_NEAR(problem.lse.get(t, h), expected, 64 * 0x1p-24 * (std::abs(expected) + 8 * std::abs(scale) * 64));
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
      EXPECT_NEAR(memory[static_cast<std::size_t>(h * tokens + t)], problem.expected_lse.get(t, h), 1e-5);
    }
  }
}

// Pages further apart than 2^32 bytes and 2^31 elements: address space is reserved, only what is touched is backed.
TEST_P(Edge, OffsetsPast4GiB) {
  const std::int64_t kReserved = std::int64_t{48} << 30;
  void* memory = mmap(nullptr, static_cast<std::size_t>(kReserved), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) GTEST_SKIP() << "cannot reserve 48 GiB of address space here";
  auto* bytes = static_cast<std::uint8_t*>(memory);

  Options options = base();
  options.layout = Layout::kNhd;
  options.sequences = {{1, 37}, {5, 23}};
  AttentionCase problem(options);
  const std::int64_t num_blocks = problem.args.key_cache.shape[0];
  const std::int64_t page = kReserved / num_blocks / 4096 * 4096;
  // K at the start of a page, V in its middle, scales behind them: one pool, all strides huge.
  const auto spread = [&](Tensor tensor, std::int64_t offset) {
    if (!tensor.defined()) return tensor;
    tensor.data = bytes + offset;
    tensor.strides[0] = page / static_cast<std::int64_t>(dtype_bytes(tensor.dtype));
    return tensor;
  };
  ReshapeAndCacheArgs store;
  problem.cache->apply(store);
  store.key_cache = problem.args.key_cache = spread(problem.args.key_cache, 0);
  store.value_cache = problem.args.value_cache = spread(problem.args.value_cache, page / 2);
  store.k_scale_cache = problem.args.k_scale_cache = spread(problem.args.k_scale_cache, page / 4 * 3);
  store.v_scale_cache = problem.args.v_scale_cache = spread(problem.args.v_scale_cache, page / 4 * 3 + 65536);
  ASSERT_GT((num_blocks - 1) * page, std::int64_t{1} << 34);
  store.key = problem.key.view;
  store.value = problem.value.view;
  store.slot_mapping = problem.slot_mapping.view;
  const Status status = reshape_and_cache(store);
  ASSERT_TRUE(status.ok()) << status.message();

  // Same bytes as the compact cache, row by row.
  for (std::int64_t block = 1; block < num_blocks - 1; ++block) {
    const Tensor& compact = problem.cache->key_cache;
    const std::int64_t size = static_cast<std::int64_t>(dtype_bytes(compact.dtype));
    for (std::int64_t t = 0; t < problem.slot_mapping.view.shape[0]; ++t) {
      const std::int64_t slot = problem.slot_mapping.view.ptr<std::int64_t>()[t];
      if (slot / options.block_size != block) continue;
      const std::int64_t within = slot % options.block_size * compact.strides[1] * size;
      ASSERT_EQ(std::memcmp(compact.ptr<std::uint8_t>() + block * compact.strides[0] * size + within,
                            bytes + block * page + within, static_cast<std::size_t>(compact.shape[3] * size)),
                0);
    }
  }
  ASSERT_TRUE(problem.check());
  ASSERT_TRUE(problem.check(3));
  munmap(memory, static_cast<std::size_t>(kReserved));
}

INSTANTIATE_TEST_SUITE_P(Modes, Edge, ::testing::ValuesIn(table_modes()),
                         [](const auto& param) { return test_name(param.param); });

}  // namespace
}  // namespace quire::testing
