#include "cuda/kernel/attend_any/launch.h"

#include "cuda/kernel/attend_any/kernel.cuh"
#include "cuda/launch.h"

namespace quire::cuda {

KernelDesc attend_any_row() {
  using Config = AttendAnyConfig;
  return {.name = "attend_any",
          .key = format::FormatId::kNone,
          .value = format::FormatId::kNone,
          .max_head_size = format::kMaxHeadSize,
          .serves_few = true,
          .serves_many = true,
          .tensor_cores = false,
          .shape = {.tile_rows = Config::kRows,
                    .grid_by_sequence = false,
                    .blocks_per_multiprocessor = 3,
                    .overhead_keys = 256,
                    .ns_per_key = 1000},
          .refuses = [](const KernelDesc&, const AttentionProblem&) -> const char* { return nullptr; },
          .launch =
              [](const AttentionParams& params, std::int64_t tiles, cudaStream_t stream) {
                const auto kernel =
                    params.head_size_v <= kAttentionThreads ? &attend_any<1> : &attend_any<Config::kMaxColumns>;
                return launch_kernel(kernel, attention_grid(params, tiles), kAttentionThreads,
                                     Config::storage_bytes(params.head_size, params.head_size_v), params, stream);
              }};
}

}  // namespace quire::cuda
