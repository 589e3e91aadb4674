// unified_attention on CUDA: launches the kernels that the plan chose, and the merge of their partial results.
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <limits>

#include "cuda/attention_params.h"
#include "cuda/cuda.h"
#include "cuda/kernel/merge_splits/merge_splits.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace quire::cuda {
namespace {

// The kernel of an id that a plan carries, or null where it cannot have come from the planner.
const KernelDesc* find_kernel(int id, const AttentionShape& shape, RowClass rows) {
  const std::vector<KernelDesc>& table = kernel_table();
  if (id < 0 || id >= static_cast<int>(table.size())) return nullptr;
  const KernelDesc& kernel = table[static_cast<std::size_t>(id)];
  return kernel.takes(shape.key_format, shape.value_format) && kernel.serves(rows) ? &kernel : nullptr;
}

cudaError_t launch(const KernelDesc& kernel, AttentionParams params, const PlanData& plan, int min_rows, int max_rows,
                   cudaStream_t stream) {
  params.min_rows = min_rows;
  params.max_rows = max_rows;
  params.sequence_tiles = kernel.shape.grid_by_sequence ? tiles_of_sequence(kernel, plan.problem) : 0;
  params.num_multiprocessors = plan.problem.arch.num_multiprocessors;
  params.batch_invariant = plan.problem.batch_invariant;
  return kernel.launch(params, count_tiles(kernel, plan.problem, params.num_tokens, params.batch), stream);
}

Status run_in(const PlanData& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape, void* workspace,
              cudaStream_t stream) {
  constexpr int kMostRows = std::numeric_limits<int>::max();
  if (shape.num_tokens == 0 || shape.batch == 0) return {};
  const KernelDesc* few = find_kernel(plan.kernel_ids[0], shape, RowClass::kFew);
  const KernelDesc* many = plan.kernel_ids[1] < 0 ? few : find_kernel(plan.kernel_ids[1], shape, RowClass::kMany);
  if (few == nullptr || many == nullptr) {
    return invalid_argument("plan has kernel ids " + std::to_string(plan.kernel_ids[0]) + " and " +
                            std::to_string(plan.kernel_ids[1]) + "; take it from plan_unified_attention");
  }
  AttentionParams params = make_attention_params(plan, args, shape);
  const std::int64_t rows = shape.num_tokens * shape.num_q_heads;
  if (params.max_splits > 1) {
    params.partials.state = static_cast<float2*>(workspace);
    params.partials.acc = reinterpret_cast<float*>(params.partials.state + rows * params.max_splits);
  }
  // A persistent kernel's own partial results come last, and it merges them itself.
  Partials own;
  if (few->shape.persistent) {
    own.state = reinterpret_cast<float2*>(static_cast<std::uint8_t*>(workspace) + plan.workspace_bytes -
                                          few->workspace(plan.problem));
  }
  const auto launch_few = [&](int min_rows, int max_rows) {
    AttentionParams its = params;
    if (few->shape.persistent) its.partials = own;
    return launch(*few, its, plan, min_rows, max_rows, stream);
  };
  cudaError_t error = cudaSuccess;
  if (few == many) {
    error = launch_few(0, kMostRows);
  } else {
    error = launch(*many, params, plan, kFewRows + 1, kMostRows, stream);
    if (error == cudaSuccess) error = launch_few(0, kFewRows);
  }
  if (few->shape.persistent) params.min_rows = kFewRows + 1;  // of what is left to merge
  if (error != cudaSuccess || params.max_splits == 1 || (few == many && few->shape.persistent))
    return cuda_status(error, "unified_attention");
  return cuda_status(launch_merge_splits(params, rows, stream), "unified_attention (merge)");
}

}  // namespace

Status attend(const PlanData& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape,
              const QuantKVBackend* decoder, void* workspace, void* stream) {
  if (decoder != nullptr) {
    return unsupported(
        "decode_row runs on the CPU; on cuda a registered mode must name a read_format or override unified_attention");
  }
  const DeviceGuard guard(args.query.device.index);
  if (!guard.status()) return guard.status();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (plan.workspace_bytes == 0 || workspace != nullptr) return run_in(plan, args, shape, workspace, cuda_stream);
  void* own = nullptr;
  const Status allocated = cuda_status(cudaMallocAsync(&own, plan.workspace_bytes, cuda_stream), "workspace");
  if (!allocated) return allocated;
  const Status ran = run_in(plan, args, shape, own, cuda_stream);
  const Status freed = cuda_status(cudaFreeAsync(own, cuda_stream), "workspace");
  return ran.ok() ? freed : ran;
}

}  // namespace quire::cuda
