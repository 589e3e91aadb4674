#include "plan.h"

#include <nanobind/stl/string.h>

#include <string>

#include "call.h"
#include "docs.h"
#include "layout.h"
#include "modes.h"
#include "raise.h"

namespace nb = nanobind;

namespace quire::python {
namespace {

PyTypeObject* plan_type = nullptr;

template <class T>
struct Field {
  const char* name;
  T AttentionProblem::*member;
};
constexpr Field<int> kInts[] = {
    {"num_q_heads", &AttentionProblem::num_q_heads}, {"num_kv_heads", &AttentionProblem::num_kv_heads},
    {"head_size", &AttentionProblem::head_size},     {"head_size_v", &AttentionProblem::head_size_v},
    {"block_size", &AttentionProblem::block_size},   {"row_alignment", &AttentionProblem::row_alignment},
    {"num_splits", &AttentionProblem::num_splits},
};
constexpr Field<std::int64_t> kBounds[] = {
    {"max_num_tokens", &AttentionProblem::max_num_tokens},
    {"max_batch", &AttentionProblem::max_batch},
    {"max_query_len", &AttentionProblem::max_query_len},
    {"max_seq_len", &AttentionProblem::max_seq_len},
};
constexpr Field<bool> kFlags[] = {
    {"whole_pages", &AttentionProblem::whole_pages},
    {"has_centre", &AttentionProblem::has_centre},
    {"batch_invariant", &AttentionProblem::batch_invariant},
};
constexpr Field<DType> kDTypes[] = {
    {"query_dtype", &AttentionProblem::query_dtype},
    {"key_cache_dtype", &AttentionProblem::key_cache_dtype},
    {"value_cache_dtype", &AttentionProblem::value_cache_dtype},
};

template <class T>
T number_of(nb::handle object, const char* name) {
  T value{};
  if (!nb::try_cast(object.attr(name), value)) {
    throw_status(invalid_argument(std::string(name) + " is " + nb::cast<std::string>(nb::repr(object.attr(name))) +
                                  ", which is no number of its kind"));
  }
  return value;
}

// "cpu", "cuda" or "cuda:1", or what prints so (torch.device).
Device device_argument(nb::handle value) {
  const std::string text = nb::cast<std::string>(nb::str(value));
  if (text == "cpu") return Device::cpu();
  if (text == "cuda") return Device::cuda(0);
  if (text.starts_with("cuda:") && text.size() > 5 && text.size() < 9 &&
      text.find_first_not_of("0123456789", 5) == std::string::npos) {
    return Device::cuda(std::stoi(text.substr(5)));
  }
  throw_status(invalid_argument("device is '" + text + "'; supported: cpu, cuda and cuda:<index>"));
}

AttentionProblem problem_from(nb::handle given) {
  AttentionProblem problem;
  problem.device = device_argument(given.attr("device"));
  const nb::object arch = given.attr("arch");
  if (!arch.is_none()) {
    problem.arch = {number_of<int>(arch, "major"), number_of<int>(arch, "minor"),
                    number_of<int>(arch, "num_multiprocessors"), number_of<int>(arch, "shared_bytes")};
  } else if (problem.device.is_cuda()) {
    problem.arch = value_of(device_arch(problem.device));
  }
  if (!mode_of(nb::object(given.attr("mode")).ptr(), &problem.mode)) throw nb::python_error();
  for (const auto& field : kInts) problem.*field.member = number_of<int>(given, field.name);
  for (const auto& field : kBounds) problem.*field.member = number_of<std::int64_t>(given, field.name);
  for (const auto& field : kFlags) problem.*field.member = number_of<bool>(given, field.name);
  for (const auto& field : kDTypes) problem.*field.member = dtype_argument(field.name, given.attr(field.name));
  return problem;
}

nb::tuple tuple_of(const Arch& arch) {
  return nb::make_tuple(arch.major, arch.minor, arch.num_multiprocessors, arch.shared_bytes);
}

}  // namespace

nb::dict dict_of(const AttentionProblem& problem) {
  nb::dict fields;
  fields["device"] = to_string(problem.device);
  fields["arch"] = tuple_of(problem.arch);
  fields["mode"] = mode_name(problem.mode);
  for (const auto& field : kInts) fields[field.name] = problem.*field.member;
  for (const auto& field : kBounds) fields[field.name] = problem.*field.member;
  for (const auto& field : kFlags) fields[field.name] = problem.*field.member;
  for (const auto& field : kDTypes) fields[field.name] = std::string(dtype_name(problem.*field.member));
  return fields;
}

bool plan_of(PyObject* object, const AttentionPlan** plan) {
  if (Py_TYPE(object) != plan_type) {
    PyErr_SetString(PyExc_TypeError, "plan must be a quire.AttentionPlan, from plan_unified_attention");
    return false;
  }
  *plan = nb::inst_ptr<AttentionPlan>(nb::handle(object));
  return true;
}

void bind_plan(nb::module_& module) {
  auto plan = nb::class_<AttentionPlan>(module, "AttentionPlan", docs::AttentionPlan)
                  .def_prop_ro("workspace_bytes", &AttentionPlan::workspace_bytes, docs::AttentionPlan_workspace_bytes)
                  .def_prop_ro("tensor_cores", &AttentionPlan::tensor_cores, docs::AttentionPlan_tensor_cores)
                  .def("describe", &AttentionPlan::describe, docs::AttentionPlan_describe)
                  .def_prop_ro(
                      "problem",
                      [](const AttentionPlan& self) {
                        return nb::module_::import_("quire.plan").attr("problem_from")(dict_of(self.problem()));
                      },
                      docs::AttentionPlan_problem)
                  .def("__repr__", [](const AttentionPlan& self) { return "AttentionPlan(" + self.describe() + ")"; });
  plan_type = reinterpret_cast<PyTypeObject*>(plan.ptr());
  module.def(
      "plan_unified_attention",
      [](nb::handle problem) {
        const AttentionProblem known = problem_from(problem);
        return value_of(without_gil([&] { return plan_unified_attention(known); }));
      },
      nb::arg("problem"), docs::plan_unified_attention);
  module.def(
      "supports",
      [](nb::handle problem) {
        const AttentionSupport support = [&] {
          const AttentionProblem known = problem_from(problem);
          return value_of(without_gil([&] { return supports(known); }));
        }();
        return nb::make_tuple(support.tensor_cores, support.workspace_bytes);
      },
      nb::arg("problem"), docs::supports);
  module.def(
      "device_arch", [](nb::handle device) { return tuple_of(value_of(device_arch(device_argument(device)))); },
      nb::arg("device"), docs::device_arch);
  module.def(
      "device_count",
      [](const std::string& type) { return value_of(device_count(device_argument(nb::cast(type)).type)); },
      nb::arg("type"), docs::device_count);
}

}  // namespace quire::python
