// The plan of unified_attention on CUDA: the rows of the kernel table that serve a problem, and the cheapest of them.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "cuda/cuda.h"
#include "cuda/kernels.h"
#include "quire/ops.h"

namespace quire::cuda {
namespace {

constexpr int kNoKernel = -1;

// The cheapest kernel for the sequences of a class. attend_any serves everything, so there is one.
int choose(const AttentionProblem& problem, format::FormatId key, format::FormatId value, RowClass rows) {
  const std::vector<KernelDesc>& table = kernel_table();
  int best = kNoKernel;
  double least = std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < table.size(); ++i) {
    const KernelDesc& kernel = table[i];
    if (!kernel.takes(key, value) || !kernel.serves(rows) ||
        std::max(problem.head_size, problem.head_size_v) > kernel.max_head_size ||
        kernel.refuses(kernel, problem) != nullptr) {
      continue;
    }
    const double ns = kernel_cost(kernel, problem).ns;
    if (ns < least) {
      best = static_cast<int>(i);
      least = ns;
    }
  }
  return best;
}

std::string in_words(const KernelDesc& kernel) {
  return "cuda/" + std::string(kernel.name) +
         (kernel.tensor_cores ? "<" + std::to_string(kernel.max_head_size) + ">" : "") + " (" +
         std::to_string(kernel.shape.tile_rows) + " rows, " + (kernel.tensor_cores ? "tensor cores" : "fp32") + ")";
}

Status too_many(const std::string& what, std::int64_t most) {
  return unsupported(what + "; one CUDA grid takes at most " + std::to_string(most));
}

}  // namespace

Status plan(PlanData& plan) {
  constexpr std::int64_t kInvariantSplit = 2048;  // depends on nothing but itself
  constexpr std::int64_t kMaxSplits = 1024;
  constexpr std::int64_t kSplitMultiple = 128;  // of every kernel's key tile

  const AttentionProblem& problem = plan.problem;
  if (Status status = check_arch(problem.arch); !status) return status;
  // What one grid cannot hold is refused, the rows before anything is computed from them: the rest then fits 63 bits.
  constexpr std::int64_t kMaxGridX = std::numeric_limits<std::int32_t>::max();
  constexpr std::int64_t kMaxGridYZ = 65535;
  const std::optional<std::int64_t> rows = checked_product({problem.max_num_tokens, problem.num_q_heads});
  if (!rows || *rows > kMaxGridX) {
    return too_many("max_num_tokens " + std::to_string(problem.max_num_tokens) + " times num_q_heads " +
                        std::to_string(problem.num_q_heads) + " is the number of rows",
                    kMaxGridX);
  }
  if (problem.num_kv_heads > kMaxGridYZ) {
    return too_many("num_kv_heads is " + std::to_string(problem.num_kv_heads), kMaxGridYZ);
  }

  const std::int64_t group_size = problem.num_q_heads / problem.num_kv_heads;
  const bool has_many = problem.max_query_len * group_size > kFewRows;
  plan.kernel_ids[0] = choose(problem, plan.key_format, plan.value_format, RowClass::kFew);
  plan.kernel_ids[1] = has_many ? choose(problem, plan.key_format, plan.value_format, RowClass::kMany) : kNoKernel;
  const KernelDesc& few = kernel_table()[static_cast<std::size_t>(plan.kernel_ids[0])];
  const KernelDesc& main = has_many ? kernel_table()[static_cast<std::size_t>(plan.kernel_ids[1])] : few;
  for (const KernelDesc* kernel : {&few, &main}) {
    const std::int64_t tiles = count_tiles(*kernel, problem, problem.max_num_tokens, problem.max_batch);
    if (tiles > kMaxGridX) {
      return too_many(
          "max_batch " + std::to_string(problem.max_batch) + " makes " + std::to_string(tiles) + " row tiles",
          kMaxGridX);
    }
  }
  plan.tensor_cores = main.tensor_cores;
  plan.query_tile = static_cast<int>(std::max<std::int64_t>(1, main.shape.tile_rows / group_size));

  const std::int64_t max_keys = std::max<std::int64_t>(problem.max_seq_len, 1);
  if (problem.batch_invariant && !main.shape.persistent) {
    plan.split_size = kInvariantSplit;
  } else {
    std::int64_t splits = main.shape.persistent ? 1 : problem.num_splits;
    if (splits <= 0) splits = kernel_cost(main, problem).splits;
    splits = std::clamp<std::int64_t>(splits, 1, kMaxSplits);
    const std::int64_t keys = (max_keys + splits - 1) / splits;
    plan.split_size = (keys + kSplitMultiple - 1) / kSplitMultiple * kSplitMultiple;
  }
  plan.max_splits = (max_keys + plan.split_size - 1) / plan.split_size;
  if (plan.max_splits > kMaxGridYZ) {
    return too_many("max_seq_len " + std::to_string(problem.max_seq_len) + " in splits of " +
                        std::to_string(plan.split_size) + " keys makes " + std::to_string(plan.max_splits) + " splits",
                    kMaxGridYZ);
  }
  if (plan.max_splits > 1) {
    plan.workspace_bytes = static_cast<std::size_t>(*rows) * static_cast<std::size_t>(plan.max_splits) *
                           (2 * sizeof(float) + sizeof(float) * static_cast<std::size_t>(problem.head_size_v));
  }
  if (few.shape.persistent) {
    plan.workspace_bytes = (plan.workspace_bytes + 15) / 16 * 16 + few.workspace(problem);
  }
  return {};
}

std::string describe(const PlanData& plan) {
  const KernelDesc& few = kernel_table()[static_cast<std::size_t>(plan.kernel_ids[0])];
  if (plan.kernel_ids[1] == kNoKernel || plan.kernel_ids[1] == plan.kernel_ids[0]) return in_words(few);
  return in_words(kernel_table()[static_cast<std::size_t>(plan.kernel_ids[1])]) + " and " + std::string(few.name) +
         " for sequences of few rows";
}

}  // namespace quire::cuda
