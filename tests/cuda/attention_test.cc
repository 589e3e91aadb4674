// What only a GPU can get wrong, or what is checked differently there. Everything else is in tests/ops, which main.cc
// runs.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/device_problem.h"
#include "support/attention_case.h"
#include "support/modes.h"
#include "support/paged_cache.h"

namespace quire::testing {
namespace {

using Options = AttentionCase::Options;

TEST(CudaAttention, BlockIdsOutsideTheCacheAreSkippedAndCounted) {
  for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{1} << 30}) {
    Options options;
    options.sequences = {{1, 40}};
    AttentionCase problem(options);
    auto* table = problem.block_table.view.ptr<std::int32_t>();
    std::int64_t counter = 0;
    problem.args.error_counter = Tensor::contiguous(&counter, DType::kInt64, {1});
    // Without its last page the sequence is what it would be if it ended before that page.
    table[2] = static_cast<std::int32_t>(bad);
    QUIRE_ASSERT_OK(problem.run());
    EXPECT_GT(counter, 0);
    problem.seq_lens.fill_integers({32});
    problem.args.error_counter = Tensor();
    problem.run_oracle();
    EXPECT_TRUE(problem.matches());
  }
}

TEST(CudaAttention, PagesPastFourGiB) {
  for (const char* mode : {"bfloat16", "int4_per_token_head", "fp8_per_token_head"}) {
    if (!modes_built({mode})) continue;
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
    const std::int64_t pages = args.cache.key_cache.shape[0];
    ASSERT_EQ(pages, 5);
    Result<cuda::DeviceBuffer> pool =
        cuda::DeviceBuffer::allocate(static_cast<std::size_t>((pages - 1) * kPageDistance + (1 << 20)));
    ASSERT_TRUE(pool.ok()) << pool.status().message();
    std::int64_t offset = 0;
    for (ConstTensor* cache :
         {&args.cache.key_cache, &args.cache.value_cache, &args.cache.k_scale_cache, &args.cache.v_scale_cache}) {
      if (!cache->defined()) continue;
      const auto size = static_cast<std::int64_t>(dtype_bytes(cache->dtype));
      const std::int64_t page_bytes = cache->strides[0] * size;
      for (std::int64_t page = 0; page < pages; ++page) {
        QUIRE_ASSERT_OK(pool->copy_in(cache->ptr<const std::uint8_t>() + page * page_bytes,
                                      static_cast<std::size_t>(page_bytes),
                                      static_cast<std::size_t>(offset + page * kPageDistance)));
      }
      cache->data = static_cast<std::uint8_t*>(pool->data()) + offset;
      cache->device = Device::cuda();
      cache->strides[0] = kPageDistance / size;
      offset += page_bytes;
    }
    std::fill(problem.out.bytes.begin(), problem.out.bytes.end(), std::uint8_t{0xFF});
    QUIRE_ASSERT_OK(attend_on_device(args, 0, false));
    EXPECT_EQ(problem.out.bytes, near);
  }
}

// Every kernel runs once on little data, for the sanitizers (scripts/gpu-test).
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
  Options prompt;  // 16-bit queries: tensor cores
  prompt.mode = GetParam();
  prompt.num_kv_heads = 1;
  prompt.group = 3;
  prompt.dtype = DType::kBFloat16;
  prompt.sequences = {{45, 300}, {2, 200}};
  Options large_heads = prompt;
  large_heads.head_size = 136;
  Options prefixes = prompt;
  prefixes.rswa_window = 60;
  prefixes.rswa_prefix_lens = {70, 33};
  Options wide_prefixes = wide;
  wide_prefixes.rswa_window = 40;
  wide_prefixes.rswa_prefix_lens = {90, 3};
  for (const Options& options : {wide, narrow, prompt, large_heads, prefixes, wide_prefixes}) {
    if (!packs(options.mode, options.head_size)) continue;
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

// Long prompts over longer contexts. Their tiles are so many that every stage of a kernel's pipeline is filled, emptied
// and filled again, with whole tiles, masked ones, and ones that no row sees.
struct LongPrompt {
  const char* name;
  void (*apply)(Options&);
};
constexpr LongPrompt kLongPrompts[] = {
    {"plain", [](Options&) {}},
    {"window", [](Options& o) { o.window = 200; }},
    {"window, not causal",
     [](Options& o) {
       o.window = 70;
       o.causal = false;
     }},
    {"biases",
     [](Options& o) {
       o.softcap = 20.0F;
       o.alibi = o.sinks = true;
     }},
    {"chunks",
     [](Options& o) {
       o.window = 400;
       o.chunk_lookback = 1;
     }},
    {"prefix ranges", [](Options& o) { o.mm_prefix = true; }},
    {"R-SWA",
     [](Options& o) {
       o.rswa_window = 150;
       o.rswa_prefix_lens = {300, 100, 0, 140};
     }},
    {"R-SWA, long windows and prefixes",
     [](Options& o) {
       o.rswa_window = 500;
       o.rswa_prefix_lens = {560, 1000, 33, -1};
     }},
    {"R-SWA, not causal",
     [](Options& o) {
       o.rswa_window = 70;
       o.rswa_prefix_lens = {600, 130, 40, 5};
       o.causal = false;
     }},
    {"rows with gaps", [](Options& o) { o.layout = Layout::kPadded; }},
    {"one KV head, packed",
     [](Options& o) {
       o.num_kv_heads = 1;
       o.group = 8;
       o.layout = Layout::kPackedInline;
     }},
    {"vLLM's pages",
     [](Options& o) {
       o.block_size = 32;
       o.layout = Layout::kPackedInlineNhd;
     }},
    {"pages of three layers, K longer than V",
     [](Options& o) {
       o.head_size = 192;
       o.head_size_v = 128;
       o.block_size = 64;
       o.layout = Layout::kLayerPages;
     }},
    {"smaller heads",
     [](Options& o) {
       o.head_size = 72;
       o.head_size_v = 40;
     }},
    {"larger heads", [](Options& o) { o.head_size = 192; }},
    {"fp16", [](Options& o) { o.dtype = o.out_dtype = o.auto_dtype = DType::kFloat16; }},
    {"fp8 query", [](Options& o) { o.dtype = DType::kFloat8E4M3; }},
};

class CudaLongPrompt : public ::testing::TestWithParam<std::string> {};

TEST_P(CudaLongPrompt, AloneAndInSplits) {
  std::uint64_t seed = 1;
  for (const LongPrompt& prompt : kLongPrompts) {
    SCOPED_TRACE(prompt.name);
    Options options;
    options.mode = GetParam();
    options.head_size = 128;
    options.group = 3;
    options.sequences = {{90, 1100}, {1, 700}, {45, 400}, {140, 140}};
    options.dtype = DType::kBFloat16;
    options.seed = ++seed;
    prompt.apply(options);
    if (!packs(options.mode, options.head_size)) continue;
    AttentionCase problem(options);
    EXPECT_TRUE(problem.check());
    EXPECT_TRUE(problem.check(3));
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, CudaLongPrompt, ::testing::ValuesIn(table_modes()),
                         [](const auto& param) { return test_name(param.param); });

}  // namespace
}  // namespace quire::testing
