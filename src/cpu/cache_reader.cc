#include "cpu/cache_reader.h"

#include <algorithm>
#include <cmath>

namespace quire::cpu {

using format::FormatInfo;
using format::MetaPlace;

void CacheReader::load_tile(const TileRows& rows, int kv_head, LevelTile& tile) const {
  if (load != nullptr) return load(rows, shape, side(0, kv_head).head_vector, tile);
  tile.any_offset = false;
  tile.all_finite = false;  // unknown: take the careful path
  for (int n = 0; n < rows.num_rows; ++n) {
    float* levels = tile.levels + static_cast<std::int64_t>(n) * tile.stride;
    const CacheRow cache_row{rows.data(n), reinterpret_cast<const float*>(rows.meta(n)), shape.head_size, is_value};
    if (!decode(cache_row, levels)) std::fill_n(levels, shape.head_size, NAN);
    std::fill(levels + shape.head_size, levels + tile.stride, 0.0F);
    tile.scale[n] = 1.0F;
    tile.offset[n] = 0.0F;
  }
  for (int n = rows.num_rows; n < padded(rows.num_rows); ++n) tile.scale[n] = tile.offset[n] = 0.0F;
}

// An exception must not leave a part.
bool CacheReader::decode(const CacheRow& cache_row, float* levels) const {
  try {
    return backend->decode_row(cache_row, levels);
  } catch (...) {
    *decode_threw = true;
    return false;
  }
}

CacheReader make_reader(const ConstTensor& cache, const attention::SideTensors<const void>& side, format::FormatId id,
                        int head_size, const QuantKVBackend* backend, std::atomic<bool>* decode_threw, bool is_value,
                        bool exact) {
  CacheReader reader;
  attention::set_paged_rows(reader, cache, side);
  reader.shape = format::row_shape(head_size);
  reader.backend = backend;
  reader.decode_threw = decode_threw;
  reader.is_value = is_value;
  if (id == format::FormatId::kNone) return reader;
  const FormatInfo& info = format::format_info(id);
  if (info.meta_place == MetaPlace::kInRow) reader.in_row_meta = info.code_bytes(head_size);
  reader.rotation = info.rotation;
  reader.unrotate = info.unrotate(reader.shape);
  reader.row_bytes = info.row_bytes(head_size);
  const auto index = static_cast<std::size_t>(id);
  reader.load = kernels().load_tile[index];
  if (!exact && head_size % std::max(1, kernels().operands[index].per_word) == 0) {
    reader.operands = kernels().operands[index];
  }
  const FloatRows& floats = kernels().float_rows[index];
  if (floats.takes != nullptr && floats.takes(head_size)) reader.float_rows = floats;
  return reader;
}

}  // namespace quire::cpu
