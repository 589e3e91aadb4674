// Device memory for tests, tools and benchmarks, copied in and out synchronously. No CUDA types.
//
//   DeviceBuffer   one owned allocation
//   DeviceMirror   the tensors of a call on the device: runs an op on a GPU with arguments that live on the host
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "quire/ops.h"
#include "quire/status.h"
#include "quire/tensor.h"

namespace quire::cuda {

// Ok where a CUDA device can be used; otherwise the driver's reason.
Status device_available();

// "NVIDIA H200, sm_90, 132 SMs, 139.8 GiB", or empty.
std::string device_description();

// Waits for everything on the device and reports its first error.
Status synchronize();

class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;

  // Zero bytes are a valid allocation without a pointer. The contents are not initialised.
  static Result<DeviceBuffer> allocate(std::size_t bytes);
  // Allocated and filled from the host.
  static Result<DeviceBuffer> copy_of(const void* host, std::size_t bytes);

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

  Status copy_in(const void* host, std::size_t bytes, std::size_t offset = 0);
  Status copy_out(void* host, std::size_t bytes, std::size_t offset = 0) const;
  Status poison(std::uint8_t value = 0xFF);

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Copies of the host memory that some tensors span. Tensors whose spans overlap (K and V of one buffer, inline scales)
// share a copy, so every stride keeps its meaning; alignment up to 256 bytes is kept too.
class DeviceMirror {
 public:
  // Points every defined host tensor of the list at its copy on the device.
  static Result<DeviceMirror> upload(const std::vector<Tensor*>& tensors);

  // Copies what `host`, one of the tensors as it was before upload, spans back to where it points.
  Status download(const Tensor& host) const;

 private:
  struct Region {
    std::uintptr_t begin = 0, end = 0;  // host addresses
    DeviceBuffer copy;
    std::size_t padding = 0;  // bytes before the copy of `begin`
  };
  const Region* find(const Tensor& host) const;

  std::vector<Region> regions_;
};

// The tensors of a call, for DeviceMirror::upload.
std::vector<Tensor*> tensors_of(ReshapeAndCacheArgs& args);
std::vector<Tensor*> tensors_of(UnifiedAttentionArgs& args);
std::vector<Tensor*> tensors_of(MergeAttnStatesArgs& args);

}  // namespace quire::cuda
