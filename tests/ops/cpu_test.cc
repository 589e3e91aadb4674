// What only the CPU has: threads, SIMD targets, and address space without memory behind it.
#include <gtest/gtest.h>
#include <omp.h>
#include <sys/mman.h>

#include <cstring>
#include <string>
#include <vector>

#include "cpu/cpu.h"
#include "support/attention_case.h"
#include "support/modes.h"
#include "support/paged_cache.h"

namespace quire::testing {
namespace {

using Options = AttentionCase::Options;

class Cpu : public ::testing::TestWithParam<std::string> {
 protected:
  void TearDown() override {
    omp_set_num_threads(threads_);
    ASSERT_TRUE(cpu::use_simd_target("").ok());
  }

  Options base() const {
    Options options;
    options.mode = GetParam();
    options.sequences = {{1, 200}, {6, 70}, {9, 9}, {1, 1300}};
    return options;
  }

 private:
  int threads_ = omp_get_max_threads();
};

TEST_P(Cpu, ThreadsGiveTheSameBits) {
  for (int num_splits : {0, 5}) {
    Options options = base();
    options.sinks = true;
    AttentionCase problem(options);
    ASSERT_TRUE(problem.run(num_splits).ok());
    const std::vector<std::uint8_t> out = problem.out.bytes;
    const std::vector<std::uint8_t> lse = problem.lse.bytes;
    for (int threads : {1, 2, 3, 8}) {
      omp_set_num_threads(threads);
      for (int repeat = 0; repeat < 3; ++repeat) {
        ASSERT_TRUE(problem.run(num_splits).ok());
        ASSERT_EQ(problem.out.bytes, out) << threads << " threads";
        ASSERT_EQ(problem.lse.bytes, lse) << threads << " threads";
      }
    }
  }
}

// Every SIMD target meets the oracle.
TEST_P(Cpu, EveryTargetMatchesTheOracle) {
  for (const std::string& target : cpu::simd_targets()) {
    ASSERT_TRUE(cpu::use_simd_target(target).ok());
    for (int head_size : {64, 80, 128, 112}) {
      Options options = base();
      options.head_size = head_size;
      options.group = 5;
      options.num_kv_heads = 1;
      options.sinks = true;
      options.window = 100;
      AttentionCase problem(options);
      ASSERT_TRUE(problem.check()) << target;
    }
    AttentionProblem problem;
    problem.mode = mode_of(GetParam());
    problem.num_q_heads = problem.num_kv_heads = problem.block_size = 1;
    problem.head_size = problem.head_size_v = 64;
    const Result<AttentionPlan> plan = plan_unified_attention(problem);
    ASSERT_TRUE(plan.ok());
    EXPECT_NE(plan->describe().find(target), std::string::npos) << plan->describe();
  }
}

// Pages lie further apart than 2^32 bytes and 2^31 elements. Address space is reserved, and only what is touched is
// backed.
TEST_P(Cpu, OffsetsPast4GiB) {
  const std::int64_t kReserved = std::int64_t{48} << 30;
  void* memory = mmap(nullptr, static_cast<std::size_t>(kReserved), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) GTEST_SKIP() << "cannot reserve 48 GiB of address space here";
  auto* bytes = static_cast<std::uint8_t*>(memory);

  Options options = base();
  options.layout = Layout::kNhd;
  options.sequences = {{1, 37}, {5, 23}};
  AttentionCase problem(options);
  const std::int64_t num_blocks = problem.args.cache.key_cache.shape[0];
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
  store.cache.key_cache = spread(store.cache.key_cache, 0);
  store.cache.value_cache = spread(store.cache.value_cache, page / 2);
  store.cache.k_scale_cache = spread(store.cache.k_scale_cache, page / 4 * 3);
  store.cache.v_scale_cache = spread(store.cache.v_scale_cache, page / 4 * 3 + 65536);
  problem.args.cache = store.cache;
  ASSERT_GT((num_blocks - 1) * page, std::int64_t{1} << 34);
  store.key = problem.key.view;
  store.value = problem.value.view;
  store.slot_mapping = problem.slot_mapping.view;
  const Status status = reshape_and_cache(store, nullptr);
  ASSERT_TRUE(status.ok()) << status.message();

  // The bytes are those of the compact cache, row by row.
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

INSTANTIATE_TEST_SUITE_P(Modes, Cpu, ::testing::ValuesIn(table_modes()),
                         [](const auto& param) { return test_name(param.param); });

}  // namespace
}  // namespace quire::testing
