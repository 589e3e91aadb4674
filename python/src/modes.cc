#include "modes.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "docs.h"
#include "quire/executor.h"
#include "quire/ops.h"
#include "quire/version.h"
#include "raise.h"

namespace nb = nanobind;

namespace quire::python {
namespace {

nb::dict dict_of(const ModeInfo& mode) {
  nb::dict info;
  info["name"] = mode.name;
  info["aliases"] = nb::tuple(nb::cast(mode.aliases));
  info["kv_quant_mode"] = mode.kv_quant_mode ? nb::cast(static_cast<int>(*mode.kv_quant_mode)) : nb::none();
  info["key_format"] = mode.key_format;
  info["value_format"] = mode.value_format;
  info["shared_slot"] = mode.shared_slot;
  info["compiled"] = mode.compiled;
  info["registered"] = mode.registered;
  info["composed"] = mode.composed;
  return info;
}

nb::list modes() {
  nb::list all;
  for (const ModeInfo& mode : list_modes()) all.append(dict_of(mode));
  return all;
}

nb::dict info_of(const std::string& name) {
  return dict_of(*value_of(mode_info(value_of(parse_kv_cache_dtype(name)))));
}

KVQuantMode enum_of(int value) { return static_cast<KVQuantMode>(value); }

}  // namespace

bool mode_of(PyObject* name, ModeId* mode) {
  static PyObject* const known = PyDict_New();
  if (PyUnicode_Check(name) == 0) {
    PyErr_SetString(PyExc_TypeError, "mode must be a str, the name of a kv_cache_dtype such as 'int4_per_token_head'");
    return false;
  }
  PyObject* number = PyDict_GetItemWithError(known, name);
  if (number != nullptr) {
    *mode = static_cast<ModeId>(PyLong_AsLong(number));
    return true;
  }
  Py_ssize_t length = 0;
  const char* text = PyErr_Occurred() != nullptr ? nullptr : PyUnicode_AsUTF8AndSize(name, &length);
  if (text == nullptr) return false;
  const Result<ModeId> found = parse_kv_cache_dtype({text, static_cast<std::size_t>(length)});
  if (!found) {
    raise(found.status());
    return false;
  }
  *mode = *found;
  number = PyLong_FromLong(static_cast<long>(*found));
  const bool kept = number != nullptr && PyDict_SetItem(known, name, number) == 0;
  Py_XDECREF(number);
  return kept;
}

std::string mode_name(ModeId mode) {
  const Result<const ModeInfo*> info = mode_info(mode);
  return info ? (*info)->name : "unknown";
}

void throw_status(const Status& status) {
  raise(status);
  throw nb::python_error();
}

void bind_modes(nb::module_& module) {
  module.def("modes", &modes, docs::modes);
  module.def("mode_info", &info_of, nb::arg("name"), docs::mode_info);
  module.def(
      "register_mode",
      [](const std::string& name, const std::vector<std::string>& aliases) {
        value_of(register_mode({name, aliases}));
      },
      nb::arg("name"), nb::arg("aliases") = nb::tuple(), docs::register_mode);
  module.def(
      "packing_factor", [](int value) { return value_of(packing_factor(enum_of(value))); }, nb::arg("value"),
      docs::packing_factor);
  module.def(
      "packed_head_size",
      [](int value, int head_size) { return value_of(packed_head_size(enum_of(value), head_size)); }, nb::arg("value"),
      nb::arg("head_size"), docs::packed_head_size);
  module.def(
      "get_kv_quant_mode", [](const std::string& name) { return static_cast<int>(get_kv_quant_mode(name)); },
      nb::arg("kv_cache_dtype"), docs::get_kv_quant_mode);
  module.def(
      "mode_from_kv_quant_mode", [](int value) { return mode_name(value_of(mode_from_kv_quant_mode(enum_of(value)))); },
      nb::arg("value"), docs::mode_from_kv_quant_mode);
  module.def(
      "set_num_threads", [](int num_threads) { check(set_num_threads(num_threads)); }, nb::arg("num_threads"),
      docs::set_num_threads);
  module.def(
      "num_threads", [] { return num_threads(); }, docs::num_threads);
  module.def(
      "version", [] { return version(); }, docs::version);
}

}  // namespace quire::python
