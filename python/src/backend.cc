#include "backend.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "call.h"
#include "docs.h"
#include "modes.h"
#include "quire/backend.h"
#include "raise.h"
#include "reader.h"
#include "tensor.h"

namespace nb = nanobind;

namespace quire::python {
namespace {

// The object is never released: the registry keeps backends for the life of the process, longer than the interpreter.
class PyBackend final : public QuantKVBackend {
 public:
  PyBackend(ModeId mode, nb::object object)
      : mode_(mode),
        object_(object.release()),
        has_decode_row_(overrides("decode_row")),
        stores_(overrides("reshape_and_cache")),
        reads_(overrides("unified_attention")),
        read_format_(nb::cast<std::string>(object_.attr("read_format")())) {}

  nb::handle object() const { return object_; }

  ModeId mode() const override { return mode_; }
  std::string_view read_format() const override { return read_format_; }
  bool has_decode_row() const override { return has_decode_row_; }

  bool needs_scale_caches() const override {
    const nb::gil_scoped_acquire gil;
    try {
      return nb::cast<bool>(object_.attr("needs_scale_caches")());
    } catch (nb::python_error& error) {
      error.restore();
      throw std::runtime_error(status_of_exception("needs_scale_caches").message());
    }
  }
  Result<int> packing_factor() const override { return ask<int>("packing_factor"); }
  Result<int> packed_head_size(int head_size) const override { return ask<int>("packed_head_size", head_size); }
  Result<std::int64_t> row_bytes(int head_size, bool is_value) const override {
    return ask<std::int64_t>("row_bytes", head_size, is_value);
  }

  Status reshape_and_cache(const ReshapeAndCacheArgs& args, void* stream) const override {
    return stores_ ? forward("reshape_and_cache", 4) : QuantKVBackend::reshape_and_cache(args, stream);
  }
  Status unified_attention(const UnifiedAttentionArgs& args, void* stream) const override {
    return reads_ ? forward("unified_attention", 7) : QuantKVBackend::unified_attention(args, stream);
  }

  bool decode_row(const CacheRow& row, float* out) const override {
    const nb::gil_scoped_acquire gil;
    const Result<std::int64_t> num_bytes = row_bytes(row.head_size, row.is_value);
    if (!num_bytes) return false;
    nb::object data = nb::steal(PyMemoryView_FromMemory(reinterpret_cast<char*>(const_cast<std::uint8_t*>(row.data)),
                                                        static_cast<Py_ssize_t>(*num_bytes), PyBUF_READ));
    bool decoded = false;
    try {
      const nb::object scale = row.scale == nullptr ? nb::none() : nb::cast(*row.scale);
      const nb::object values = object_.attr("decode_row")(data, scale, row.head_size, row.is_value);
      decoded = !values.is_none() && copy_row(values, row.head_size, out);
    } catch (nb::python_error& error) {
      error.restore();
    }
    std::string failure;
    if (PyErr_Occurred() != nullptr) failure = keep_as_cause("decode_row").message();
    nb::object released = nb::steal(PyObject_CallMethod(data.ptr(), "release", nullptr));
    PyErr_Clear();  // where the backend still holds a view of the row, which then ends with it
    if (!failure.empty()) throw std::runtime_error(failure);
    return decoded;
  }

 private:
  // Whether the class has a method of its own, not that of quire.backend.QuantKVBackend.
  bool overrides(const char* name) const {
    const nb::object base = nb::module_::import_("quire.backend").attr("QuantKVBackend");
    return !nb::object(object_.type().attr(name)).is(nb::object(base.attr(name)));
  }

  template <class T, class... Arguments>
  Result<T> ask(const char* method, Arguments... arguments) const {
    const nb::gil_scoped_acquire gil;
    try {
      return nb::cast<T>(object_.attr(method)(arguments...));
    } catch (nb::python_error& error) {
      error.restore();
      return status_of_exception(std::string(method) + " of mode " + mode_name(mode_));
    } catch (nb::cast_error&) {
      return internal_error(std::string(method) + " of mode " + mode_name(mode_) + " did not return a whole number");
    }
  }

  // Calls a method with what Python gave to the op: the first num_positional by position, the others by name.
  Status forward(const char* method, std::size_t num_positional) const {
    const CurrentCall& call = current_call();
    if (call.signature == nullptr) {
      return unsupported("mode " + mode_name(mode_) +
                         " has a backend written in Python, which serves calls from Python");
    }
    const nb::gil_scoped_acquire gil;
    try {
      nb::list positional;
      nb::dict named;
      std::size_t i = 0;
      for (const Parameter& parameter : call.signature->parameters()) {
        PyObject* given = call.slots[i++];
        const bool own = parameter.kind == Kind::kMode || parameter.kind == Kind::kPlan ||
                         std::string_view(parameter.name) == "workspace";
        if (own) continue;
        if (positional.size() < num_positional) {
          positional.append(given == nullptr ? nb::none() : nb::borrow(given));
        } else if (given != nullptr && given != Py_None) {
          named[parameter.name] = nb::borrow(given);
        }
      }
      object_.attr(method)(*positional, **named);
      return {};
    } catch (nb::python_error& error) {
      error.restore();
      return status_of_exception(std::string(method) + " of mode " + mode_name(mode_));
    }
  }

  static bool copy_row(nb::handle values, int head_size, float* out) {
    Reader reader(nullptr);
    Tensor row;
    if (!reader.read("decode_row's result", values.ptr(), false, &row) || !reader.finish()) return false;
    if (row.ndim != 1 || row.shape[0] != head_size || row.dtype != DType::kFloat32 || !row.device.is_cpu()) {
      return refuse("decode_row returned " + to_string(row) + "; expected [" + std::to_string(head_size) + "] float32");
    }
    for (int i = 0; i < head_size; ++i) out[i] = row.ptr<float>()[i * row.strides[0]];
    return true;
  }

  ModeId mode_;
  nb::handle object_;
  bool has_decode_row_, stores_, reads_;
  std::string read_format_;
};

ModeId mode_argument(nb::handle name) {
  ModeId mode{};
  if (!mode_of(name.ptr(), &mode)) throw nb::python_error();
  return mode;
}

// Backends of two Python classes differ as those classes do.
void register_class(nb::handle mode, nb::handle backend_class) {
  const ModeId id = mode_argument(mode);
  PyObject* the_class = backend_class.ptr();
  Py_INCREF(the_class);  // for the life of the registry
  check(without_gil([&] {
    return register_backend(id, the_class, [id, the_class]() -> std::unique_ptr<QuantKVBackend> {
      const nb::gil_scoped_acquire gil;
      try {
        nb::object made = nb::handle(the_class)();
        made.attr("mode") = mode_name(id);
        return std::make_unique<PyBackend>(id, std::move(made));
      } catch (nb::python_error& error) {
        error.restore();
        throw std::runtime_error(status_of_exception("the constructor").message());
      }
    });
  }));
}

const QuantKVBackend& backend_of(nb::handle mode) {
  const ModeId id = mode_argument(mode);
  return *value_of(without_gil([&] { return get_backend(id); }));
}

// The object of a backend written in Python; None for the library's own.
nb::object object_of(nb::handle mode) {
  const auto* written_in_python = dynamic_cast<const PyBackend*>(&backend_of(mode));
  return written_in_python == nullptr ? nb::none() : nb::borrow(written_in_python->object());
}

nb::tuple scale_caches(nb::handle mode, std::int64_t num_blocks, int block_size, int num_kv_heads) {
  const QuantKVBackend& backend = backend_of(mode);
  const ScaleCaches caches = value_of(backend.allocate_scale_caches(num_blocks, block_size, num_kv_heads));
  const auto as_object = [&](const Tensor& tensor) -> nb::object {
    if (!tensor.defined()) return nb::none();
    auto* memory = new std::shared_ptr<void>(caches.memory);
    return make_tensor(tensor,
                       nb::capsule(memory, [](void* p) noexcept { delete static_cast<std::shared_ptr<void>*>(p); }));
  };
  return nb::make_tuple(as_object(caches.k_scale_cache), as_object(caches.v_scale_cache));
}

}  // namespace

void bind_backend(nb::module_& module) {
  module.def("register_backend", &register_class, nb::arg("mode"), nb::arg("backend_class"), docs::register_backend);
  module.def("backend_object", &object_of, nb::arg("mode"), docs::backend_object);
  module.def(
      "has_backend", [](const std::string& mode) { return without_gil([&] { return has_backend(mode); }); },
      nb::arg("mode"), docs::has_backend);
  module.def(
      "backend_needs_scale_caches", [](nb::handle mode) { return backend_of(mode).needs_scale_caches(); },
      nb::arg("mode"), docs::backend_needs_scale_caches);
  module.def(
      "backend_packing_factor", [](nb::handle mode) { return value_of(backend_of(mode).packing_factor()); },
      nb::arg("mode"), docs::backend_packing_factor);
  module.def(
      "backend_packed_head_size",
      [](nb::handle mode, int head_size) { return value_of(backend_of(mode).packed_head_size(head_size)); },
      nb::arg("mode"), nb::arg("head_size"), docs::backend_packed_head_size);
  module.def(
      "backend_row_bytes",
      [](nb::handle mode, int head_size, bool is_value) {
        return value_of(backend_of(mode).row_bytes(head_size, is_value));
      },
      nb::arg("mode"), nb::arg("head_size"), nb::arg("is_value"), docs::backend_row_bytes);
  module.def("backend_scale_caches", &scale_caches, nb::arg("mode"), nb::arg("num_blocks"), nb::arg("block_size"),
             nb::arg("num_kv_heads"), docs::backend_scale_caches);
}

}  // namespace quire::python
