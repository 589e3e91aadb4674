// The partial results of an attention call's splits to its output.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/attention_params.h"

namespace quire::cuda {

// num_rows: (token, query head) pairs of the call.
cudaError_t launch_merge_splits(const AttentionParams& params, std::int64_t num_rows, cudaStream_t stream);

}  // namespace quire::cuda
