// Which threads the ops of the CPU run on: quire's own, or those of the caller's thread pool. CUDA does not ask.
#pragma once

#include "quire/export.h"
#include "quire/status.h"

namespace quire {

// A thread pool of the caller. run_parts calls part(context, i) once for each i in [0, num_parts) and returns when all
// calls have returned. The calls may run one after the other or at the same time, on any threads: quire waits for
// nothing inside of them. run_parts must not throw, and neither does `part`. It is called from the thread that calls
// the op; ops on several threads call it at the same time.
struct Executor {
  using Part = void (*)(void* context, int index);
  using RunParts = void (*)(void* pool, int num_parts, Part part, void* context);

  int num_threads = 1;  // how many parts an op is cut into, 1 to 4096
  RunParts run_parts = nullptr;
  void* pool = nullptr;  // given back to run_parts
};

// From the next op on, ops of the CPU run on this executor; one without run_parts brings back quire's own threads. The
// pool must live until ops no longer use it. Refused: num_threads outside its range. Results have the same bits on any
// number of threads. Not to be called while an op runs on another thread.
QUIRE_API Status set_executor(const Executor& executor);

// How many of quire's own threads an op of the CPU uses, 1 to 4096; 0, the default, takes as many as OpenMP would
// (OMP_NUM_THREADS, else one for each processor). Not to be called while an op runs on another thread.
QUIRE_API Status set_num_threads(int num_threads);

// The number of parts that the next op of the CPU on this thread would be cut into. Without an executor it is 1 inside
// of a parallel region of OpenMP, whose threads have the cores already.
QUIRE_API int num_threads();

}  // namespace quire
