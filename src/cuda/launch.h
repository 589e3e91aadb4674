// The host sides of the kernels share these: driver errors as Status, the current device, access widths, and the
// launch itself.
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

// Makes a device the thread's current one, and at its end the one that was before. Every op holds one while it talks to
// the driver, and refuses where the status is not ok: there is no such device.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  const Status& status() const { return status_; }

 private:
  Status status_;
  int before_ = -1;  // -1: nothing to put back
};

// More than 48 KiB of shared memory have to be asked for. The driver is asked at a kernel's first launch on the current
// device, and again only for more bytes.
cudaError_t allow_shared_bytes(const void* kernel, std::size_t shared_bytes);

#ifdef __CUDACC__
// Launches a kernel of one parameter struct.
template <class Params>
cudaError_t launch_kernel(void (*kernel)(Params), dim3 grid, int threads, std::size_t shared_bytes,
                          const Params& params, cudaStream_t stream) {
  const cudaError_t error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, static_cast<unsigned>(threads), shared_bytes, stream>>>(params);
  return cudaGetLastError();
}
#endif

}  // namespace quire::cuda
