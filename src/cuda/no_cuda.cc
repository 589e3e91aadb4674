// cuda.h in a build without CUDA: every call says so.
#include "cuda/cuda.h"

namespace quire::cuda {
namespace {

Status no_cuda() {
  return unsupported(
      "device is cuda, but this build has no CUDA; configure with -DQUIRE_CUDA=ON where nvcc is installed");
}

}  // namespace

Result<int> device_count() { return no_cuda(); }

Result<Arch> arch(int) { return no_cuda(); }

Status plan(PlanData&) { return no_cuda(); }

std::string describe(const PlanData&) { return "none"; }

Status reshape_and_cache(const ReshapeAndCacheArgs&, const StoreProblem&, void*) { return no_cuda(); }

Status attend(const PlanData&, const UnifiedAttentionArgs&, const AttentionShape&, const QuantKVBackend*, void*,
              void*) {
  return no_cuda();
}

Status merge_attn_states(const MergeAttnStatesArgs&, void*) { return no_cuda(); }

Status hadamard(const HadamardArgs&, void*) { return no_cuda(); }

Status with_one_token_each(Device, std::int64_t, const std::function<Status(const ConstTensor&)>&, void*) {
  return no_cuda();
}

Status check_table_once(std::string_view, const ConstTensor&, int, const std::function<Status(const ConstTensor&)>&,
                        void*) {
  return no_cuda();
}

}  // namespace quire::cuda
