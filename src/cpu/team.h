// quire's own threads: a team that is made by the first call that needs it and then kept. Between calls
// its threads look for the next one for 50 microseconds, as long as waking one up would take, and then sleep.
//
// Threads take parts one after the other; the calling thread takes them like the others and waits only for parts that
// somebody has begun. So a thread that the system does not run, or runs late, costs its part's time at most, and where
// all cores are taken the caller does everything itself. Which thread runs which part is not determined.
//
// The team serves one call at a time. A call that finds it at work runs in its own thread alone. A forked child begins
// without threads and makes its own.
#pragma once

namespace quire::cpu {

// Calls part(context, i) once for each i in [0, num_parts) on up to that many threads, and returns when all calls have
// returned. No exception may leave a part.
void run_on_team(int num_parts, void (*part)(void* context, int index), void* context);

}  // namespace quire::cpu
