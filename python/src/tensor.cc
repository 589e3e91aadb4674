#include "tensor.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "docs.h"
#include "layout.h"
#include "raise.h"
#include "reader.h"

namespace nb = nanobind;

namespace quire::python {
namespace {

PyTypeObject* tensor_type = nullptr;

nb::tuple tuple_of(const std::int64_t* values, int count) {
  nb::list list;
  for (int i = 0; i < count; ++i) list.append(values[i]);
  return nb::tuple(list);
}

// Fills a new quire.Tensor from any array; `dtype`, where given, takes the place of the array's, of the same bytes.
void construct(PyTensor* self, nb::handle array, nb::handle dtype) {
  new (self) PyTensor();
  DType as{};
  if (!dtype.is_none()) as = dtype_argument("dtype", dtype);
  Reader reader(nullptr, dtype.is_none() ? nullptr : &as);
  PyObject* keep = nullptr;
  const bool read = reader.read("array", array.ptr(), false, &self->tensor, &keep) && reader.finish();
  self->keep = nb::steal(keep);
  self->read_only = reader.last_read_only();
  if (!read) throw nb::python_error();
}

// ---- DLPack ---------------------------------------------------------------------------------------------------------

// What a capsule owns: the tensor in either form, its shape and strides, and a reference to the Python object.
template <class Managed>
struct Export {
  Managed managed{};
  std::int64_t shape[Tensor::kMaxDims] = {}, strides[Tensor::kMaxDims] = {};
  PyObject* owner = nullptr;
};

template <class Managed>
Export<Managed>* export_of(const PyTensor& self, PyObject* owner) {
  auto* made = new Export<Managed>();
  const Tensor& from = self.tensor;
  std::copy_n(from.shape, Tensor::kMaxDims, made->shape);
  std::copy_n(from.strides, Tensor::kMaxDims, made->strides);
  made->owner = Py_NewRef(owner);
  made->managed.tensor = {from.data,
                          {from.device.is_cuda() ? dlpack::kCuda : dlpack::kCpu, from.device.index},
                          from.ndim,
                          dlpack_type(from.dtype),
                          made->shape,
                          made->strides,
                          0};
  made->managed.manager = made;
  made->managed.deleter = [](Managed* managed) {
    auto* whole = static_cast<Export<Managed>*>(managed->manager);
    if (Py_IsInitialized() != 0) {
      const PyGILState_STATE state = PyGILState_Ensure();
      Py_DECREF(whole->owner);
      PyGILState_Release(state);
    }
    delete whole;
  };
  return made;
}

template <class Managed>
nb::object capsule_of(Managed* managed, const char* name) {
  // A consumer renames the capsule and then owns the tensor.
  PyObject* capsule = PyCapsule_New(managed, name, [](PyObject* self) {
    const char* own_name = PyCapsule_GetName(self);
    const bool versioned = std::string_view(own_name) == dlpack::kVersionedCapsule;
    if (!versioned && std::string_view(own_name) != dlpack::kLegacyCapsule) return;
    auto* unused = static_cast<Managed*>(PyCapsule_GetPointer(self, own_name));
    unused->deleter(unused);
  });
  if (capsule == nullptr) throw nb::python_error();
  return nb::steal(capsule);
}

nb::object to_dlpack(nb::handle self, nb::handle, nb::handle max_version, nb::handle dl_device, nb::handle copy) {
  const PyTensor& tensor = nb::cast<const PyTensor&>(self);
  if (!copy.is_none() && nb::cast<bool>(copy))
    throw nb::buffer_error("a quire.Tensor is a view; copy is not supported");
  const int device_type = tensor.tensor.device.is_cuda() ? dlpack::kCuda : dlpack::kCpu;
  if (!dl_device.is_none() &&
      (nb::cast<int>(dl_device[0]) != device_type || nb::cast<int>(dl_device[1]) != tensor.tensor.device.index)) {
    throw nb::buffer_error("a quire.Tensor is a view; it cannot go to another device");
  }
  if (!max_version.is_none() && nb::cast<int>(max_version[0]) >= 1) {
    auto* made = export_of<dlpack::ManagedTensorVersioned>(tensor, self.ptr());
    made->managed.version = {dlpack::kMajorVersion, dlpack::kMinorVersion};
    made->managed.flags = tensor.read_only ? dlpack::kReadOnly : 0;
    return capsule_of(&made->managed, dlpack::kVersionedCapsule);
  }
  if (tensor.read_only) throw nb::buffer_error("read-only memory needs DLPack 1.0: ask with max_version=(1, 0)");
  return capsule_of(&export_of<dlpack::ManagedTensor>(tensor, self.ptr())->managed, dlpack::kLegacyCapsule);
}

nb::tuple dlpack_device(const PyTensor& self) {
  return nb::make_tuple(self.tensor.device.is_cuda() ? static_cast<int>(dlpack::kCuda) : static_cast<int>(dlpack::kCpu),
                        self.tensor.device.index);
}

// ---- the buffer protocol --------------------------------------------------------------------------------------------

const char* buffer_format(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "f";
    case DType::kFloat16:
      return "e";
    case DType::kInt8:
      return "b";
    case DType::kUInt8:
      return "B";
    case DType::kInt32:
      return "i";
    case DType::kInt64:
      return "q";
    default:
      return nullptr;
  }
}

struct BufferShape {
  Py_ssize_t shape[Tensor::kMaxDims], strides[Tensor::kMaxDims];
};

int get_buffer(PyObject* object, Py_buffer* buffer, int flags) noexcept {
  const PyTensor& self = *nb::inst_ptr<PyTensor>(nb::handle(object));
  const Tensor& tensor = self.tensor;
  const std::size_t itemsize = dtype_bytes(tensor.dtype);
  const char* format = !self.bits      ? buffer_format(tensor.dtype)
                       : itemsize == 1 ? "B"
                       : itemsize == 2 ? "H"
                       : itemsize == 4 ? "I"
                                       : "Q";
  buffer->obj = nullptr;
  const char* why = tensor.device.is_cuda() ? "a quire.Tensor on cuda has no buffer; use __dlpack__"
                    : format == nullptr ? "the buffer protocol has no format for this dtype; use __dlpack__, or bits"
                    : self.read_only && (flags & PyBUF_WRITABLE) != 0 ? "this quire.Tensor is read-only"
                                                                      : nullptr;
  if (why != nullptr) {
    PyErr_SetString(PyExc_BufferError, why);
    return -1;
  }
  auto made = std::make_unique<BufferShape>();
  const auto bytes = static_cast<Py_ssize_t>(dtype_bytes(tensor.dtype));
  Py_ssize_t total = bytes, dense = bytes;
  bool contiguous = true;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    made->shape[i] = tensor.shape[i];
    made->strides[i] = tensor.strides[i] * bytes;
    contiguous = contiguous && (tensor.shape[i] == 1 || made->strides[i] == dense);
    dense *= tensor.shape[i];
    total *= tensor.shape[i];
  }
  if ((flags & PyBUF_STRIDES) != PyBUF_STRIDES && !contiguous) {
    PyErr_SetString(PyExc_BufferError, "this quire.Tensor is not contiguous");
    return -1;
  }
  *buffer = {};
  buffer->buf = tensor.data;
  buffer->len = total;
  buffer->itemsize = bytes;
  buffer->readonly = self.read_only ? 1 : 0;
  buffer->ndim = tensor.ndim;
  buffer->format = const_cast<char*>(format);
  buffer->shape = made->shape;
  buffer->strides = made->strides;
  buffer->internal = made.release();
  buffer->obj = Py_NewRef(object);
  return 0;
}

void release_buffer(PyObject*, Py_buffer* buffer) noexcept { delete static_cast<BufferShape*>(buffer->internal); }

int traverse(PyObject* self, visitproc visit, void* arg) noexcept {
  Py_VISIT(Py_TYPE(self));
  if (nb::inst_ready(self)) Py_VISIT(nb::inst_ptr<PyTensor>(nb::handle(self))->keep.ptr());
  return 0;
}

int clear(PyObject* self) noexcept {
  nb::inst_ptr<PyTensor>(nb::handle(self))->keep.reset();
  return 0;
}

PyType_Slot slots[] = {
    {Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)},
    {Py_bf_releasebuffer, reinterpret_cast<void*>(release_buffer)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {0, nullptr},
};

// Zeros in host memory, aligned for every vector unit.
nb::object allocate(std::int64_t num_bytes) {
  constexpr std::uintptr_t kAlignment = 64;
  void* memory = num_bytes < 0 ? nullptr : std::calloc(static_cast<std::size_t>(num_bytes) + kAlignment, 1);
  if (memory == nullptr) throw std::bad_alloc();
  const auto address = (reinterpret_cast<std::uintptr_t>(memory) + kAlignment - 1) & ~(kAlignment - 1);
  return make_tensor(Tensor::contiguous(reinterpret_cast<void*>(address), DType::kUInt8, {num_bytes}),
                     nb::capsule(memory, [](void* p) noexcept { std::free(p); }));
}

}  // namespace

const PyTensor* own_tensor(PyObject* object) {
  return Py_TYPE(object) == tensor_type ? nb::inst_ptr<PyTensor>(nb::handle(object)) : nullptr;
}

nb::object make_tensor(const Tensor& tensor, nb::object keep, bool read_only) {
  return nb::cast(PyTensor{tensor, std::move(keep), read_only});
}

void bind_tensor(nb::module_& module) {
  auto type =
      nb::class_<PyTensor>(module, "Tensor", nb::type_slots(slots), docs::Tensor)
          .def("__init__", &construct, nb::arg("array"), nb::arg("dtype") = nb::none(), docs::Tensor___init__)
          .def_prop_ro(
              "shape", [](const PyTensor& self) { return tuple_of(self.tensor.shape, self.tensor.ndim); },
              docs::Tensor_shape)
          .def_prop_ro(
              "strides", [](const PyTensor& self) { return tuple_of(self.tensor.strides, self.tensor.ndim); },
              docs::Tensor_strides)
          .def_prop_ro(
              "ndim", [](const PyTensor& self) { return self.tensor.ndim; }, docs::Tensor_ndim)
          .def_prop_ro(
              "dtype", [](const PyTensor& self) { return std::string(dtype_name(self.tensor.dtype)); },
              docs::Tensor_dtype)
          .def_prop_ro(
              "device", [](const PyTensor& self) { return to_string(self.tensor.device); }, docs::Tensor_device)
          .def_prop_ro(
              "data_ptr", [](const PyTensor& self) { return reinterpret_cast<std::uintptr_t>(self.tensor.data); },
              docs::Tensor_data_ptr)
          .def_prop_ro(
              "read_only", [](const PyTensor& self) { return self.read_only; }, docs::Tensor_read_only)
          .def_prop_ro(
              "bits",
              [](const PyTensor& self) {
                nb::object view = make_tensor(self.tensor, self.keep, self.read_only);
                nb::inst_ptr<PyTensor>(view)->bits = true;
                PyObject* bits = PyMemoryView_FromObject(view.ptr());
                if (bits == nullptr) throw nb::python_error();
                return nb::steal(bits);
              },
              docs::Tensor_bits)
          .def("__dlpack__", &to_dlpack, nb::kw_only(), nb::arg("stream") = nb::none(),
               nb::arg("max_version") = nb::none(), nb::arg("dl_device") = nb::none(), nb::arg("copy") = nb::none(),
               docs::Tensor___dlpack__)
          .def("__dlpack_device__", &dlpack_device, docs::Tensor___dlpack_device__)
          .def("__repr__", [](const PyTensor& self) { return "quire.Tensor(" + to_string(self.tensor) + ")"; });
  tensor_type = reinterpret_cast<PyTypeObject*>(type.ptr());
  module.def("allocate", &allocate, nb::arg("num_bytes"), docs::allocate);
}

}  // namespace quire::python
