#include "call.h"

#include <cmath>
#include <limits>
#include <string>

#include "modes.h"
#include "plan.h"
#include "raise.h"
#include "reader.h"
#include "views.h"

namespace quire::python {
namespace {

thread_local CurrentCall current;

bool refuse_kind(const char* name, const char* expected) {
  PyErr_Clear();
  PyErr_SetString(PyExc_TypeError, (std::string(name) + " must be " + expected).c_str());
  return false;
}

bool take_bool(const char* name, PyObject* value, bool* to) {
  if (value == Py_True || value == Py_False) {
    *to = value == Py_True;
    return true;
  }
  // NumPy's bool is neither a bool nor a number; an array of several elements is no answer.
  PyObject* type = PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(value)), "__name__");
  const char* type_name = type == nullptr ? nullptr : PyUnicode_AsUTF8AndSize(type, nullptr);
  const bool accepted = type_name != nullptr && std::string_view(type_name).substr(0, 4) == "bool";
  Py_XDECREF(type);
  const int truth = accepted || PyLong_Check(value) != 0 ? PyObject_IsTrue(value) : -1;
  if (truth < 0) return refuse_kind(name, "a bool");
  *to = truth != 0;
  return true;
}

template <class Int>
bool take_int(const char* name, PyObject* value, Int* to) {
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
  if (overflow != 0 || number < std::numeric_limits<Int>::min() || number > std::numeric_limits<Int>::max()) {
    return refuse(std::string(name) + " does not fit in " + std::to_string(sizeof(Int) * 8) + " bits");
  }
  if (number == -1 && PyErr_Occurred() != nullptr) return refuse_kind(name, "a whole number");
  *to = static_cast<Int>(number);
  return true;
}

bool take_float(const char* name, PyObject* value, float* to) {
  const double number = PyFloat_AsDouble(value);
  if (number == -1 && PyErr_Occurred() != nullptr) return refuse_kind(name, "a number");
  *to = static_cast<float>(number);
  return true;
}

// The stream and the mode are resolved after the other parameters, which may know them.
struct Later {
  const Parameter* mode = nullptr;
  bool mode_given = false;
  void* stream = nullptr;
  const PyViews* cache = nullptr;
};

bool take(const Parameter& parameter, PyObject* value, void* field, Reader& reader, Later& later) {
  switch (parameter.kind) {
    case Kind::kRead:
      return reader.read(parameter.name, value, static_cast<ConstTensor*>(field));
    case Kind::kWritten:
      return reader.read(parameter.name, value, true, static_cast<Tensor*>(field));
    case Kind::kBool:
      return take_bool(parameter.name, value, static_cast<bool*>(field));
    case Kind::kInt:
      return take_int(parameter.name, value, static_cast<int*>(field));
    case Kind::kInt64:
      return take_int(parameter.name, value, static_cast<std::int64_t*>(field));
    case Kind::kFloat:
      return take_float(parameter.name, value, static_cast<float*>(field));
    case Kind::kMode:
      later.mode_given = true;
      return mode_of(value, static_cast<ModeId*>(field));
    case Kind::kStoreCache:
    case Kind::kReadCache:
      later.cache = views_of(value);
      if (later.cache == nullptr) return false;
      if (parameter.kind == Kind::kReadCache) {
        *static_cast<ConstKVCacheViews*>(field) = later.cache->views;
        return true;
      }
      if (later.cache->read_only != nullptr) {
        return refuse(std::string(later.cache->read_only) + " is read-only, and the call writes to it");
      }
      *static_cast<KVCacheViews*>(field) = later.cache->views;
      return true;
    case Kind::kPlan:
      return plan_of(value, static_cast<const AttentionPlan**>(field));
    case Kind::kStream:
      return true;
  }
  return true;
}

bool resolve_mode(const Later& later, void* call) {
  if (later.mode == nullptr) return true;
  auto* mode = static_cast<ModeId*>(later.mode->field(call));
  const bool cache_knows = later.cache != nullptr && later.cache->mode.has_value();
  if (!later.mode_given && !cache_knows) {
    return refuse("mode is not given, and cache was made without one; name a kv_cache_dtype");
  }
  if (later.mode_given && cache_knows && *mode != *later.cache->mode) {
    return refuse("mode is " + mode_name(*mode) + ", but cache is of mode " + mode_name(*later.cache->mode));
  }
  if (!later.mode_given) *mode = *later.cache->mode;
  return true;
}

}  // namespace

const CurrentCall& current_call() { return current; }

int Signature::index_of(PyObject* keyword, std::size_t expected) const {
  const std::size_t count = parameters_.size();
  for (std::size_t i = 0; i < count; ++i) {  // in most calls the keywords come in the order of the table
    const std::size_t at = expected + i < count ? expected + i : expected + i - count;
    if (names_[at] == keyword) return static_cast<int>(at);
  }
  for (std::size_t i = 0; i < count; ++i) {
    if (PyUnicode_Compare(names_[i], keyword) == 0) return static_cast<int>(i);
  }
  return -1;
}

bool Signature::sort(PyObject* const* arguments, Py_ssize_t count, PyObject* keywords, PyObject** slots) const {
  if (names_[0] == nullptr) {
    for (std::size_t i = parameters_.size(); i-- > 0;) names_[i] = PyUnicode_InternFromString(parameters_[i].name);
  }
  const auto type_error = [&](const std::string& sentence) {
    PyErr_SetString(PyExc_TypeError, (std::string(function_) + "() " + sentence).c_str());
    return false;
  };
  const auto given = static_cast<std::size_t>(count);
  if (given > num_required_) {
    return type_error("takes " + std::to_string(num_required_) + " arguments by position, and got " +
                      std::to_string(given) + "; the others are given by name");
  }
  for (std::size_t i = 0; i < given; ++i) slots[i] = arguments[i];
  const Py_ssize_t num_keywords = keywords == nullptr ? 0 : PyTuple_Size(keywords);
  std::size_t expected = given;
  for (Py_ssize_t i = 0; i < num_keywords; ++i) {
    PyObject* keyword = PyTuple_GetItem(keywords, i);
    const int at = index_of(keyword, expected);
    if (at < 0 || slots[at] != nullptr) {
      const char* text = PyUnicode_AsUTF8AndSize(keyword, nullptr);
      return type_error(std::string(at < 0 ? "has no argument '" : "got twice the argument '") +
                        (text == nullptr ? "" : text) + "'");
    }
    slots[at] = arguments[count + i];
    expected = static_cast<std::size_t>(at) + 1;
  }
  for (std::size_t i = given; i < num_required_; ++i) {
    if (slots[i] == nullptr) return type_error(std::string("needs the argument '") + parameters_[i].name + "'");
  }
  return true;
}

PyObject* Signature::run(void* call, PyObject* const* arguments, Py_ssize_t count, PyObject* keywords,
                         Status (*op)(void*), void* body) const {
  PyObject* slots[kMost] = {};
  if (!sort(arguments, count, keywords, slots)) return nullptr;
  PyObject* stream_argument = nullptr;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    if (parameters_[i].kind == Kind::kStream) stream_argument = slots[i];
  }
  Reader reader(stream_argument);
  Later later;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& parameter = parameters_[i];
    if (parameter.kind == Kind::kMode) later.mode = &parameter;
    if (parameter.kind == Kind::kStream) later.stream = parameter.field(call);
    if (slots[i] == nullptr || slots[i] == Py_None) continue;
    if (!take(parameter, slots[i], parameter.field(call), reader, later)) return nullptr;
  }
  if (!reader.finish() || !resolve_mode(later, call)) return nullptr;
  if (later.stream != nullptr) static_cast<StreamArgument*>(later.stream)->value = reader.stream();

  const CurrentCall outer = std::exchange(current, CurrentCall{this, slots});
  const Status status = without_gil([&] { return op(body); });
  current = outer;
  if (!status) return raise(status);
  drop_cause();
  return Py_NewRef(Py_None);
}

}  // namespace quire::python
