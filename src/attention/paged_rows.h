// Where the rows of K or of V lie in a paged cache: the one place that turns (block, slot, head) into an address, on
// both devices and in the benchmarks.
//
//     row    data   + block * block_stride       + slot * slot_stride       + head * head_stride          in bytes
//     scale  scales + block * scale_block_stride + slot * scale_slot_stride + head * scale_head_stride
//
// Strides are the caller's and are 64 bits wide: pages may be padded, layers may lie in one page, heads may come before
// slots, scales may be a tensor of their own or inline after the row.
#pragma once

#include <cstdint>

#include "format/exact.h"
#include "quire/tensor.h"

namespace quire::attention {

// Byte is std::uint8_t where rows are written and const std::uint8_t where they are read.
template <class Byte>
struct PagedRowsOf {
  Byte* data = nullptr;  // [num_blocks, block_size, num_kv_heads, row bytes]
  std::int64_t block_stride = 0, slot_stride = 0, head_stride = 0;
  Byte* scales = nullptr;  // [num_blocks, block_size, num_kv_heads] fp32, null where the format has none
  std::int64_t scale_block_stride = 0, scale_slot_stride = 0, scale_head_stride = 0;

  QUIRE_HD std::int64_t offset(std::int64_t block, std::int64_t slot, std::int64_t head) const {
    return block * block_stride + slot * slot_stride + head * head_stride;
  }
  QUIRE_HD std::int64_t scale_offset(std::int64_t block, std::int64_t slot, std::int64_t head) const {
    return block * scale_block_stride + slot * scale_slot_stride + head * scale_head_stride;
  }
  QUIRE_HD Byte* row(std::int64_t block, std::int64_t slot, std::int64_t head) const {
    return data + offset(block, slot, head);
  }
  QUIRE_HD Byte* scale(std::int64_t block, std::int64_t slot, std::int64_t head) const {
    return scales + scale_offset(block, slot, head);
  }
};
using PagedRows = PagedRowsOf<const std::uint8_t>;
using WritablePagedRows = PagedRowsOf<std::uint8_t>;

// Of a cache [num_blocks, block_size, num_kv_heads, ..] and its scale cache, which may be undefined.
template <class Byte>
void set_paged_rows(PagedRowsOf<Byte>& rows, const Tensor& cache, const Tensor& scale_cache) {
  const auto bytes = static_cast<std::int64_t>(dtype_bytes(cache.dtype));
  rows.data = cache.ptr<Byte>();
  rows.block_stride = cache.strides[0] * bytes;
  rows.slot_stride = cache.strides[1] * bytes;
  rows.head_stride = cache.strides[2] * bytes;
  if (!scale_cache.defined()) return;
  rows.scales = scale_cache.ptr<Byte>();
  rows.scale_block_stride = scale_cache.strides[0] * 4;
  rows.scale_slot_stride = scale_cache.strides[1] * 4;
  rows.scale_head_stride = scale_cache.strides[2] * 4;
}

}  // namespace quire::attention
