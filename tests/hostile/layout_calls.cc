// make_layout, cache_bytes and make_views: the views of an accepted layout lie inside of the bytes that it asks for.
#include <array>
#include <climits>
#include <string>

#include "hostile/probe.h"
#include "support/modes.h"

namespace quire::testing {
namespace {

struct LayoutCall {
  KVCacheSpec spec;
  std::int64_t num_blocks = 3;
  Result<KVCacheLayout> layout = Status();
};

// [first, last] byte of a view relative to `base`; false where that does not fit 64 bits.
bool reach(const Tensor& t, const void* base, std::int64_t* last) {
  const auto element = static_cast<std::int64_t>(dtype_bytes(t.dtype));
  std::int64_t end = static_cast<const std::uint8_t*>(t.data) - static_cast<const std::uint8_t*>(base) + element;
  for (int dim = 0; dim < t.ndim; ++dim) {
    std::int64_t product = 0;
    if (t.shape[dim] < 1 || t.strides[dim] < 0 ||
        __builtin_mul_overflow(t.shape[dim] - 1, t.strides[dim] * element, &product) ||
        __builtin_add_overflow(end, product, &end)) {
      return false;
    }
  }
  *last = end;
  return true;
}

Status check_layout(const LayoutCall& call) {
  const KVCacheLayout& layout = *call.layout;
  const Result<KVCacheBytes> result = cache_bytes(layout, call.num_blocks);
  if (!result.ok()) {
    const KVCacheViews none = make_views(layout, call.num_blocks, nullptr);
    return none.key_cache.defined() ? internal_error("there are views of what has no size") : Status();
  }
  const KVCacheBytes& bytes = *result;
  for (std::int64_t size : {bytes.base, bytes.v_base, bytes.k_scales, bytes.v_scales}) {
    if (size < 0) return internal_error("cache_bytes gave " + std::to_string(size) + " bytes");
  }
  for (std::int64_t size :
       {layout.k_data_bytes, layout.v_data_bytes, layout.bytes_per_token_head, layout.bytes_per_token,
        layout.bytes_per_block, layout.k_block_stride, layout.v_block_stride}) {
    if (size < 1) return internal_error("the layout has a size of " + std::to_string(size) + " bytes");
  }
  if (call.num_blocks < 1 || call.num_blocks > 1000) return {};
  std::array<std::uint8_t, 4> bases{};  // addresses are compared; nothing is read or written
  const KVCacheViews views = make_views(layout, call.num_blocks, &bases[0], &bases[1], &bases[2], &bases[3]);
  const bool apart = layout.spec.packing == KVPacking::kSeparate;
  const struct {
    const Tensor& view;
    const void* base;
    std::int64_t bytes;
  } planes[] = {{views.key_cache, &bases[0], bytes.base},
                {views.value_cache, &bases[apart ? 1 : 0], apart ? bytes.v_base : bytes.base},
                {views.k_scale_cache, &bases[layout.k_scale_offset < 0 ? 2 : 0],
                 layout.k_scale_offset < 0 ? bytes.k_scales : bytes.base},
                {views.v_scale_cache, &bases[layout.v_scale_offset < 0 ? 3 : (apart ? 1 : 0)],
                 layout.v_scale_offset < 0 ? bytes.v_scales : (apart ? bytes.v_base : bytes.base)}};
  for (const auto& plane : planes) {
    std::int64_t last = 0;
    if (plane.view.defined() && (!reach(plane.view, plane.base, &last) || last > plane.bytes)) {
      return internal_error("a view " + to_string(plane.view) + " leaves its " + std::to_string(plane.bytes) +
                            " bytes");
    }
  }
  return {};
}

Call make_layout_call(const KVCacheSpec& spec) {
  const auto memory = std::make_shared<LayoutCall>();
  LayoutCall& l = *memory;
  l.spec = spec;
  Call call;
  call.memory = memory;
  call.run = [&l] {
    l.layout = make_layout(l.spec);
    return l.layout.status();
  };
  call.oracle = [&l] { return check_layout(l); };
  call.words = {"packing", "num_blocks"};
  plain_probes(call);

  KVCacheSpec& s = l.spec;
  scalar_probes<ModeId, std::int64_t>(call, "mode", &s.mode, {.refused = {-1, kInt32Min, kInt32Max, 1000}});
  for (const ModeInfo& mode : list_modes()) {
    if (mode.registered) continue;
    call.probes.push_back({"mode=" + mode.name, Expect::kRight, [&s, id = mode.id] { s.mode = id; }});
  }
  const std::vector<int> bad_sizes = {INT_MIN, -1, 1, 8, 31, 513, 1024, 1 << 20, INT_MAX};
  std::vector<int> bad_keys = bad_sizes;
  bad_keys.push_back(0);  // as head_size_v it means head_size
  scalar_probes<int>(call, "head_size", &s.head_size,
                     {.refused = bad_keys, .right = {32, 33, 34, 36, 62, 80, 96, 100, 511, 512}});
  scalar_probes<int>(call, "head_size_v", &s.head_size_v,
                     {.refused = bad_sizes, .right = {0, 32, 33, 34, 36, 62, 80, 511, 512}});
  for (const auto& [name, field] : {std::pair{"num_kv_heads", &s.num_kv_heads}, std::pair{"num_layers", &s.num_layers},
                                    std::pair{"block_size", &s.block_size}}) {
    scalar_probes<int>(call, name, field,
                       {.refused = {INT_MIN, -1, 0, INT_MAX}, .right = {1, 3, 1 << 14, 1 << 18, 1 << 20, 1 << 30}});
  }
  scalar_probes<std::int64_t>(call, "page_alignment", &s.page_alignment,
                              {.refused = {kInt64Min, -1, 0, kInt64Max, kInt64Max - 1, std::int64_t{1} << 62},
                               .right = {1, 3, 7, 4096, 1 << 30, std::int64_t{1} << 31, std::int64_t{1} << 40}});
  scalar_probes<DType, std::int64_t>(call, "model_dtype", &s.model_dtype,
                                     {.refused = {9, 77, 255}, .right = {0, 1, 2, 3, 4, 5, 6, 7, 8}});
  scalar_probes<CacheOrder, std::int64_t>(call, "order", &s.order, {.refused = {2, 9, 255}, .accepted = {0, 1}});
  scalar_probes<KVPacking, std::int64_t>(call, "packing", &s.packing, {.refused = {3, 9, 255}, .right = {0, 1, 2}});
  scalar_probes<ScalePlacement, std::int64_t>(call, "scales", &s.scales, {.refused = {2, 9, 255}, .right = {0, 1}});
  call.probes.push_back({"everything as large as allowed", Expect::kRight, [&s] {
                           s.head_size = s.head_size_v = 512;
                           s.num_kv_heads = s.num_layers = 1 << 14;
                           s.block_size = 1 << 18;
                           s.page_alignment = 1 << 30;
                           s.model_dtype = DType::kFloat32;
                         }});
  // The sizes of no blocks, of a negative number of them, and of more than 64 bits can count.
  scalar_probes<std::int64_t>(call, "num_blocks", &l.num_blocks,
                              {.right = {kInt64Min, -1, 0, 1, 1000, std::int64_t{1} << 31, std::int64_t{1} << 40,
                                         std::int64_t{1} << 50, std::int64_t{1} << 62, kInt64Max}});
  return call;
}

}  // namespace

std::vector<Group> layout_groups() {
  const auto group = [](const std::string& name, const std::string& mode, KVCacheSpec spec) {
    return Group{"layout/" + name,
                 {mode},
                 [=]() mutable {
                   spec.mode = mode_of(mode);
                   return make_layout_call(spec);
                 },
                 60,
                 60};
  };
  return {group("auto", "auto", {.packing = KVPacking::kKVInBlock}),
          group("int4", "int4_per_token_head",
                {.order = CacheOrder::kHND, .packing = KVPacking::kKVInRow, .scales = ScalePlacement::kInline}),
          group("turboquant", "turboquant_3bit_nc", {})};
}

}  // namespace quire::testing
