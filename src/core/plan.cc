// A plan is made of bounds alone: this file validates them and asks the right device, which chooses the kernels.
#include "quire/plan.h"

#include "core/device.h"
#include "core/guard.h"
#include "core/plan.h"
#include "core/validate.h"

namespace quire {
namespace core {

Status make_plan(const AttentionProblem& problem, PlanData& plan) {
  Result<FormatPair> formats = validate_problem(problem);
  if (!formats) return formats.status();
  plan.problem = problem;
  plan.key_format = formats->key;
  plan.value_format = formats->value;
  return device_ops(problem.device.type).plan(plan);
}

}  // namespace core

Result<AttentionPlan> plan_unified_attention(const AttentionProblem& problem) {
  return core::guarded([&]() -> Result<AttentionPlan> {
    auto data = std::make_shared<PlanData>();
    if (Status status = core::make_plan(problem, *data); !status) return status;
    return AttentionPlan(std::move(data));
  });
}

Result<AttentionSupport> supports(const AttentionProblem& problem) {
  return core::guarded([&]() -> Result<AttentionSupport> {
    PlanData plan;
    if (Status status = core::make_plan(problem, plan); !status) return status;
    return AttentionSupport{plan.tensor_cores, plan.workspace_bytes};
  });
}

const AttentionProblem& AttentionPlan::problem() const {
  static const AttentionProblem empty;
  return data_ == nullptr ? empty : data_->problem;
}

std::size_t AttentionPlan::workspace_bytes() const { return data_ == nullptr ? 0 : data_->workspace_bytes; }

bool AttentionPlan::tensor_cores() const { return data_ != nullptr && data_->tensor_cores; }

std::string AttentionPlan::describe() const {
  if (data_ == nullptr) return "an empty plan";
  return core::device_ops(data_->problem.device.type).describe(*data_) + ", " + std::to_string(data_->max_splits) +
         (data_->max_splits == 1 ? " split" : " splits");
}

}  // namespace quire
