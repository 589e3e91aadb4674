// Arrays of other libraries as quire's tensors, without a copy and without linking to any of those libraries. A Reader
// reads the arrays of one call and keeps hold of them until it is destroyed. Four ways in, in this order:
//
//   1. the C functions that a class carries as __dlpack_c_exchange_api__ (PyTorch): some tens of nanoseconds
//   2. the buffer protocol, where the array has a format that quire knows (NumPy): a tenth of the cost of 3
//   3. __dlpack__(stream, max_version), whose capsule is versioned or, from older libraries, legacy (CuPy, JAX)
//   4. __array_interface__ of a dtype that neither knows: bfloat16 and float8 of ml_dtypes in NumPy
//
// Shapes, strides, dtypes and devices are taken as they are; what quire cannot read is refused with a Python exception
// that names the argument. All functions need the GIL.
#pragma once

#include <Python.h>

#include <array>

#include "dlpack.h"
#include "quire/tensor.h"

namespace quire::python {

class Reader {
 public:
  // `stream` is the call's argument of that name; null or None: the current stream of the arrays' library.
  // `as`, where it is not null, is the dtype of every array, whatever the array says, of the same bytes.
  explicit Reader(PyObject* stream, const DType* as = nullptr) : stream_argument_(stream), as_(as) {}
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader();

  // Reads an array into *tensor; `written` arrays must be writable. `keep` is null where the array is used in this call
  // only; otherwise it receives a new reference to what keeps the memory alive. Of an array that has to be told the
  // stream, only the name is taken down, and finish() reads it. False: a Python exception is set.
  bool read(const char* name, PyObject* array, bool written, Tensor* tensor, PyObject** keep = nullptr) {
    return read({name, array, written, tensor, nullptr, keep});
  }
  bool read(const char* name, PyObject* array, ConstTensor* tensor) {
    return read({name, array, false, nullptr, tensor, nullptr});
  }
  bool finish();

  // Whether the array that read() took last cannot be written; of a deferred one nobody knows before finish().
  bool last_read_only() const { return last_read_only_; }

  // The cudaStream_t of the call, after finish().
  void* stream() const { return stream_; }

 private:
  struct Argument {
    const char* name;
    PyObject* array;
    bool written;
    Tensor* tensor;  // where it goes: one of these two
    ConstTensor* const_tensor;
    PyObject** keep;

    void give(const Tensor& found) const {
      if (tensor != nullptr) {
        *tensor = found;
      } else {
        *const_tensor = found;
      }
    }
  };
  static constexpr int kMost = 32;  // arrays of a call

  bool read(const Argument& argument);
  bool read_exchange(const Argument& argument, const dlpack::ExchangeApi& api, bool has_requires_grad);
  bool read_dlpack(const Argument& argument);
  bool take_capsule(const Argument& argument, PyObject* capsule);
  int read_buffer(const Argument& argument);           // 1: done, 0: not this way, -1: an exception is set
  int read_array_interface(const Argument& argument);  // the same
  bool decide_stream();

  PyObject* stream_argument_;
  const DType* as_;
  void* stream_ = nullptr;
  bool stream_known_ = false, last_read_only_ = false;
  int num_buffers_ = 0, num_held_ = 0, num_deferred_ = 0;
  std::array<Py_buffer, kMost> buffers_;
  std::array<PyObject*, kMost> held_;
  std::array<Argument, kMost> deferred_;
};

// The dtype of a name, float32 to int64 as in dtype_name; -1 where there is none.
int dtype_of_name(std::string_view name);

// How DLPack says a dtype.
dlpack::DataType dlpack_type(DType dtype);

}  // namespace quire::python
