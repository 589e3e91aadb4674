// The module quire._quire: libquire's C++ as Python. What users import is quire/__init__.py.
#include <nanobind/nanobind.h>

#include "backend.h"
#include "layout.h"
#include "modes.h"
#include "ops.h"
#include "plan.h"
#include "raise.h"
#include "tensor.h"
#include "views.h"

NB_MODULE(_quire, module) {
  using namespace quire::python;
  nanobind::set_leak_warnings(false);  // backends live for the life of the process, with whatever they hold
  if (!find_error_classes()) throw nanobind::python_error();
  bind_tensor(module);
  bind_modes(module);
  bind_layout(module);
  bind_views(module);
  bind_plan(module);
  bind_backend(module);
  bind_turboquant(module);
  if (!add_ops(module.ptr())) throw nanobind::python_error();
}
