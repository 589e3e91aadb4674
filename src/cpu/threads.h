// Where the parts of an op run: on quire's own threads, which are OpenMP's, or on the caller's executor
// (quire/executor.h says what a part may count on).
#pragma once

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

}  // namespace quire::cpu
