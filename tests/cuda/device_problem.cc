#include "cuda/device_problem.h"

#include <string>

#include "format/formats.h"

namespace quire::testing {

using cuda::DeviceBuffer;
using cuda::DeviceMirror;

Status store_on_device(const ReshapeAndCacheArgs& args) {
  ReshapeAndCacheArgs on_device = args;
  const Result<DeviceMirror> mirror = DeviceMirror::upload(cuda::tensors_of(on_device));
  if (!mirror.ok()) return mirror.status();
  if (Status status = reshape_and_cache(on_device); !status) return status;
  if (Status status = cuda::synchronize(); !status) return status;
  for (const Tensor* tensor :
       {&args.key_cache, &args.value_cache, &args.k_scale_cache, &args.v_scale_cache, &args.error_counter}) {
    if (Status status = mirror.value().download(*tensor); !status) return status;
  }
  return {};
}

Status attend_on_device(const UnifiedAttentionArgs& args, int num_splits, bool batch_invariant) {
  UnifiedAttentionArgs on_device = args;
  const Result<DeviceMirror> mirror = DeviceMirror::upload(cuda::tensors_of(on_device));
  if (!mirror.ok()) return mirror.status();
  if (num_splits == 0 && !batch_invariant) {
    if (Status status = unified_attention(on_device); !status) return status;
  } else {
    Result<AttentionProblem> problem = problem_of(on_device);
    if (!problem.ok()) return problem.status();
    problem->num_splits = num_splits;
    problem->batch_invariant = batch_invariant;
    const Result<AttentionPlan> plan = plan_unified_attention(*problem);
    if (!plan.ok()) return plan.status();
    Result<DeviceBuffer> workspace = DeviceBuffer::allocate(plan.value().workspace_bytes);
    if (!workspace.ok()) return workspace.status();
    if (Status status = workspace->poison(); !status) return status;
    Status status = run_unified_attention(plan.value(), on_device, workspace->data(), workspace->bytes());
    if (!status) return status;
    if (status = cuda::synchronize(); !status) return status;
  }
  if (Status status = cuda::synchronize(); !status) return status;
  for (const Tensor* tensor : {&args.out, &args.lse, &args.error_counter}) {
    if (Status status = mirror.value().download(*tensor); !status) return status;
  }
  return {};
}

Status attend_on_device(AttentionCase& problem, int num_splits, bool batch_invariant) {
  UnifiedAttentionArgs planned = problem.args;
  for (Tensor* tensor : cuda::tensors_of(planned)) tensor->device = Device::kCuda;
  const Result<AttentionProblem> bounds = problem_of(planned);
  if (!bounds.ok()) return bounds.status();
  const Result<AttentionPlan> plan = plan_unified_attention(*bounds);
  if (!plan.ok()) return plan.status();
  problem.serial_sums = 4.0;
  if (plan->kernel.find("tensor cores") != std::string::npos) {
    const Result<ModeInfo> mode = mode_info(problem.args.mode);
    if (!mode.ok()) return mode.status();
    const format::FormatId key = format::find_format(mode->key_format);
    const bool rotated = key != format::FormatId::kNone && format::format_info(key).rotation != format::Rotation::kNone;
    problem.query_unit = rotated ? 0x1p-11 : 0x1p-24;
    problem.weight_unit = problem.args.value_cache.dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
  }
  return attend_on_device(problem.args, num_splits, batch_invariant);
}

}  // namespace quire::testing
