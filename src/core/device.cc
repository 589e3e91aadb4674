#include "core/device.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <tuple>

#include "core/checks.h"
#include "core/guard.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"

namespace quire::core {
namespace {

Status read_lengths(const UnifiedAttentionArgs& args, const AttentionShape& shape, const AttentionProblem*,
                    AttentionProblem& problem) {
  const auto at = [](const ConstTensor& t, std::int64_t i) { return t.ptr<const std::int32_t>()[i * t.strides[0]]; };
  for (int b = 0; b < shape.batch; ++b) {
    problem.max_query_len =
        std::max<std::int64_t>(problem.max_query_len, at(args.cu_seqlens_q, b + 1) - at(args.cu_seqlens_q, b));
    problem.max_seq_len = std::max<std::int64_t>(problem.max_seq_len, at(args.seq_lens, b));
  }
  return {};
}

// The device holds the lengths: what the call says, else what the plan was made for. Without either the kernels could
// only be chosen for the longest sequences that the tensors can hold, which are rarely those of the call.
Status take_bounds(const UnifiedAttentionArgs& args, const AttentionShape& shape, const AttentionProblem* planned,
                   AttentionProblem& problem) {
  problem.max_query_len = args.max_query_len;
  problem.max_seq_len = args.max_seq_len;
  if (planned != nullptr) {
    if (problem.max_query_len == 0) problem.max_query_len = planned->max_query_len;
    if (problem.max_seq_len == 0) problem.max_seq_len = planned->max_seq_len;
    return {};
  }
  if (shape.num_tokens == 0 || shape.batch == 0) return {};
  for (const auto& [name, what, bound] :
       {std::tuple{"max_query_len", "query lengths (1 where every sequence decodes)", problem.max_query_len},
        std::tuple{"max_seq_len", "seq_lens", problem.max_seq_len}}) {
    if (bound == 0) {
      return invalid_argument(std::string(name) + " is 0; on cuda it is required, a bound on the batch's " + what +
                              ", which the host cannot read");
    }
  }
  return {};
}

Status attend_on_cpu(const PlanData& plan, const UnifiedAttentionArgs& args, const AttentionShape& shape,
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
    .count = []() -> Result<int> { return 1; },
    .arch = [](int) -> Result<Arch> { return Arch{}; },
    .bound_lengths = &read_lengths,
    .plan = &cpu::plan,
    .describe = &cpu::describe,
    .store = [](const ReshapeAndCacheArgs& args, const StoreProblem& problem,
                void*) { return cpu::reshape_and_cache(args, problem); },
    .attend = &attend_on_cpu,
    .merge = [](const MergeAttnStatesArgs& args, void*) -> Status {
      cpu::merge_attn_states(args);
      return {};
    },
    .hadamard = [](const HadamardArgs& args, void*) -> Status {
      cpu::hadamard(args);
      return {};
    },
};

constexpr DeviceOps kCudaOps = {
    .count = &cuda::device_count,
    .arch = &cuda::arch,
    .bound_lengths = &take_bounds,
    .plan = &cuda::plan,
    .describe = &cuda::describe,
    .store = &cuda::reshape_and_cache,
    .attend = &cuda::attend,
    .merge = &cuda::merge_attn_states,
    .hadamard = &cuda::hadamard,
};

}  // namespace

const DeviceOps& device_ops(DeviceType type) { return type == DeviceType::kCuda ? kCudaOps : kCpuOps; }

}  // namespace quire::core

namespace quire {

Result<int> device_count(DeviceType type) {
  return core::guarded([&]() -> Result<int> {
    if (type != DeviceType::kCpu && type != DeviceType::kCuda) {
      return invalid_argument("type is an unknown device; supported: cpu and cuda");
    }
    return core::device_ops(type).count();
  });
}

Result<Arch> device_arch(Device device) {
  return core::guarded([&]() -> Result<Arch> {
    if (Status status = core::check_device("device", " is ", device); !status) return status;
    return core::device_ops(device.type).arch(device.index);
  });
}

}  // namespace quire
