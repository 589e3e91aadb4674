#include "raise.h"

#include <array>
#include <utility>

namespace quire::python {
namespace {

struct ErrorClass {
  StatusCode code;
  const char* name;
};
constexpr ErrorClass kClasses[] = {
    {StatusCode::kInvalidArgument, "InvalidArgumentError"},
    {StatusCode::kOutOfRange, "OutOfRangeError"},
    {StatusCode::kNotFound, "NotFoundError"},
    {StatusCode::kUnsupported, "UnsupportedError"},
    {StatusCode::kAlreadyExists, "AlreadyExistsError"},
    {StatusCode::kInternal, "InternalError"},
};
std::array<PyObject*, std::size(kClasses)> classes{};

// The exception of a backend written in Python, until the op that it ended has come back.
thread_local PyObject* cause = nullptr;
PyObject* cause_elsewhere = nullptr;  // of one of quire's own threads; guarded by the GIL

PyObject* take_exception() {
  PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  if (value != nullptr && traceback != nullptr) PyException_SetTraceback(value, traceback);
  Py_XDECREF(type);
  Py_XDECREF(traceback);
  return value;
}

}  // namespace

bool find_error_classes() {
  PyObject* module = PyImport_ImportModule("quire.errors");
  if (module == nullptr) return false;
  bool all = true;
  for (std::size_t i = 0; i < classes.size(); ++i) {
    classes[i] = PyObject_GetAttrString(module, kClasses[i].name);
    all = all && classes[i] != nullptr;
  }
  Py_DECREF(module);
  return all;
}

PyObject* raise(const Status& status) {
  PyObject* error_class = classes.back();
  for (std::size_t i = 0; i < classes.size(); ++i) {
    if (kClasses[i].code == status.code()) error_class = classes[i];
  }
  PyErr_SetString(error_class, status.message().c_str());
  if (cause == nullptr) cause = std::exchange(cause_elsewhere, nullptr);
  if (cause != nullptr) {
    PyObject* raised = take_exception();
    PyException_SetCause(raised, cause);
    cause = nullptr;
    PyErr_SetObject(error_class, raised);
    Py_DECREF(raised);
  }
  return nullptr;
}

bool refuse(const std::string& sentence) {
  raise(invalid_argument(sentence));
  return false;
}

Status status_of_exception(const std::string& where) {
  PyObject* exception = take_exception();
  if (exception == nullptr) return internal_error(where + " failed without an exception");
  PyObject* text = PyObject_Str(exception);
  const char* utf8 = text == nullptr ? nullptr : PyUnicode_AsUTF8AndSize(text, nullptr);
  const std::string message = utf8 == nullptr ? "" : utf8;
  PyErr_Clear();
  Py_XDECREF(text);
  for (std::size_t i = 0; i < classes.size(); ++i) {
    if (PyObject_IsInstance(exception, classes[i]) == 1) {
      Py_DECREF(exception);
      return {kClasses[i].code, message};
    }
  }
  PyObject* name = PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(exception)), "__name__");
  const char* class_name = name == nullptr ? nullptr : PyUnicode_AsUTF8AndSize(name, nullptr);
  Status status =
      internal_error(where + " raised " + (class_name == nullptr ? "an exception" : class_name) + ": " + message);
  PyErr_Clear();
  Py_XDECREF(name);
  Py_XDECREF(cause);
  cause = exception;
  return status;
}

Status keep_as_cause(const std::string& where) {
  PyObject* const before = std::exchange(cause, nullptr);
  Status status = status_of_exception(where);
  PyObject* exception = std::exchange(cause, before);
  if (exception != nullptr) Py_XDECREF(std::exchange(cause_elsewhere, exception));
  return status;
}

void drop_cause() { Py_CLEAR(cause); }

}  // namespace quire::python
