// decode_split in the table of kernels.
#pragma once

#include "cuda/kernel/decode_split/kernel.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace quire::cuda {

struct DecodeSplit {
  static constexpr std::string_view kName = "decode_split";
  static constexpr bool kServesFew = true;
  static constexpr bool kServesMany = false;
  static const char* refuses(const KernelDesc& kernel, const AttentionProblem& problem) {
    return refused_by_tensor_cores(kernel, problem);
  }

  template <class KeyF, class ValueF, int kHead>
  static constexpr bool kCompiled = kHead >= 128;
  template <class KeyF, class ValueF, int kHead>
  static constexpr KernelShape kShape = {.tile_rows = DecodeConfig<KeyF, ValueF, kHead>::kRows,
                                         .grid_by_sequence = true,
                                         .blocks_per_multiprocessor = 3,
                                         .overhead_keys = 256,
                                         .ns_per_key = 53};

  template <class KeyF, class ValueF, int kHead>
  static cudaError_t launch(const AttentionParams& params, std::int64_t tiles, cudaStream_t stream) {
    using Config = DecodeConfig<KeyF, ValueF, kHead>;
    return launch_kernel(&decode_split<KeyF, ValueF, kHead>, attention_grid(params, tiles), kAttentionThreads,
                         sizeof(typename Config::Storage), params, stream);
  }
};

}  // namespace quire::cuda
