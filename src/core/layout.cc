#include "quire/layout.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "core/checks.h"
#include "core/guard.h"
#include "core/mode_table.h"
#include "quire/backend.h"

namespace quire {
namespace {

using format::FormatInfo;
using format::MetaPlace;

constexpr std::int64_t kGiB = std::int64_t{1} << 30;
constexpr std::int64_t kMaxRowBytes = 1 << 15;  // of a registered mode

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Bytes of one row, of its scale, and the dtype it is kept in.
struct RowCost {
  std::int64_t data_bytes = 0;
  std::int64_t scale_bytes = 0;
  DType cache_dtype = DType::kUInt8;
};

// Asks the backend of a registered mode what its rows cost.
Result<RowCost> registered_row_cost(const ModeInfo& mode, int head_size, bool is_value) {
  const Result<const QuantKVBackend*> backend = get_backend(mode.id);
  if (!backend) return backend.status();
  const Result<std::int64_t> bytes = (*backend)->row_bytes(head_size, is_value);
  if (!bytes) return bytes.status();
  if (*bytes < 1 || *bytes > kMaxRowBytes) {
    return invalid_argument("row_bytes of mode " + mode.name + " is " + std::to_string(*bytes) + " at head_size " +
                            std::to_string(head_size) + "; supported: 1 to " + std::to_string(kMaxRowBytes));
  }
  if (!(*backend)->needs_scale_caches()) return RowCost{*bytes, 0, DType::kUInt8};
  const Result<ScaleCaches> scales = (*backend)->allocate_scale_caches(2, 3, 5);
  if (!scales) return scales.status();
  for (const Tensor& cache : {scales->k_scale_cache, scales->v_scale_cache}) {
    if (cache.ndim != 3 || cache.dtype != DType::kFloat32 || cache.shape[0] != 2 || cache.shape[1] != 3 ||
        cache.shape[2] != 5) {
      return unsupported("allocate_scale_caches(2, 3, 5) of mode " + mode.name + " gives " + to_string(cache) +
                         "; make_layout supports [2, 3, 5] float32, other scale caches are the backend's to lay out");
    }
  }
  return RowCost{*bytes, 4, DType::kUInt8};
}

Result<RowCost> row_cost(const core::ModeRow& mode, const KVCacheSpec& spec, bool is_value) {
  const int head_size = is_value ? spec.head_size_v : spec.head_size;
  const char* argument = is_value ? "head_size_v" : "head_size";
  if (head_size < format::kMinHeadSize || head_size > format::kMaxHeadSize) {
    return invalid_argument(std::string(argument) + " is " + std::to_string(head_size) + "; supported: 32 to 512");
  }
  const core::FormatPair pair = core::formats_of(mode, spec.model_dtype, spec.model_dtype);
  if (pair.known()) {
    const FormatInfo& info = format::format_info(is_value ? pair.value : pair.key);
    if (head_size % info.unit != 0) {
      return invalid_argument("mode " + mode.name + " packs " + std::to_string(info.unit) + " elements together, so " +
                              argument + " must be a multiple of " + std::to_string(info.unit) + ", got " +
                              std::to_string(head_size));
    }
    return RowCost{info.row_bytes(head_size), info.meta_place == MetaPlace::kScaleCache ? info.meta_bytes : 0,
                   info.cache_dtype};
  }
  if (!mode.registered) {
    return invalid_argument("model_dtype is " + std::string(dtype_name(spec.model_dtype)) + "; mode " + mode.name +
                            " stores float32, float16 or bfloat16");
  }
  return core::call_backend("make_layout", mode.id, [&] { return registered_row_cost(mode, head_size, is_value); });
}

// Refuses a value outside an enum whose first `count` values are named by `names`.
template <class Enum>
Status check_enum(const char* field, Enum value, int count, const char* names) {
  if (static_cast<int>(value) < count) return {};
  return invalid_argument(std::string(field) + " is outside its enum; supported: " + names);
}

}  // namespace

Result<KVCacheLayout> make_layout(const KVCacheSpec& given) {
  return core::guarded([&]() -> Result<KVCacheLayout> {
    KVCacheLayout layout;
    KVCacheSpec& spec = layout.spec;
    spec = given;
    for (const Status& status : {check_enum("order", spec.order, 2, "kNHD, kHND"),
                                 check_enum("packing", spec.packing, 3, "kSeparate, kKVInBlock, kKVInRow"),
                                 check_enum("scales", spec.scales, 2, "kSeparate, kInline")}) {
      if (!status) return status;
    }
    if (dtype_name(spec.model_dtype) == "unknown") {
      return invalid_argument("model_dtype is outside its enum; supported: float32, float16, bfloat16");
    }
    if (spec.head_size_v == 0) spec.head_size_v = spec.head_size;
    const Result<const core::ModeRow*> known = core::known_mode(spec.mode);
    if (!known) return known.status();
    const core::ModeRow* mode = *known;
    if (mode->shared_slot) spec.packing = KVPacking::kKVInRow;

    // The limits keep every product of these with a row's bytes inside 63 bits.
    const struct {
      const char* name;
      std::int64_t value, most;
    } counts[] = {{"num_kv_heads", spec.num_kv_heads, 1 << 14},
                  {"num_layers", spec.num_layers, 1 << 14},
                  {"block_size", spec.block_size, 1 << 18},
                  {"page_alignment", spec.page_alignment, 1 << 30}};
    for (const auto& field : counts) {
      if (field.value < 1 || field.value > field.most) {
        return invalid_argument(std::string(field.name) + " is " + std::to_string(field.value) + "; supported: 1 to " +
                                std::to_string(field.most));
      }
    }

    const Result<RowCost> k = row_cost(*mode, spec, false);
    if (!k) return k.status();
    const Result<RowCost> v = row_cost(*mode, spec, true);
    if (!v) return v.status();
    layout.key_cache_dtype = k->cache_dtype;
    layout.value_cache_dtype = v->cache_dtype;
    const bool any_scales = k->scale_bytes + v->scale_bytes > 0;
    const bool inline_scales = any_scales && spec.scales == ScalePlacement::kInline;

    layout.k_data_bytes = k->data_bytes;
    layout.v_data_bytes = v->data_bytes;
    layout.k_scale_bytes = k->scale_bytes;
    layout.v_scale_bytes = v->scale_bytes;
    layout.k_row_bytes = k->data_bytes + (inline_scales ? k->scale_bytes : 0);
    layout.v_row_bytes = v->data_bytes + (inline_scales ? v->scale_bytes : 0);
    const bool in_row = spec.packing == KVPacking::kKVInRow;
    // A slot that K and V share is rounded up to an even number of bytes, as TurboQuant's is.
    const std::int64_t slot_bytes = round_up(layout.k_row_bytes + layout.v_row_bytes, mode->shared_slot ? 2 : 1);
    layout.bytes_per_token_head = (in_row ? slot_bytes : layout.k_row_bytes + layout.v_row_bytes) +
                                  (inline_scales ? 0 : layout.k_scale_bytes + layout.v_scale_bytes);
    layout.bytes_per_token = layout.bytes_per_token_head * spec.num_kv_heads * spec.num_layers;

    const std::int64_t heads = spec.num_kv_heads;
    const std::int64_t slots = spec.block_size;
    const auto place = [&](std::int64_t row, std::int64_t& slot_stride, std::int64_t& head_stride) {
      slot_stride = spec.order == CacheOrder::kNHD ? heads * row : row;
      head_stride = spec.order == CacheOrder::kNHD ? row : slots * row;
      return heads * slots * row;  // bytes of the plane
    };
    const std::int64_t k_plane =
        place(in_row ? slot_bytes : layout.k_row_bytes, layout.k_slot_stride, layout.k_head_stride);
    const std::int64_t v_plane =
        place(in_row ? slot_bytes : layout.v_row_bytes, layout.v_slot_stride, layout.v_head_stride);
    if (spec.packing == KVPacking::kSeparate) {
      layout.k_block_stride = round_up(k_plane, spec.page_alignment);
      layout.v_block_stride = round_up(v_plane, spec.page_alignment);
    } else {
      layout.v_offset = in_row ? layout.k_row_bytes : k_plane;
      layout.k_block_stride = layout.v_block_stride =
          round_up(in_row ? k_plane : k_plane + v_plane, spec.page_alignment);
    }
    if (inline_scales) {
      layout.k_scale_offset = layout.k_scale_bytes > 0 ? layout.k_data_bytes : -1;
      layout.v_scale_offset = layout.v_scale_bytes > 0 ? layout.v_data_bytes : -1;
    }

    for (const auto& [element, strides] :
         {std::pair{static_cast<std::int64_t>(dtype_bytes(layout.key_cache_dtype)),
                    std::array{layout.k_block_stride, layout.k_slot_stride, layout.k_head_stride, std::int64_t{0}}},
          std::pair{static_cast<std::int64_t>(dtype_bytes(layout.value_cache_dtype)),
                    std::array{layout.v_block_stride, layout.v_slot_stride, layout.v_head_stride, layout.v_offset}},
          std::pair{
              std::int64_t{layout.k_scale_offset < 0 ? 1 : 4},
              std::array{layout.k_block_stride, layout.k_slot_stride, layout.k_head_stride, layout.k_scale_offset}},
          std::pair{std::int64_t{layout.v_scale_offset < 0 ? 1 : 4},
                    std::array{layout.v_block_stride, layout.v_slot_stride, layout.v_head_stride,
                               layout.v_offset + layout.v_scale_offset}}}) {
      for (std::int64_t stride : strides) {
        if (stride % element != 0) {
          return invalid_argument(
              "mode " + mode->name + " with these head sizes, packing, scales and page_alignment puts a " +
              std::to_string(element) + "-byte element at " + std::to_string(stride) +
              " bytes; supported: multiples of the element size (separate scales, another page_alignment)");
        }
      }
    }

    const std::int64_t separate_scales =
        inline_scales ? 0 : (layout.k_scale_bytes + layout.v_scale_bytes) * heads * slots;
    layout.bytes_per_block =
        layout.k_block_stride + (spec.packing == KVPacking::kSeparate ? layout.v_block_stride : 0) + separate_scales;
    layout.tokens_per_gib = kGiB / (layout.bytes_per_block * spec.num_layers) * slots;

    // TurboQuant counts half a slot for K and half for V.
    const auto elements = [&](std::int64_t row_bytes, DType dtype) {
      return mode->shared_slot ? slot_bytes / 2 : row_bytes / static_cast<std::int64_t>(dtype_bytes(dtype));
    };
    layout.effective_head_size = elements(layout.k_data_bytes, layout.key_cache_dtype);
    layout.effective_head_size_v = elements(layout.v_data_bytes, layout.value_cache_dtype);
    layout.padded_head_size = elements(layout.k_data_bytes + layout.k_scale_bytes, layout.key_cache_dtype);
    layout.padded_head_size_v = elements(layout.v_data_bytes + layout.v_scale_bytes, layout.value_cache_dtype);
    return layout;
  });
}

KVCacheViews make_views(const KVCacheLayout& layout, std::int64_t num_blocks, void* base, void* v_base,
                        void* k_scale_base, void* v_scale_base, Device device) {
  if (!cache_bytes(layout, num_blocks)) return {};
  const KVCacheSpec& spec = layout.spec;
  const std::int64_t slots = spec.block_size;
  const std::int64_t heads = spec.num_kv_heads;
  const auto rows = [&](void* data, DType dtype, std::int64_t row_bytes, std::int64_t block_stride,
                        std::int64_t slot_stride, std::int64_t head_stride) {
    const auto element = static_cast<std::int64_t>(dtype_bytes(dtype));
    return Tensor::strided(data, dtype, {num_blocks, slots, heads, row_bytes / element},
                           {block_stride / element, slot_stride / element, head_stride / element, 1}, device);
  };
  const auto offset = [](void* pointer, std::int64_t bytes) {
    return pointer == nullptr ? nullptr : static_cast<void*>(static_cast<std::uint8_t*>(pointer) + bytes);
  };
  void* v_data = spec.packing == KVPacking::kSeparate ? v_base : offset(base, layout.v_offset);

  KVCacheViews views;
  views.key_cache = rows(base, layout.key_cache_dtype, layout.k_data_bytes, layout.k_block_stride, layout.k_slot_stride,
                         layout.k_head_stride);
  views.value_cache = rows(v_data, layout.value_cache_dtype, layout.v_data_bytes, layout.v_block_stride,
                           layout.v_slot_stride, layout.v_head_stride);
  const auto scales = [&](std::int64_t scale_bytes, std::int64_t scale_offset, void* row_base, void* separate_base,
                          std::int64_t block_stride, std::int64_t slot_stride, std::int64_t head_stride) {
    if (scale_bytes == 0) return Tensor();
    if (scale_offset < 0) {
      return Tensor::contiguous(separate_base, DType::kFloat32, {num_blocks, slots, heads}, device);
    }
    return Tensor::strided(offset(row_base, scale_offset), DType::kFloat32, {num_blocks, slots, heads},
                           {block_stride / 4, slot_stride / 4, head_stride / 4}, device);
  };
  views.k_scale_cache = scales(layout.k_scale_bytes, layout.k_scale_offset, base, k_scale_base, layout.k_block_stride,
                               layout.k_slot_stride, layout.k_head_stride);
  views.v_scale_cache = scales(layout.v_scale_bytes, layout.v_scale_offset, v_data, v_scale_base, layout.v_block_stride,
                               layout.v_slot_stride, layout.v_head_stride);
  return views;
}

Result<KVCacheBytes> cache_bytes(const KVCacheLayout& layout, std::int64_t num_blocks) {
  const KVCacheSpec& spec = layout.spec;
  const std::int64_t most =
      std::numeric_limits<std::int64_t>::max() / std::max<std::int64_t>(1, layout.bytes_per_block);
  if (num_blocks < 0 || num_blocks > most) {
    return invalid_argument("num_blocks is " + std::to_string(num_blocks) + "; supported: 0 to " +
                            std::to_string(most) + ", with pages of " + std::to_string(layout.bytes_per_block) +
                            " bytes");
  }
  KVCacheBytes bytes;
  bytes.base = layout.k_block_stride * num_blocks;
  if (spec.packing == KVPacking::kSeparate) bytes.v_base = layout.v_block_stride * num_blocks;
  const std::int64_t rows_per_block = std::int64_t{spec.block_size} * spec.num_kv_heads;
  if (layout.k_scale_offset < 0) bytes.k_scales = layout.k_scale_bytes * rows_per_block * num_blocks;
  if (layout.v_scale_offset < 0) bytes.v_scales = layout.v_scale_bytes * rows_per_block * num_blocks;
  return bytes;
}

}  // namespace quire
