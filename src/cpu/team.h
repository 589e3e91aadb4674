// The threads of the CPU device: a team that is made by the first call that needs it and then kept, asleep between calls.
//
// A call's work is tasks, which threads take one after the other; the calling thread takes them like the others and waits
// only for tasks that somebody has begun. So a thread that the system does not run, or runs late, costs its task's time
// at most, and where all cores are taken the caller does everything itself. Which thread does which task is not
// determined: results must not depend on it.
//
// The team serves one call at a time. A call that finds it at work, or that comes out of a parallel region of OpenMP,
// runs in its own thread alone. A forked child begins without threads and makes its own.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace quire::cpu {

// Threads that a call may use: what OpenMP would give a parallel region here (OMP_NUM_THREADS, omp_set_num_threads).
int max_threads();

// task(index, thread) for every index below num_tasks, thread < num_threads; no exception may leave it. Returns when all
// are done.
using TeamTask = void (*)(void* context, std::int64_t index, int thread);
void run_tasks(std::int64_t num_tasks, int num_threads, TeamTask task, void* context);

template <class Task>
void run_tasks(std::int64_t num_tasks, int num_threads, Task&& task) {
  using Plain = std::remove_reference_t<Task>;
  run_tasks(
      num_tasks, num_threads,
      [](void* context, std::int64_t index, int thread) { (*static_cast<Plain*>(context))(index, thread); },
      const_cast<std::remove_const_t<Plain>*>(std::addressof(task)));
}

// Memory of at least `bytes` bytes, aligned to 64, which the calling thread keeps from call to call; null where there is
// none. What was in it is lost.
std::uint8_t* scratch_memory(std::size_t bytes);

}  // namespace quire::cpu
