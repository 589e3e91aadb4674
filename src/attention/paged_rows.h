// Where the rows of K or of V lie in a paged cache: the one place that turns (block, slot, head) into an address, on
// both devices and in the benchmarks.
//
//     row    data   + block * block_stride       + slot * slot_stride       + head * head_stride          in bytes
//     scale  scales + block * scale_block_stride + slot * scale_slot_stride + head * scale_head_stride
//     page   pages  + block * page_block_stride                             + head * page_head_stride
//
// Strides are the caller's and are 64 bits wide: pages may be padded, layers may lie in one page, heads may come before
// slots, scales may be a tensor of their own or inline after the row.
#pragma once

#include <cstdint>
#include <type_traits>

#include "format/exact.h"
#include "format/format.h"
#include "quire/tensor.h"

namespace quire::attention {

// Byte is std::uint8_t where rows are written and const std::uint8_t where they are read.
template <class Byte>
struct PagedRowsOf {
  Byte* data = nullptr;  // [num_blocks, block_size, num_kv_heads, row bytes]
  std::int64_t block_stride = 0, slot_stride = 0, head_stride = 0;
  Byte* scales = nullptr;  // [num_blocks, block_size, num_kv_heads] fp32, null where the format has none
  std::int64_t scale_block_stride = 0, scale_slot_stride = 0, scale_head_stride = 0;
  const std::uint8_t* pages = nullptr;  // [num_blocks, num_kv_heads, page bytes], may be null
  std::int64_t page_block_stride = 0, page_head_stride = 0;
  const float* head_vectors = nullptr;  // [num_kv_heads, head_size], may be null
  std::int64_t head_vector_stride = 0;  // elements

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
  // What a format is given of the page and the KV head besides the row.
  QUIRE_HD format::SideInputs side(std::int64_t block, std::int64_t head) const {
    return {.head_vector = head_vectors == nullptr ? nullptr : head_vectors + head * head_vector_stride,
            .page = pages == nullptr ? nullptr : pages + block * page_block_stride + head * page_head_stride};
  }
};
using PagedRows = PagedRowsOf<const std::uint8_t>;
using WritablePagedRows = PagedRowsOf<std::uint8_t>;

// The tensors that go with a cache; each may be undefined.
template <class Data>
struct SideTensors {
  BasicTensor<Data> scale_cache;  // [num_blocks, block_size, num_kv_heads]
  BasicTensor<Data> page_meta;    // [num_blocks, num_kv_heads, page bytes]
  ConstTensor head_vector;        // [num_kv_heads, head_size]
};

// Fills in the rows of a cache [num_blocks, block_size, num_kv_heads, row elements].
template <class Byte, class Data>
void set_paged_rows(PagedRowsOf<Byte>& rows, const BasicTensor<Data>& cache,
                    const SideTensors<std::type_identity_t<Data>>& side) {
  const auto bytes = static_cast<std::int64_t>(dtype_bytes(cache.dtype));
  rows.data = cache.template ptr<Byte>();
  rows.block_stride = cache.strides[0] * bytes;
  rows.slot_stride = cache.strides[1] * bytes;
  rows.head_stride = cache.strides[2] * bytes;
  if (side.scale_cache.defined()) {
    rows.scales = side.scale_cache.template ptr<Byte>();
    rows.scale_block_stride = side.scale_cache.strides[0] * 4;
    rows.scale_slot_stride = side.scale_cache.strides[1] * 4;
    rows.scale_head_stride = side.scale_cache.strides[2] * 4;
  }
  if (side.page_meta.defined()) {
    rows.pages = side.page_meta.template ptr<const std::uint8_t>();
    rows.page_block_stride = side.page_meta.strides[0];
    rows.page_head_stride = side.page_meta.strides[1];
  }
  if (side.head_vector.defined()) {
    rows.head_vectors = side.head_vector.template ptr<const float>();
    rows.head_vector_stride = side.head_vector.strides[0];
  }
}

}  // namespace quire::attention
