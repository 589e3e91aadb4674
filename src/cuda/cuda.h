// The CUDA device as the rest of the library sees it: both ops on device pointers and a stream. No CUDA types appear
// here; `stream` is a cudaStream_t (null: the default stream). Callers (core/ops.cc, core/plan.cc) have validated the
// arguments against the public contract and hand over what they found (StoreProblem, AttentionShape); what is checked
// here is only what depends on the device build: whether the kernels for a pair of formats were compiled, and what the
// driver answers.
//
// run and reshape_and_cache allocate nothing, synchronize nothing and read nothing back, so both can be captured in a
// CUDA graph and replayed with other lengths, tables and slots inside the plan's bounds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string_view>

#include "attention/problem.h"
#include "quire/ops.h"
#include "quire/status.h"

namespace quire::cuda {

// One launch that stores K and V. Tokens with a negative slot are skipped; a slot outside the cache is skipped and
// counted in args.error_counter where one is given.
Status reshape_and_cache(const ReshapeAndCacheArgs& args, const StoreProblem& problem, void* stream);

// A pure function of the problem, but for one question to the device where there is one: whether it runs the Hopper
// kernels. What is refused is refused with and without a device.
Result<AttentionPlan> plan(const AttentionProblem& problem);

// `workspace` holds plan.workspace_bytes on the device (may be null where that is 0).
Status run(const AttentionPlan& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape, void* workspace,
           void* stream);

// run with a workspace allocated and freed in stream order.
Status unified_attention_alloc(const AttentionPlan& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape,
                               void* stream);

Status merge_attn_states(const MergeAttnStatesArgs& args, void* stream);

// For TurboQuant's entry points (core/turboquant.cc), in turboquant.cu.
//
// Calls `op` with cu_seqlens_q [batch + 1] = 0, 1, .. batch on the device, one token a sequence: allocated, filled and
// freed in stream order.
Status with_one_token_each(std::int64_t batch, const std::function<Status(const Tensor& cu_seqlens_q)>& op,
                           void* stream);

// Calls `check` with a host copy of a dense float32 table on the device, waiting for the stream, unless a table of this
// name (a literal), address, head size and number of elements has passed before. Refused while the stream is captured.
Status check_table_once(std::string_view name, const Tensor& table, int head_size,
                        const std::function<Status(const Tensor& on_host)>& check, void* stream);

}  // namespace quire::cuda
