// Planning: bounds in, kernel and workspace out. Pure; the devices choose, this file validates and asks the right one.
#include "core/device.h"
#include "core/guard.h"
#include "core/mode_table.h"
#include "core/validate.h"
#include "quire/ops.h"

namespace quire {

Result<AttentionPlan> plan_unified_attention(const AttentionProblem& problem) {
  return core::guarded([&]() -> Result<AttentionPlan> {
    if (Status status = core::validate_problem(problem); !status) return status;
    const Result<ModeInfo> mode = mode_info(problem.mode);
    if (!mode) return mode.status();
    return core::device_ops(problem.device)
        .plan(problem, core::formats_of(*mode, problem.cache_dtype, problem.cache_dtype));
  });
}

}  // namespace quire
