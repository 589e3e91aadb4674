// Device memory for tests, tools, benchmarks and the model runner, copied in and out synchronously. No CUDA types, and
// no #if at its users: a build without CUDA has it too, and there every request for the device is refused in a
// sentence.
//
//   CurrentDevice    makes a device the thread's current one for a while
//   DeviceBuffer     one owned allocation on a CUDA device
//   Memory           one on any device
//   DeviceMirror     the tensors of a call on a CUDA device
//   run_on_device    runs an op on a GPU with arguments that live on the host
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "quire/ops.h"
#include "quire/status.h"
#include "quire/tensor.h"

namespace quire::cuda {

// Ok where cuda:index can be used; otherwise the driver's reason, how many devices there are, or that this build has no
// CUDA.
Status device_available(int index = 0);

// "NVIDIA H200, sm_90, 132 SMs, 139.8 GiB", or empty.
std::string device_description(int index = 0);

// Waits for everything on the current device and reports its first error.
Status synchronize();

// An allocation on the current device.
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

// One of the tensors of a call's arguments, to be looked at and pointed elsewhere, whether an op writes it or not.
class TensorRef {
 public:
  TensorRef(Tensor* tensor) : written_(tensor) {}
  TensorRef(ConstTensor* tensor) : read_(tensor) {}

  Tensor writable() const {
    Tensor tensor;
    TensorRef(&tensor).set(get());
    return tensor;
  }
  ConstTensor get() const { return written_ != nullptr ? ConstTensor(*written_) : *read_; }
  void set(const ConstTensor& tensor) const;

  // Where the argument is.
  const void* address() const { return written_ != nullptr ? static_cast<const void*>(written_) : read_; }

  // edit(Tensor&) changes the tensor, read or written.
  template <class Edit>
  void edit(const Edit& edit) const {
    Tensor tensor = writable();
    edit(tensor);
    set(tensor);
  }

 private:
  Tensor* written_ = nullptr;
  ConstTensor* read_ = nullptr;
};

// Copies on a device of the host memory that some tensors span. Tensors whose spans overlap (K and V of one buffer, inline scales)
// share a copy, so every stride keeps its meaning; alignment up to 256 bytes is kept too.
class DeviceMirror {
 public:
  // Points every defined host tensor of the list at its copy on `device`; those on a GPU stay where they are.
  static Result<DeviceMirror> upload(const std::vector<TensorRef>& tensors, Device device = Device::cuda());

  // Copies what `host`, one of the tensors as it was before upload, spans back to where it points.
  Status download(const Tensor& host) const;

 private:
  struct Region {
    std::uintptr_t begin = 0, end = 0;  // host addresses
    DeviceBuffer copy;
    std::size_t padding = 0;  // bytes before the copy of `begin`
  };
  const Region* find(const ConstTensor& host) const;

  Device device_ = Device::cuda();
  std::vector<Region> regions_;
};

// The tensors of a call, for DeviceMirror::upload.
std::vector<TensorRef> tensors_of(ReshapeAndCacheArgs& args);
std::vector<TensorRef> tensors_of(UnifiedAttentionArgs& args);
std::vector<TensorRef> tensors_of(MergeAttnStatesArgs& args);
std::vector<TensorRef> tensors_of(HadamardArgs& args);

// Fills in the bounds on the lengths that CUDA needs, where they are 0 and the lengths are on the host. run_on_device
// does.
void fill_in_bounds(UnifiedAttentionArgs& args);

// Calls `op` with copies on `device` of the host tensors among args' (those on a GPU stay where they are), waits, and
// copies what an op of these arguments writes back to the host tensors among them. `device` is current meanwhile.
Status run_on_device(const ReshapeAndCacheArgs& args, const std::function<Status(const ReshapeAndCacheArgs&)>& op,
                     Device device = Device::cuda());
Status run_on_device(const UnifiedAttentionArgs& args, const std::function<Status(const UnifiedAttentionArgs&)>& op,
                     Device device = Device::cuda());
Status run_on_device(const MergeAttnStatesArgs& args, const std::function<Status(const MergeAttnStatesArgs&)>& op,
                     Device device = Device::cuda());
Status run_on_device(const HadamardArgs& args, const std::function<Status(const HadamardArgs&)>& op,
                     Device device = Device::cuda());

}  // namespace quire::cuda

namespace quire {

// Makes a CUDA device the thread's current one for as long as it lives, and at its end the one that was before; for the
// CPU it does nothing. The status says where there is no such device. The ops need none of this: they go where their
// tensors are. What calls CUDA by itself does.
class CurrentDevice {
 public:
  explicit CurrentDevice(Device device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

  const Status& status() const { return status_; }

 private:
  Status status_;
  [[maybe_unused]] int before_ = -1;  // -1: nothing to put back; unused without CUDA
};

// Ok where the device can be used in this build on this machine.
Status device_available(Device device);

// The device in words, "cpu" or cuda::device_description(index).
std::string device_description(Device device);

// Waits for the device's work; reports its first error.
Status synchronize(Device device);

// Memory on any device, aligned to 64 bytes at least; freed with its last copy. Much of it on the host comes in huge
// pages, where Linux gives them on request: what is read in the order of a block table otherwise waits for the look-up
// of addresses.
class Memory {
 public:
  // Zeroed. Zero bytes give no pointer.
  static Result<Memory> allocate(Device device, std::size_t bytes);
  static Result<Memory> copy_of(Device device, const void* host, std::size_t bytes);

  void* data() const { return data_.get(); }
  std::size_t bytes() const { return bytes_; }

 private:
  static Memory own(cuda::DeviceBuffer buffer);

  std::shared_ptr<void> data_;
  std::size_t bytes_ = 0;
};

}  // namespace quire
