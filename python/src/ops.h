// The ops as functions of the module.
#pragma once

#include <Python.h>

namespace quire::python {

bool add_ops(PyObject* module);

}  // namespace quire::python
