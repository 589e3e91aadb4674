// prefill_sm90 in the table of kernels.
#pragma once

#include "cuda/kernel/prefill_sm90/kernel.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace quire::cuda {

struct PrefillSm90 {
  static constexpr std::string_view kName = "prefill_sm90";
  static constexpr bool kServesFew = false;
  static constexpr bool kServesMany = true;
  static const char* refuses(const KernelDesc& kernel, const AttentionProblem& problem) {
    return runs_sm90a(problem.arch) ? refused_by_tensor_cores(kernel, problem) : "it is compiled for sm_90a";
  }

  template <class KeyF, class ValueF, int kHead>
  static constexpr bool kCompiled = kHead == kMaxHeadSm90;
  template <class KeyF, class ValueF, int kHead>
  static constexpr KernelShape kShape = {.tile_rows = PrefillSm90Config<KeyF, ValueF>::kRows,
                                         .grid_by_sequence = false,
                                         .blocks_per_multiprocessor = 1,
                                         .overhead_keys = 4096,
                                         .ns_per_key = 22};

  template <class KeyF, class ValueF, int kHead>
  static cudaError_t launch(const AttentionParams& params, std::int64_t tiles, cudaStream_t stream) {
    using Config = PrefillSm90Config<KeyF, ValueF>;
    return launch_kernel(&prefill_sm90<KeyF, ValueF>, attention_grid(params, tiles), Config::kThreads,
                         Config::kStorageBytes, params, stream);
  }
};

}  // namespace quire::cuda
