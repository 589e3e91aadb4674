#include "cuda/device_problem.h"

#include <string>

#include "format/formats.h"

namespace quire::testing {

using cuda::DeviceBuffer;

Status store_on_device(const ReshapeAndCacheArgs& args) {
  return cuda::run_on_device(
      args, [](const ReshapeAndCacheArgs& on_device) { return reshape_and_cache(on_device, nullptr); });
}

Status attend_on_device(const UnifiedAttentionArgs& args, int num_splits, bool batch_invariant) {
  return cuda::run_on_device(args, [&](const UnifiedAttentionArgs& on_device) -> Status {
    if (num_splits == 0 && !batch_invariant) return unified_attention(on_device, nullptr);
    Result<AttentionProblem> problem = problem_of(on_device);
    if (!problem.ok()) return problem.status();
    problem->num_splits = num_splits;
    problem->batch_invariant = batch_invariant;
    const Result<AttentionPlan> plan = plan_unified_attention(*problem);
    if (!plan.ok()) return plan.status();
    Result<DeviceBuffer> workspace = DeviceBuffer::allocate(plan->workspace_bytes());
    if (!workspace.ok()) return workspace.status();
    if (Status status = workspace->poison(); !status) return status;
    Status status = run_unified_attention(plan.value(), on_device, workspace->data(), workspace->bytes(), nullptr);
    return status.ok() ? cuda::synchronize() : status;  // before the workspace goes
  });
}

Status merge_on_device(const MergeAttnStatesArgs& args) {
  return cuda::run_on_device(
      args, [](const MergeAttnStatesArgs& on_device) { return merge_attn_states(on_device, nullptr); });
}

Status hadamard_on_device(const HadamardArgs& args) {
  return cuda::run_on_device(args, [](const HadamardArgs& on_device) { return hadamard(on_device, nullptr); });
}

void prepare_for_device(AttentionCase& problem) {
  problem.serial_sums = 4.0;
  const Result<AttentionPlan> plan = problem.plan();
  if (!plan.ok() || !plan->tensor_cores()) return;
  const ModeInfo mode = **mode_info(problem.args.mode);
  const format::FormatId key = format::find_format(mode.key_format);
  const bool rotated = key != format::FormatId::kNone && format::format_info(key).rotation != format::Rotation::kNone;
  problem.query_unit = rotated ? 0x1p-11 : 0x1p-24;
  problem.weight_unit = problem.args.cache.value_cache.dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
}

}  // namespace quire::testing
