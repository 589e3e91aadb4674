// Device memory for tests, tools and benchmarks: one owned allocation, copied in and out synchronously. No CUDA types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "quire/status.h"

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

}  // namespace quire::cuda
