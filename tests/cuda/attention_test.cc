// What only a GPU can get wrong, or what is checked there differently; the oracle grid is tests/ops, run by main.cc.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/device_problem.h"

namespace quire::testing {
namespace {

using Options = AttentionCase::Options;

TEST(CudaAttention, SameCallSameBits) {
  for (const std::string& mode : table_modes()) {
    SCOPED_TRACE(mode);
    Options options;
    options.mode = mode;
    options.head_size = 128;
    options.num_kv_heads = 4;
    options.group = 4;
    options.sequences = {{1, 700}, {5, 333}, {40, 40}};
    AttentionCase problem(options);
    for (const int splits : {1, 5}) {
      QUIRE_ASSERT_OK(problem.run(splits));
      const auto out = problem.out.bytes;
      const auto lse = problem.lse.bytes;
      for (int repeat = 0; repeat < 3; ++repeat) {
        QUIRE_ASSERT_OK(problem.run(splits));
        EXPECT_EQ(problem.out.bytes, out);
        EXPECT_EQ(problem.lse.bytes, lse);
      }
    }
  }
}

// Sequence `b` of a case as a call of its own.
UnifiedAttentionArgs only(const AttentionCase& problem, std::int64_t b, OwnedTensor& cu_seqlens) {
  const auto rows = [](Tensor tensor, std::int64_t begin, std::int64_t count) {
    tensor.data =
        tensor.ptr<std::uint8_t>() + begin * tensor.strides[0] * static_cast<std::int64_t>(dtype_bytes(tensor.dtype));
    tensor.shape[0] = count;
    return tensor;
  };
  std::int64_t first = 0;
  for (std::int64_t i = 0; i < b; ++i) first += problem.options.sequences[static_cast<std::size_t>(i)].query_len;
  const std::int64_t count = problem.options.sequences[static_cast<std::size_t>(b)].query_len;
  UnifiedAttentionArgs args = problem.args;
  args.query = rows(args.query, first, count);
  args.out = rows(args.out, first, count);
  args.lse = rows(args.lse, first, count);
  args.seq_lens = rows(args.seq_lens, b, 1);
  args.block_table = rows(args.block_table, b, 1);
  cu_seqlens = OwnedTensor(DType::kInt32, {2});
  cu_seqlens.fill_integers({0, count});
  args.cu_seqlens_q = cu_seqlens.view;
  return args;
}

TEST(CudaAttention, BatchInvariantPlansIgnoreTheRestOfTheBatch) {
  for (const std::string& mode : table_modes()) {
    SCOPED_TRACE(mode);
    Options options;
    options.mode = mode;
    options.num_kv_heads = 1;
    options.group = 5;
    options.sequences = {{1, 5000}, {7, 2100}, {19, 19}, {1, 1}, {2, 4096}};
    AttentionCase problem(options);
    QUIRE_ASSERT_OK(problem.run(0, true));
    const auto out = problem.out.bytes;
    const auto lse = problem.lse.bytes;
    for (std::int64_t b = 0; b < 5; ++b) {
      OwnedTensor cu_seqlens;
      QUIRE_ASSERT_OK(attend_on_device(only(problem, b, cu_seqlens), 0, true));  // overwrites its own rows
      EXPECT_EQ(problem.out.bytes, out) << "sequence " << b;
      EXPECT_EQ(problem.lse.bytes, lse) << "sequence " << b;
    }
  }
}

TEST(CudaAttention, BlockIdsOutsideTheCacheAreSkippedAndCounted) {
  for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{1} << 30}) {
    Options options;
    options.sequences = {{1, 40}};
    AttentionCase problem(options);
    auto* table = problem.block_table.view.ptr<std::int32_t>();
    std::int64_t counter = 0;
    problem.args.error_counter = Tensor::contiguous(&counter, DType::kInt64, {1});
    // Without its last page the sequence is what it would be if it ended before it.
    table[2] = static_cast<std::int32_t>(bad);
    QUIRE_ASSERT_OK(problem.run());
    EXPECT_GT(counter, 0);
    problem.seq_lens.fill_integers({32});
    problem.args.error_counter = Tensor();
    problem.run_oracle();
    EXPECT_TRUE(problem.matches());
  }
}

TEST(CudaAttention, NoTokensAndEmptySequences) {
  Options options;
  options.sequences = {{0, 0}, {0, 17}, {3, 0}, {4, 2}, {1, 20}};
  options.sinks = true;
  AttentionCase problem(options);
  EXPECT_TRUE(problem.check());
  EXPECT_TRUE(problem.check(3));
  UnifiedAttentionArgs empty = problem.args;
  empty.query.shape[0] = empty.out.shape[0] = empty.lse.shape[0] = 0;
  empty.cu_seqlens_q.shape[0] = 1;
  empty.seq_lens.shape[0] = empty.block_table.shape[0] = 0;
  QUIRE_ASSERT_OK(attend_on_device(empty, 0, false));
}

// A NaN in a key or value that a row sees makes that row NaN, and no other.
TEST(CudaAttention, NotANumberReachesOnlyTheRowsThatSeeIt) {
  for (const char* mode : {"bfloat16", "float16", "float32", "fp8", "int8_per_token_head", "int4_per_token_head"}) {
    SCOPED_TRACE(mode);
    Options options;
    options.mode = mode;
    options.window = 5;
    options.sequences = {{30, 50}, {3, 33}};
    AttentionCase problem(options);
    // Token 37 of the first sequence again, with a NaN in its key and value of head 0.
    OwnedTensor key(DType::kFloat32, {1, 2, 64}), value(DType::kFloat32, {1, 2, 64}), slot(DType::kInt64, {1});
    Random random(1);
    std::vector<float> row = random.normals(128);
    row[5] = std::numeric_limits<float>::quiet_NaN();
    key.fill(row);
    value.fill(row);
    slot.fill_integers({problem.block_table.view.ptr<std::int32_t>()[37 / 16] * 16 + 37 % 16});
    ReshapeAndCacheArgs store;
    problem.cache->apply(store);
    store.key = key.view;
    store.value = value.view;
    store.slot_mapping = slot.view;
    QUIRE_ASSERT_OK(reshape_and_cache(store));
    for (const int splits : {1, 2}) {
      EXPECT_TRUE(problem.check(splits));
      int poisoned = 0;
      for (std::int64_t t = 0; t < 30; ++t) poisoned += std::isnan(problem.out.get(t, 0, 5)) ? 1 : 0;
      EXPECT_EQ(poisoned, 5);
    }
  }
}

TEST(CudaAttention, PagesPastFourGiB) {
  for (const char* mode : {"bfloat16", "int4_per_token_head", "fp8_per_token_head"}) {
    SCOPED_TRACE(mode);
    Options options;
    options.mode = mode;
    options.sequences = {{2, 40}};
    AttentionCase problem(options);
    QUIRE_ASSERT_OK(problem.run(1));
    const auto near = problem.out.bytes;

    // The same pages, 1.25 GiB apart: five of them, the last past 5 GiB.
    UnifiedAttentionArgs args = problem.args;
    constexpr std::int64_t kPageDistance = (std::int64_t{5} << 28) + 4096;
    const std::int64_t pages = args.key_cache.shape[0];
    ASSERT_EQ(pages, 5);
    Result<cuda::DeviceBuffer> pool =
        cuda::DeviceBuffer::allocate(static_cast<std::size_t>((pages - 1) * kPageDistance + (1 << 20)));
    ASSERT_TRUE(pool.ok()) << pool.status().message();
    std::int64_t offset = 0;
    for (Tensor* cache : {&args.key_cache, &args.value_cache, &args.k_scale_cache, &args.v_scale_cache}) {
      if (!cache->defined()) continue;
      const auto size = static_cast<std::int64_t>(dtype_bytes(cache->dtype));
      const std::int64_t page_bytes = cache->strides[0] * size;
      for (std::int64_t page = 0; page < pages; ++page) {
        QUIRE_ASSERT_OK(pool->copy_in(cache->ptr<std::uint8_t>() + page * page_bytes,
                                      static_cast<std::size_t>(page_bytes),
                                      static_cast<std::size_t>(offset + page * kPageDistance)));
      }
      cache->data = static_cast<std::uint8_t*>(pool->data()) + offset;
      cache->device = Device::kCuda;
      cache->strides[0] = kPageDistance / size;
      offset += page_bytes;
    }
    const std::vector<Tensor*> rest = {&args.query,    &args.out,         &args.lse,
                                       &args.seq_lens, &args.block_table, &args.cu_seqlens_q};
    const Result<cuda::DeviceMirror> mirror = cuda::DeviceMirror::upload(rest);
    ASSERT_TRUE(mirror.ok()) << mirror.status().message();
    QUIRE_ASSERT_OK(unified_attention(args));
    QUIRE_ASSERT_OK(cuda::synchronize());
    std::fill(problem.out.bytes.begin(), problem.out.bytes.end(), std::uint8_t{0xFF});
    QUIRE_ASSERT_OK(mirror.value().download(problem.args.out));
    EXPECT_EQ(problem.out.bytes, near);
  }
}

TEST(CudaAttention, MergeAttnStates) {
  constexpr std::int64_t kRows = 37, kHeads = 3, kHeadSize = 80;
  Random random(21);
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    OwnedTensor a(dtype, {kRows, kHeads, kHeadSize}, 5), b(dtype, {kRows, kHeads, kHeadSize});
    OwnedTensor lse_a(DType::kFloat32, {kRows, kHeads}, 2), lse_b(DType::kFloat32, {kRows, kHeads});
    OwnedTensor out(dtype, {kRows, kHeads, kHeadSize}, 3), lse(DType::kFloat32, {kRows, kHeads});
    a.fill(random.normals(a.view.numel()));
    b.fill(random.normals(b.view.numel()));
    std::vector<float> la = random.normals(kRows * kHeads);
    std::vector<float> lb = random.normals(kRows * kHeads);
    constexpr float kEmpty = -std::numeric_limits<float>::infinity();
    la[4] = la[5] = lb[5] = lb[6] = kEmpty;
    la[7] = 80.0F;
    lse_a.fill(la);
    lse_b.fill(lb);
    MergeAttnStatesArgs args;
    args.prefix_out = a.view;
    args.suffix_out = b.view;
    args.prefix_lse = lse_a.view;
    args.suffix_lse = lse_b.view;
    args.out = out.view;
    args.lse = lse.view;
    MergeAttnStatesArgs on_device = args;
    const Result<cuda::DeviceMirror> mirror = cuda::DeviceMirror::upload(cuda::tensors_of(on_device));
    ASSERT_TRUE(mirror.ok()) << mirror.status().message();
    QUIRE_ASSERT_OK(merge_attn_states(on_device));
    QUIRE_ASSERT_OK(cuda::synchronize());
    QUIRE_ASSERT_OK(mirror.value().download(args.out));
    QUIRE_ASSERT_OK(mirror.value().download(args.lse));
    // One rounding to the output's dtype, and a few fp32 ones.
    const double step = dtype == DType::kFloat32 ? 0x1p-21 : dtype == DType::kFloat16 ? 0x1p-10 : 0x1p-7;
    for (std::int64_t row = 0; row < kRows * kHeads; ++row) {
      const double wa = std::exp(static_cast<double>(la[static_cast<std::size_t>(row)]));
      const double wb = std::exp(static_cast<double>(lb[static_cast<std::size_t>(row)]));
      const std::int64_t t = row / kHeads;
      const std::int64_t h = row % kHeads;
      for (std::int64_t i = 0; i < kHeadSize; ++i) {
        const double x = a.get(t, h, i);
        const double y = b.get(t, h, i);
        const double expected = wa + wb == 0.0 ? 0.0 : (wa * x + wb * y) / (wa + wb);
        ASSERT_NEAR(out.get(t, h, i), expected, step * (std::abs(x) + std::abs(y)));
      }
      const double expected = std::log(wa + wb);
      if (std::isinf(expected)) {
        ASSERT_EQ(lse.get(t, h), kEmpty);
      } else {
        ASSERT_NEAR(lse.get(t, h), expected, 0x1p-21 * (1.0 + std::abs(expected)));
      }
    }
  }
}

// Every kernel once on little data: what the sanitizers run (scripts/gpu-test).
class CudaSmall : public ::testing::TestWithParam<std::string> {};

TEST_P(CudaSmall, StoreAndAttend) {
  Options wide;
  wide.mode = GetParam();
  wide.num_kv_heads = 1;
  wide.group = 3;
  wide.sequences = {{1, 600}, {5, 21}};  // long enough that the plan splits by itself
  wide.sinks = wide.alibi = wide.qq_bias = true;
  Options narrow = wide;
  narrow.sequences = {{4, 40}, {0, 0}, {7, 3}};
  narrow.head_size = 96;
  narrow.head_size_v = 160;
  narrow.layout = Layout::kPackedInline;
  narrow.mm_prefix = true;
  narrow.window = 9;
  narrow.softcap = 5.0F;
  for (const Options& options : {wide, narrow}) {
    AttentionCase problem(options);
    const PagedCache stored(problem.cache->options());
    ReshapeAndCacheArgs store;
    stored.apply(store);
    store.key = problem.key.view;
    store.value = problem.value.view;
    store.slot_mapping = problem.slot_mapping.view;
    QUIRE_ASSERT_OK(store_on_device(store));
    EXPECT_EQ(stored.bytes(), problem.cache->bytes());
    EXPECT_TRUE(problem.check());
    EXPECT_TRUE(problem.check(1));
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, CudaSmall, ::testing::ValuesIn(table_modes()),
                         [](const auto& param) { return test_name(param.param); });

// The kernels that must have run.
TEST(CudaAttention, ThePlanNamesItsKernel) {
  AttentionProblem problem;
  problem.device = Device::kCuda;
  problem.mode = mode_of("int4_per_token_head");
  problem.num_q_heads = 32;
  problem.num_kv_heads = 8;
  problem.head_size = problem.head_size_v = 128;
  problem.block_size = 16;
  problem.max_num_tokens = problem.max_batch = 64;
  problem.max_query_len = 1;
  problem.max_seq_len = 8192;
  const Result<AttentionPlan> plan = plan_unified_attention(problem);
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  EXPECT_NE(plan.value().kernel.find("decode_split<128>"), std::string::npos) << plan.value().kernel;
  problem.max_query_len = problem.max_num_tokens = 512;
  problem.max_batch = 1;
  EXPECT_NE(plan_unified_attention(problem).value().kernel.find("prefill_split<128>"), std::string::npos);
  problem.query_dtype = DType::kFloat32;
  EXPECT_NE(plan_unified_attention(problem).value().kernel.find("attend_split"), std::string::npos);
  problem.query_dtype = DType::kBFloat16;
  problem.mode = mode_of("bfloat16");
  problem.row_alignment = 2;
  EXPECT_NE(plan_unified_attention(problem).value().kernel.find("attend_split"), std::string::npos);
  EXPECT_GE(plan.value().split_size * plan.value().max_splits, 8192);
  EXPECT_LT(plan.value().split_size * (plan.value().max_splits - 1), 8192);
}

}  // namespace
}  // namespace quire::testing
