// KVCacheSpec and KVCacheLayout are dataclasses of quire/layout.py; these read and fill them, field by field.
#pragma once

#include <nanobind/nanobind.h>

#include "quire/layout.h"

namespace quire::python {

// Both throw a Python exception where there is none.
KVCacheSpec spec_of(nanobind::handle spec);
KVCacheLayout layout_of(nanobind::handle spec);

// The dtype of a name such as "bfloat16"; throws where it is none of quire's.
DType dtype_argument(const char* name, nanobind::handle value);

void bind_layout(nanobind::module_& module);

}  // namespace quire::python
