// The CUDA device as the rest of the library sees it: both ops on device pointers and a stream. No CUDA types appear
// here; `stream` is a cudaStream_t (null: the default stream). Callers have validated the arguments against the public
// contract and hand over what they found (StoreProblem, AttentionShape); what is checked here is only what depends on
// the device and the build.
//
// attend with a workspace and reshape_and_cache allocate nothing, synchronize nothing and read nothing back, so both
// can be captured in a CUDA graph and replayed with other lengths, tables and slots inside the plan's bounds.
//
// In a build without CUDA no_cuda.cc has these functions, and each refuses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string_view>

#include "attention/problem.h"
#include "quire/backend.h"
#include "quire/ops.h"
#include "quire/status.h"

namespace quire::cuda {

// The facts of the current device.
Result<Arch> arch();

// One launch that stores K and V. Tokens with a negative slot are skipped; a slot outside the cache is skipped and
// counted in args.error_counter where one is given.
Status reshape_and_cache(const ReshapeAndCacheArgs& args, const StoreProblem& problem, void* stream);

// A pure function of the problem, whose formats these are (kNone: a registered mode's).
Result<AttentionPlan> plan(const AttentionProblem& problem, format::FormatId key, format::FormatId value);

// `workspace` holds plan.workspace_bytes on the device; where it is null one is allocated and freed in stream order. A
// `decoder` (not null) is refused: decode_row runs on the CPU.
Status attend(const AttentionPlan& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape,
              const QuantKVBackend* decoder, void* workspace, void* stream);

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
