#include "support/tested_ops.h"

#include <algorithm>
#include <cstdint>

#include "format/formats.h"
#include "support/attention_case.h"
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

// What the 16-bit products of src/cpu round. A query that is rotated, or that meets integer levels, becomes int16 by
// steps of its largest element / largest, where 32-bit sums allow largest = 32767 for head sizes up to 512 and small
// levels, and 2^31 / (d * 1958) for the codebooks: 8195 at d = 128, 2140 at 512. The error of an element is evenly
// distributed over a step and the largest element is 3 to 4 standard deviations, so in the tolerance's terms (u /
// sqrt(3) of an element) u is at most 4 / 2 / largest: 2^-14, or 2^-12 at d = 128. The codebooks' levels themselves are
// off by up to 2.6e-4 of a standard deviation, 2^-12. bf16 queries in two parts keep 16 bits. Weights: int16 by steps
// of the tile's largest weight / 32767, 2^-16 of it at most; bf16 in two parts, 2^-17.
void set_cpu_tolerances(AttentionCase& problem) {
  const Result<const ModeInfo*> found = mode_info(problem.args.mode);
  if (problem.options.dtype == DType::kFloat32 || !found.ok()) return;
  const ModeInfo* mode = *found;
  const format::FormatId key = format::find_format(mode->key_format);
  const bool known = key != format::FormatId::kNone;
  if (!known && mode->name != "auto") return;
  const bool codebook = known && format::format_info(key).level_norm;
  const bool integer = known && (format::format_info(key).rotation != format::Rotation::kNone ||
                                 mode->key_format == "int8_per_token_head");
  problem.serial_sums = 4.0;
  problem.query_unit = codebook ? 0x1p-11 : (integer ? 0x1p-13 : 0x1p-24);
  problem.weight_unit = 0x1p-15;
}

}  // namespace

TestedOps ops{Device::cpu(),
              {DType::kFloat32, DType::kBFloat16},
              [](const ReshapeAndCacheArgs& args) { return reshape_and_cache(args, nullptr); },
              attend_on_cpu,
              [](const MergeAttnStatesArgs& args) { return merge_attn_states(args, nullptr); },
              [](const HadamardArgs& args) { return hadamard(args, nullptr); },
              set_cpu_tolerances};

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
