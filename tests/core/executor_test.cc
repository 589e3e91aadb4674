// The threads of the CPU's ops: their number, and a thread pool of the caller.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "quire/quire.h"
#include "support/attention_case.h"
#include "support/modes.h"

namespace quire::testing {
namespace {

class Threads : public ::testing::Test {
 protected:
  ~Threads() override {
    EXPECT_TRUE(set_executor({}).ok());
    EXPECT_TRUE(set_num_threads(0).ok());
  }
};

// Every byte that a store, a read through the workspace and a merge write, with queries of 32 bits and of 16: the
// products of the two differ.
std::vector<std::vector<std::uint8_t>> written_bytes() {
  std::vector<std::vector<std::uint8_t>> bytes;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    AttentionCase::Options options;
    options.dtype = dtype;
    options.sequences = {{1, 1500}, {6, 200}, {40, 90}};
    AttentionCase problem(options);
    EXPECT_TRUE(problem.store().ok());
    for (const std::vector<std::uint8_t>& cache : problem.cache->bytes()) bytes.push_back(cache);
    EXPECT_TRUE(problem.run(4).ok());
    bytes.push_back(problem.out.bytes);
    bytes.push_back(problem.lse.bytes);
    const MergeAttnStatesArgs merge{problem.args.out, {}, problem.args.out, problem.args.lse, problem.args.out,
                                    problem.args.lse};
    EXPECT_TRUE(merge_attn_states(merge, nullptr).ok());
    bytes.push_back(problem.out.bytes);
  }
  return bytes;
}

// Runs parts one after the other, last first, and counts them.
struct Backwards {
  int calls = 0;
  int parts = 0;
  static void run_parts(void* pool, int num_parts, void (*part)(void* context, int index), void* context) {
    auto& self = *static_cast<Backwards*>(pool);
    ++self.calls;
    self.parts += num_parts;
    for (int i = num_parts - 1; i >= 0; --i) part(context, i);
  }
};

// A thread for each part.
void on_new_threads(void*, int num_parts, void (*part)(void* context, int index), void* context) {
  std::vector<std::thread> threads;
  for (int i = 0; i < num_parts; ++i) threads.emplace_back(part, context, i);
  for (std::thread& thread : threads) thread.join();
}

TEST_F(Threads, AnyNumberOfThemGivesTheSameBits) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  ASSERT_TRUE(set_num_threads(1).ok());
  EXPECT_EQ(num_threads(), 1);
  const auto expected = written_bytes();
  for (const int count : {2, 3, 64}) {
    ASSERT_TRUE(set_num_threads(count).ok());
    EXPECT_EQ(num_threads(), count);
    EXPECT_EQ(written_bytes(), expected) << count;
  }
}

TEST_F(Threads, AnExecutorOfTheCallerRunsEveryPart) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  const auto expected = written_bytes();
  Backwards pool;
  ASSERT_TRUE(set_executor({5, &Backwards::run_parts, &pool}).ok());
  EXPECT_EQ(num_threads(), 5);
  EXPECT_EQ(written_bytes(), expected);
  EXPECT_GE(pool.calls, 8);  // two for a store, the parts of a read and its folding, and a merge
  EXPECT_GE(pool.parts, 20);
  const int calls = pool.calls;
  ASSERT_TRUE(set_executor({3, &on_new_threads, nullptr}).ok());
  EXPECT_EQ(written_bytes(), expected);
  ASSERT_TRUE(set_executor({}).ok());  // quire's own threads again
  EXPECT_EQ(written_bytes(), expected);
  EXPECT_EQ(pool.calls, calls);
}

TEST_F(Threads, RefusesNumbersThatAreNone) {
  for (const int count : {-1, 4097, -2147483647 - 1}) {
    const std::string words = "num_threads is " + std::to_string(count) + "; supported: 1 to 4096";
    EXPECT_NE(set_num_threads(count).message().find(words), std::string::npos);
    EXPECT_NE(set_executor({count, &on_new_threads, nullptr}).message().find(words), std::string::npos);
  }
  EXPECT_FALSE(set_executor({0, &on_new_threads, nullptr}).ok());
}

TEST(Version, OfTheLibraryIsThatOfTheHeaders) {
  EXPECT_EQ(version_number(), QUIRE_VERSION_NUMBER);
  EXPECT_EQ(version(), std::to_string(QUIRE_VERSION_MAJOR) + "." + std::to_string(QUIRE_VERSION_MINOR) + "." +
                           std::to_string(QUIRE_VERSION_PATCH));
  EXPECT_STREQ(version(), QUIRE_PROJECT_VERSION);  // CMake's
}

}  // namespace
}  // namespace quire::testing
