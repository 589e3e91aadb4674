// A forked child can compute. OpenMP keeps threads between parallel regions, and a child has none of its parent's:
// without care its first op would wait for them for ever.
#include <gtest/gtest.h>
#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "support/attention_case.h"
#include "support/modes.h"

namespace quire::testing {
namespace {

// Every byte that a store, a read through the workspace and a merge write.
std::vector<std::vector<std::uint8_t>> store_read_and_merge() {
  AttentionCase::Options options;
  options.sequences = {{1, 1500}, {6, 200}, {40, 90}};
  AttentionCase problem(options);  // has stored its keys and values
  std::vector<std::vector<std::uint8_t>> written = problem.cache->bytes();
  if (!problem.run().ok()) return {};
  written.push_back(problem.out.bytes);
  written.push_back(problem.lse.bytes);
  const MergeAttnStatesArgs merge{.out = problem.args.out,
                                  .lse = {},
                                  .prefix_out = problem.args.out,
                                  .prefix_lse = problem.args.lse,
                                  .suffix_out = problem.args.out,
                                  .suffix_lse = problem.args.lse};
  if (!merge_attn_states(merge, nullptr).ok()) return {};
  written.push_back(problem.out.bytes);
  return written;
}

// The child's answer, or the signal that ended it, which is SIGALRM where the child hangs.
int status_of_child(int (*child)(const std::vector<std::vector<std::uint8_t>>&),
                    const std::vector<std::vector<std::uint8_t>>& expected) {
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(120);
    _exit(child(expected));
  }
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

int same_bytes(const std::vector<std::vector<std::uint8_t>>& expected) {
  omp_set_num_threads(4);  // LLVM's OpenMP forgets the parent's number
  int threads = 0;
#pragma omp parallel
#pragma omp single
  threads = omp_get_num_threads();
  if (threads != 4) return 2;
  return store_read_and_merge() == expected ? 0 : 1;
}

class Fork : public ::testing::Test {
 protected:
  Fork() { omp_set_num_threads(4); }
  ~Fork() override { omp_set_num_threads(threads_); }

 private:
  int threads_ = omp_get_max_threads();
};

TEST_F(Fork, TheChildsFirstOpsGiveTheParentsBits) {
  QUIRE_NEEDS_MODES("int4_per_token_head");
  const std::vector<std::vector<std::uint8_t>> expected = store_read_and_merge();
  ASSERT_FALSE(expected.empty());
  EXPECT_EQ(status_of_child(same_bytes, expected), 0);
  // The parent carries on and forks again, and so does a child.
  EXPECT_EQ(store_read_and_merge(), expected);
  EXPECT_EQ(status_of_child(
                [](const auto& bytes) {
                  const int own = same_bytes(bytes);
                  return own != 0 ? own : status_of_child(same_bytes, bytes);
                },
                expected),
            0);
}

}  // namespace
}  // namespace quire::testing
