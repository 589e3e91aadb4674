// Relations that hold whatever the numbers are: where pages lie, how a batch is cut, how keys are split, and what a
// factor of two does. And determinism: the same bits from repeated runs, whatever the neighbours are.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "support/attention_case.h"
#include "support/modes.h"
#include "support/owned_tensor.h"
#include "support/paged_cache.h"
#include "support/tested_ops.h"

namespace quire::testing {
namespace {

using Options = AttentionCase::Options;

class Relation : public ::testing::TestWithParam<ModeAndQuery> {
 protected:
  Options base() const {
    Options options;
    options.mode = GetParam().mode;
    options.dtype = GetParam().query_dtype;
    options.sequences = {{1, 200}, {6, 70}, {9, 9}, {1, 2500}};
    return options;
  }
};

// Queries [first, last) of sequence b alone, as a batch of one sequence.
UnifiedAttentionArgs one_sequence(const AttentionCase& problem, std::int64_t b, std::int32_t (&cu_seqlens)[2]) {
  UnifiedAttentionArgs args = problem.args;
  const std::int32_t* starts = problem.cu_seqlens_q.view.ptr<std::int32_t>();
  cu_seqlens[0] = 0;
  cu_seqlens[1] = starts[b + 1] - starts[b];
  const auto rows = [&](const cuda::TensorRef& ref) {
    Tensor tensor = ref.writable();
    if (!tensor.defined()) return;
    tensor.data = tensor.ptr<std::uint8_t>() +
                  starts[b] * tensor.strides[0] * static_cast<std::int64_t>(dtype_bytes(tensor.dtype));
    tensor.shape[0] = cu_seqlens[1];
    ref.set(tensor);
  };
  rows(&args.query);
  rows(&args.out);
  rows(&args.lse);
  const auto entry = [&](ConstTensor& tensor) {
    if (!tensor.defined()) return;
    tensor.data =
        tensor.ptr<const std::uint8_t>() + b * tensor.strides[0] * static_cast<std::int64_t>(dtype_bytes(tensor.dtype));
    tensor.shape[0] = 1;
  };
  entry(args.seq_lens);
  entry(args.block_table);
  args.cu_seqlens_q = Tensor::contiguous(cu_seqlens, DType::kInt32, {2});
  return args;
}

TEST_P(Relation, WherePagesLieDoesNotMatter) {
  Options options = base();
  AttentionCase first(options);
  ASSERT_TRUE(first.check());
  for (std::uint64_t page_seed : {1, 2, 3}) {
    options.page_seed = page_seed;
    AttentionCase other(options);
    ASSERT_NE(other.block_table.bytes, first.block_table.bytes);
    ASSERT_TRUE(other.run().ok());
    ASSERT_EQ(other.out.bytes, first.out.bytes);
    ASSERT_EQ(other.lse.bytes, first.lse.bytes);
  }
}

TEST_P(Relation, LayoutDoesNotMatter) {
  Options options = base();
  AttentionCase first(options);
  ASSERT_TRUE(first.run().ok());
  for (Layout layout : kAllLayouts) {
    options.layout = layout;
    AttentionCase other(options);
    if (other.plan()->describe() == first.plan()->describe()) {
      ASSERT_TRUE(other.run().ok());
      ASSERT_EQ(other.out.bytes, first.out.bytes) << layout_name(layout);
    } else {  // rows too badly aligned for it
      ASSERT_TRUE(other.check());
    }
  }
}

TEST_P(Relation, RepeatsGiveTheSameBits) {
  for (int num_splits : {0, 1, 5}) {
    Options options = base();
    options.sinks = true;
    AttentionCase problem(options);
    ASSERT_TRUE(problem.run(num_splits).ok());
    const std::vector<std::uint8_t> out = problem.out.bytes;
    const std::vector<std::uint8_t> lse = problem.lse.bytes;
    for (int repeat = 0; repeat < 3; ++repeat) {
      ASSERT_TRUE(problem.run(num_splits).ok());
      ASSERT_EQ(problem.out.bytes, out);
      ASSERT_EQ(problem.lse.bytes, lse);
    }
  }
}

TEST_P(Relation, BatchInvariantBitsDoNotDependOnNeighbours) {
  Options options = base();
  options.window = 900;
  options.sinks = true;
  AttentionCase problem(options);
  ASSERT_TRUE(problem.run(0, true).ok());
  const std::vector<std::uint8_t> together = problem.out.bytes;
  const std::vector<std::uint8_t> lse_together = problem.lse.bytes;
  std::fill(problem.out.bytes.begin(), problem.out.bytes.end(), 0xFF);
  std::fill(problem.lse.bytes.begin(), problem.lse.bytes.end(), 0xFF);
  for (std::int64_t b = 0; b < 4; ++b) {
    std::int32_t cu_seqlens[2];
    const UnifiedAttentionArgs args = one_sequence(problem, b, cu_seqlens);
    const Status status = ops.attend(args, static_cast<int>(b), true);  // a number of splits the flag overrides
    ASSERT_TRUE(status.ok()) << status.message();
  }
  EXPECT_EQ(problem.out.bytes, together);
  EXPECT_EQ(problem.lse.bytes, lse_together);
}

// Moves row `from` of dimension `dim` to row `to` of another tensor of the same shape.
void copy_rows(const OwnedTensor& from, std::int64_t from_row, OwnedTensor& to, std::int64_t to_row, int dim,
               std::int64_t count = 1) {
  const auto size = static_cast<std::int64_t>(dtype_bytes(from.view.dtype));
  const int other = 1 - dim;
  const std::int64_t bytes = (from.view.ndim == 3 ? from.view.shape[2] : 1) * size;
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t j = 0; j < from.view.shape[other]; ++j) {
      const std::int64_t source = (from_row + i) * from.view.strides[dim] + j * from.view.strides[other];
      const std::int64_t target = (to_row + i) * to.view.strides[dim] + j * to.view.strides[other];
      std::memcpy(to.bytes.data() + target * size, from.bytes.data() + source * size, static_cast<std::size_t>(bytes));
    }
  }
}

// Heads in another order give outputs in that order: no head sees the rows, scales, sinks or slopes of another.
TEST_P(Relation, PermutedHeadsGivePermutedHeads) {
  Options options = base();
  options.num_kv_heads = 3;
  options.sinks = options.alibi = true;
  AttentionCase first(options), other(options);
  ASSERT_TRUE(first.run().ok());
  constexpr std::int64_t kOrder[] = {2, 0, 1};  // KV head h of `other` is KV head kOrder[h] of `first`
  for (std::int64_t h = 0; h < 3; ++h) {
    copy_rows(first.key, kOrder[h], other.key, h, 1);
    copy_rows(first.value, kOrder[h], other.value, h, 1);
    copy_rows(first.query, 2 * kOrder[h], other.query, 2 * h, 1, 2);
    for (std::int64_t g = 0; g < 2; ++g) {
      other.sinks.view.ptr<float>()[2 * h + g] = first.sinks.get(2 * kOrder[h] + g);
      other.alibi_slopes.view.ptr<float>()[2 * h + g] = first.alibi_slopes.get(2 * kOrder[h] + g);
    }
  }
  ASSERT_TRUE(other.store().ok());
  ASSERT_TRUE(other.run().ok());
  OwnedTensor out(DType::kFloat32, {first.out.view.shape[0], 6, options.head_size}, 4);
  OwnedTensor lse(DType::kFloat32, {first.out.view.shape[0], 6}, 1);
  for (std::int64_t h = 0; h < 3; ++h) {
    copy_rows(first.out, 2 * kOrder[h], out, 2 * h, 1, 2);
    copy_rows(first.lse, 2 * kOrder[h], lse, 2 * h, 1, 2);
  }
  EXPECT_EQ(other.out.bytes, out.bytes);
  EXPECT_EQ(other.lse.bytes, lse.bytes);
}

// Sequences in another order give outputs in that order. A kernel may cut the keys of all sequences as one list;
// batch_invariant does not.
TEST_P(Relation, PermutedSequencesGivePermutedRows) {
  Options options = base();
  AttentionCase first(options), other(options);
  ASSERT_TRUE(first.run(0, true).ok());
  constexpr std::int64_t kOrder[] = {3, 1, 0, 2};
  const std::int32_t* starts = first.cu_seqlens_q.view.ptr<std::int32_t>();
  OwnedTensor out(DType::kFloat32, {first.out.view.shape[0], 4, options.head_size}, 4);
  OwnedTensor lse(DType::kFloat32, {first.out.view.shape[0], 4}, 1);
  std::vector<std::int64_t> begins{0}, lengths;
  for (const std::int64_t b : kOrder) {
    const std::int64_t count = starts[b + 1] - starts[b];
    const std::int64_t row = static_cast<std::int64_t>(lengths.size());
    copy_rows(first.query, starts[b], other.query, begins.back(), 0, count);
    copy_rows(first.block_table, b, other.block_table, row, 0);
    copy_rows(first.out, starts[b], out, begins.back(), 0, count);
    copy_rows(first.lse, starts[b], lse, begins.back(), 0, count);
    begins.push_back(begins.back() + count);
    lengths.push_back(first.seq_lens.view.ptr<std::int32_t>()[b]);
  }
  other.cu_seqlens_q.fill_integers(begins);
  other.seq_lens.fill_integers(lengths);
  ASSERT_TRUE(other.run(0, true).ok());
  EXPECT_EQ(other.out.bytes, out.bytes);
  EXPECT_EQ(other.lse.bytes, lse.bytes);
}

// Prefill in pieces gives the rows of the whole.
TEST_P(Relation, ChunkedPrefillIsTheWholePrefill) {
  Options options = base();
  options.sequences = {{150, 150}};
  options.num_kv_heads = 1;
  AttentionCase whole(options);
  ASSERT_TRUE(whole.check());
  for (int first : {0, 1, 15, 16, 17, 63, 64, 65, 149}) {
    for (int count : {1, 16, 17, 64}) {
      const int last = std::min(150, first + count);
      UnifiedAttentionArgs args = whole.args;
      std::int32_t cu_seqlens[2] = {0, last - first};
      std::int32_t seq_len = last;
      args.cu_seqlens_q = Tensor::contiguous(cu_seqlens, DType::kInt32, {2});
      args.seq_lens = Tensor::contiguous(&seq_len, DType::kInt32, {1});
      args.query.data = args.query.ptr<const std::uint8_t>() +
                        first * args.query.strides[0] * static_cast<std::int64_t>(dtype_bytes(args.query.dtype));
      args.query.shape[0] = last - first;
      OwnedTensor out(DType::kFloat32, {last - first, 2, options.head_size});
      args.out = out.view;
      args.lse = Tensor();
      const Status status = ops.attend(args, 0, false);
      ASSERT_TRUE(status.ok()) << status.message();
      for (std::int64_t t = 0; t < last - first; ++t) {
        for (std::int64_t h = 0; h < 2; ++h) {
          for (int i = 0; i < options.head_size; ++i) {
            // Both are within tolerance() of the oracle.
            ASSERT_NEAR(out.get(t, h, i), whole.out.get(first + t, h, i), 2 * whole.tolerance() * 24)
                << first << " + " << t;
          }
        }
      }
    }
  }
}

// Keys that are cut anywhere into two calls and merged give what one call gives. Pages have one token, so that the cut
// can fall anywhere.
TEST_P(Relation, SplitAnywhereAndMerge) {
  Options options = base();
  options.block_size = 1;
  options.sequences = {{3, 90}};
  options.sinks = true;
  options.causal = false;
  options.softcap = 5.0F;
  AttentionCase whole(options);
  ASSERT_TRUE(whole.check());
  for (int cut : {0, 1, 44, 63, 64, 65, 89, 90}) {
    OwnedTensor outs[2], lses[2];
    for (int part : {0, 1}) {
      outs[part] = OwnedTensor(DType::kFloat32, {3, 4, options.head_size}, 4);
      lses[part] = OwnedTensor(DType::kFloat32, {3, 4}, 1);
      UnifiedAttentionArgs args = whole.args;
      std::int32_t seq_len = part == 0 ? cut : 90 - cut;
      args.seq_lens = Tensor::contiguous(&seq_len, DType::kInt32, {1});
      // The three queries see every key of the part, also where it has fewer keys than queries: since positions come
      // from seq_len, each query is a sequence of its own.
      std::int32_t cu_seqlens[] = {0, 1, 2, 3};
      std::int32_t seq_lens[] = {seq_len, seq_len, seq_len};
      args.cu_seqlens_q = Tensor::contiguous(cu_seqlens, DType::kInt32, {4});
      args.seq_lens = Tensor::contiguous(seq_lens, DType::kInt32, {3});
      args.query.shape[0] = 3;
      args.block_table.shape[0] = 3;
      args.block_table.strides[0] = 0;
      if (part == 1) {
        args.block_table.data = args.block_table.ptr<const std::int32_t>() + cut;
        args.block_table.shape[1] -= cut;
        args.sinks = Tensor();  // counted once
      }
      args.out = outs[part].view;
      args.lse = lses[part].view;
      const Status status = ops.attend(args, 0, false);
      ASSERT_TRUE(status.ok()) << status.message();
    }
    OwnedTensor out(DType::kFloat32, {3, 4, options.head_size}, 2);
    OwnedTensor lse(DType::kFloat32, {3, 4});
    MergeAttnStatesArgs merge{.out = out.view,
                              .lse = lse.view,
                              .prefix_out = outs[0].view,
                              .prefix_lse = lses[0].view,
                              .suffix_out = outs[1].view,
                              .suffix_lse = lses[1].view};
    ASSERT_TRUE(ops.merge(merge).ok());
    for (std::int64_t t = 0; t < 3; ++t) {
      for (std::int64_t h = 0; h < 4; ++h) {
        ASSERT_NEAR(lse.get(t, h), whole.expected_lse.get(t, h), 2 * whole.tolerance() + 1e-6) << "cut " << cut;
        for (int i = 0; i < options.head_size; ++i) {
          ASSERT_NEAR(out.get(t, h, i), whole.expected_out.get(t, h, i), 2 * whole.tolerance() * 24) << "cut " << cut;
        }
      }
    }
  }
}

// Powers of two commute with every rounding, so these hold bit for bit.
TEST_P(Relation, DoubledScales) {
  AttentionCase problem(base());
  ASSERT_TRUE(problem.run().ok());
  const OwnedTensor& out = problem.out;
  std::vector<float> plain;
  const auto collect = [&] {
    std::vector<float> values;
    for (std::int64_t t = 0; t < problem.num_tokens; ++t) {
      for (std::int64_t h = 0; h < 4; ++h) {
        for (int i = 0; i < problem.options.head_size; ++i) values.push_back(out.get(t, h, i));
      }
    }
    return values;
  };
  plain = collect();
  float two = 2.0F;
  problem.args.v_descale = Tensor::contiguous(&two, DType::kFloat32, {1});
  ASSERT_TRUE(problem.run().ok());
  std::vector<float> doubled = collect();
  for (std::size_t i = 0; i < plain.size(); ++i) ASSERT_EQ(doubled[i], 2.0F * plain[i]);

  problem.args.v_descale = Tensor();
  problem.args.k_descale = Tensor::contiguous(&two, DType::kFloat32, {1});
  ASSERT_TRUE(problem.run().ok());
  const std::vector<float> by_k_scale = collect();
  ASSERT_NE(by_k_scale, plain);
  problem.args.k_descale = Tensor();
  problem.args.softmax_scale *= 2.0F;
  ASSERT_TRUE(problem.run().ok());
  ASSERT_EQ(collect(), by_k_scale);
}

TEST_P(Relation, SinkOfMinusInfinityIsNoSink) {
  Options options = base();
  AttentionCase problem(options);
  ASSERT_TRUE(problem.run(3).ok());
  const std::vector<std::uint8_t> out = problem.out.bytes;
  const std::vector<std::uint8_t> lse = problem.lse.bytes;
  OwnedTensor sinks(DType::kFloat32, {4});
  sinks.fill(std::vector<float>(4, -std::numeric_limits<float>::infinity()));
  problem.args.sinks = sinks.view;
  ASSERT_TRUE(problem.run(3).ok());
  EXPECT_EQ(problem.out.bytes, out);
  EXPECT_EQ(problem.lse.bytes, lse);
}

INSTANTIATE_TEST_SUITE_P(Modes, Relation, ::testing::ValuesIn(modes_and_queries()),
                         [](const auto& param) { return test_name(param.param); });

}  // namespace
}  // namespace quire::testing
