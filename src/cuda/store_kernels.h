// The store kernels' launchers.
#pragma once

#include <cuda_runtime.h>

#include "cuda/store_params.h"

namespace quire::cuda {

// Rows of a pair of formats; in kernel/store_rows/launch.h, instantiated in a generated source for each pair of a mode.
template <class KeyF, class ValueF>
cudaError_t launch_store_rows(const StoreParams& params, cudaStream_t stream);

// Rows of any pair, formats looked up at run time.
cudaError_t launch_store_any(const StoreParams& params, cudaStream_t stream);

// Formats without statistics or rotation, one thread an element: the head-major layout, where a row is not contiguous,
// and float8 inputs, whose codes are copied.
cudaError_t launch_store_elements(const StoreParams& params, cudaStream_t stream);

}  // namespace quire::cuda
