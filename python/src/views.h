// quire.KVCacheViews: the arrays of a cache, read once and passed to both ops.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <optional>

#include "quire/layout.h"

namespace quire::python {

struct PyViews {
  static constexpr std::size_t kParts = 8;

  KVCacheViews views;
  std::optional<ModeId> mode;                         // where the views know it
  std::array<nanobind::object, kParts> arrays, keep;  // as they were given; what keeps their memory alive
  const char* read_only = nullptr;                    // the first of the arrays that cannot be written
};

// The PyViews of a Python object; null, with a Python exception set, where it is none.
const PyViews* views_of(PyObject* object);

// A Python object for views whose arrays all live in the memory of `keep`.
nanobind::object make_views_object(const KVCacheViews& views, ModeId mode, const nanobind::object& keep);

void bind_views(nanobind::module_& module);

}  // namespace quire::python
