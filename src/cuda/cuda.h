// The CUDA device as the rest of the library sees it: both ops on device pointers and a stream. No CUDA types appear
// here; `stream` is a cudaStream_t (null: the default stream). An op runs on the device of its tensors, whatever the
// thread's current one is, and leaves that as it was. Callers have validated the arguments against the public
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
#include <string>
#include <string_view>

#include "attention/problem.h"
#include "call/plan_data.h"
#include "quire/backend.h"
#include "quire/ops.h"
#include "quire/status.h"

namespace quire::cuda {

// How many devices this process sees.
Result<int> device_count();

// The facts of device `index`; refused where there is none of that number.
Result<Arch> arch(int index);

// One launch that stores K and V. Tokens with a negative slot are skipped; a slot outside the cache is skipped and
// counted in args.error_counter where one is given.
Status reshape_and_cache(const ReshapeAndCacheArgs& args, const StoreProblem& problem, void* stream);

// Fills in all of a plan but its problem and formats (kNone: a registered mode's), a pure function of those.
Status plan(PlanData& plan);
std::string describe(const PlanData& plan);

// `workspace` holds plan.workspace_bytes on the device; where it is null one is allocated and freed in stream order. A
// `decoder` (not null) is refused: decode_row runs on the CPU.
Status attend(const PlanData& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape,
              const QuantKVBackend* decoder, void* workspace, void* stream);

Status merge_attn_states(const MergeAttnStatesArgs& args, void* stream);

Status hadamard(const HadamardArgs& args, void* stream);

// For TurboQuant's entry points (core/turboquant.cc), in turboquant.cu.
//
// Calls `op` with cu_seqlens_q [batch + 1] = 0, 1, 2 and so on to batch, on the device, one token a sequence:
// allocated, filled and freed in stream order.
Status with_one_token_each(Device device, std::int64_t batch,
                           const std::function<Status(const ConstTensor& cu_seqlens_q)>& op, void* stream);

// Calls `check` with a host copy of a dense float32 table on the device, waiting for the stream, unless a table of this
// name (a literal), address, head size and number of elements has passed before. Refused while the stream is captured.
Status check_table_once(std::string_view name, const ConstTensor& table, int head_size,
                        const std::function<Status(const ConstTensor& on_host)>& check, void* stream);

}  // namespace quire::cuda
