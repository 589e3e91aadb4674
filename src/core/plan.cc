// Planning: bounds in, kernel and workspace out. Pure; the devices choose, this file validates and asks the right one.
#include "core/guard.h"
#include "core/validate.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "format/build_config.h"
#include "quire/ops.h"

namespace quire {

Result<AttentionPlan> plan_unified_attention(const AttentionProblem& problem) {
  return core::guarded([&]() -> Result<AttentionPlan> {
    if (Status status = core::validate_problem(problem); !status) return status;
    if (problem.device == Device::kCpu) return cpu::plan(problem);
#if quire_with_cuda
    return cuda::plan(problem);
#else
    return unsupported(
        "device is cuda, but this build has no CUDA; configure with -DQUIRE_CUDA=ON where nvcc is installed");
#endif
  });
}

}  // namespace quire
