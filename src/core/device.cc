#include "core/device.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/cpu.h"
#include "cuda/cuda.h"

namespace quire::core {
namespace {

void read_lengths(const UnifiedAttentionArgs& args, const AttentionShape& shape, const AttentionProblem*,
                  AttentionProblem& problem) {
  const auto at = [](const Tensor& t, std::int64_t i) { return t.ptr<const std::int32_t>()[i * t.strides[0]]; };
  for (int b = 0; b < shape.batch; ++b) {
    problem.max_query_len =
        std::max<std::int64_t>(problem.max_query_len, at(args.cu_seqlens_q, b + 1) - at(args.cu_seqlens_q, b));
    problem.max_seq_len = std::max<std::int64_t>(problem.max_seq_len, at(args.seq_lens, b));
  }
}

// The device holds the lengths: what the call says, else what the plan was made for, else what the tensors can hold.
void take_bounds(const UnifiedAttentionArgs& args, const AttentionShape& shape, const AttentionProblem* planned,
                 AttentionProblem& problem) {
  const auto bound = [](std::int64_t given, std::int64_t otherwise) { return given > 0 ? given : otherwise; };
  problem.max_query_len =
      bound(args.max_query_len,
            planned != nullptr ? planned->max_query_len : std::min<std::int64_t>(shape.num_tokens, INT32_MAX));
  problem.max_seq_len = bound(args.max_seq_len, planned != nullptr ? planned->max_seq_len : shape.max_keys());
}

Status attend_on_cpu(const AttentionPlan& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape,
                     const QuantKVBackend* decoder, void* workspace, void*) {
  std::unique_ptr<std::byte[]> own;
  if (workspace == nullptr && plan.workspace_bytes > 0) {
    own.reset(new (std::nothrow) std::byte[plan.workspace_bytes]);
    if (own == nullptr) {
      return internal_error("no memory for a workspace of " + std::to_string(plan.workspace_bytes) + " bytes");
    }
    workspace = own.get();
  }
  return cpu::run(plan, args, shape, decoder, workspace);
}

constexpr DeviceOps kCpuOps = {
    .arch = []() -> Result<Arch> { return Arch{}; },
    .bound_lengths = &read_lengths,
    .plan = [](const AttentionProblem& problem, FormatPair) { return cpu::plan(problem); },
    .store = [](const ReshapeAndCacheArgs& args, const StoreProblem& problem,
                void*) { return cpu::reshape_and_cache(args, problem); },
    .attend = &attend_on_cpu,
    .merge = [](const MergeAttnStatesArgs& args, void*) -> Status {
      cpu::merge_attn_states(args);
      return {};
    },
};

constexpr DeviceOps kCudaOps = {
    .arch = &cuda::arch,
    .bound_lengths = &take_bounds,
    .plan = [](const AttentionProblem& problem,
               FormatPair formats) { return cuda::plan(problem, formats.key, formats.value); },
    .store = &cuda::reshape_and_cache,
    .attend = &cuda::attend,
    .merge = &cuda::merge_attn_states,
};

}  // namespace

const DeviceOps& device_ops(Device device) { return device == Device::kCuda ? kCudaOps : kCpuOps; }

}  // namespace quire::core

namespace quire {

Result<Arch> device_arch(Device device) {
  if (device != Device::kCpu && device != Device::kCuda) {
    return invalid_argument("device is unknown; supported: cpu and cuda");
  }
  return core::device_ops(device).arch();
}

}  // namespace quire
