#include "support/tested_ops.h"

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/operand.h"
#include "format/formats.h"
#include "reference/attention.h"
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
  // The workspace is exactly as long as the plan says; operator new aligns it to 16 bytes.
  std::vector<std::uint8_t> workspace(std::max<std::size_t>(plan->workspace_bytes(), 16), 0xFF);
  return run_unified_attention(*plan, args, workspace.data(), plan->workspace_bytes(), nullptr);
}

// What the 16-bit products of src/cpu round, for queries of 16 bits; u is the tolerance's unit roundoff, of errors
// evenly distributed over -u to u.
//
// Query: an int16 by steps of its row's largest element / largest, where sums of head_size products with levels up to
// max_level stay inside 32 bits. The largest element is 3 to 4 standard deviations and the error half a step, so u is
// 4 / 2 / largest: 2^-14 for small levels, 2^-12 for a codebook at a head size of 128, 2^-10 at 512. TurboQuant's
// levels are themselves up to 2.6e-4 of a standard deviation off. A bf16 query meets bf16 keys as it is. Weights: an
// int16 by steps of the tile's largest / 32767, so u is 2^-16 of that; two parts of bf16, 2^-17. Twice that, since a
// tile's weights are smaller than its largest.
void set_cpu_tolerances(AttentionCase& problem) {
  const Result<const ModeInfo*> mode = mode_info(problem.args.mode);
  if (problem.options.dtype == DType::kFloat32 || !mode.ok()) return;
  const format::FormatId key = reference::resolve_format((*mode)->key_format, problem.options.auto_dtype);
  const format::FormatId value = reference::resolve_format((*mode)->value_format, problem.options.auto_dtype);
  if (key == format::FormatId::kNone) return;
  problem.serial_sums = 4.0;
  if (cpu::operand_of(key) == cpu::Operand::kInt16) {
    const double max_level = cpu::kernels().operands[static_cast<std::size_t>(key)].max_level;
    const double largest = std::min(32639.0, 0x1p31 / (problem.options.head_size * std::max(1.0, max_level)));
    problem.query_unit = 2.0 / largest + (format::format_info(key).level_norm ? 2.6e-4 : 0.0);
  }
  if (cpu::operand_of(value) == cpu::Operand::kInt16) problem.weight_unit = 0x1p-15;
  if (cpu::operand_of(value) == cpu::Operand::kBFloat16) problem.weight_unit = 0x1p-16;
}

}  // namespace

TestedOps ops{Device::cpu(),
              {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
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
