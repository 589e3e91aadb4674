#include "views.h"

#include <nanobind/stl/string.h>

#include <string>

#include "docs.h"
#include "layout.h"
#include "modes.h"
#include "raise.h"
#include "reader.h"
#include "tensor.h"

namespace nb = nanobind;

namespace quire::python {
namespace {

PyTypeObject* views_type = nullptr;

struct Part {
  const char* name;
  bool written;  // by a store
};
constexpr Part kParts[PyViews::kParts] = {
    {"key_cache", true},    {"value_cache", true},  {"k_scale_cache", true},  {"v_scale_cache", true},
    {"k_page_meta", false}, {"v_page_meta", false}, {"k_head_vector", false}, {"v_head_vector", false},
};

void set_part(KVCacheViews& views, std::size_t part, const Tensor& tensor) {
  Tensor* const written[] = {&views.key_cache,     &views.value_cache, &views.k_scale_cache,
                             &views.v_scale_cache, &views.k_page_meta, &views.v_page_meta};
  if (part < std::size(written)) {
    *written[part] = tensor;
  } else {
    (part == 6 ? views.k_head_vector : views.v_head_vector) = tensor;
  }
}

// Reads the arrays of a cache, each by itself: first as one that can be written, then as one that cannot.
void construct(PyViews* self, nb::handle key_cache, nb::handle value_cache, nb::handle k_scale_cache,
               nb::handle v_scale_cache, nb::handle k_page_meta, nb::handle v_page_meta, nb::handle k_head_vector,
               nb::handle v_head_vector, nb::handle mode) {
  new (self) PyViews();
  const nb::handle given[] = {key_cache,   value_cache, k_scale_cache, v_scale_cache,
                              k_page_meta, v_page_meta, k_head_vector, v_head_vector};
  if (!mode.is_none()) {
    ModeId id{};
    if (!mode_of(mode.ptr(), &id)) throw nb::python_error();
    self->mode = id;
  }
  Reader reader(nullptr);
  std::array<Tensor, PyViews::kParts> tensors;
  std::array<PyObject*, PyViews::kParts> keep{};
  bool all = true;
  for (std::size_t i = 0; i < PyViews::kParts && all; ++i) {
    if (given[i].is_none()) continue;
    self->arrays[i] = nb::borrow(given[i]);
    all = reader.read(kParts[i].name, given[i].ptr(), false, &tensors[i], &keep[i]) && reader.finish();
    if (all && kParts[i].written && reader.last_read_only() && self->read_only == nullptr) {
      self->read_only = kParts[i].name;
    }
  }
  for (std::size_t i = 0; i < PyViews::kParts; ++i) {
    self->keep[i] = nb::steal(keep[i]);
    set_part(self->views, i, tensors[i]);
  }
  if (!all) throw nb::python_error();
}

// Views of memory laid out as make_layout(spec) says: four buffers of bytes, of which a mode may need fewer.
nb::object make(nb::handle spec, std::int64_t num_blocks, nb::handle base, nb::handle v_base, nb::handle k_scale_base,
                nb::handle v_scale_base) {
  const KVCacheLayout layout = layout_of(spec);
  const Result<KVCacheBytes> bytes = cache_bytes(layout, num_blocks);
  if (!bytes) throw_status(bytes.status());
  const struct {
    const char* name;
    nb::handle array;
    std::int64_t needed;
  } buffers[] = {{"base", base, bytes->base},
                 {"v_base", v_base, bytes->v_base},
                 {"k_scale_base", k_scale_base, bytes->k_scales},
                 {"v_scale_base", v_scale_base, bytes->v_scales}};
  nb::object keep[4];
  void* pointers[4] = {};
  Device device;
  Reader reader(nullptr);
  for (int i = 0; i < 4; ++i) {
    const auto& buffer = buffers[i];
    const std::string name = buffer.name;
    if (buffer.needed == 0) continue;
    if (buffer.array.is_none()) {
      throw_status(invalid_argument(name + " is not given; it must have " + std::to_string(buffer.needed) + " bytes"));
    }
    Tensor tensor;
    PyObject* kept = nullptr;
    const bool read = reader.read(buffer.name, buffer.array.ptr(), true, &tensor, &kept) && reader.finish();
    keep[i] = nb::steal(kept);
    if (!read) throw nb::python_error();
    std::int64_t dense = 1;
    for (int d = tensor.ndim - 1; d >= 0; --d) {
      if (tensor.shape[d] != 1 && tensor.strides[d] != dense) {
        throw_status(invalid_argument(name + " is not contiguous; it must be a block of bytes"));
      }
      dense *= tensor.shape[d];
    }
    const std::int64_t given = tensor.numel() * static_cast<std::int64_t>(dtype_bytes(tensor.dtype));
    if (given < buffer.needed) {
      throw_status(invalid_argument(name + " has " + std::to_string(given) + " bytes; " + std::to_string(num_blocks) +
                                    " blocks need " + std::to_string(buffer.needed)));
    }
    if (i > 0 && pointers[0] != nullptr && tensor.device != device) {
      throw_status(
          invalid_argument(name + " is on " + to_string(tensor.device) + ", but base is on " + to_string(device)));
    }
    pointers[i] = tensor.data;
    device = tensor.device;
  }
  PyViews made;
  made.views = make_views(layout, num_blocks, pointers[0], pointers[1], pointers[2], pointers[3], device);
  made.mode = layout.spec.mode;
  const Tensor parts[] = {made.views.key_cache, made.views.value_cache, made.views.k_scale_cache,
                          made.views.v_scale_cache};
  const bool own_v = layout.spec.packing == KVPacking::kSeparate;
  const bool own_scales = layout.spec.scales == ScalePlacement::kSeparate;
  const int owners[] = {0, own_v ? 1 : 0, own_scales ? 2 : 0, own_scales ? 3 : own_v ? 1 : 0};
  for (std::size_t i = 0; i < 4; ++i) {
    if (!parts[i].defined()) continue;
    made.keep[i] = keep[owners[i]];
    made.arrays[i] = make_tensor(parts[i], keep[owners[i]]);
  }
  return nb::cast(std::move(made));
}

int traverse(PyObject* self, visitproc visit, void* arg) noexcept {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  const PyViews& views = *nb::inst_ptr<PyViews>(nb::handle(self));
  for (const nb::object& object : views.arrays) Py_VISIT(object.ptr());
  for (const nb::object& object : views.keep) Py_VISIT(object.ptr());
  return 0;
}

int clear(PyObject* self) noexcept {
  PyViews& views = *nb::inst_ptr<PyViews>(nb::handle(self));
  views.views = {};
  for (nb::object& object : views.arrays) object.reset();
  for (nb::object& object : views.keep) object.reset();
  return 0;
}

PyType_Slot slots[] = {
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)}, {Py_tp_clear, reinterpret_cast<void*>(clear)}, {0, nullptr}};

template <std::size_t part>
nb::object array(const PyViews& self) {
  return self.arrays[part].is_valid() ? self.arrays[part] : nb::none();
}

}  // namespace

const PyViews* views_of(PyObject* object) {
  if (Py_TYPE(object) == views_type || nb::isinstance<PyViews>(nb::handle(object))) {
    return nb::inst_ptr<PyViews>(nb::handle(object));
  }
  PyErr_SetString(PyExc_TypeError,
                  "cache must be a quire.KVCacheViews, made by allocate_cache, make_views or from arrays");
  return nullptr;
}

nb::object make_views_object(const KVCacheViews& views, ModeId mode, const nb::object& keep) {
  PyViews made;
  made.views = views;
  made.mode = mode;
  const Tensor parts[] = {views.key_cache, views.value_cache, views.k_scale_cache, views.v_scale_cache};
  for (std::size_t i = 0; i < std::size(parts); ++i) {
    if (!parts[i].defined()) continue;
    made.keep[i] = keep;
    made.arrays[i] = make_tensor(parts[i], keep);
  }
  return nb::cast(std::move(made));
}

void bind_views(nb::module_& module) {
  auto type = nb::class_<PyViews>(module, "KVCacheViews", nb::type_slots(slots), docs::KVCacheViews)
                  .def("__init__", &construct, nb::arg("key_cache"), nb::arg("value_cache"),
                       nb::arg("k_scale_cache") = nb::none(), nb::arg("v_scale_cache") = nb::none(), nb::kw_only(),
                       nb::arg("k_page_meta") = nb::none(), nb::arg("v_page_meta") = nb::none(),
                       nb::arg("k_head_vector") = nb::none(), nb::arg("v_head_vector") = nb::none(),
                       nb::arg("mode") = nb::none(), docs::KVCacheViews___init__)
                  .def_prop_ro("key_cache", &array<0>, docs::KVCacheViews_key_cache)
                  .def_prop_ro("value_cache", &array<1>, docs::KVCacheViews_value_cache)
                  .def_prop_ro("k_scale_cache", &array<2>, docs::KVCacheViews_k_scale_cache)
                  .def_prop_ro("v_scale_cache", &array<3>, docs::KVCacheViews_v_scale_cache)
                  .def_prop_ro("k_page_meta", &array<4>, docs::KVCacheViews_k_page_meta)
                  .def_prop_ro("v_page_meta", &array<5>, docs::KVCacheViews_v_page_meta)
                  .def_prop_ro("k_head_vector", &array<6>, docs::KVCacheViews_k_head_vector)
                  .def_prop_ro("v_head_vector", &array<7>, docs::KVCacheViews_v_head_vector)
                  .def(
                      "with_mode",
                      [](const PyViews& self, nb::handle mode) {
                        PyViews copy = self;
                        ModeId id{};
                        if (!mode_of(mode.ptr(), &id)) throw nb::python_error();
                        copy.mode = id;
                        return copy;
                      },
                      nb::arg("mode"), docs::KVCacheViews_with_mode)
                  .def_prop_ro(
                      "mode",
                      [](const PyViews& self) -> nb::object {
                        return self.mode ? nb::cast(mode_name(*self.mode)) : nb::none();
                      },
                      docs::KVCacheViews_mode);
  views_type = reinterpret_cast<PyTypeObject*>(type.ptr());
  module.def("make_views", &make, nb::arg("spec"), nb::arg("num_blocks"), nb::arg("base"),
             nb::arg("v_base") = nb::none(), nb::arg("k_scale_base") = nb::none(), nb::arg("v_scale_base") = nb::none(),
             docs::make_views);
}

}  // namespace quire::python
