#include "support/owned_tensor.h"

#include <cstdlib>

#include "format/float_types.h"
#include "reference/attention.h"

namespace quire::testing {

OwnedTensor::OwnedTensor(DType dtype, std::vector<std::int64_t> shape, std::int64_t gap) {
  view.dtype = dtype;
  for (std::int64_t extent : shape) view.shape[view.ndim++] = extent;
  std::int64_t stride = 1;
  std::int64_t last = 0;  // index of the last element
  for (int i = view.ndim - 1; i >= 0; --i) {
    view.strides[i] = stride;
    last += (view.shape[i] - 1) * stride;
    stride *= view.shape[i];
    if (i == view.ndim - 1 && view.ndim > 1) stride += gap;
  }
  const std::int64_t elements = view.numel() == 0 ? 0 : last + 1;
  bytes.assign(static_cast<std::size_t>(elements) * dtype_bytes(dtype), 0xFF);
  view.data = bytes.data();
}

// Byte address of the n-th element in row-major order.
std::uint8_t* OwnedTensor::at(std::int64_t n) {
  std::int64_t offset = 0;
  for (int i = view.ndim - 1; i >= 0; --i) {
    offset += n % view.shape[i] * view.strides[i];
    n /= view.shape[i];
  }
  return bytes.data() + static_cast<std::size_t>(offset) * dtype_bytes(view.dtype);
}

void OwnedTensor::fill(const std::vector<float>& values) {
  for (std::int64_t n = 0; n < view.numel(); ++n) {
    const float x = values[static_cast<std::size_t>(n)];
    switch (view.dtype) {
      case DType::kFloat32:
        format::store_as(at(n), x);
        break;
      case DType::kFloat16:
        format::store_as(at(n), format::float_to_half(x));
        break;
      case DType::kBFloat16:
        format::store_as(at(n), format::float_to_bfloat16(x));
        break;
      case DType::kFloat8E4M3:
        *at(n) = format::E4M3::encode(x);
        break;
      case DType::kFloat8E5M2:
        *at(n) = format::E5M2::encode(x);
        break;
      default:
        std::abort();
    }
  }
}

void OwnedTensor::fill_integers(const std::vector<std::int64_t>& values) {
  for (std::int64_t n = 0; n < view.numel(); ++n) {
    const std::int64_t x = values[static_cast<std::size_t>(n)];
    if (view.dtype == DType::kInt64) {
      format::store_as(at(n), x);
    } else if (view.dtype == DType::kInt32) {
      format::store_as(at(n), static_cast<std::int32_t>(x));
    } else {
      *at(n) = static_cast<std::uint8_t>(x);
    }
  }
}

float OwnedTensor::get(std::int64_t i, std::int64_t j, std::int64_t k) const {
  return static_cast<float>(reference::element(view, i, j, k));
}

}  // namespace quire::testing
