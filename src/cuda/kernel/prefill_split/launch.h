// prefill_split in the table of kernels.
#pragma once

#include <algorithm>

#include "cuda/kernel/prefill_sm90/config.h"
#include "cuda/kernel/prefill_split/kernel.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace quire::cuda {

struct PrefillSplit {
  static constexpr std::string_view kName = "prefill_split";
  static constexpr bool kServesFew = false;
  static constexpr bool kServesMany = true;
  static const char* refuses(const KernelDesc& kernel, const AttentionProblem& problem) {
    if (runs_sm90a(problem.arch) && std::max(problem.head_size, problem.head_size_v) <= kMaxHeadSm90) {
      return "prefill_sm90 serves it";
    }
    return refused_by_tensor_cores(kernel, problem);
  }

  template <class KeyF, class ValueF, int kHead>
  static constexpr bool kCompiled = kHead >= 128;
  template <class KeyF, class ValueF, int kHead>
  static constexpr KernelShape kShape = {.tile_rows = PrefillConfig<KeyF, ValueF, kHead>::kRows,
                                         .grid_by_sequence = false,
                                         .blocks_per_multiprocessor = 2,
                                         .overhead_keys = 4096,
                                         .ns_per_key = 69};

  template <class KeyF, class ValueF, int kHead>
  static cudaError_t launch(const AttentionParams& params, std::int64_t tiles, cudaStream_t stream) {
    using Config = PrefillConfig<KeyF, ValueF, kHead>;
    return launch_kernel(&prefill_split<KeyF, ValueF, kHead>, attention_grid(params, tiles), kAttentionThreads,
                         sizeof(typename Config::Storage), params, stream);
  }
};

}  // namespace quire::cuda
