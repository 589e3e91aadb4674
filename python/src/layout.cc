#include "layout.h"

#include <nanobind/stl/string.h>

#include <iterator>
#include <string>
#include <string_view>

#include "call.h"
#include "docs.h"
#include "modes.h"
#include "reader.h"

namespace nb = nanobind;

namespace quire::python {
namespace {

// The words for the values of an enum, in its order.
constexpr std::string_view kOrders[] = {"NHD", "HND"};
constexpr std::string_view kPackings[] = {"separate", "kv_in_block", "kv_in_row"};
constexpr std::string_view kPlacements[] = {"separate", "inline"};

template <class Enum, std::size_t count>
Enum enum_of(nb::handle spec, const char* name, const std::string_view (&words)[count]) {
  const std::string given = nb::cast<std::string>(spec.attr(name));
  std::string supported;
  for (std::size_t i = 0; i < count; ++i) {
    if (words[i] == given) return static_cast<Enum>(i);
    supported += (i == 0 ? "" : ", ") + std::string(words[i]);
  }
  throw_status(invalid_argument(std::string(name) + " is '" + given + "'; supported: " + supported));
}

template <class Number>
Number number_of(nb::handle object, const char* name) {
  Number value{};
  if (!nb::try_cast(object.attr(name), value)) {
    throw_status(invalid_argument(std::string(name) + " is " + nb::cast<std::string>(nb::repr(object.attr(name))) +
                                  "; it must be a whole number"));
  }
  return value;
}

struct Field {
  const char* name;
  std::int64_t KVCacheLayout::*member;
};
constexpr Field kFields[] = {
    {"k_data_bytes", &KVCacheLayout::k_data_bytes},
    {"v_data_bytes", &KVCacheLayout::v_data_bytes},
    {"k_scale_bytes", &KVCacheLayout::k_scale_bytes},
    {"v_scale_bytes", &KVCacheLayout::v_scale_bytes},
    {"k_row_bytes", &KVCacheLayout::k_row_bytes},
    {"v_row_bytes", &KVCacheLayout::v_row_bytes},
    {"bytes_per_token_head", &KVCacheLayout::bytes_per_token_head},
    {"bytes_per_token", &KVCacheLayout::bytes_per_token},
    {"bytes_per_block", &KVCacheLayout::bytes_per_block},
    {"tokens_per_gib", &KVCacheLayout::tokens_per_gib},
    {"k_block_stride", &KVCacheLayout::k_block_stride},
    {"k_slot_stride", &KVCacheLayout::k_slot_stride},
    {"k_head_stride", &KVCacheLayout::k_head_stride},
    {"v_block_stride", &KVCacheLayout::v_block_stride},
    {"v_slot_stride", &KVCacheLayout::v_slot_stride},
    {"v_head_stride", &KVCacheLayout::v_head_stride},
    {"v_offset", &KVCacheLayout::v_offset},
    {"k_scale_offset", &KVCacheLayout::k_scale_offset},
    {"v_scale_offset", &KVCacheLayout::v_scale_offset},
    {"effective_head_size", &KVCacheLayout::effective_head_size},
    {"effective_head_size_v", &KVCacheLayout::effective_head_size_v},
    {"padded_head_size", &KVCacheLayout::padded_head_size},
    {"padded_head_size_v", &KVCacheLayout::padded_head_size_v},
};

// Two dicts: what make_layout resolved of the spec, and the fields of the layout.
nb::tuple make_layout_of(nb::handle spec) {
  const KVCacheLayout layout = layout_of(spec);
  nb::dict resolved, fields;
  resolved["mode"] = mode_name(layout.spec.mode);
  resolved["head_size_v"] = layout.spec.head_size_v;
  resolved["packing"] = std::string(kPackings[static_cast<std::size_t>(layout.spec.packing)]);
  resolved["scales"] = std::string(kPlacements[static_cast<std::size_t>(layout.spec.scales)]);
  for (const Field& field : kFields) fields[field.name] = layout.*field.member;
  fields["key_cache_dtype"] = std::string(dtype_name(layout.key_cache_dtype));
  fields["value_cache_dtype"] = std::string(dtype_name(layout.value_cache_dtype));
  return nb::make_tuple(resolved, fields);
}

nb::tuple cache_bytes_of(nb::handle spec, std::int64_t num_blocks) {
  const KVCacheBytes bytes = value_of(cache_bytes(layout_of(spec), num_blocks));
  return nb::make_tuple(bytes.base, bytes.v_base, bytes.k_scales, bytes.v_scales);
}

}  // namespace

DType dtype_argument(const char* name, nb::handle value) {
  std::string given;
  const int dtype = nb::try_cast(value, given) ? dtype_of_name(given) : -1;
  if (dtype < 0) {
    throw_status(invalid_argument(std::string(name) + " is " + nb::cast<std::string>(nb::repr(value)) +
                                  "; it must be the name of a dtype, such as 'bfloat16'"));
  }
  return static_cast<DType>(dtype);
}

KVCacheSpec spec_of(nb::handle given) {
  KVCacheSpec spec;
  if (!mode_of(nb::object(given.attr("mode")).ptr(), &spec.mode)) throw nb::python_error();
  spec.head_size = number_of<int>(given, "head_size");
  spec.head_size_v = number_of<int>(given, "head_size_v");
  spec.num_kv_heads = number_of<int>(given, "num_kv_heads");
  spec.num_layers = number_of<int>(given, "num_layers");
  spec.block_size = number_of<int>(given, "block_size");
  spec.model_dtype = dtype_argument("model_dtype", given.attr("model_dtype"));
  spec.order = enum_of<CacheOrder>(given, "order", kOrders);
  spec.packing = enum_of<KVPacking>(given, "packing", kPackings);
  spec.scales = enum_of<ScalePlacement>(given, "scales", kPlacements);
  spec.page_alignment = number_of<std::int64_t>(given, "page_alignment");
  return spec;
}

KVCacheLayout layout_of(nb::handle spec) {
  const KVCacheSpec known = spec_of(spec);
  return value_of(without_gil([&] { return make_layout(known); }));
}

void bind_layout(nb::module_& module) {
  module.def("make_layout", &make_layout_of, nb::arg("spec"), docs::make_layout);
  module.def("cache_bytes", &cache_bytes_of, nb::arg("spec"), nb::arg("num_blocks"), docs::cache_bytes);
}

}  // namespace quire::python
