// Where the parts of an op run: on quire's own threads (team.h), or on the caller's executor (quire/executor.h says
// what a part may count on). Parts do not wait for each other, so an executor may run them one after the other.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace quire::cpu {

// How many parts an op is cut into.
int num_parts();

// Calls part(context, i) once for each i in [0, num_parts).
void run_parts(int num_parts, void (*part)(void* context, int index), void* context);

// The same for a callable part(i), which must not throw.
template <class Part>
void run_parts(int num_parts, const Part& part) {
  run_parts(
      num_parts, [](void* context, int index) { (*static_cast<const Part*>(context))(index); },
      const_cast<Part*>(&part));
}

// Calls task(index, part) once for each index in [0, num_tasks), from at most num_parts parts, each of which takes the
// next task until there are none. Which part runs which task is not determined: results must not depend on it. A task
// that is callable with a third argument, `next`, gets what holds the task that is taken next, by whichever part.
template <class Task>
void run_tasks(std::int64_t num_tasks, int num_parts, const Task& task) {
  using Next = std::atomic<std::int64_t>;
  Next next{0};
  run_parts(static_cast<int>(std::min<std::int64_t>(num_parts, num_tasks)), [&](int part) {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
      if constexpr (std::is_invocable_v<const Task&, std::int64_t, int, const Next&>) {
        task(i, part, static_cast<const Next&>(next));
      } else {
        task(i, part);
      }
    }
  });
}

// Calls item(i) once for each i in [0, num_items); `grain` neighbours are one task.
template <class Item>
void run_items(std::int64_t num_items, std::int64_t grain, const Item& item) {
  run_tasks((num_items + grain - 1) / grain, num_parts(), [&](std::int64_t task, int) {
    for (std::int64_t i = task * grain; i < std::min(num_items, (task + 1) * grain); ++i) item(i);
  });
}

}  // namespace quire::cpu
