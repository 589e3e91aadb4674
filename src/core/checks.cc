#include "core/checks.h"

namespace quire::core {

using format::FormatInfo;
using format::MetaPlace;

Status check(const Tensor& tensor, Device device, const Expect& expect) {
  const std::string name = expect.name;
  if (!tensor.defined()) {
    if (expect.optional) return {};
    return invalid_argument(name + " is not given; it must be " + expect.shape_text);
  }
  if (tensor.ndim != static_cast<int>(expect.shape.size())) {
    return invalid_argument(name + " is " + to_string(tensor) + "; it must have " + str(std::ssize(expect.shape)) +
                            " dimensions, " + expect.shape_text);
  }
  int dim = 0;
  for (std::int64_t extent : expect.shape) {
    if (tensor.shape[dim] < 0 || (extent != kAny && tensor.shape[dim] != extent)) {
      std::string wanted;
      for (std::int64_t e : expect.shape)
        wanted += (wanted.empty() ? "" : ", ") + (e == kAny ? std::string("any") : str(e));
      return invalid_argument(name + " is " + to_string(tensor) + "; expected [" + wanted + "], that is " +
                              expect.shape_text);
    }
    ++dim;
  }
  bool dtype_ok = false;
  std::string wanted;
  for (DType dtype : expect.dtypes) {
    dtype_ok = dtype_ok || tensor.dtype == dtype;
    wanted += (wanted.empty() ? "" : ", ") + std::string(dtype_name(dtype));
  }
  if (!dtype_ok)
    return invalid_argument(name + " is " + std::string(dtype_name(tensor.dtype)) + "; supported: " + wanted);
  if (tensor.device != device) {
    return invalid_argument(name + " is on " + std::string(device_name(tensor.device)) +
                            ", but the call's other tensors are on " + std::string(device_name(device)) +
                            "; all must be on one device");
  }
  if (tensor.numel() > 0 && tensor.data == nullptr) {
    return invalid_argument(name + " is a null pointer with shape " + to_string(tensor) +
                            "; it must point to its elements");
  }
  if (tensor.numel() > 0 && reinterpret_cast<std::uintptr_t>(tensor.data) % dtype_bytes(tensor.dtype) != 0) {
    return invalid_argument(name + " is not aligned to its element size of " +
                            str(static_cast<std::int64_t>(dtype_bytes(tensor.dtype))) + " bytes");
  }
  if (expect.dense_rows && tensor.shape[tensor.ndim - 1] > 1 && tensor.strides[tensor.ndim - 1] != 1) {
    return invalid_argument(name + " has stride " + str(tensor.strides[tensor.ndim - 1]) +
                            " in its last dimension; supported: 1");
  }
  return {};
}

Status check_head_size(const char* name, std::int64_t head_size) {
  if (head_size < format::kMinHeadSize || head_size > format::kMaxHeadSize) {
    return invalid_argument(std::string(name) + " is " + str(head_size) + "; supported: " + str(format::kMinHeadSize) +
                            " to " + str(format::kMaxHeadSize));
  }
  return {};
}

Status check_scale(const char* name, const Tensor& scale, Device device, std::int64_t num_kv_heads,
                   std::int64_t batch) {
  if (!scale.defined()) return {};
  const bool one = scale.numel() == 1 && scale.ndim <= 2;
  const bool per_head = scale.ndim == 1 && scale.shape[0] == num_kv_heads;
  const bool per_sequence = batch >= 0 && scale.ndim == 2 && scale.shape[0] == batch && scale.shape[1] == num_kv_heads;
  if (!one && !per_head && !per_sequence) {
    return invalid_argument(std::string(name) + " is " + to_string(scale) + "; supported: one element, [num_kv_heads]" +
                            (batch >= 0 ? " or [batch, num_kv_heads], here [" + str(batch) + ", " : ", here [") +
                            str(num_kv_heads) + "]");
  }
  if (scale.dtype != DType::kFloat32) {
    return invalid_argument(std::string(name) + " is " + std::string(dtype_name(scale.dtype)) + "; supported: float32");
  }
  if (scale.device != device) {
    return invalid_argument(std::string(name) + " is on " + std::string(device_name(scale.device)) +
                            ", but the call's other tensors are on " + std::string(device_name(device)));
  }
  if (scale.data == nullptr) return invalid_argument(std::string(name) + " is a null pointer");
  return {};
}

Result<FormatPair> resolve(ModeId id, const Tensor& key_cache, const Tensor& value_cache) {
  const Result<ModeInfo> mode = mode_info(id);
  if (!mode) return mode.status();
  if (!mode->compiled) {
    return unsupported("mode " + mode->name +
                       " is not in this build; configure with -DQUIRE_MODES=all or a list that names it");
  }
  const FormatPair pair = formats_of(*mode, key_cache.dtype, value_cache.dtype);
  if (pair.known()) return pair;
  if (mode->registered) {
    return unsupported("mode " + mode->name +
                       " was registered without a format quire can read or write; its backend must override the op");
  }
  return invalid_argument("key_cache is " + std::string(dtype_name(key_cache.dtype)) + " and value_cache " +
                          std::string(dtype_name(value_cache.dtype)) + "; mode " + mode->name +
                          " stores float32, float16 or bfloat16");
}

Status check_packing(const char* name, const FormatInfo& info, std::int64_t head_size) {
  if (head_size % info.unit == 0) return {};
  return invalid_argument("format " + std::string(info.name) + " packs " + str(info.unit) + " elements together, so " +
                          name + " must be a multiple of " + str(info.unit) + ", got " + str(head_size));
}

Status check_cache(const char* name, const Tensor& cache, const char* scale_name, const Tensor& scale_cache,
                   Device device, const FormatInfo& info, std::int64_t num_kv_heads, std::int64_t head_size,
                   std::int64_t num_blocks, std::int64_t block_size) {
  const auto element = static_cast<std::int64_t>(dtype_bytes(info.cache_dtype));
  // Bytes may always come as uint8.
  const bool as_bytes = element == 1 && cache.dtype == DType::kUInt8;
  QUIRE_RETURN_IF_ERROR(check(cache, device,
                              {.name = name,
                               .dtypes = {as_bytes ? DType::kUInt8 : info.cache_dtype},
                               .shape = {num_blocks, block_size, num_kv_heads, info.row_bytes(head_size) / element},
                               .shape_text = "[num_blocks, block_size, num_kv_heads, row elements]",
                               .dense_rows = true}));
  if (info.meta_place == MetaPlace::kScaleCache) {
    return check(scale_cache, device,
                 {.name = scale_name,
                  .dtypes = {DType::kFloat32},
                  .shape = {num_blocks, block_size, num_kv_heads},
                  .shape_text = "[num_blocks, block_size, num_kv_heads]"});
  }
  if (scale_cache.defined()) {
    return invalid_argument(std::string(scale_name) + " is given, but format " + std::string(info.name) +
                            " has no scale cache; leave it out");
  }
  return {};
}

Status check_counter(const Tensor& counter, Device device) {
  if (!counter.defined()) return {};
  if (device == Device::kCpu) {
    return invalid_argument(
        "error_counter is given, but on the CPU a bad index is refused before anything is written; leave it out");
  }
  return check(counter, device,
               {.name = "error_counter", .dtypes = {DType::kInt64}, .shape = {1}, .shape_text = "[1]"});
}

}  // namespace quire::core
