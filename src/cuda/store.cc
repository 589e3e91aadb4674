// reshape_and_cache on CUDA: which of the store kernels serves a call.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "cuda/cuda.h"
#include "cuda/launch.h"
#include "cuda/store_kernels.h"
#include "cuda/store_params.h"

namespace quire::cuda {

#define QUIRE_CUDA_PAIR(Key, Value) \
  extern template cudaError_t launch_store_rows<format::Key, format::Value>(const StoreParams&, cudaStream_t);
#include "cuda/pairs.def"
#undef QUIRE_CUDA_PAIR

namespace {

struct StorePair {
  format::FormatId key, value;
  cudaError_t (*launch)(const StoreParams&, cudaStream_t);
};
constexpr StorePair kStorePairs[] = {
#define QUIRE_CUDA_PAIR(Key, Value) \
  {format::format_id<format::Key>, format::format_id<format::Value>, &launch_store_rows<format::Key, format::Value>},
#include "cuda/pairs.def"
#undef QUIRE_CUDA_PAIR
};

cudaError_t launch(const StoreParams& params, bool by_element, cudaStream_t stream) {
  if (by_element) return launch_store_elements(params, stream);
  for (const StorePair& pair : kStorePairs) {
    if (pair.key == params.key.format && pair.value == params.value.format) return pair.launch(params, stream);
  }
  return launch_store_any(params, stream);
}

}  // namespace

Status reshape_and_cache(const ReshapeAndCacheArgs& args, const StoreProblem& problem, void* stream) {
  const DeviceGuard guard(args.key.device.index);
  if (!guard.status()) return guard.status();
  if (problem.num_tokens == 0 || problem.num_kv_heads == 0) return {};
  // Rows, and blocks of one thread per element, are counted in 31 bits.
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  constexpr std::int64_t kThreads = 128;
  const std::int64_t elements = std::max<std::int64_t>(kThreads, std::max(problem.head_size, problem.head_size_v));
  const std::int64_t max_tokens = kMost / (elements / kThreads + 1) / problem.num_kv_heads;
  if (problem.num_tokens > max_tokens) {
    return unsupported("key holds " + std::to_string(problem.num_tokens) + " tokens; one CUDA call stores at most " +
                       std::to_string(max_tokens) + " of them");
  }
  const StoreParams params = make_store_params(args, problem);
  const bool by_element = problem.head_major_x > 0 || params.key.copy_codes || params.value.copy_codes;
  return cuda_status(launch(params, by_element, static_cast<cudaStream_t>(stream)), "reshape_and_cache");
}

}  // namespace quire::cuda
