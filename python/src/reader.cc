#include "reader.h"

#include <cstring>
#include <string>

#include "raise.h"
#include "tensor.h"

namespace quire::python {
namespace {

constexpr const char* kDTypes =
    "float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8, uint8, int32, int64 and bool";

struct DTypeRow {
  DType dtype;
  std::uint8_t code, bits;
};
constexpr DTypeRow kDTypeRows[] = {
    {DType::kFloat32, dlpack::kFloat, 32},
    {DType::kFloat16, dlpack::kFloat, 16},
    {DType::kBFloat16, dlpack::kBFloat, 16},
    {DType::kFloat8E4M3, dlpack::kFloat8E4M3Fn, 8},
    {DType::kFloat8E5M2, dlpack::kFloat8E5M2, 8},
    {DType::kInt8, dlpack::kInt, 8},
    {DType::kUInt8, dlpack::kUInt, 8},
    {DType::kInt32, dlpack::kInt, 32},
    {DType::kInt64, dlpack::kInt, 64},
    {DType::kUInt8, dlpack::kBool, 8},  // a flag is a byte of 0 or 1
};

// Libraries say what they like of the strides of an array without elements; quire wants to see dense ones.
void settle_strides(Tensor* tensor) {
  if (tensor->numel() != 0) return;
  std::int64_t dense = 1;
  for (int i = tensor->ndim - 1; i >= 0; --i) {
    tensor->strides[i] = dense;
    dense *= tensor->shape[i] > 0 ? tensor->shape[i] : 1;
  }
}

bool refuse_dtype(const char* name, const std::string& dtype) {
  return refuse(std::string(name) + " is " + dtype + "; quire knows " + kDTypes);
}

// A Python string's text, for a sentence.
std::string text_of(PyObject* object) {
  PyObject* text = PyObject_Str(object);
  Py_ssize_t length = 0;
  const char* utf8 = text == nullptr ? nullptr : PyUnicode_AsUTF8AndSize(text, &length);
  std::string result = utf8 == nullptr ? "unknown" : std::string(utf8, static_cast<std::size_t>(length));
  Py_XDECREF(text);
  PyErr_Clear();
  return result;
}

std::string type_name(PyObject* object) {
  PyObject* name = PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__name__");
  std::string result = name == nullptr ? "object" : text_of(name);
  Py_XDECREF(name);
  PyErr_Clear();
  return result;
}

bool refuse_type(const char* name, PyObject* object) {
  PyErr_SetString(PyExc_TypeError, (std::string(name) + " is of type " + type_name(object) +
                                    "; it must be an array (PyTorch, NumPy, CuPy, JAX, or whatever has __dlpack__ or "
                                    "the buffer protocol)")
                                       .c_str());
  return false;
}

// `as`, where it is not null, takes the place of the array's own dtype.
bool convert(const char* name, const dlpack::Tensor& from, const DType* as, Tensor* to) {
  const DTypeRow* found = nullptr;
  for (const DTypeRow& row : kDTypeRows) {
    if (row.bits == from.dtype.bits && (as == nullptr ? row.code == from.dtype.code : row.dtype == *as)) {
      found = &row;
      break;
    }
  }
  if (found == nullptr || from.dtype.lanes != 1) {
    return refuse_dtype(name, "of DLPack type code " + std::to_string(from.dtype.code) + " with " +
                                  std::to_string(from.dtype.bits) + " bits");
  }
  Device device;
  if (from.device.type == dlpack::kCuda || from.device.type == dlpack::kCudaManaged) {
    device = Device::cuda(from.device.index);
  } else if (from.device.type != dlpack::kCpu && from.device.type != dlpack::kCudaHost) {
    return refuse(std::string(name) + " is on a device of DLPack type " + std::to_string(from.device.type) +
                  "; supported: cpu and cuda");
  }
  if (from.ndim < 0 || from.ndim > Tensor::kMaxDims) {
    return refuse(std::string(name) + " has " + std::to_string(from.ndim) + " dimensions; supported: 0 to " +
                  std::to_string(Tensor::kMaxDims));
  }
  to->data = static_cast<char*>(from.data) + from.byte_offset;
  to->dtype = found->dtype;
  to->device = device;
  to->ndim = from.ndim;
  std::int64_t dense = 1;
  for (int i = from.ndim - 1; i >= 0; --i) {
    to->shape[i] = from.shape[i];
    to->strides[i] = from.strides == nullptr ? dense : from.strides[i];
    dense *= from.shape[i];
  }
  settle_strides(to);
  return true;
}

// The exchange table of a class, found once for each class; the classes stay alive, since the cache refers to them.
struct KnownClass {
  PyTypeObject* type = nullptr;
  const dlpack::ExchangeApi* api = nullptr;
  bool has_requires_grad = false;
};

const KnownClass& known_class(PyTypeObject* type) {
  static KnownClass classes[8];
  static unsigned next = 0;
  for (const KnownClass& known : classes) {
    if (known.type == type) return known;
  }
  KnownClass found;
  found.type = type;
  PyObject* object = reinterpret_cast<PyObject*>(type);
  PyObject* capsule = PyObject_GetAttrString(object, "__dlpack_c_exchange_api__");
  if (capsule != nullptr && PyCapsule_IsValid(capsule, dlpack::kExchangeCapsule) != 0) {
    auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kExchangeCapsule));
    while (api != nullptr && api->header.version.major != dlpack::kMajorVersion) {
      api = reinterpret_cast<dlpack::ExchangeApi*>(api->header.previous);
    }
    if (api != nullptr && api->tensor_from_object != nullptr) found.api = api;
  }
  Py_XDECREF(capsule);
  PyErr_Clear();
  found.has_requires_grad = PyObject_HasAttrString(object, "requires_grad") != 0;
  Py_INCREF(object);
  KnownClass& place = classes[next++ % 8];
  PyObject* const before = reinterpret_cast<PyObject*>(place.type);
  place = found;
  Py_XDECREF(before);
  return place;
}

// Refuses an array that requires grad.
bool check_no_grad(const char* name, PyObject* array) {
  static PyObject* const attribute = PyUnicode_InternFromString("requires_grad");
  PyObject* value = PyObject_GetAttr(array, attribute);
  if (value == nullptr) return false;
  const int required = value == Py_False ? 0 : PyObject_IsTrue(value);
  Py_DECREF(value);
  if (required <= 0) return required == 0;
  return refuse(std::string(name) + " requires grad, and quire has no backward pass; give it as " + name + ".detach()");
}

// The dtype of a format of the struct module, native or little-endian; -1: none of ours.
int dtype_of_format(const char* format, Py_ssize_t itemsize) {
  if (format == nullptr) return static_cast<int>(DType::kUInt8);
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  if (format[0] == 0 || format[1] != 0) return -1;
  switch (format[0]) {
    case 'f':
      return static_cast<int>(DType::kFloat32);
    case 'e':
      return static_cast<int>(DType::kFloat16);
    case 'b':
      return static_cast<int>(DType::kInt8);
    case 'B':
    case '?':
    case 'c':
      return static_cast<int>(DType::kUInt8);
    case 'i':
    case 'l':
    case 'q':
      return itemsize == 4 ? static_cast<int>(DType::kInt32) : itemsize == 8 ? static_cast<int>(DType::kInt64) : -1;
    default:
      return -1;
  }
}

bool take_strided(const char* name, DType dtype, int ndim, const Py_ssize_t* shape, const Py_ssize_t* byte_strides,
                  void* data, Tensor* tensor) {
  if (ndim > Tensor::kMaxDims) {
    return refuse(std::string(name) + " has " + std::to_string(ndim) + " dimensions; supported: 0 to " +
                  std::to_string(Tensor::kMaxDims));
  }
  const auto bytes = static_cast<Py_ssize_t>(dtype_bytes(dtype));
  tensor->data = data;
  tensor->dtype = dtype;
  tensor->device = Device::cpu();
  tensor->ndim = ndim;
  for (int i = 0; i < ndim; ++i) {
    if (byte_strides[i] % bytes != 0 && shape[i] > 1) {
      return refuse(std::string(name) + " has a stride of " + std::to_string(byte_strides[i]) +
                    " bytes, which is no multiple of its elements' " + std::to_string(bytes));
    }
    tensor->shape[i] = shape[i];
    tensor->strides[i] = byte_strides[i] / bytes;
  }
  settle_strides(tensor);
  return true;
}

bool refuse_read_only(const char* name) {
  return refuse(std::string(name) + " is read-only, and the call writes to it; give a writable array");
}

}  // namespace

int dtype_of_name(std::string_view name) {
  for (const DTypeRow& row : kDTypeRows) {
    if (row.code != dlpack::kBool && dtype_name(row.dtype) == name) return static_cast<int>(row.dtype);
  }
  return -1;
}

dlpack::DataType dlpack_type(DType dtype) {
  for (const DTypeRow& row : kDTypeRows) {
    if (row.dtype == dtype) return {row.code, row.bits, 1};
  }
  return {dlpack::kUInt, 8, 1};
}

Reader::~Reader() {
  for (int i = 0; i < num_buffers_; ++i) PyBuffer_Release(&buffers_[static_cast<std::size_t>(i)]);
  for (int i = 0; i < num_held_; ++i) Py_DECREF(held_[static_cast<std::size_t>(i)]);
}

bool Reader::read(const Argument& argument) {
  const char* const name = argument.name;
  PyObject* const array = argument.array;
  last_read_only_ = false;
  if (const PyTensor* own = own_tensor(array)) {
    if (argument.written && own->read_only) return refuse_read_only(name);
    last_read_only_ = own->read_only;
    Tensor tensor = own->tensor;
    if (as_ != nullptr && dtype_bytes(*as_) != dtype_bytes(tensor.dtype)) {
      return refuse_dtype(name, std::string(dtype_name(tensor.dtype)));
    }
    if (as_ != nullptr) tensor.dtype = *as_;
    argument.give(tensor);
    if (argument.keep != nullptr) *argument.keep = Py_NewRef(array);
    return true;
  }
  const KnownClass& known = known_class(Py_TYPE(array));
  if (known.api != nullptr) return read_exchange(argument, *known.api, known.has_requires_grad);
  if (known.has_requires_grad && !check_no_grad(name, array)) return false;
  if (PyObject_CheckBuffer(array) != 0) {
    const int done = read_buffer(argument);
    if (done != 0) return done > 0;
  }
  if (PyObject_HasAttrString(array, "__dlpack__") != 0) {
    if (num_deferred_ == kMost) return refuse("too many arrays in one call");
    deferred_[static_cast<std::size_t>(num_deferred_++)] = argument;
    return true;
  }
  return refuse_type(name, array);
}

bool Reader::finish() {
  if (!decide_stream()) return false;
  for (int i = 0; i < num_deferred_; ++i) {
    if (!read_dlpack(deferred_[static_cast<std::size_t>(i)])) return false;
  }
  num_deferred_ = 0;
  return true;
}

// A stream given as a number, or by an object of torch.cuda (cuda_stream), CuPy (ptr) or CUDA's protocol.
bool Reader::decide_stream() {
  if (stream_argument_ == nullptr || stream_argument_ == Py_None) return true;
  PyObject* number = nullptr;
  if (PyLong_Check(stream_argument_)) {
    number = Py_NewRef(stream_argument_);
  } else if (PyObject_HasAttrString(stream_argument_, "cuda_stream") != 0) {
    number = PyObject_GetAttrString(stream_argument_, "cuda_stream");
  } else if (PyObject_HasAttrString(stream_argument_, "__cuda_stream__") != 0) {
    PyObject* pair = PyObject_CallMethod(stream_argument_, "__cuda_stream__", nullptr);
    number = pair == nullptr ? nullptr : PySequence_GetItem(pair, 1);
    Py_XDECREF(pair);
  } else if (PyObject_HasAttrString(stream_argument_, "ptr") != 0) {
    number = PyObject_GetAttrString(stream_argument_, "ptr");
  } else {
    PyErr_SetString(PyExc_TypeError,
                    ("stream is of type " + type_name(stream_argument_) +
                     "; it must be a cudaStream_t as a number, a stream of torch.cuda or CuPy, or None")
                        .c_str());
    return false;
  }
  if (number == nullptr) return false;
  stream_ = PyLong_AsVoidPtr(number);
  Py_DECREF(number);
  stream_known_ = true;
  return PyErr_Occurred() == nullptr;
}

bool Reader::read_exchange(const Argument& argument, const dlpack::ExchangeApi& api, bool has_requires_grad) {
  dlpack::Tensor view;
  if (api.tensor_from_object(argument.array, &view) != 0) return false;
  const bool differentiable = view.dtype.code == dlpack::kFloat || view.dtype.code == dlpack::kBFloat;
  if (has_requires_grad && differentiable && !check_no_grad(argument.name, argument.array)) return false;
  Tensor tensor;
  if (!convert(argument.name, view, as_, &tensor)) return false;
  argument.give(tensor);
  if (argument.keep != nullptr) *argument.keep = Py_NewRef(argument.array);
  const bool ask = view.device.type == dlpack::kCuda && !stream_known_ &&
                   (stream_argument_ == nullptr || stream_argument_ == Py_None) && api.current_work_stream != nullptr;
  if (!ask) return true;
  stream_known_ = true;
  return api.current_work_stream(view.device.type, view.device.index, &stream_) == 0;
}

int Reader::read_buffer(const Argument& argument) {
  if (num_buffers_ == kMost) return refuse("too many arrays in one call") ? 1 : -1;
  // An array for longer than this call is held as a memoryview, which holds the buffer.
  PyObject* source = argument.keep == nullptr ? argument.array : PyMemoryView_FromObject(argument.array);
  if (source == nullptr) {
    PyErr_Clear();
    return read_array_interface(argument);
  }
  Py_buffer& buffer = buffers_[static_cast<std::size_t>(num_buffers_)];
  const int got = PyObject_GetBuffer(source, &buffer, PyBUF_RECORDS_RO);
  if (argument.keep != nullptr) *argument.keep = source;
  if (got != 0) {
    if (argument.keep != nullptr) Py_CLEAR(*argument.keep);
    PyErr_Clear();
    return read_array_interface(argument);
  }
  ++num_buffers_;
  const int dtype = as_ == nullptr ? dtype_of_format(buffer.format, buffer.itemsize) : static_cast<int>(*as_);
  if (dtype < 0 || static_cast<Py_ssize_t>(dtype_bytes(static_cast<DType>(dtype))) != buffer.itemsize) {
    PyBuffer_Release(&buffers_[static_cast<std::size_t>(--num_buffers_)]);
    if (argument.keep != nullptr) Py_CLEAR(*argument.keep);
    return read_array_interface(argument);
  }
  last_read_only_ = buffer.readonly != 0;
  if (argument.written && buffer.readonly != 0) return refuse_read_only(argument.name) ? 1 : -1;
  Tensor tensor;
  if (!take_strided(argument.name, static_cast<DType>(dtype), buffer.ndim, buffer.shape, buffer.strides, buffer.buf,
                    &tensor)) {
    return -1;
  }
  argument.give(tensor);
  return 1;
}

// NumPy knows ml_dtypes' bfloat16 and float8 as opaque bytes; their names are in the array's dtype.
int Reader::read_array_interface(const Argument& argument) {
  PyObject* dtype = PyObject_GetAttrString(argument.array, "dtype");
  PyErr_Clear();
  if (dtype == nullptr) return 0;
  const std::string dtype_text = text_of(dtype);
  Py_DECREF(dtype);
  const int known = as_ == nullptr ? dtype_of_name(dtype_text) : -1;
  PyObject* interface = PyObject_GetAttrString(argument.array, "__array_interface__");
  PyErr_Clear();
  if (interface == nullptr) return 0;
  int result = -1;
  if (known < 0) {
    refuse_dtype(argument.name, dtype_text);
  } else {
    PyObject* data = PyDict_GetItemString(interface, "data");
    PyObject* shape = PyDict_GetItemString(interface, "shape");
    PyObject* strides = PyObject_GetAttrString(argument.array, "strides");
    const Py_ssize_t ndim = shape == nullptr ? -1 : PyTuple_Size(shape);
    Py_ssize_t extents[Tensor::kMaxDims + 1] = {}, steps[Tensor::kMaxDims + 1] = {};
    for (Py_ssize_t i = 0; i < ndim && i < Tensor::kMaxDims; ++i) {
      extents[i] = PyLong_AsSsize_t(PyTuple_GetItem(shape, i));
      steps[i] = strides == nullptr ? 0 : PyLong_AsSsize_t(PyTuple_GetItem(strides, i));
    }
    Tensor tensor;
    void* pointer = data == nullptr ? nullptr : PyLong_AsVoidPtr(PyTuple_GetItem(data, 0));
    const bool read_only = data != nullptr && PyObject_IsTrue(PyTuple_GetItem(data, 1)) != 0;
    last_read_only_ = read_only;
    Py_XDECREF(strides);
    if (PyErr_Occurred() != nullptr || ndim < 0) {
      if (PyErr_Occurred() == nullptr) refuse_type(argument.name, argument.array);
    } else if (argument.written && read_only) {
      refuse_read_only(argument.name);
    } else if (take_strided(argument.name, static_cast<DType>(known), static_cast<int>(ndim), extents, steps, pointer,
                            &tensor)) {
      argument.give(tensor);
      if (argument.keep != nullptr) *argument.keep = Py_NewRef(argument.array);
      result = 1;
    }
  }
  Py_DECREF(interface);
  return result;
}

// The library that made the array is told which stream will use it, and makes that wait for what it has under way.
bool Reader::read_dlpack(const Argument& argument) {
  PyObject* device = PyObject_CallMethod(argument.array, "__dlpack_device__", nullptr);
  if (device == nullptr) return false;
  PyObject* type = PySequence_GetItem(device, 0);
  const long device_type = type == nullptr ? -1 : PyLong_AsLong(type);
  Py_XDECREF(type);
  Py_DECREF(device);
  if (PyErr_Occurred() != nullptr) return false;
  PyObject* stream = Py_NewRef(Py_None);
  if (device_type == dlpack::kCuda || device_type == dlpack::kCudaManaged) {
    Py_DECREF(stream);
    stream = stream_ == nullptr ? PyLong_FromLong(1) : PyLong_FromVoidPtr(stream_);  // 1 is CUDA's default stream
  }
  PyObject* method = PyObject_GetAttrString(argument.array, "__dlpack__");
  PyObject* none = PyTuple_New(0);
  PyObject* keywords = Py_BuildValue("{s:O,s:(ii)}", "stream", stream, "max_version",
                                     static_cast<int>(dlpack::kMajorVersion), static_cast<int>(dlpack::kMinorVersion));
  PyObject* capsule =
      method == nullptr || none == nullptr || keywords == nullptr ? nullptr : PyObject_Call(method, none, keywords);
  if (capsule == nullptr && PyErr_ExceptionMatches(PyExc_TypeError) != 0) {  // from before max_version
    PyErr_Clear();
    PyDict_DelItemString(keywords, "max_version");
    capsule = PyObject_Call(method, none, keywords);
  }
  Py_XDECREF(keywords);
  Py_XDECREF(none);
  Py_XDECREF(method);
  Py_DECREF(stream);
  if (capsule == nullptr) return false;
  const bool taken = take_capsule(argument, capsule);
  if (taken && argument.keep != nullptr) {
    *argument.keep = capsule;
  } else if (num_held_ < kMost) {
    held_[static_cast<std::size_t>(num_held_++)] = capsule;
  }
  return taken;
}

// The capsule stays whole: it frees its tensor itself when it is dropped.
bool Reader::take_capsule(const Argument& argument, PyObject* capsule) {
  const auto take = [&](const dlpack::Tensor& found) {
    Tensor tensor;
    if (!convert(argument.name, found, as_, &tensor)) return false;
    argument.give(tensor);
    return true;
  };
  if (PyCapsule_IsValid(capsule, dlpack::kVersionedCapsule) != 0) {
    const auto* managed =
        static_cast<const dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, dlpack::kVersionedCapsule));
    if (managed->version.major != dlpack::kMajorVersion) {
      return refuse(std::string(argument.name) + " speaks DLPack " + std::to_string(managed->version.major) + "." +
                    std::to_string(managed->version.minor) + "; quire speaks 1.x and the unversioned form");
    }
    last_read_only_ = (managed->flags & dlpack::kReadOnly) != 0;
    if (argument.written && (managed->flags & dlpack::kReadOnly) != 0) return refuse_read_only(argument.name);
    return take(managed->tensor);
  }
  if (PyCapsule_IsValid(capsule, dlpack::kLegacyCapsule) != 0) {
    const auto* managed =
        static_cast<const dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::kLegacyCapsule));
    return take(managed->tensor);
  }
  PyErr_Clear();
  return refuse_type(argument.name, argument.array);
}

}  // namespace quire::python
