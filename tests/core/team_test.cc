// The team of threads of src/cpu runs every task once, by as many threads as were asked for, whoever else calls.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/threads.h"

namespace quire::testing {
namespace {

constexpr int kThreads = 4;

// Whether each of many tasks ran once, and no two at the same time as the same thread.
bool every_task_once(std::int64_t num_tasks) {
  std::vector<std::atomic<int>> runs(static_cast<std::size_t>(num_tasks));
  std::atomic<int> at_work[kThreads] = {};
  std::atomic<bool> right{true};
  cpu::run_tasks(num_tasks, kThreads, [&](std::int64_t index, int thread) {
    if (thread < 0 || thread >= kThreads || at_work[thread].fetch_add(1) != 0) right = false;
    runs[static_cast<std::size_t>(index)].fetch_add(1);
    at_work[thread].fetch_sub(1);
  });
  for (const std::atomic<int>& count : runs) {
    if (count != 1) right = false;
  }
  return right;
}

TEST(Team, EveryTaskOnce) {
  for (int repeat = 0; repeat < 200; ++repeat) {
    for (const std::int64_t num_tasks : {0, 1, 2, 3, 17, 1000}) ASSERT_TRUE(every_task_once(num_tasks)) << num_tasks;
  }
}

TEST(Team, CallersAtTheSameTime) {
  std::atomic<bool> right{true};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 100; ++repeat) {
        if (!every_task_once(50)) right = false;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_TRUE(right);
}

TEST(Team, TasksMayCallIt) {
  std::atomic<int> inner{0};
  cpu::run_tasks(8, kThreads,
                 [&](std::int64_t, int) { cpu::run_tasks(5, kThreads, [&](std::int64_t, int) { ++inner; }); });
  EXPECT_EQ(inner, 40);
}

TEST(Team, AChildHasItsOwn) {
  ASSERT_TRUE(every_task_once(100));
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(60);
    _exit(every_task_once(100) && every_task_once(1000) ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_TRUE(every_task_once(100));
}

}  // namespace
}  // namespace quire::testing
