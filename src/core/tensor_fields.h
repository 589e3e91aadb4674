// The tensors of an op's arguments as a table: names and members, in the order of the struct. Each op's file lists its
// own (validate_store.cc, ..); what holds for every tensor of every op is written here once, over such a table.
#pragma once

#include <cstddef>
#include <string>

#include "core/checks.h"
#include "quire/status.h"
#include "quire/tensor.h"

namespace quire::core {

template <class Args>
struct TensorField {
  const char* name;
  Tensor Args::*tensor;
};

// What every tensor must be (check_extents), and that all lie where the first one given does.
template <class Args, std::size_t kSize>
Status check_tensors(const Args& args, const TensorField<Args> (&fields)[kSize]) {
  const TensorField<Args>* first = nullptr;
  for (const TensorField<Args>& field : fields) {
    const Tensor& tensor = args.*field.tensor;
    if (!tensor.defined()) continue;
    QUIRE_RETURN_IF_ERROR(check_extents(field.name, tensor));
    if (tensor.device != Device::kCpu && tensor.device != Device::kCuda) {
      return invalid_argument(std::string(field.name) + " is on an unknown device; supported: cpu and cuda");
    }
    if (first == nullptr) first = &field;
    if (const Device device = (args.*first->tensor).device; tensor.device != device) {
      return invalid_argument(std::string(field.name) + " is on " + std::string(device_name(tensor.device)) + ", but " +
                              first->name + " is on " + std::string(device_name(device)) +
                              "; all tensors of a call must be on one device");
    }
  }
  return {};
}

// What drop_idle_strides of validate.h does.
template <class Args, std::size_t kSize>
Args drop_idle_strides(const Args& args, const TensorField<Args> (&fields)[kSize]) {
  Args copy = args;
  for (const TensorField<Args>& field : fields) {
    Tensor& tensor = copy.*field.tensor;
    for (int dim = 0; dim < tensor.ndim; ++dim) {
      if (tensor.shape[dim] <= 1) tensor.strides[dim] = 0;
    }
  }
  return copy;
}

}  // namespace quire::core
