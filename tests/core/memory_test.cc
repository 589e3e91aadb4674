// Running out of memory gives a Status, and nothing has been written. This program brings its own operator new, which
// fails when told to; for allocations that do not go through it, the tests limit the address space of a child.
#include <gtest/gtest.h>
#include <malloc.h>
#include <omp.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <new>
#include <vector>

#include "support/attention_case.h"
#include "support/modes.h"
#include "support/owned_tensor.h"
#include "support/paged_cache.h"
#include "support/random.h"
#include "support/turboquant_tables.h"

namespace {

// How many allocations still succeed; after them one fails or, with `for_good`, all do.
constexpr long kUnlimited = std::numeric_limits<long>::max();
std::atomic<long> allocations_left{kUnlimited};
std::atomic<bool> for_good{false};

// One heap for all threads, so that a child can use up all that is left of it.
[[maybe_unused]] const bool one_heap = mallopt(M_ARENA_MAX, 1) == 1;

void* allocate(std::size_t size) {
  if (allocations_left != kUnlimited && --allocations_left < 0) {
    if (!for_good) allocations_left = kUnlimited;
    return nullptr;
  }
  return std::malloc(size == 0 ? 1 : size);
}

}  // namespace

// They are not inlined, because the compiler would see free() called on what operator new gave, and warn.
#define QUIRE_NOINLINE __attribute__((noinline))
QUIRE_NOINLINE void* operator new(std::size_t size) {
  if (void* memory = allocate(size)) return memory;
  throw std::bad_alloc();
}
QUIRE_NOINLINE void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return allocate(size); }
QUIRE_NOINLINE void operator delete(void* memory) noexcept { std::free(memory); }
QUIRE_NOINLINE void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
QUIRE_NOINLINE void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
// The forms for arrays call those above, but a sanitizer's library has its own.
QUIRE_NOINLINE void* operator new[](std::size_t size) { return operator new(size); }
QUIRE_NOINLINE void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return allocate(size); }
QUIRE_NOINLINE void operator delete[](void* memory) noexcept { std::free(memory); }
QUIRE_NOINLINE void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
QUIRE_NOINLINE void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }

namespace quire::testing {
namespace {

using Bytes = std::vector<std::vector<std::uint8_t>>;

// Calls op() with its n-th allocation failing, for n = 0, 1 and so on, until none fails; then it must succeed.
// `outputs` are all bytes that it may write.
void expect_every_failed_allocation_is_a_status(const std::function<Status()>& op,
                                                const std::function<Bytes()>& outputs) {
  for (const bool all_further : {false, true}) {
    const Bytes before = outputs();
    long failures = 0;
    for (;; ++failures) {
      for_good = all_further;
      allocations_left = failures;
      const Status status = op();
      const bool failed = allocations_left < 0 || (!all_further && allocations_left == kUnlimited);
      allocations_left = kUnlimited;
      if (!failed) {
        EXPECT_TRUE(status.ok()) << status.message();
        break;
      }
      ASSERT_EQ(status.code(), StatusCode::kInternal) << "allocation " << failures << ": " << status.message();
      EXPECT_NE(status.message().find("memory"), std::string::npos) << status.message();
      ASSERT_EQ(outputs(), before) << "allocation " << failures << ": " << status.message();
    }
  }
}

// How many times op() calls operator new, where it succeeds.
long allocations_of(const std::function<Status()>& op) {
  constexpr long kMany = 1 << 30;
  for_good = false;
  allocations_left = kMany;
  const Status status = op();
  const long count = kMany - allocations_left;
  allocations_left = kUnlimited;
  EXPECT_TRUE(status.ok()) << status.message();
  return count;
}

// A store and a run of a plan allocate nothing. The first calls of a thread may, and keep the memory for those that
// follow.
TEST(Memory, OpsThatSucceedAllocateNothing) {
  for (const char* mode : {"auto", "fp8", "int8_per_token_head", "int4_per_token_head", "turboquant_3bit_nc",
                           "k=int8_per_token_head,v=int2_per_token_head"}) {
    if (!modes_built({mode})) continue;
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      AttentionCase::Options options;
      options.mode = mode;
      options.dtype = dtype;
      options.sequences = {{1, 1500}, {20, 90}};
      options.window = 1400;
      options.softcap = 20.0F;
      options.sinks = options.alibi = true;
      AttentionCase problem(options);
      const PagedCache cache(problem.cache->options());
      ReshapeAndCacheArgs store;
      cache.apply(store);
      store.key = problem.key.view;
      store.value = problem.value.view;
      store.slot_mapping = problem.slot_mapping.view;
      const AttentionProblem planned = *problem_of(problem.args);
      const AttentionPlan plan = *plan_unified_attention(planned);
      std::vector<std::uint8_t> workspace(plan.workspace_bytes() + 16);
      const auto write = [&] { return reshape_and_cache(store, nullptr); };
      const auto read = [&] {
        return run_unified_attention(plan, problem.args, workspace.data(), plan.workspace_bytes(), nullptr);
      };
      ASSERT_TRUE(write().ok());
      ASSERT_TRUE(read().ok());
      EXPECT_EQ(allocations_of(write), 0) << mode;
      EXPECT_EQ(allocations_of(read), 0) << mode;
      // The one-call form allocates its workspace where its plan has one, as ops.h says, and nothing else.
      const auto all_in_one = [&] { return unified_attention(problem.args, nullptr); };
      EXPECT_EQ(allocations_of(all_in_one), plan.workspace_bytes() > 0 ? 1 : 0) << mode;
      EXPECT_EQ(allocations_of([&] { return problem_of(problem.args).status(); }), 0) << mode;
      EXPECT_EQ(allocations_of([&] { return supports(planned).status(); }), 0) << mode;
      EXPECT_LE(allocations_of([&] { return plan_unified_attention(planned).status(); }), 1) << mode;
    }
  }
}

TEST(Memory, EveryAllocationOfAStoreMayFail) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  const AttentionCase problem(AttentionCase::Options{});
  const PagedCache cache(problem.cache->options());
  ReshapeAndCacheArgs args;
  cache.apply(args);
  args.key = problem.key.view;
  args.value = problem.value.view;
  args.slot_mapping = problem.slot_mapping.view;
  expect_every_failed_allocation_is_a_status([&] { return reshape_and_cache(args, nullptr); },
                                             [&] { return cache.bytes(); });
}

TEST(Memory, EveryAllocationOfAReadMayFail) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  AttentionCase::Options options;
  options.sequences = {{1, 1500}, {20, 90}};
  AttentionCase problem(options);
  const AttentionPlan plan = *plan_unified_attention(*problem_of(problem.args));
  std::vector<std::uint8_t> workspace(plan.workspace_bytes() + 16);
  const std::function<Status()> forms[] = {
      [&] { return unified_attention(problem.args, nullptr); },
      [&] { return run_unified_attention(plan, problem.args, workspace.data(), plan.workspace_bytes(), nullptr); }};
  for (const std::function<Status()>& form : forms) {
    std::fill(problem.out.bytes.begin(), problem.out.bytes.end(), std::uint8_t{0xFF});
    std::fill(problem.lse.bytes.begin(), problem.lse.bytes.end(), std::uint8_t{0xFF});
    expect_every_failed_allocation_is_a_status(form, [&] { return Bytes{problem.out.bytes, problem.lse.bytes}; });
  }
}

TEST(Memory, EveryAllocationOfAPlanMayFail) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  const AttentionCase problem(AttentionCase::Options{});
  const AttentionProblem planned = *problem_of(problem.args);
  const auto nothing = [] { return Bytes(); };
  expect_every_failed_allocation_is_a_status([&] { return problem_of(problem.args).status(); }, nothing);
  expect_every_failed_allocation_is_a_status([&] { return plan_unified_attention(planned).status(); }, nothing);
}

TEST(Memory, EveryAllocationOfATurboQuantCallMayFail) {
  const TurboQuantConfig config{.key_bits = 4, .value_bits = 4};
  QUIRE_NEEDS_MODES("turboquant_4bit_nc");
  constexpr int kHeadSize = 64;
  OwnedTensor key(DType::kFloat32, {3, 2, kHeadSize}), query(DType::kFloat32, {1, 2, kHeadSize});
  OwnedTensor out(DType::kFloat32, {1, 2, kHeadSize}), slot_mapping(DType::kInt32, {3});
  OwnedTensor block_table(DType::kInt32, {1, 1}), seq_lens(DType::kInt32, {1});
  OwnedTensor rotation(DType::kFloat32, {kHeadSize, kHeadSize}), midpoints(DType::kFloat32, {15});
  Random random(3);
  for (OwnedTensor* tensor : {&key, &query}) tensor->fill(random.normals(tensor->view.numel()));
  slot_mapping.fill_integers({0, 1, 2});
  block_table.fill_integers({0});
  seq_lens.fill_integers({3});
  rotation.fill(rotation_table(kHeadSize));
  midpoints.fill(midpoint_table(4, kHeadSize));
  std::vector<std::uint8_t> cache(2 * 16 * 2 * 70, 0xFF);
  const Tensor kv_cache = Tensor::contiguous(cache.data(), DType::kUInt8, {2, 16, 2, 70});
  TurboQuantStoreArgs store{config, key.view, key.view, kv_cache, slot_mapping.view, rotation.view, midpoints.view};
  expect_every_failed_allocation_is_a_status([&] { return turboquant_store(store, nullptr); },
                                             [&] { return Bytes{cache}; });
  TurboQuantDecodeArgs decode;
  decode.softmax_scale = 0.125F;
  decode.config = config;
  decode.query = query.view;
  decode.out = out.view;
  decode.kv_cache = kv_cache;
  decode.block_table = block_table.view;
  decode.seq_lens = seq_lens.view;
  decode.rotation = rotation.view;
  expect_every_failed_allocation_is_a_status([&] { return turboquant_decode_attention(decode, nullptr); },
                                             [&] { return Bytes{out.bytes}; });
}

TEST(Memory, EveryAllocationOfALookUpMayFail) {
  QUIRE_NEEDS_MODES("int8_per_token_head", "fp8");
  const auto nothing = [] { return Bytes(); };
  const char* pair = "k=int8_per_token_head,v=fp8_e4m3";
  const auto expect = [&](const std::function<Status()>& call) {
    expect_every_failed_allocation_is_a_status(call, nothing);
  };
  expect([&] { return parse_kv_cache_dtype(pair).status(); });
  const ModeId mode = *parse_kv_cache_dtype(pair);
  expect([&] { return mode_info(mode).status(); });
  expect([&] { return get_backend(mode).status(); });  // made here
  expect([&] { return get_backend(pair).status(); });
  const QuantKVBackend* backend = *get_backend(mode);
  expect([&] { return backend->allocate_scale_caches(2, 16, 2).status(); });
  expect([&] { return make_layout({.mode = mode}).status(); });

  const ModeSpec specs[] = {{"memory_test_first_of_two", {"memory_test_first_alias"}},
                            {"memory_test_second_of_two", {"memory_test_second_alias"}}};
  const ModeSpec* next = specs;
  expect([&] {
    const Status status = register_mode(*next).status();
    if (status.ok()) ++next;
    return status;
  });
}

// The sentence of a refusal needs memory too.
TEST(Memory, EveryAllocationOfARefusalMayFail) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  AttentionCase problem(AttentionCase::Options{});
  problem.args.query.ndim = 2;
  for (const bool all_further : {false, true}) {
    for (long failures = 0;; ++failures) {
      for_good = all_further;
      allocations_left = failures;
      const Status status = unified_attention(problem.args, nullptr);
      const bool failed = allocations_left < 0 || (!all_further && allocations_left == kUnlimited);
      allocations_left = kUnlimited;
      ASSERT_FALSE(status.ok());
      if (!failed) break;
      EXPECT_NE(status.message().find("memory"), std::string::npos) << status.message();
    }
  }
}

// Bytes of address space in use.
std::size_t in_use() {
  std::size_t pages = 0;
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  if (file == nullptr || std::fscanf(file, "%zu", &pages) != 1) std::abort();
  std::fclose(file);
  return pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

// Runs unified_attention in a child whose memory is used up but for scraps of less than 64 KiB. `warm` runs before, so
// that the threads exist. Returns 0 where the answer is kInternal and nothing was written.
int refusal_in_a_child(const AttentionCase& warm, const AttentionCase& problem) {
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(120);
    if (!unified_attention(warm.args, nullptr).ok()) _exit(10);
    const rlim_t most = in_use();
    const rlimit limit{most, most};
    if (setrlimit(RLIMIT_AS, &limit) != 0) _exit(11);
    constexpr std::size_t kScrap = std::size_t{1} << 16;
    void* volatile taken = nullptr;  // or the compiler leaves malloc out
    do {
      taken = std::malloc(kScrap);
    } while (taken != nullptr);
    const Status status = unified_attention(problem.args, nullptr);
    if (status.ok()) _exit(1);
    if (status.code() != StatusCode::kInternal) _exit(2);
    if (status.message().find("memory") == std::string::npos) _exit(3);
    for (const auto* bytes : {&problem.out.bytes, &problem.lse.bytes}) {
      for (const std::uint8_t byte : *bytes) {
        if (byte != 0xFF) _exit(4);
      }
    }
    _exit(0);
  }
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

class LimitedMemory : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
#ifdef __SANITIZE_ADDRESS__
    GTEST_SKIP() << "AddressSanitizer's own address space has no limit";
#endif
    if (!modes_built({"int4_per_token_head"})) GTEST_SKIP() << "this build leaves out int4_per_token_head";
    omp_set_num_threads(GetParam());
  }
  void TearDown() override { omp_set_num_threads(threads_); }

 private:
  int threads_ = omp_get_max_threads();
};

// 256 query heads share one KV head, so that the scratch of a thread is 2 MB.
TEST_P(LimitedMemory, ScratchOfTheThreads) {
  AttentionCase::Options options;
  options.sequences = {{1, 20}};
  const AttentionCase warm(options);
  options.num_kv_heads = 1;
  options.group = 256;
  options.head_size = 512;
  const AttentionCase problem(options);
  EXPECT_EQ(refusal_in_a_child(warm, problem), 0);
}

// There are 20000 sequences, so that the lists of tiles and tasks take more than a megabyte.
TEST_P(LimitedMemory, ListsOfTiles) {
  AttentionCase::Options options;
  options.sequences = {{1, 20}};
  const AttentionCase warm(options);
  AttentionCase problem(options);
  constexpr std::int64_t kBatch = 20000;
  OwnedTensor query(DType::kFloat32, {kBatch, 4, 64});
  problem.out = OwnedTensor(DType::kFloat32, {kBatch, 4, 64});
  problem.lse = OwnedTensor(DType::kFloat32, {kBatch, 4});
  std::vector<std::int32_t> cu_seqlens(kBatch + 1);
  for (std::size_t i = 0; i < cu_seqlens.size(); ++i) cu_seqlens[i] = static_cast<std::int32_t>(i);
  UnifiedAttentionArgs& args = problem.args;
  args.query = query.view;
  args.out = problem.out.view;
  args.lse = problem.lse.view;
  args.cu_seqlens_q = Tensor::contiguous(cu_seqlens.data(), DType::kInt32, {kBatch + 1});
  args.seq_lens = ConstTensor::strided(args.seq_lens.data, DType::kInt32, {kBatch}, {0});  // each sequence is the first
  args.block_table.shape[0] = kBatch;
  args.block_table.strides[0] = 0;
  EXPECT_EQ(refusal_in_a_child(warm, problem), 0);
}

INSTANTIATE_TEST_SUITE_P(Threads, LimitedMemory, ::testing::Values(1, 3));

}  // namespace
}  // namespace quire::testing
