// The CPU device: both ops, their plan, and the SIMD targets they dispatch to. Callers have validated the arguments.
#pragma once

#include <string>
#include <vector>

#include "attention/problem.h"
#include "call/plan_data.h"
#include "quire/backend.h"
#include "quire/ops.h"

namespace quire::cpu {

// Threads share the work by slot, so two tokens of one call that name the same slot never interleave.
Status reshape_and_cache(const ReshapeAndCacheArgs& args, const StoreProblem& problem);

Status plan(PlanData& plan);  // fills in all but the problem and the formats
std::string describe(const PlanData& plan);

// Reads rows through the formats of `shape`, or, where they are not known, through `backend`'s decode_row.
Status run(const PlanData& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape,
           const QuantKVBackend* backend, void* workspace);

void merge_attn_states(const MergeAttnStatesArgs& args);

void hadamard(const HadamardArgs& args);

// A forked child has one thread. The team of team.h knows; OpenMP, which callers of the library and its tools use,
// keeps threads for the parent's next parallel region, and the child's would wait for them for ever. From this call on
// they end before each fork, and parent and child make new ones.
bool end_threads_before_fork();

// SIMD targets compiled in and runnable here ("AVX3", "AVX2", "SCALAR"), best first, and a switch between them for tests
// and benchmarks: empty restores the best. Not thread-safe against running ops.
std::vector<std::string> simd_targets();
Status use_simd_target(const std::string& name);

}  // namespace quire::cpu
