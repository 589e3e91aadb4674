#include "cpu/team.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

namespace quire::cpu {
namespace {

class Team {
 public:
  // False where the team is at work already.
  bool run(std::int64_t num_tasks, int num_threads, TeamTask task, void* context) {
    if (!busy_.try_lock()) return false;
    const std::lock_guard<std::mutex> busy(busy_, std::adopt_lock);
    grow(num_threads - 1);
    next_.store(0, std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      num_tasks_ = num_tasks;
      task_ = task;
      context_ = context;
      vacancies_ = std::min(num_threads - 1, num_workers_);
      joined_ = 0;
      ++call_;
    }
    wake_.notify_all();
    work(num_tasks, task, context, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    vacancies_ = 0;  // whoever has not begun by now need not
    done_.wait(lock, [&] { return active_ == 0; });
    return true;
  }

 private:
  void work(std::int64_t num_tasks, TeamTask task, void* context, int thread) {
    for (std::int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) task(context, i, thread);
  }

  void grow(int num_workers) {
    while (num_workers_ < num_workers) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (...) {
        return;  // fewer threads are enough
      }
      ++num_workers_;
    }
  }

  void serve() {
    std::uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return vacancies_ > 0 && call_ != seen; });
      seen = call_;
      --vacancies_;
      ++active_;
      const int thread = ++joined_;
      const std::int64_t num_tasks = num_tasks_;
      const TeamTask task = task_;
      void* const context = context_;
      lock.unlock();
      work(num_tasks, task, context, thread);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_;  // held by the thread whose call the team serves
  int num_workers_ = 0;

  std::mutex mutex_;  // of what follows
  std::condition_variable wake_, done_;
  std::uint64_t call_ = 0;
  int vacancies_ = 0;  // workers that may still join the call
  int joined_ = 0, active_ = 0;
  std::int64_t num_tasks_ = 0;
  TeamTask task_ = nullptr;
  void* context_ = nullptr;

  alignas(64) std::atomic<std::int64_t> next_{0};
};

// Never destroyed: its workers may outlive everything else. A child's is a new one in the same place; the parent's
// workers do not exist there, and its locks may be held by threads that do not either.
alignas(Team) unsigned char team_memory[sizeof(Team)];
Team& team() {
  static Team* const made = [] {
    pthread_atfork(nullptr, nullptr, [] { new (team_memory) Team; });
    return new (team_memory) Team;
  }();
  return *made;
}

}  // namespace

int max_threads() { return omp_in_parallel() ? 1 : std::max(1, omp_get_max_threads()); }

void run_tasks(std::int64_t num_tasks, int num_threads, TeamTask task, void* context) {
  const auto useful = static_cast<int>(std::min<std::int64_t>(num_threads, num_tasks));
  if (useful > 1 && team().run(num_tasks, useful, task, context)) return;
  for (std::int64_t i = 0; i < num_tasks; ++i) task(context, i, 0);
}

std::uint8_t* scratch_memory(std::size_t bytes) {
  struct Memory {
    std::uint8_t* data = nullptr;
    std::size_t bytes = 0;
    ~Memory() { std::free(data); }
  };
  thread_local Memory memory;
  if (memory.bytes < bytes) {
    std::free(memory.data);
    memory.bytes = 0;
    memory.data = static_cast<std::uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (memory.data != nullptr) memory.bytes = bytes;
  }
  return memory.data;
}

}  // namespace quire::cpu
