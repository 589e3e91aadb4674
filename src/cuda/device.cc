// The devices, asked of the driver once each: their number, their facts, and which kernels may use how much shared
// memory.
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>

#include "cuda/cuda.h"
#include "cuda/launch.h"

namespace quire::cuda {

Result<int> device_count() {
  static std::atomic<int> known = -1;
  if (const int count = known.load(std::memory_order_relaxed); count >= 0) return count;
  int count = 0;
  if (Status status = cuda_status(cudaGetDeviceCount(&count), "device"); !status) return status;
  known.store(count, std::memory_order_relaxed);
  return count;
}

DeviceGuard::DeviceGuard(int index) {
  const Result<int> count = device_count();
  if (!count) {
    status_ = count.status();
    return;
  }
  if (index < 0 || index >= *count) {
    status_ = invalid_argument("device is cuda:" + std::to_string(index) + "; this process sees " +
                               std::to_string(*count) + " CUDA device" + (*count == 1 ? "" : "s") +
                               (*count == 0   ? std::string()
                                : *count == 1 ? std::string(", cuda:0")
                                              : ", cuda:0 to cuda:" + std::to_string(*count - 1)));
    return;
  }
  int current = 0;
  status_ = cuda_status(cudaGetDevice(&current), "device");
  if (!status_ || current == index) return;
  status_ = cuda_status(cudaSetDevice(index), "device");
  if (status_) before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

Result<Arch> arch(int index) {
  // One device is enough for most processes, and its facts need no lock.
  constexpr int kKnown = 64;
  struct Known {
    std::once_flag once;
    Arch arch;
    Status status;
  };
  static std::array<Known, kKnown> known;
  const auto ask = [index](Arch& arch) -> Status {
    const DeviceGuard guard(index);
    if (!guard.status()) return guard.status();
    const struct {
      cudaDeviceAttr attribute;
      int* value;
    } facts[] = {{cudaDevAttrComputeCapabilityMajor, &arch.major},
                 {cudaDevAttrComputeCapabilityMinor, &arch.minor},
                 {cudaDevAttrMultiProcessorCount, &arch.num_multiprocessors},
                 {cudaDevAttrMaxSharedMemoryPerBlockOptin, &arch.shared_bytes}};
    for (const auto& fact : facts) {
      const Status status = cuda_status(cudaDeviceGetAttribute(fact.value, fact.attribute, index), "device");
      if (!status) return status;
    }
    return {};
  };
  Arch arch;
  if (index < 0 || index >= kKnown) {
    if (Status status = ask(arch); !status) return status;
    return arch;
  }
  Known& device = known[static_cast<std::size_t>(index)];
  std::call_once(device.once, [&] { device.status = ask(device.arch); });
  if (!device.status) return device.status;
  return device.arch;
}

cudaError_t allow_shared_bytes(const void* kernel, std::size_t shared_bytes) {
  if (shared_bytes <= 48 * 1024) return cudaSuccess;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  // A table of what was allowed, by kernel and device, with open addressing; a key of 0 is a free place. A place is
  // written under the lock, its key last, and its bytes only grow; a reader needs no lock. Where no place is free, the
  // driver is asked at every launch.
  struct Place {
    std::atomic<std::uint64_t> key = 0;
    std::atomic<std::size_t> bytes = 0;
  };
  constexpr std::size_t kPlaces = 4096, kTries = 64;
  static std::array<Place, kPlaces> places;
  static std::mutex mutex;
  // Addresses of kernels have 48 bits.
  const std::uint64_t key = reinterpret_cast<std::uintptr_t>(kernel) | static_cast<std::uint64_t>(device + 1) << 48;
  const auto find = [&](std::uint64_t wanted) -> Place* {
    const std::size_t first = (key * 0x9E3779B97F4A7C15U) >> 52;
    for (std::size_t i = 0; i < kTries; ++i) {
      Place& place = places[(first + i) % kPlaces];
      const std::uint64_t found = place.key.load(std::memory_order_acquire);
      if (found == wanted) return &place;
    }
    return nullptr;
  };
  const Place* known = find(key);
  if (known != nullptr && known->bytes.load(std::memory_order_acquire) >= shared_bytes) return cudaSuccess;
  const std::lock_guard lock(mutex);
  Place* place = find(key);
  if (place != nullptr && place->bytes.load(std::memory_order_relaxed) >= shared_bytes) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  if (place == nullptr) place = find(0);
  if (place != nullptr) {
    place->bytes.store(shared_bytes, std::memory_order_release);
    place->key.store(key, std::memory_order_release);
  }
  return cudaSuccess;
}

}  // namespace quire::cuda
