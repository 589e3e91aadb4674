// A tensor of any number of dimensions is a list of rows here: a row runs along the last dimension.
#pragma once

#include <cstdint>

#include "format/exact.h"
#include "quire/tensor.h"

namespace quire::attention {

// This is plain data, which a kernel can take. Strides are in bytes.
struct RowList {
  std::int64_t shape[Tensor::kMaxDims] = {};  // of the dimensions before the last, the rest 1
  std::int64_t strides[Tensor::kMaxDims] = {};
  std::int64_t element_stride = 0;
  DType dtype = DType::kFloat32;

  // Counts the bytes from the first element to row `index`, in row-major order.
  QUIRE_HD std::int64_t offset(std::int64_t index) const {
    std::int64_t bytes = 0;
    for (int dim = Tensor::kMaxDims - 1; dim >= 0; --dim) {
      bytes += index % shape[dim] * strides[dim];
      index /= shape[dim];
    }
    return bytes;
  }
};

inline RowList row_list(const ConstTensor& tensor) {
  RowList list;
  const auto bytes = static_cast<std::int64_t>(dtype_bytes(tensor.dtype));
  list.dtype = tensor.dtype;
  list.element_stride = tensor.strides[tensor.ndim - 1] * bytes;
  for (int dim = 0; dim < Tensor::kMaxDims; ++dim) {
    const bool given = dim < tensor.ndim - 1;
    list.shape[dim] = given ? tensor.shape[dim] : 1;
    list.strides[dim] = given ? tensor.strides[dim] * bytes : 0;
  }
  return list;
}

}  // namespace quire::attention
