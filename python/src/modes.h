// Modes, by their names: Python knows no ModeId.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "quire/mode.h"

namespace quire::python {

// The mode of a str; false with a Python exception set where there is none. Names are looked up once.
bool mode_of(PyObject* name, ModeId* mode);

std::string mode_name(ModeId mode);

// Throws the Python exception of a Status that is not ok.
[[noreturn]] void throw_status(const Status& status);
inline void check(const Status& status) {
  if (!status) throw_status(status);
}
template <class T>
T value_of(Result<T> result) {
  if (!result) throw_status(result.status());
  return std::move(*result);
}

void bind_modes(nanobind::module_& module);

}  // namespace quire::python
