// TurboQuant by vLLM's entry points (quire/turboquant.h). A configuration's fields are arguments of their own.
#include "quire/turboquant.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <array>

#include "call.h"
#include "docs.h"
#include "modes.h"
#include "ops.h"
#include "raise.h"
#include "reader.h"
#include "views.h"

namespace nb = nanobind;

namespace quire::python {
namespace {

template <class Args, auto... path>
constexpr Parameter of(const char* name) {
  return parameter<Call<Args>, &Call<Args>::args, path...>(name);
}
template <class Args, auto member>
constexpr Parameter config(const char* name) {
  return of<Args, &Args::config, member>(name);
}

using Store = TurboQuantStoreArgs;
constexpr std::array kStore = {
    of<Store, &Store::key>("key"),
    of<Store, &Store::value>("value"),
    of<Store, &Store::kv_cache>("kv_cache"),
    of<Store, &Store::slot_mapping>("slot_mapping"),
    config<Store, &TurboQuantConfig::key_bits>("key_bits"),
    config<Store, &TurboQuantConfig::value_bits>("value_bits"),
    config<Store, &TurboQuantConfig::norm_correction>("norm_correction"),
    config<Store, &TurboQuantConfig::key_e4b15>("key_e4b15"),
    of<Store, &Store::rotation>("rotation"),
    of<Store, &Store::midpoints>("midpoints"),
    parameter<Call<Store>, &Call<Store>::stream>("stream"),
};
static_assert(same_names(kStore, docs::turboquant_store_names));
constinit const Signature store_signature("turboquant_store", kStore, 4);

using Decode = TurboQuantDecodeArgs;
constexpr std::array kDecode = {
    of<Decode, &Decode::query>("query"),
    of<Decode, &Decode::out>("out"),
    of<Decode, &Decode::kv_cache>("kv_cache"),
    of<Decode, &Decode::block_table>("block_table"),
    of<Decode, &Decode::seq_lens>("seq_lens"),
    of<Decode, &Decode::softmax_scale>("softmax_scale"),
    config<Decode, &TurboQuantConfig::key_bits>("key_bits"),
    config<Decode, &TurboQuantConfig::value_bits>("value_bits"),
    config<Decode, &TurboQuantConfig::norm_correction>("norm_correction"),
    config<Decode, &TurboQuantConfig::key_e4b15>("key_e4b15"),
    of<Decode, &Decode::rotation>("rotation"),
    of<Decode, &Decode::centroids>("centroids"),
    of<Decode, &Decode::lse>("lse"),
    of<Decode, &Decode::max_seq_len>("max_seq_len"),
    parameter<Call<Decode>, &Call<Decode>::stream>("stream"),
};
static_assert(same_names(kDecode, docs::turboquant_decode_attention_names));
constinit const Signature decode_signature("turboquant_decode_attention", kDecode, 6);

TurboQuantConfig config_of(int key_bits, int value_bits, bool norm_correction, bool key_e4b15) {
  return {key_bits, value_bits, norm_correction, key_e4b15};
}

nb::object views(nb::handle kv_cache, int head_size, int key_bits, int value_bits, bool norm_correction,
                 bool key_e4b15) {
  const TurboQuantConfig known = config_of(key_bits, value_bits, norm_correction, key_e4b15);
  Tensor slots;
  PyObject* keep = nullptr;
  Reader reader(nullptr);
  const bool read = reader.read("kv_cache", kv_cache.ptr(), true, &slots, &keep) && reader.finish();
  nb::object kept = nb::steal(keep);
  if (!read) throw nb::python_error();
  const KVCacheViews made = value_of(turboquant_views(known, slots, head_size));
  // A pair of bits that has no mode of its own is read through turboquant_mode's composed one.
  TurboQuantConfig corrected = known;
  corrected.norm_correction = true;
  return make_views_object(made, value_of(turboquant_mode(corrected)), kept);
}

}  // namespace

PyObject* call_turboquant_store(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
  Call<Store> call;
  return store_signature.run(&call, given, count, keywords,
                             [&] { return turboquant_store(call.args, call.stream.value); });
}

PyObject* call_turboquant_decode_attention(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
  Call<Decode> call;
  return decode_signature.run(&call, given, count, keywords,
                              [&] { return turboquant_decode_attention(call.args, call.stream.value); });
}

void bind_turboquant(nb::module_& module) {
  const auto key_bits = nb::arg("key_bits") = 4, value_bits = nb::arg("value_bits") = 4;
  const auto norm_correction = nb::arg("norm_correction") = true, key_e4b15 = nb::arg("key_e4b15") = false;
  module.def(
      "turboquant_mode",
      [](int keys, int values, bool correction, bool e4b15) {
        return mode_name(value_of(turboquant_mode(config_of(keys, values, correction, e4b15))));
      },
      key_bits, value_bits, norm_correction, key_e4b15, docs::turboquant_mode);
  module.def("turboquant_views", &views, nb::arg("kv_cache"), nb::arg("head_size"), key_bits, value_bits,
             norm_correction, key_e4b15, docs::turboquant_views);
  module.def("turboquant_uses_e4b15", &turboquant_uses_e4b15, nb::arg("major"), nb::arg("minor"),
             docs::turboquant_uses_e4b15);
  module.def(
      "boundary_skip_layers",
      [](int num_layers, int n) {
        nb::list layers;
        for (const int layer : boundary_skip_layers(num_layers, n)) layers.append(layer);
        return layers;
      },
      nb::arg("num_layers"), nb::arg("n") = 2, docs::boundary_skip_layers);
}

}  // namespace quire::python
