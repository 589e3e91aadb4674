#include "cpu/team.h"

#include <omp.h>
#include <pthread.h>

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>

namespace quire::cpu {
namespace {

using Part = void (*)(void* context, int index);

// A new thread may run where its maker may. Where OpenMP pins threads (OMP_PROC_BIND, GOMP_CPU_AFFINITY, KMP_AFFINITY:
// vLLM's CPU workers do) that is one core, which the maker has already, so thread `index` of the team goes to the place
// of OpenMP's thread of that index, counted from the maker's own. The maker does this for the new thread: one that asks
// LLVM's OpenMP becomes a thread of its pool, which must not begin while the process ends.
void leave_makers_core([[maybe_unused]] std::thread& worker, [[maybe_unused]] int index) noexcept {
#ifdef __linux__
  cpu_set_t makers;
  if (pthread_getaffinity_np(pthread_self(), sizeof makers, &makers) != 0 || CPU_COUNT(&makers) != 1) return;
  const int num_places = omp_get_num_places();
  if (num_places < 2) return;
  const auto cores_of = [](int place) {
    cpu_set_t set;
    CPU_ZERO(&set);
    int cores[CPU_SETSIZE];
    const int num_cores = omp_get_place_num_procs(place);
    if (num_cores > CPU_SETSIZE) return set;
    omp_get_place_proc_ids(place, cores);
    for (int i = 0; i < num_cores; ++i) {
      if (cores[i] >= 0 && cores[i] < CPU_SETSIZE) CPU_SET(static_cast<std::size_t>(cores[i]), &set);
    }
    return set;
  };
  int first = 0;
  for (int place = 0; place < num_places; ++place) {
    const cpu_set_t cores = cores_of(place);
    cpu_set_t both;
    CPU_AND(&both, &cores, &makers);
    if (CPU_COUNT(&both) > 0) first = place;
  }
  const cpu_set_t cores = cores_of((first + index) % num_places);
  pthread_setaffinity_np(worker.native_handle(), sizeof cores, &cores);  // refused: it stays where it is
#endif
}

class Team {
 public:
  // False where the team is at work already.
  bool run(int num_parts, Part part, void* context) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    grow(num_parts - 1);
    next_.store(0, std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      num_parts_ = num_parts;
      part_ = part;
      context_ = context;
      vacancies_ = std::min(num_parts - 1, num_workers_);
      ++call_;
    }
    wake_.notify_all();
    work(num_parts, part, context);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      vacancies_ = 0;  // whoever has not begun by now need not
    }
    const auto all_done = [&] { return active_.load(std::memory_order_acquire) == 0; };
    if (!spin_until(all_done)) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, all_done);
    }
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  void work(int num_parts, Part part, void* context) {
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < num_parts;) part(context, i);
  }

  void grow(int num_workers) {
    while (num_workers_ < num_workers) {
      try {
        std::thread worker([this] { serve(); });
        leave_makers_core(worker, num_workers_ + 1);
        worker.detach();
      } catch (...) {
        return;  // fewer threads are enough
      }
      ++num_workers_;
    }
  }

  void serve() {
    std::uint64_t seen = 0;
    for (;;) {
      spin_until([&] { return call_.load(std::memory_order_acquire) != seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return vacancies_ > 0 && call_ != seen; });
      seen = call_;
      --vacancies_;
      ++active_;
      const int num_parts = num_parts_;
      const Part part = part_;
      void* const context = context_;
      lock.unlock();
      work(num_parts, part, context);
      lock.lock();
      if (active_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  // Whether `condition` came true within the time that falling asleep and waking up would take.
  template <class Condition>
  static bool spin_until(const Condition& condition) {
    constexpr std::chrono::microseconds kTime(50);
    constexpr int kLooksBetweenClocks = 32;
    const auto end = std::chrono::steady_clock::now() + kTime;
    for (int look = 0;; ++look) {
      if (condition()) return true;
      if (look % kLooksBetweenClocks == 0 && std::chrono::steady_clock::now() >= end) return false;
      pause();
    }
  }
  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::atomic<bool> busy_{false};  // a call is being served; a part of it may call again
  int num_workers_ = 0;

  std::mutex mutex_;  // of what follows
  std::condition_variable wake_, done_;
  std::atomic<std::uint64_t> call_{0};
  int vacancies_ = 0;  // workers that may still join the call
  std::atomic<int> active_{0};
  int num_parts_ = 0;
  Part part_ = nullptr;
  void* context_ = nullptr;

  alignas(64) std::atomic<int> next_{0};
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

void run_on_team(int num_parts, Part part, void* context) {
  if (num_parts > 1 && team().run(num_parts, part, context)) return;
  for (int i = 0; i < num_parts; ++i) part(context, i);
}

}  // namespace quire::cpu
