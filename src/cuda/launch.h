// What the host sides of the kernels share: driver errors as Status, access widths, and the launch itself.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "quire/status.h"

namespace quire::cuda {

inline Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return internal_error(std::string(what) + ": CUDA reports " + cudaGetErrorName(error) + " (" +
                        cudaGetErrorString(error) + ")");
}

// The widest access, up to 16 bytes, that divides an address and every distance added to it.
inline int access_bytes(const void* address, std::initializer_list<std::int64_t> distances) {
  auto bits = reinterpret_cast<std::uintptr_t>(address) | 16U;
  for (const std::int64_t distance : distances) bits |= static_cast<std::uintptr_t>(distance);
  return static_cast<int>(bits & -bits);
}

#ifdef __CUDACC__
// Launches a kernel of one parameter struct. More than 48 KiB of shared memory have to be asked for.
template <class Params>
cudaError_t launch_kernel(void (*kernel)(Params), dim3 grid, int threads, std::size_t shared_bytes,
                          const Params& params, cudaStream_t stream) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, static_cast<unsigned>(threads), shared_bytes, stream>>>(params);
  return cudaGetLastError();
}
#endif

}  // namespace quire::cuda
