// A non-owning view of a strided array: pointer, dtype, device, shape, strides. Strides are int64, counted in elements
// of the dtype, and always read, never derived from the shape: NHD, HND, padded pages, K and V packed in one tensor and
// inline scales are all only strides. The fields say what DLPack's DLTensor says; `data` is its data plus byte_offset.
//
//   Tensor        what an op may write
//   ConstTensor   what an op only reads; a Tensor converts to it
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <type_traits>

#include "quire/export.h"

namespace quire {

enum class DType : std::uint8_t {
  kFloat32,
  kFloat16,
  kBFloat16,
  kFloat8E4M3,  // e4m3fn: no infinities, NaN is 0x7f and 0xff, largest value 448
  kFloat8E5M2,
  kInt8,
  kUInt8,
  kInt32,
  kInt64,
};

enum class DeviceType : std::uint8_t { kCpu, kCuda };

// Where memory is and an op runs. `index` counts the devices of a type as the CUDA runtime does; the CPU has index 0.
// An op runs on the device of its tensors and leaves the calling thread's current CUDA device as it was.
struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;

  static constexpr Device cpu() { return Device{}; }
  static constexpr Device cuda(int index = 0) { return Device{DeviceType::kCuda, index}; }

  constexpr bool is_cpu() const { return type == DeviceType::kCpu; }
  constexpr bool is_cuda() const { return type == DeviceType::kCuda; }
  friend constexpr bool operator==(const Device& a, const Device& b) { return a.type == b.type && a.index == b.index; }
  friend constexpr bool operator!=(const Device& a, const Device& b) { return !(a == b); }
};

constexpr std::size_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    default:
      return 1;
  }
}

constexpr std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat8E4M3:
      return "float8_e4m3fn";
    case DType::kFloat8E5M2:
      return "float8_e5m2";
    case DType::kInt8:
      return "int8";
    case DType::kUInt8:
      return "uint8";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
  }
  return "unknown";
}

constexpr std::string_view device_type_name(DeviceType type) {
  return type == DeviceType::kCpu ? "cpu" : type == DeviceType::kCuda ? "cuda" : "unknown";
}

// Data is void (Tensor) or const void (ConstTensor).
template <class Data>
struct BasicTensor {
  static constexpr int kMaxDims = 6;

  Data* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device;
  int ndim = 0;
  std::int64_t shape[kMaxDims] = {};
  std::int64_t strides[kMaxDims] = {};  // in elements

  // What may be written may be read.
  template <class D = Data, std::enable_if_t<!std::is_const_v<D>, int> = 0>
  operator BasicTensor<const D>() const {
    BasicTensor<const D> t;
    t.data = data;
    t.dtype = dtype;
    t.device = device;
    t.ndim = ndim;
    for (int i = 0; i < kMaxDims; ++i) {
      t.shape[i] = shape[i];
      t.strides[i] = strides[i];
    }
    return t;
  }

  // A default-constructed Tensor stands for "not given". A tensor of zero elements may have a null pointer and is
  // given.
  bool defined() const { return data != nullptr || ndim != 0; }

  // The product of the extents. Every op refuses a tensor where ndim is not 0 to kMaxDims, an extent is negative or the
  // product does not fit 63 bits; of such a tensor the result says nothing.
  std::int64_t numel() const {
    std::uint64_t n = 1;
    for (int i = 0; i < ndim && i < kMaxDims; ++i) n *= static_cast<std::uint64_t>(shape[i]);
    return static_cast<std::int64_t>(n);
  }

  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }

  // A dense row-major view. More than kMaxDims extents give a tensor of that ndim, which every op refuses.
  static BasicTensor contiguous(Data* data, DType dtype, std::initializer_list<std::int64_t> shape,
                                Device device = Device::cpu()) {
    BasicTensor t;
    t.data = data;
    t.dtype = dtype;
    t.device = device;
    for (std::int64_t extent : shape) {
      if (t.ndim < kMaxDims) t.shape[t.ndim] = extent;
      ++t.ndim;
    }
    std::uint64_t stride = 1;
    for (int i = (t.ndim < kMaxDims ? t.ndim : kMaxDims) - 1; i >= 0; --i) {
      t.strides[i] = static_cast<std::int64_t>(stride);
      stride *= static_cast<std::uint64_t>(t.shape[i]);
    }
    return t;
  }

  // A view with explicit strides (in elements). Lists of different lengths give a tensor with ndim -1, which every op
  // refuses.
  static BasicTensor strided(Data* data, DType dtype, std::initializer_list<std::int64_t> shape,
                             std::initializer_list<std::int64_t> strides, Device device = Device::cpu()) {
    BasicTensor t = contiguous(data, dtype, shape, device);
    if (strides.size() != shape.size()) t.ndim = -1;
    int i = 0;
    for (std::int64_t stride : strides) {
      if (i < kMaxDims) t.strides[i++] = stride;
    }
    return t;
  }

  // Elements [begin, end) of the last dimension: how K and V are viewed inside one packed tensor. The tensor itself
  // where ndim is not 1 to kMaxDims.
  BasicTensor slice_last(std::int64_t begin, std::int64_t end) const {
    using Byte = std::conditional_t<std::is_const_v<Data>, const std::uint8_t, std::uint8_t>;
    BasicTensor t = *this;
    if (ndim < 1 || ndim > kMaxDims) return t;
    const int last = ndim - 1;
    t.data = static_cast<Byte*>(data) + begin * strides[last] * static_cast<std::int64_t>(dtype_bytes(dtype));
    t.shape[last] = end - begin;
    return t;
  }
};

using Tensor = BasicTensor<void>;
using ConstTensor = BasicTensor<const void>;

// "[3, 16, 2, 64] float16 on cuda:0", for messages; "float16 of 7 dimensions" where ndim is not 0 to kMaxDims. The CPU
// is not named.
QUIRE_API std::string to_string(const ConstTensor& tensor);

// "cpu" or "cuda:1".
QUIRE_API std::string to_string(const Device& device);

}  // namespace quire
