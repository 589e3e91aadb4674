#include "cpu/threads.h"

#include <omp.h>

#include <algorithm>
#include <string>

#include "cpu/team.h"
#include "quire/executor.h"

namespace quire {
namespace {

constexpr int kMaxParts = 4096;

// Set while no op runs, as executor.h asks.
Executor executor;
int own_threads = 0;  // 0: as many as OpenMP would take

}  // namespace

namespace cpu {

int num_parts() {
  if (executor.run_parts != nullptr) return executor.num_threads;
  // A parallel region of the caller's has the cores already.
  if (omp_in_parallel() != 0) return 1;
  return own_threads > 0 ? own_threads : std::clamp(omp_get_max_threads(), 1, kMaxParts);
}

void run_parts(int num_parts, void (*part)(void* context, int index), void* context) {
  if (num_parts < 1) return;
  if (num_parts == 1) return part(context, 0);
  if (executor.run_parts != nullptr) return executor.run_parts(executor.pool, num_parts, part, context);
  run_on_team(num_parts, part, context);
}

}  // namespace cpu

Status set_executor(const Executor& given) {
  if (given.num_threads < 1 || given.num_threads > kMaxParts) {
    return invalid_argument("num_threads is " + std::to_string(given.num_threads) + "; supported: 1 to " +
                            std::to_string(kMaxParts));
  }
  executor = given;
  return {};
}

Status set_num_threads(int num_threads) {
  if (num_threads < 0 || num_threads > kMaxParts) {
    return invalid_argument("num_threads is " + std::to_string(num_threads) + "; supported: 1 to " +
                            std::to_string(kMaxParts) + ", or 0 for as many as OpenMP would take");
  }
  own_threads = num_threads;
  return {};
}

int num_threads() { return cpu::num_parts(); }

}  // namespace quire
