// A call of an op from Python: its parameters as a table, and how a Python call becomes the library's struct of
// arguments. The ops are called for every layer of every step, so they take their arguments as CPython hands them over,
// not as a tuple and a dict.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>

#include "quire/layout.h"
#include "quire/plan.h"
#include "quire/tensor.h"

namespace quire::python {

enum class Kind { kRead, kWritten, kBool, kInt, kInt64, kFloat, kMode, kStoreCache, kReadCache, kPlan, kStream };

struct StreamArgument {
  void* value = nullptr;
};

struct Parameter {
  const char* name;
  Kind kind;
  void* (*field)(void* call);
};

template <class T>
constexpr Kind kind_of() {
  if constexpr (std::is_same_v<T, ConstTensor>) return Kind::kRead;
  if constexpr (std::is_same_v<T, Tensor>) return Kind::kWritten;
  if constexpr (std::is_same_v<T, bool>) return Kind::kBool;
  if constexpr (std::is_same_v<T, int>) return Kind::kInt;
  if constexpr (std::is_same_v<T, std::int64_t>) return Kind::kInt64;
  if constexpr (std::is_same_v<T, float>) return Kind::kFloat;
  if constexpr (std::is_same_v<T, ModeId>) return Kind::kMode;
  if constexpr (std::is_same_v<T, KVCacheViews>) return Kind::kStoreCache;
  if constexpr (std::is_same_v<T, ConstKVCacheViews>) return Kind::kReadCache;
  if constexpr (std::is_same_v<T, const AttentionPlan*>) return Kind::kPlan;
  if constexpr (std::is_same_v<T, StreamArgument>) return Kind::kStream;
}

// The parameter `name`, which lies at a path of members in a Call: parameter<Call, &Call::args, &Args::query>("query").
template <class Call, auto... path>
constexpr Parameter parameter(const char* name) {
  using T = std::remove_reference_t<decltype((std::declval<Call&>().*....*path))>;
  return {name, kind_of<T>(), [](void* call) -> void* { return &((*static_cast<Call*>(call)).*....*path); }};
}

// Whether a table has the names that _quire.pyi gives the function.
template <std::size_t documented>
consteval bool same_names(std::span<const Parameter> table, const std::string_view (&names)[documented]) {
  if (table.size() != documented) return false;
  for (std::size_t i = 0; i < documented; ++i) {
    if (names[i] != table[i].name) return false;
  }
  return true;
}

// A function's parameters. The first num_required must be given and may be given by position; the others by name.
class Signature {
 public:
  static constexpr std::size_t kMost = 40;

  constexpr Signature(const char* function, std::span<const Parameter> parameters, std::size_t num_required)
      : function_(function), parameters_(parameters), num_required_(num_required) {}

  // Calls op(): fills in `call` from the arguments of Python, without the GIL around op. Null: an exception is set.
  template <class Op>
  PyObject* run(void* call, PyObject* const* arguments, Py_ssize_t count, PyObject* keywords, Op&& op) const {
    using Body = std::remove_reference_t<Op>;
    return run(
        call, arguments, count, keywords, [](void* body) { return (*static_cast<Body*>(body))(); }, &op);
  }

  std::span<const Parameter> parameters() const { return parameters_; }

 private:
  PyObject* run(void* call, PyObject* const* arguments, Py_ssize_t count, PyObject* keywords, Status (*op)(void*),
                void* body) const;
  bool sort(PyObject* const* arguments, Py_ssize_t count, PyObject* keywords, PyObject** slots) const;
  int index_of(PyObject* keyword, std::size_t expected) const;

  const char* function_;
  std::span<const Parameter> parameters_;
  std::size_t num_required_;
  mutable PyObject* names_[kMost] = {};  // interned, from the first call on
};

// What Python gave to the call that this thread is in, so that a backend written in Python receives the same objects.
struct CurrentCall {
  const Signature* signature = nullptr;
  PyObject* const* slots = nullptr;  // as many as parameters; null where not given
};
const CurrentCall& current_call();

// The result of work() with the GIL released: for what may call a backend, which may be written in Python.
template <class Work>
auto without_gil(Work&& work) {
  struct Released {
    PyThreadState* state = PyEval_SaveThread();
    ~Released() { PyEval_RestoreThread(state); }
  } released;
  return work();
}

}  // namespace quire::python
