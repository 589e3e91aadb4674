// The part of DLPack's ABI, version 1.3, that the reader of arguments needs: what a framework hands over as a tensor,
// in
// a capsule ("dltensor", or "dltensor_versioned" from version 1.0 on) or through the table of C functions that a tensor
// class carries as __dlpack_c_exchange_api__. Names and layouts are those of https://dmlc.github.io/dlpack.
#pragma once

#include <cstdint>

namespace quire::python::dlpack {

inline constexpr std::uint32_t kMajorVersion = 1, kMinorVersion = 3;
inline constexpr const char* kLegacyCapsule = "dltensor";
inline constexpr const char* kVersionedCapsule = "dltensor_versioned";
inline constexpr const char* kExchangeCapsule = "dlpack_exchange_api";

struct Version {
  std::uint32_t major, minor;
};

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };

struct Device {
  DeviceType type;
  std::int32_t index;
};

enum TypeCode : std::uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBFloat = 4,
  kBool = 6,
  kFloat8E4M3Fn = 10,
  kFloat8E5M2 = 12,
};

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null before version 1.2: dense
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* manager;
  void (*deleter)(ManagedTensor* self);
};

inline constexpr std::uint64_t kReadOnly = 1;  // of ManagedTensorVersioned::flags

struct ManagedTensorVersioned {
  Version version;
  void* manager;
  void (*deleter)(ManagedTensorVersioned* self);
  std::uint64_t flags;
  Tensor tensor;
};

// The functions return 0, or -1 with a Python exception set. NoSync: nothing waits for a stream.
struct ExchangeApi {
  struct Header {
    Version version;
    Header* previous;  // of an older major version
  } header;
  int (*allocate)(Tensor* prototype, ManagedTensorVersioned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*managed_tensor_from_object)(void* object, ManagedTensorVersioned** out);
  int (*object_from_managed_tensor)(ManagedTensorVersioned* tensor, void** out);
  int (*tensor_from_object)(void* object, Tensor* out);  // a view that the object owns; may be null
  int (*current_work_stream)(DeviceType type, std::int32_t index, void** stream);
};

}  // namespace quire::python::dlpack
