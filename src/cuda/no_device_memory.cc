// device_memory.h in a build without CUDA: there is no device, and every request for it says why.
#include "cuda/device_memory.h"

namespace quire::cuda {

Status device_available(int) {
  return unsupported(
      "device is cuda, but this build has no CUDA; configure with -DQUIRE_CUDA=ON where nvcc is installed");
}

std::string device_description(int) { return {}; }

Status synchronize() { return device_available(); }

DeviceBuffer::~DeviceBuffer() = default;
DeviceBuffer::DeviceBuffer(DeviceBuffer&&) noexcept = default;
DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&&) noexcept = default;

Result<DeviceBuffer> DeviceBuffer::allocate(std::size_t) { return device_available(); }
Result<DeviceBuffer> DeviceBuffer::copy_of(const void*, std::size_t) { return device_available(); }
Status DeviceBuffer::copy_in(const void*, std::size_t, std::size_t) { return device_available(); }
Status DeviceBuffer::copy_out(void*, std::size_t, std::size_t) const { return device_available(); }
Status DeviceBuffer::poison(std::uint8_t) { return device_available(); }

}  // namespace quire::cuda

namespace quire {

CurrentDevice::CurrentDevice(Device device) : status_(device_available(device)) {}
CurrentDevice::~CurrentDevice() = default;

}  // namespace quire
