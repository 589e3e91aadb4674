#include "core/checks.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <span>
#include <utility>

namespace quire::core {

using format::FormatInfo;
using format::MetaPlace;

namespace {

// Gives numbers as "[3, 64, 1]".
std::string list_of(std::span<const std::int64_t> values) {
  std::string list;
  for (std::int64_t value : values) list += (list.empty() ? "[" : ", ") + str(value);
  return list + "]";
}

}  // namespace

Status check_memory(const char* name, const ConstTensor& tensor) {
  if (tensor.numel() == 0) return {};
  if (tensor.data == nullptr) {
    return invalid_argument(std::string(name) + " is a null pointer with shape " + to_string(tensor) +
                            "; it must point to its elements");
  }
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % dtype_bytes(tensor.dtype) != 0) {
    return invalid_argument(std::string(name) + " is not aligned to its element size of " +
                            str(static_cast<std::int64_t>(dtype_bytes(tensor.dtype))) + " bytes");
  }
  return {};
}

Status check_dtype(const char* name, DType dtype, std::initializer_list<DType> supported) {
  if (std::ranges::find(supported, dtype) != supported.end()) return {};
  std::string names;
  for (DType one : supported) names += (names.empty() ? "" : ", ") + std::string(dtype_name(one));
  return invalid_argument(std::string(name) + " is " + std::string(dtype_name(dtype)) + "; supported: " + names);
}

Status check(const ConstTensor& tensor, const Expect& expect) {
  if (!tensor.defined()) {
    if (expect.optional) return {};
    return invalid_argument(std::string(expect.name) + " is not given; it must be " + expect.shape_text);
  }
  if (tensor.ndim != static_cast<int>(expect.shape.size())) {
    return invalid_argument(std::string(expect.name) + " is " + to_string(tensor) + "; it must have " +
                            str(std::ssize(expect.shape)) + " dimensions, " + expect.shape_text);
  }
  int dim = 0;
  for (std::int64_t extent : expect.shape) {
    if (extent != kAny && tensor.shape[dim] != extent) {
      std::string wanted;
      for (std::int64_t e : expect.shape)
        wanted += (wanted.empty() ? "" : ", ") + (e == kAny ? std::string("any") : str(e));
      return invalid_argument(std::string(expect.name) + " is " + to_string(tensor) + "; expected [" + wanted +
                              "], that is " + expect.shape_text);
    }
    ++dim;
  }
  QUIRE_RETURN_IF_ERROR(check_dtype(expect.name, tensor.dtype, expect.dtypes));
  QUIRE_RETURN_IF_ERROR(check_memory(expect.name, tensor));
  if (expect.dense_rows && tensor.shape[tensor.ndim - 1] > 1 && tensor.strides[tensor.ndim - 1] != 1) {
    return invalid_argument(std::string(expect.name) + " has stride " + str(tensor.strides[tensor.ndim - 1]) +
                            " in its last dimension; supported: 1");
  }
  return {};
}

Status check_device(const char* name, const char* verb, const Device& device) {
  if (device.is_cpu() && device.index == 0) return {};
  if (device.is_cuda() && device.index >= 0) return {};
  if (device.is_cpu() || device.is_cuda()) {
    return invalid_argument(std::string(name) + verb + to_string(device) + "; supported: cpu, and cuda:0 and up");
  }
  return invalid_argument(std::string(name) + verb + "an unknown device; supported: cpu and cuda");
}

Status check_extents(const char* name, const ConstTensor& tensor) {
  if (tensor.ndim < 0 || tensor.ndim > Tensor::kMaxDims) {
    return invalid_argument(std::string(name) + " has " + str(tensor.ndim) + " dimensions; supported: 0 to " +
                            str(Tensor::kMaxDims));
  }
  std::int64_t count = 1;  // of elements
  for (int dim = 0; dim < tensor.ndim; ++dim) {
    if (tensor.shape[dim] < 0) {
      return invalid_argument(std::string(name) + " is " + to_string(tensor) + "; an extent must not be negative");
    }
    if (tensor.shape[dim] > 1 && __builtin_mul_overflow(count, tensor.shape[dim], &count)) {
      return invalid_argument(std::string(name) + " is " + to_string(tensor) +
                              "; the product of its extents must be below 2^63");
    }
  }
  const auto element = static_cast<std::int64_t>(dtype_bytes(tensor.dtype));
  std::int64_t reach = 1;  // elements from the first to the farthest in memory, both counted
  for (int dim = 0; dim < tensor.ndim; ++dim) {
    if (tensor.shape[dim] <= 1) continue;
    std::int64_t distance = 0;
    std::int64_t bytes = 0;
    if (__builtin_mul_overflow(tensor.shape[dim] - 1, tensor.strides[dim], &distance) || distance == INT64_MIN ||
        __builtin_add_overflow(reach, std::abs(distance), &reach) || __builtin_mul_overflow(reach, element, &bytes)) {
      return invalid_argument(std::string(name) + " is " + to_string(tensor) + " with stride " +
                              str(tensor.strides[dim]) + " in dimension " + str(dim) +
                              "; its elements must lie within 2^63 bytes");
    }
  }
  return {};
}

Status check_apart(const char* name, const ConstTensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) return {};
  std::array<std::pair<std::int64_t, std::int64_t>, Tensor::kMaxDims> dims{};  // (distance of neighbours, extent)
  for (int dim = 0; dim < tensor.ndim; ++dim) {
    if (tensor.shape[dim] > 1) dims[dim] = {std::abs(tensor.strides[dim]), tensor.shape[dim]};
  }
  std::ranges::sort(dims);
  std::int64_t inside = 0;  // distance of the farthest element of the dimensions so far
  for (const auto& [distance, extent] : dims) {
    if (extent == 0) continue;
    if (distance <= inside) {
      return invalid_argument(std::string(name) + " is " + to_string(tensor) + " with strides " +
                              list_of({tensor.strides, static_cast<std::size_t>(tensor.ndim)}) +
                              ", where elements overlap; what is written must have an address for each element");
    }
    inside += (extent - 1) * distance;
  }
  return {};
}

Status check_count(const char* name, const ConstTensor& tensor, const char* what, std::int64_t value,
                   std::int64_t least) {
  if (value >= least && value <= INT32_MAX) return {};
  return invalid_argument(std::string(name) + " is " + to_string(tensor) + "; " + what + " must be between " +
                          str(least) + " and " + str(INT32_MAX));
}

Status check_head_size(const char* name, std::int64_t head_size) {
  if (head_size < format::kMinHeadSize || head_size > format::kMaxHeadSize) {
    return invalid_argument(std::string(name) + " is " + str(head_size) + "; supported: " + str(format::kMinHeadSize) +
                            " to " + str(format::kMaxHeadSize));
  }
  return {};
}

Status check_scale(const char* name, const ConstTensor& scale, std::int64_t num_kv_heads, std::int64_t batch) {
  if (!scale.defined()) return {};
  const bool one = scale.numel() == 1 && scale.ndim <= 2;
  const bool per_head = scale.ndim == 1 && scale.shape[0] == num_kv_heads;
  const bool per_sequence = batch >= 0 && scale.ndim == 2 && scale.shape[0] == batch && scale.shape[1] == num_kv_heads;
  if (!one && !per_head && !per_sequence) {
    return invalid_argument(std::string(name) + " is " + to_string(scale) + "; supported: one element, [num_kv_heads]" +
                            (batch >= 0 ? " or [batch, num_kv_heads], here [" + str(batch) + ", " : ", here [") +
                            str(num_kv_heads) + "]");
  }
  QUIRE_RETURN_IF_ERROR(check_dtype(name, scale.dtype, {DType::kFloat32}));
  return check_memory(name, scale);
}

Status mode_not_built(const ModeInfo& mode) {
  return unsupported("mode " + mode.name +
                     " is not in this build; configure with -DQUIRE_MODES=all or a list that names it");
}

Result<const ModeRow*> known_mode(ModeId id) {
  if (const ModeRow* mode = find_mode(id)) return mode;
  return not_found("mode id " + str(static_cast<std::int32_t>(id)) +
                   " is not a mode's; take ids from parse_kv_cache_dtype or register_mode");
}

Result<FormatPair> resolve(const ModeRow& mode, const ConstTensor& key_cache, const ConstTensor& value_cache) {
  if (!mode.compiled) return mode_not_built(mode);
  const FormatPair pair = formats_of(mode, key_cache.dtype, value_cache.dtype);
  if (pair.known()) return pair;
  if (mode.registered) {
    return unsupported("mode " + mode.name +
                       " was registered without a format quire can read or write; its backend must override the op");
  }
  return invalid_argument("key_cache is " + std::string(dtype_name(key_cache.dtype)) + " and value_cache " +
                          std::string(dtype_name(value_cache.dtype)) + "; mode " + mode.name +
                          " stores float32, float16 or bfloat16");
}

Status check_packing(const char* name, const FormatInfo& info, std::int64_t head_size) {
  if (head_size % info.unit == 0) return {};
  return invalid_argument("format " + std::string(info.name) + " packs " + str(info.unit) + " elements together, so " +
                          name + " must be a multiple of " + str(info.unit) + ", got " + str(head_size));
}

Status check_cache(const char* name, const ConstTensor& cache, const char* scale_name, const ConstTensor& scale_cache,
                   const FormatInfo& info, std::int64_t num_kv_heads, std::int64_t head_size, std::int64_t num_blocks,
                   std::int64_t block_size) {
  const auto element = static_cast<std::int64_t>(dtype_bytes(info.cache_dtype));
  // Bytes may always come as uint8.
  const bool as_bytes = element == 1 && cache.dtype == DType::kUInt8;
  QUIRE_RETURN_IF_ERROR(
      check(cache, {.name = name,
                    .dtypes = {as_bytes ? DType::kUInt8 : info.cache_dtype},
                    .shape = {num_blocks, block_size, num_kv_heads, info.row_bytes(head_size) / element},
                    .shape_text = "[num_blocks, block_size, num_kv_heads, row elements]",
                    .dense_rows = true}));
  if (info.meta_place == MetaPlace::kScaleCache) {
    return check(scale_cache, {.name = scale_name,
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

Status check_centre(const char* page_name, const ConstTensor& page_meta, const char* vector_name,
                    const ConstTensor& head_vector, const FormatInfo& info, std::int64_t num_blocks,
                    std::int64_t num_kv_heads, int head_size) {
  const auto unwanted = [&info](const char* name, const char* what) {
    return invalid_argument(std::string(name) + " is given, but rows of format " + std::string(info.name) +
                            " have no " + what + "; leave it out");
  };
  if (page_meta.defined() && info.centre != format::Centre::kPage) return unwanted(page_name, "metadata per page");
  if (head_vector.defined() && info.centre != format::Centre::kHead) return unwanted(vector_name, "vector per head");
  QUIRE_RETURN_IF_ERROR(check(page_meta, {.name = page_name,
                                          .dtypes = {DType::kUInt8},
                                          .shape = {num_blocks, num_kv_heads, info.page_bytes(head_size)},
                                          .shape_text = "[num_blocks, num_kv_heads, page bytes]",
                                          .optional = true,
                                          .dense_rows = true}));
  return check(head_vector, {.name = vector_name,
                             .dtypes = {DType::kFloat32},
                             .shape = {num_kv_heads, head_size},
                             .shape_text = "[num_kv_heads, head_size]",
                             .optional = true,
                             .dense_rows = true});
}

Status check_counter(const ConstTensor& counter, Device device) {
  if (!counter.defined()) return {};
  if (device.is_cpu()) {
    return invalid_argument(
        "error_counter is given, but on the CPU a bad index is refused before anything is written; leave it out");
  }
  return check(counter, {.name = "error_counter", .dtypes = {DType::kInt64}, .shape = {1}, .shape_text = "[1]"});
}

}  // namespace quire::core
