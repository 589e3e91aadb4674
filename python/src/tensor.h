// quire.Tensor: a view of memory that another object owns, for arrays whose dtype their own library has no name for,
// and
// for the caches that quire allocates. It goes back out through DLPack and, where the dtype has a format there, through
// the buffer protocol.
#pragma once

#include <nanobind/nanobind.h>

#include "quire/tensor.h"

namespace quire::python {

struct PyTensor {
  Tensor tensor;
  nanobind::object keep;  // what keeps the memory alive
  bool read_only = false;
  bool bits = false;  // its buffer shows unsigned integers of as many bytes
};

// The PyTensor of a Python object; null where it is none.
const PyTensor* own_tensor(PyObject* object);

// A Python object for it.
nanobind::object make_tensor(const Tensor& tensor, nanobind::object keep, bool read_only = false);

void bind_tensor(nanobind::module_& module);

}  // namespace quire::python
