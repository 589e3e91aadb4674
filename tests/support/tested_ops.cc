#include "support/tested_ops.h"

#include <algorithm>
#include <cstdint>

#include "support/modes.h"

namespace quire::testing {
namespace {

Status attend_on_cpu(const UnifiedAttentionArgs& args, int num_splits, bool batch_invariant) {
  if (num_splits == 0 && !batch_invariant) return unified_attention(args, nullptr);
  Result<AttentionProblem> problem = problem_of(args);
  if (!problem.ok()) return problem.status();
  problem->num_splits = num_splits;
  problem->batch_invariant = batch_invariant;
  const Result<AttentionPlan> plan = plan_unified_attention(*problem);
  if (!plan.ok()) return plan.status();
  // Exactly as long as the plan says; operator new aligns to 16 bytes.
  std::vector<std::uint8_t> workspace(std::max<std::size_t>(plan->workspace_bytes(), 16), 0xFF);
  return run_unified_attention(*plan, args, workspace.data(), plan->workspace_bytes(), nullptr);
}

}  // namespace

TestedOps ops{Device::cpu(),
              {DType::kFloat32},
              [](const ReshapeAndCacheArgs& args) { return reshape_and_cache(args, nullptr); },
              attend_on_cpu,
              [](const MergeAttnStatesArgs& args) { return merge_attn_states(args, nullptr); },
              [](const HadamardArgs& args) { return hadamard(args, nullptr); },
              [](AttentionCase&) {}};

std::vector<ModeAndQuery> modes_and_queries() {
  std::vector<ModeAndQuery> all;
  for (const std::string& mode : table_modes()) {
    for (const DType dtype : ops.query_dtypes) all.push_back({mode, dtype});
  }
  return all;
}

std::string test_name(const ModeAndQuery& parameter) {
  const bool named = parameter.query_dtype != DType::kFloat32;
  return test_name(parameter.mode) + (named ? "_from_" + std::string(dtype_name(parameter.query_dtype)) : "");
}

}  // namespace quire::testing
