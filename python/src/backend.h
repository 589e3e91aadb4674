// Backends written in Python: a C++ QuantKVBackend over an object of a class of quire/backend.py.
#pragma once

#include <nanobind/nanobind.h>

namespace quire::python {

void bind_backend(nanobind::module_& module);

}  // namespace quire::python
