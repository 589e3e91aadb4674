// The facts of the current device, asked of the driver once for each device.
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

#include "cuda/cuda.h"
#include "cuda/launch.h"

namespace quire::cuda {

Result<Arch> arch() {
  int device = 0;
  if (Status status = cuda_status(cudaGetDevice(&device), "device"); !status) return status;
  static std::mutex mutex;
  static std::map<int, Arch> known;
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(device); found != known.end()) return found->second;
  Arch arch;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } facts[] = {{cudaDevAttrComputeCapabilityMajor, &arch.major},
               {cudaDevAttrComputeCapabilityMinor, &arch.minor},
               {cudaDevAttrMultiProcessorCount, &arch.num_multiprocessors},
               {cudaDevAttrMaxSharedMemoryPerBlockOptin, &arch.shared_bytes}};
  for (const auto& fact : facts) {
    const Status status = cuda_status(cudaDeviceGetAttribute(fact.value, fact.attribute, device), "device");
    if (!status) return status;
  }
  known.emplace(device, arch);
  return arch;
}

}  // namespace quire::cuda
