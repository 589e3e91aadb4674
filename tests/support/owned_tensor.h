// A tensor that owns its memory. Rows of the last dimension are dense, and the other strides have gaps. Elements and
// gaps start as 0xFF bytes, which is NaN in every float. The buffer is exactly as long as it needs to be, so that
// AddressSanitizer notices one byte too many.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "cuda/device_memory.h"
#include "quire/tensor.h"

namespace quire::testing {

class OwnedTensor {
 public:
  OwnedTensor() = default;
  OwnedTensor(OwnedTensor&&) = default;  // a move keeps the memory, and so the view, where it is
  OwnedTensor& operator=(OwnedTensor&&) = default;
  // `gap` elements follow each row of the last dimension.
  OwnedTensor(DType dtype, std::vector<std::int64_t> shape, std::int64_t gap = 0);

  // Takes row-major values and converts them to the dtype.
  void fill(const std::vector<float>& values);
  void fill_integers(const std::vector<std::int64_t>& values);

  float get(std::int64_t i, std::int64_t j = 0, std::int64_t k = 0) const;

  Tensor view;
  std::vector<std::uint8_t> bytes;

 private:
  template <class Visit>
  void for_each_element(const Visit& visit);
};

// Calls edit(Tensor&) on each of some arguments, whether an op writes them or not.
template <class Edit>
void edit_all(std::initializer_list<cuda::TensorRef> tensors, const Edit& edit) {
  for (const cuda::TensorRef& tensor : tensors) tensor.edit(edit);
}

}  // namespace quire::testing
