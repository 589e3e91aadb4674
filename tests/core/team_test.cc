// The team of threads of src/cpu runs every task once, by as many threads as were asked for, whoever else calls.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

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

#ifdef __linux__

// Two threads that work at the same time, in a process whose OpenMP pins threads, may each run on a core of its own.
void two_threads_are_on_two_cores() {
  cpu_set_t sets[2];
  ASSERT_EQ(sched_getaffinity(0, sizeof sets[0], &sets[0]), 0);
  if (CPU_COUNT(&sets[0]) != 1) return;  // LLVM's OpenMP pins threads when it is first used, not when it is loaded
  std::atomic<int> at_work{0};
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  cpu::run_tasks(2, 2, [&](std::int64_t index, int) {
    sched_getaffinity(0, sizeof sets[index], &sets[index]);
    ++at_work;
    while (at_work < 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
  });
  ASSERT_EQ(at_work, 2);
  EXPECT_EQ(CPU_COUNT(&sets[0]), 1);
  EXPECT_EQ(CPU_COUNT(&sets[1]), 1);
  EXPECT_FALSE(CPU_EQUAL(&sets[0], &sets[1]));
}

TEST(Team, LeavesThePinnedThreadThatMadeIt) {
  constexpr const char* kChild = "QUIRE_TEST_PINNED_CHILD";
  if (std::getenv(kChild) != nullptr) return two_threads_are_on_two_cores();
  cpu_set_t cores;
  ASSERT_EQ(sched_getaffinity(0, sizeof cores, &cores), 0);
  if (CPU_COUNT(&cores) < 2) GTEST_SKIP() << "one core";
  const pid_t pid = fork();
  if (pid == 0) {
    setenv(kChild, "1", 1);
    setenv("OMP_PROC_BIND", "true", 1);  // OpenMP reads these when it is loaded
    setenv("OMP_PLACES", "cores", 1);
    execl("/proc/self/exe", "team_test", "--gtest_filter=Team.LeavesThePinnedThreadThatMadeIt",
          static_cast<char*>(nullptr));
    _exit(1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

#endif

}  // namespace
}  // namespace quire::testing
