#include "support/paged_cache.h"

#include <cstddef>
#include <initializer_list>

#include "format/formats.h"
#include "reference/attention.h"
#include "support/random.h"

namespace quire::testing {
namespace {

// A plane of rows (or of scales) in one of a cache's buffers, in bytes.
struct Plane {
  int buffer = 0;
  std::int64_t offset = 0;
  std::int64_t block_stride = 0, slot_stride = 0, head_stride = 0;
};

struct Planes {
  Plane k, v, k_scale, v_scale;
};

Plane dense(int buffer, std::int64_t row, std::int64_t slots, std::int64_t heads, bool head_first) {
  if (head_first) return {buffer, 0, slots * heads * row, row, slots * row};
  return {buffer, 0, slots * heads * row, heads * row, row};
}

// Where everything lies. k and v are the bytes of a row, ks and vs those of its scale (0 or 4).
Planes place(Layout layout, std::int64_t k, std::int64_t v, std::int64_t ks, std::int64_t vs, std::int64_t slots,
             std::int64_t heads) {
  const bool head_first = layout == Layout::kHnd || layout == Layout::kPaddedPages;
  Planes planes{dense(0, k, slots, heads, head_first), dense(1, v, slots, heads, head_first),
                dense(2, ks, slots, heads, head_first), dense(3, vs, slots, heads, head_first)};
  Plane* const all[] = {&planes.k, &planes.v, &planes.k_scale, &planes.v_scale};
  switch (layout) {
    case Layout::kNhd:
    case Layout::kHnd:
      break;
    case Layout::kPadded:
      for (Plane* plane : all) {
        plane->head_stride += 8;
        plane->slot_stride = plane->head_stride * heads + 16;
        plane->block_stride = plane->slot_stride * slots + 48;  // an odd multiple of 16
        plane->offset = 32;
      }
      break;
    case Layout::kPackedRow:
      planes.k = dense(0, k + v, slots, heads, false);
      planes.v = planes.k;
      planes.v.offset = k;
      break;
    case Layout::kInlineScale:
      planes.k = dense(0, k + ks, slots, heads, false);
      planes.v = dense(1, v + vs, slots, heads, false);
      planes.k_scale = planes.k;
      planes.k_scale.offset = k;
      planes.v_scale = planes.v;
      planes.v_scale.offset = v;
      break;
    case Layout::kPackedInline:
    case Layout::kPackedInlineNhd:
    case Layout::kLayerPages:
      planes.k = dense(0, k + ks + v + vs, slots, heads, layout != Layout::kPackedInlineNhd);
      if (layout == Layout::kLayerPages) {
        planes.k.offset = planes.k.block_stride;
        planes.k.block_stride *= 3;
      }
      planes.k_scale = planes.v = planes.v_scale = planes.k;
      planes.k_scale.offset += k;
      planes.v.offset += k + ks;
      planes.v_scale.offset += k + ks + v;
      break;
    case Layout::kKVInBlock:
      planes.v = dense(0, v, slots, heads, false);
      planes.v.offset = planes.k.block_stride;
      planes.k.block_stride += planes.v.block_stride;
      planes.v.block_stride = planes.k.block_stride;
      break;
    case Layout::kLayerInBlock:
      for (Plane* plane : all) {
        plane->offset = plane->head_stride * heads;
        plane->slot_stride = 3 * plane->head_stride * heads;
        plane->block_stride = slots * plane->slot_stride;
      }
      break;
    case Layout::kPaddedPages:
      for (Plane* plane : all) plane->block_stride += 80;  // an odd multiple of 16
      break;
  }
  return planes;
}

Tensor view_of(std::vector<std::uint8_t>& buffer, const Plane& plane, DType dtype,
               std::initializer_list<std::int64_t> shape) {
  const std::int64_t size = static_cast<std::int64_t>(dtype_bytes(dtype));
  Tensor tensor = Tensor::contiguous(buffer.data() + plane.offset, dtype, shape);
  tensor.strides[0] = plane.block_stride / size;
  tensor.strides[1] = plane.slot_stride / size;
  tensor.strides[2] = plane.head_stride / size;
  return tensor;
}

}  // namespace

std::string_view layout_name(Layout layout) {
  constexpr std::string_view names[] = {
      "nhd",           "hnd",         "padded",         "packed_row",        "inline",
      "packed_inline", "kv_in_block", "layer_in_block", "packed_inline_nhd", "padded_pages",
      "layer_pages"};
  return names[static_cast<int>(layout)];
}

PagedCache::PagedCache(const Options& options) : options_(options) {
  if (options_.head_size_v == 0) options_.head_size_v = options_.head_size;
  const ModeInfo mode = **mode_info(mode_of(options_.mode));
  const format::FormatInfo& key = format::format_info(reference::resolve_format(mode.key_format, options_.auto_dtype));
  const format::FormatInfo& value =
      format::format_info(reference::resolve_format(mode.value_format, options_.auto_dtype));
  const std::int64_t k = key.row_bytes(options_.head_size);
  const std::int64_t v = value.row_bytes(options_.head_size_v);
  const std::int64_t ks = key.meta_place == format::MetaPlace::kScaleCache ? 4 : 0;
  const std::int64_t vs = value.meta_place == format::MetaPlace::kScaleCache ? 4 : 0;
  const std::int64_t slots = options_.block_size;
  const std::int64_t heads = options_.num_kv_heads;

  Planes planes = place(options_.layout, k, v, ks, vs, slots, heads);
  buffers_.resize(4);
  const auto grow = [&](const Plane& plane, std::int64_t bytes) {
    if (bytes == 0) return;
    const std::int64_t end = plane.offset + (options_.num_blocks - 1) * plane.block_stride +
                             (slots - 1) * plane.slot_stride + (heads - 1) * plane.head_stride + bytes;
    std::vector<std::uint8_t>& buffer = buffers_[static_cast<std::size_t>(plane.buffer)];
    if (static_cast<std::int64_t>(buffer.size()) < end) buffer.resize(static_cast<std::size_t>(end), options_.poison);
  };
  grow(planes.k, k);
  grow(planes.v, v);
  grow(planes.k_scale, ks);
  grow(planes.v_scale, vs);

  const auto rows = [&](const Plane& plane, DType dtype, std::int64_t bytes) {
    return view_of(buffers_[static_cast<std::size_t>(plane.buffer)], plane, dtype,
                   {options_.num_blocks, slots, heads, bytes / static_cast<std::int64_t>(dtype_bytes(dtype))});
  };
  const auto scales = [&](const Plane& plane) {
    return view_of(buffers_[static_cast<std::size_t>(plane.buffer)], plane, DType::kFloat32,
                   {options_.num_blocks, slots, heads});
  };
  key_cache = rows(planes.k, key.cache_dtype, k);
  value_cache = rows(planes.v, value.cache_dtype, v);
  if (ks > 0) k_scale_cache = scales(planes.k_scale);
  if (vs > 0) v_scale_cache = scales(planes.v_scale);
  if (!options_.centre) return;
  const auto add_centre = [&](const format::FormatInfo& info, int head_size, OwnedTensor& pages, OwnedTensor& vectors) {
    Random random(91);
    if (info.centre == format::Centre::kHead) {
      vectors = OwnedTensor(DType::kFloat32, {heads, head_size}, 5);
      vectors.fill(random.normals(vectors.view.numel()));
    }
    if (info.centre == format::Centre::kPage) {  // as guest_pair5 lays it out: a step, int8 codes
      const std::int64_t bytes = info.page_bytes(head_size);
      pages = OwnedTensor(DType::kUInt8, {options_.num_blocks, heads, bytes}, 3);
      for (std::int64_t block = 0; block < options_.num_blocks; ++block) {
        for (std::int64_t head = 0; head < heads; ++head) {
          auto* page = pages.view.ptr<std::uint8_t>() + block * pages.view.strides[0] + head * pages.view.strides[1];
          page[0] = static_cast<std::uint8_t>(8 * (1 + block % 3));
          for (std::int64_t i = 1; i < bytes; ++i) page[i] = static_cast<std::uint8_t>(random.below(256));
        }
      }
    }
  };
  add_centre(key, options_.head_size, k_page_meta, k_head_vector);
  add_centre(value, options_.head_size_v, v_page_meta, v_head_vector);
}

}  // namespace quire::testing
