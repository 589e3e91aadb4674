// The ops as functions of the module: ops.cc, and those of TurboQuant in turboquant.cc.
#pragma once

#include <nanobind/nanobind.h>

#include "call.h"

namespace quire::python {

// The arguments of an op that needs nothing besides them.
template <class Args>
struct Call {
  Args args;
  StreamArgument stream;
};

PyObject* call_turboquant_store(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* keywords);
PyObject* call_turboquant_decode_attention(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* keywords);

bool add_ops(PyObject* module);
void bind_turboquant(nanobind::module_& module);

}  // namespace quire::python
