// quire.AttentionPlan, and AttentionProblem, which is a dataclass of quire/plan.py.
#pragma once

#include <nanobind/nanobind.h>

#include "quire/plan.h"

namespace quire::python {

// The plan of a Python object; false with a Python exception set where it is none.
bool plan_of(PyObject* object, const AttentionPlan** plan);

// The fields of a problem, for the dataclass; a plan for it.
nanobind::dict dict_of(const AttentionProblem& problem);

void bind_plan(nanobind::module_& module);

}  // namespace quire::python
