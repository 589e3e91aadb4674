#include "cuda/kernels.h"

#include <algorithm>
#include <cmath>

#include "cuda/build_arch.h"
#include "cuda/kernel/attend_any/launch.h"

namespace quire::cuda {

#define QUIRE_CUDA_PAIR(Key, Value)                                                       \
  extern template std::vector<KernelDesc> kernel_rows<format::Key, format::Value, 64>();  \
  extern template std::vector<KernelDesc> kernel_rows<format::Key, format::Value, 128>(); \
  extern template std::vector<KernelDesc> kernel_rows<format::Key, format::Value, 256>();
#include "cuda/pairs.def"
#undef QUIRE_CUDA_PAIR

const std::vector<KernelDesc>& kernel_table() {
  static const std::vector<KernelDesc> table = [] {
    std::vector<KernelDesc> rows{attend_any_row()};
    const auto append = [&](const std::vector<KernelDesc>& more) { rows.insert(rows.end(), more.begin(), more.end()); };
#define QUIRE_CUDA_PAIR(Key, Value)                       \
  append(kernel_rows<format::Key, format::Value, 64>());  \
  append(kernel_rows<format::Key, format::Value, 128>()); \
  append(kernel_rows<format::Key, format::Value, 256>());
#include "cuda/pairs.def"
#undef QUIRE_CUDA_PAIR
    return rows;
  }();
  return table;
}

int tiles_of_sequence(const KernelDesc& kernel, const AttentionProblem& problem) {
  const std::int64_t rows =
      std::min<std::int64_t>(kFewRows, problem.max_query_len * (problem.num_q_heads / problem.num_kv_heads));
  return static_cast<int>(std::max<std::int64_t>(1, (rows + kernel.shape.tile_rows - 1) / kernel.shape.tile_rows));
}

std::int64_t count_tiles(const KernelDesc& kernel, const AttentionProblem& problem, std::int64_t num_tokens,
                         std::int64_t batch) {
  if (kernel.shape.grid_by_sequence) return batch * tiles_of_sequence(kernel, problem);
  return num_tokens * (problem.num_q_heads / problem.num_kv_heads) / kernel.shape.tile_rows + batch;
}

// Blocks run in waves of so many on each multiprocessor, and the last wave is rarely full; a block's prologue, epilogue
// and partial result cost as much as overhead_keys. With few splits the last wave is long, with many the overhead is.
KernelCost kernel_cost(const KernelDesc& kernel, const AttentionProblem& problem) {
  const std::int64_t max_keys = std::max<std::int64_t>(problem.max_seq_len, 1);
  if (kernel.shape.persistent) {
    const auto rows = static_cast<double>(count_tiles(kernel, problem, problem.max_num_tokens, problem.max_batch) *
                                          problem.num_kv_heads);
    const double keys = rows * static_cast<double>(max_keys) / problem.arch.num_multiprocessors;
    return {(keys + kernel.shape.overhead_keys) * kernel.shape.ns_per_key, 1};
  }
  constexpr std::int64_t kMostSplits = 128;
  constexpr std::int64_t kLeastKeys = 256;  // of a split
  const auto blocks = static_cast<double>(std::max<std::int64_t>(
      1, count_tiles(kernel, problem, problem.max_num_tokens, problem.max_batch) * problem.num_kv_heads));
  const double wave = static_cast<double>(kernel.shape.blocks_per_multiprocessor) * problem.arch.num_multiprocessors;
  KernelCost best{0.0, 1};
  for (std::int64_t splits = 1; splits <= std::min(kMostSplits, (max_keys + kLeastKeys - 1) / kLeastKeys); ++splits) {
    const double keys = static_cast<double>(max_keys) / static_cast<double>(splits);
    const double waves = std::ceil(blocks * static_cast<double>(splits) / wave);
    const double ns = waves * (keys + kernel.shape.overhead_keys) * kernel.shape.ns_per_key;
    if (splits == 1 || ns < best.ns) best = {ns, splits};
  }
  return best;
}

namespace {

bool runs(const BuiltArch& built, const Arch& arch) {
  if (built.specific) return built.machine_code && built.major == arch.major && built.minor == arch.minor;
  return (built.machine_code && built.major == arch.major && built.minor <= arch.minor) ||
         (built.ptx && 10 * built.major + built.minor <= 10 * arch.major + arch.minor);
}

// "8.0, 9.0a, PTX of 8.0".
std::string built_architectures() {
  std::string names;
  for (const BuiltArch& built : kBuiltArchs) {
    const std::string version =
        std::to_string(built.major) + "." + std::to_string(built.minor) + (built.specific ? "a" : "");
    if (built.machine_code) names += (names.empty() ? "" : ", ") + version;
    if (built.ptx) names += (names.empty() ? "PTX of " : ", PTX of ") + version;
  }
  return names;
}

// Whether a row of 16-bit elements can be multiplied as it lies: aligned, and by a query that its type can hold.
bool multiplies_as_it_lies(const AttentionProblem& problem, format::FormatId id, bool is_key) {
  const DType dtype = format::format_info(id).cache_dtype;
  if (dtype != DType::kFloat16 && dtype != DType::kBFloat16) return true;
  return problem.row_alignment >= 16 &&
         !(is_key && dtype == DType::kBFloat16 && problem.query_dtype == DType::kFloat16);
}

}  // namespace

Status check_arch(const Arch& arch) {
  if (arch.major < 1 || arch.minor < 0 || arch.num_multiprocessors < 1) {
    return invalid_argument("arch has compute capability " + std::to_string(arch.major) + "." +
                            std::to_string(arch.minor) + " and " + std::to_string(arch.num_multiprocessors) +
                            " multiprocessors; a problem on cuda takes it from device_arch or problem_of");
  }
  if (std::none_of(std::begin(kBuiltArchs), std::end(kBuiltArchs),
                   [&](const BuiltArch& built) { return runs(built, arch); })) {
    return unsupported("the device has compute capability " + std::to_string(arch.major) + "." +
                       std::to_string(arch.minor) + "; this build has code for " + built_architectures() +
                       ": configure with QUIRE_CUDA_ARCHITECTURES for others");
  }
  return {};
}

bool runs_sm90a(const Arch& arch) {
  return std::any_of(std::begin(kBuiltArchs), std::end(kBuiltArchs), [&](const BuiltArch& built) {
    return built.specific && built.major == 9 && built.minor == 0 && runs(built, arch);
  });
}

const char* refused_by_tensor_cores(const KernelDesc& kernel, const AttentionProblem& problem) {
  if (problem.has_centre) return "rows have a centre";
  if (problem.query_dtype == DType::kFloat32) return "16-bit products would round a float32 query";
  if (!multiplies_as_it_lies(problem, kernel.key, true) || !multiplies_as_it_lies(problem, kernel.value, false)) {
    return "a 16-bit cache is not aligned to 16 bytes, or its type cannot hold the query";
  }
  return nullptr;
}

}  // namespace quire::cuda
