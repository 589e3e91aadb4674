#include <omp.h>
#include <pthread.h>

#include "cpu/cpu.h"

namespace quire::cpu {

bool end_threads_before_fork() {
  // Only the threads of the thread that forks: OpenMP keeps a pool for each, and no other thread lives on in the child.
  return pthread_atfork([] { omp_pause_resource_all(omp_pause_soft); }, nullptr, nullptr) == 0;
}

}  // namespace quire::cpu
