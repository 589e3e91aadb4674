#include "cuda/device_memory.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <utility>

#include "cuda/launch.h"

namespace quire::cuda {
namespace {

Status outside(const char* what, std::size_t offset, std::size_t bytes, std::size_t size) {
  return out_of_range(std::string(what) + " of " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                      " leaves the device buffer of " + std::to_string(size) + " bytes");
}

}  // namespace

Status device_available(int index) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return unsupported(std::string("no CUDA device: ") + cudaGetErrorString(error));
  if (count == 0) return unsupported("no CUDA device");
  return device_arch(Device::cuda(index)).status();  // which says how many there are
}

std::string device_description(int index) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) return {};
  char memory[32];
  std::snprintf(memory, sizeof(memory), "%.1f GiB", static_cast<double>(properties.totalGlobalMem) / (1U << 30));
  return std::string(properties.name) + ", sm_" + std::to_string(properties.major) + std::to_string(properties.minor) +
         ", " + std::to_string(properties.multiProcessorCount) + " SMs, " + memory;
}

Status synchronize() { return cuda_status(cudaDeviceSynchronize(), "synchronize"); }

DeviceBuffer::~DeviceBuffer() { cudaFree(data_); }

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Result<DeviceBuffer> DeviceBuffer::allocate(std::size_t bytes) {
  DeviceBuffer buffer;
  if (bytes > 0) {
    if (Status status = cuda_status(cudaMalloc(&buffer.data_, bytes), "allocation"); !status) return status;
  }
  buffer.bytes_ = bytes;
  return buffer;
}

Result<DeviceBuffer> DeviceBuffer::copy_of(const void* host, std::size_t bytes) {
  Result<DeviceBuffer> buffer = allocate(bytes);
  if (!buffer) return buffer;
  if (Status status = buffer->copy_in(host, bytes); !status) return status;
  return buffer;
}

Status DeviceBuffer::copy_in(const void* host, std::size_t bytes, std::size_t offset) {
  if (offset > bytes_ || bytes > bytes_ - offset) return outside("a copy in", offset, bytes, bytes_);
  if (bytes == 0) return {};
  return cuda_status(cudaMemcpy(static_cast<std::uint8_t*>(data_) + offset, host, bytes, cudaMemcpyHostToDevice),
                     "copy in");
}

Status DeviceBuffer::copy_out(void* host, std::size_t bytes, std::size_t offset) const {
  if (offset > bytes_ || bytes > bytes_ - offset) return outside("a copy out", offset, bytes, bytes_);
  if (bytes == 0) return {};
  return cuda_status(cudaMemcpy(host, static_cast<const std::uint8_t*>(data_) + offset, bytes, cudaMemcpyDeviceToHost),
                     "copy out");
}

Status DeviceBuffer::poison(std::uint8_t value) {
  if (bytes_ == 0) return {};
  return cuda_status(cudaMemset(data_, value, bytes_), "poison");
}

}  // namespace quire::cuda

namespace quire {

CurrentDevice::CurrentDevice(Device device) {
  if (device.is_cpu()) return;
  status_ = cuda::device_available(device.index);
  int current = 0;
  if (status_) status_ = cuda::cuda_status(cudaGetDevice(&current), "device");
  if (!status_ || current == device.index) return;
  status_ = cuda::cuda_status(cudaSetDevice(device.index), "device");
  if (status_) before_ = current;
}

CurrentDevice::~CurrentDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace quire
