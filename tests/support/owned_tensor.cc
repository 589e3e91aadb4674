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

// Calls visit(address) of every element, in row-major order.
template <class Visit>
void OwnedTensor::for_each_element(const Visit& visit) {
  if (view.numel() == 0) return;
  const std::size_t element_bytes = dtype_bytes(view.dtype);
  std::int64_t index[Tensor::kMaxDims] = {};
  std::int64_t offset = 0;
  for (int i = view.ndim; i >= 0;) {
    visit(bytes.data() + static_cast<std::size_t>(offset) * element_bytes);
    for (i = view.ndim - 1; i >= 0; --i) {
      offset += view.strides[i];
      if (++index[i] < view.shape[i]) break;
      offset -= view.shape[i] * view.strides[i];
      index[i] = 0;
    }
  }
}

void OwnedTensor::fill(const std::vector<float>& values) {
  const float* x = values.data();
  for_each_element([&](std::uint8_t* element) {
    switch (view.dtype) {
      case DType::kFloat32:
        format::store_as(element, *x++);
        break;
      case DType::kFloat16:
        format::store_as(element, format::float_to_half(*x++));
        break;
      case DType::kBFloat16:
        format::store_as(element, format::float_to_bfloat16(*x++));
        break;
      case DType::kFloat8E4M3:
        *element = format::E4M3::encode(*x++);
        break;
      case DType::kFloat8E5M2:
        *element = format::E5M2::encode(*x++);
        break;
      default:
        std::abort();
    }
  });
}

void OwnedTensor::fill_integers(const std::vector<std::int64_t>& values) {
  const std::int64_t* x = values.data();
  for_each_element([&](std::uint8_t* element) {
    if (view.dtype == DType::kInt64) {
      format::store_as(element, *x++);
    } else if (view.dtype == DType::kInt32) {
      format::store_as(element, static_cast<std::int32_t>(*x++));
    } else {
      *element = static_cast<std::uint8_t>(*x++);
    }
  });
}

float OwnedTensor::get(std::int64_t i, std::int64_t j, std::int64_t k) const {
  return static_cast<float>(reference::element(view, i, j, k));
}

}  // namespace quire::testing
