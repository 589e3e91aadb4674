#include "cpu/cache_reader.h"

#include <algorithm>
#include <cmath>

namespace quire::cpu {

using format::FormatInfo;
using format::MetaPlace;

void CacheReader::load_tile(const RowAddress* rows, int num_rows, LevelTile& tile) const {
  if (load != nullptr) return load(rows, num_rows, shape, tile);
  tile.any_offset = false;
  tile.all_finite = false;  // unknown: take the careful path
  for (int n = 0; n < num_rows; ++n) {
    float* levels = tile.levels + static_cast<std::int64_t>(n) * tile.stride;
    const CacheRow cache_row{rows[n].data, reinterpret_cast<const float*>(rows[n].meta), shape.head_size, is_value};
    if (!decode(cache_row, levels)) std::fill_n(levels, shape.head_size, NAN);
    std::fill(levels + shape.head_size, levels + tile.stride, 0.0F);
    tile.scale[n] = 1.0F;
    tile.offset[n] = 0.0F;
  }
}

// An exception must not leave a parallel region.
bool CacheReader::decode(const CacheRow& cache_row, float* levels) const {
  try {
    return backend->decode_row(cache_row, levels);
  } catch (...) {
    *decode_threw = true;
    return false;
  }
}

CacheReader make_reader(const Tensor& cache, const Tensor& scale_cache, format::FormatId id, int head_size,
                        const QuantKVBackend* backend, std::atomic<bool>* decode_threw, bool is_value) {
  CacheReader reader;
  const auto element = static_cast<std::int64_t>(dtype_bytes(cache.dtype));
  reader.base = cache.ptr<const std::uint8_t>();
  reader.block_stride = cache.strides[0] * element;
  reader.slot_stride = cache.strides[1] * element;
  reader.head_stride = cache.strides[2] * element;
  reader.shape = format::row_shape(head_size);
  reader.backend = backend;
  reader.decode_threw = decode_threw;
  reader.is_value = is_value;
  if (scale_cache.defined()) {
    reader.meta_base = scale_cache.ptr<const std::uint8_t>();
    reader.meta_block_stride = scale_cache.strides[0] * 4;
    reader.meta_slot_stride = scale_cache.strides[1] * 4;
    reader.meta_head_stride = scale_cache.strides[2] * 4;
  }
  if (id == format::FormatId::kNone) return reader;
  const FormatInfo& info = format::format_info(id);
  if (info.meta_place == MetaPlace::kInRow) {
    reader.meta_base = reader.base + info.code_bytes(head_size);
    reader.meta_block_stride = reader.block_stride;
    reader.meta_slot_stride = reader.slot_stride;
    reader.meta_head_stride = reader.head_stride;
  }
  reader.rotation = info.rotation;
  reader.unrotate = info.unrotate(reader.shape);
  reader.load = kernels().load_tile[static_cast<std::size_t>(id)];
  return reader;
}

}  // namespace quire::cpu
