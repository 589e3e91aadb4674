// A layout says what a KV cache costs and how its bytes lie: KVCacheSpec describes the cache, KVCacheLayout answers.
// Everything is in bytes. Pages, allocators and engines ask here; no other place computes the size of a row.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "quire/export.h"
#include "quire/mode.h"
#include "quire/status.h"
#include "quire/tensor.h"

namespace quire {

enum class CacheOrder : std::uint8_t {
  kNHD,  // a page is [block_size, num_kv_heads, row]: a token's heads are neighbours
  kHND,  // a page is [num_kv_heads, block_size, row]: a head's tokens are neighbours
};

enum class KVPacking : std::uint8_t {
  kSeparate,   // a K tensor and a V tensor
  kKVInBlock,  // one tensor [num_blocks, 2, ...]: a page holds its K plane, then its V plane
  kKVInRow,    // one tensor: K row, then V row, per token and head (DiffKV, TurboQuant slots)
};

enum class ScalePlacement : std::uint8_t {
  kSeparate,  // fp32 scale caches [num_blocks, block_size, num_kv_heads]
  kInline,    // the fp32 scale right after its row's data
};

struct KVCacheSpec {
  ModeId mode{};
  int head_size = 128;
  int head_size_v = 0;  // 0: same as head_size
  int num_kv_heads = 8;
  int num_layers = 1;
  int block_size = 16;
  DType model_dtype = DType::kBFloat16;  // what "auto" stores
  CacheOrder order = CacheOrder::kNHD;
  KVPacking packing = KVPacking::kSeparate;  // modes whose K and V share a slot always use kKVInRow
  ScalePlacement scales = ScalePlacement::kSeparate;
  std::int64_t page_alignment = 1;  // a page's bytes are rounded up to a multiple of this
};

struct KVCacheLayout {
  KVCacheSpec spec;  // with defaults resolved

  // One (token, head).
  std::int64_t k_data_bytes = 0;  // codes, and the metadata a format keeps inside its row
  std::int64_t v_data_bytes = 0;
  std::int64_t k_scale_bytes = 0;  // 4 where the format has a scale cache, else 0
  std::int64_t v_scale_bytes = 0;
  std::int64_t k_row_bytes = 0;  // distance from a K row to what follows it: data, plus the scale when inline
  std::int64_t v_row_bytes = 0;
  std::int64_t bytes_per_token_head = 0;  // K + V + scales (+ slot rounding)

  // Sums.
  std::int64_t bytes_per_token = 0;  // all heads of all layers, padding not counted
  std::int64_t bytes_per_block = 0;  // one layer's page, K and V and scales, padding counted
  std::int64_t tokens_per_gib = 0;   // 2^30 over the padded cost of a token in all layers

  // Where things are, from the base of the tensor they live in. kSeparate: V has its own tensor with v_* strides and
  // v_offset 0; otherwise K and V share a base. Strides in bytes.
  std::int64_t k_block_stride = 0, k_slot_stride = 0, k_head_stride = 0;
  std::int64_t v_block_stride = 0, v_slot_stride = 0, v_head_stride = 0;
  std::int64_t v_offset = 0;
  // Inline scales: offset of a row's scale from the row's first byte (same strides as the row), else -1.
  std::int64_t k_scale_offset = -1, v_scale_offset = -1;

  // vLLM's page accounting, in elements of the cache dtype. effective_head_size: the data of a row (d, d/2, d/4), as in
  // its pull request 39074, whose page formula adds the 4 bytes of a scale itself. padded_head_size: data and scale,
  // the last extent of a vLLM cache tensor with inline scales. Modes with shared slots: half a slot, both.
  std::int64_t effective_head_size = 0, effective_head_size_v = 0;
  std::int64_t padded_head_size = 0, padded_head_size_v = 0;

  DType key_cache_dtype = DType::kUInt8;  // the dtypes of the row tensors
  DType value_cache_dtype = DType::kUInt8;
};

// kInvalidArgument where the mode's packing does not divide a head size, a field is out of range, or rows and inline
// scales would not fall on multiples of their own element size. A registered mode costs what its backend says:
// row_bytes and, where it needs scale caches, 4 bytes each for K and V.
QUIRE_API Result<KVCacheLayout> make_layout(const KVCacheSpec& spec);

// A paged cache as both ops take it. Data is void where it is stored to, const void where it is only read;
// KVCacheViews converts to ConstKVCacheViews, so that an engine keeps one per layer and passes it to both ops.
template <class Data>
struct BasicKVCacheViews {
  // [num_blocks, block_size, Hk, row] with row = the format's row in elements of the cache dtype; last stride 1. A
  // store also takes the head-major layout of float modes and of fp8 per tensor: key_cache [num_blocks, Hk, d/x,
  // block_size, x] and value_cache [num_blocks, Hk, dv, block_size].
  BasicTensor<Data> key_cache, value_cache;
  BasicTensor<Data> k_scale_cache, v_scale_cache;  // [num_blocks, block_size, Hk] float32: *_per_token_head modes only
  // For formats whose rows are stored less a centre, optional: [num_blocks, Hk, page bytes] uint8 or, where the centre
  // is the same for all pages, [Hk, d] ([Hk, dv]) float32. No format of this version has one; both ops only read them.
  BasicTensor<Data> k_page_meta, v_page_meta;
  ConstTensor k_head_vector, v_head_vector;

  template <class D = Data, std::enable_if_t<!std::is_const_v<D>, int> = 0>
  operator BasicKVCacheViews<const D>() const {
    return {key_cache,   value_cache, k_scale_cache, v_scale_cache,
            k_page_meta, v_page_meta, k_head_vector, v_head_vector};
  }
};
using KVCacheViews = BasicKVCacheViews<void>;
using ConstKVCacheViews = BasicKVCacheViews<const void>;

// Makes the views that the ops take, over memory that is laid out as `layout` says. `base` holds K (and V unless
// packing is kSeparate); `v_base` is used only for kSeparate; scale bases only for separate scales (null where the mode
// has none). Where cache_bytes refuses num_blocks, the views are not defined.
QUIRE_API KVCacheViews make_views(const KVCacheLayout& layout, std::int64_t num_blocks, void* base,
                                  void* v_base = nullptr, void* k_scale_base = nullptr, void* v_scale_base = nullptr,
                                  Device device = Device::cpu());

// Counts the bytes that each buffer of make_views needs for num_blocks pages. Refused where num_blocks is negative or
// the bytes do not fit in 63 bits.
struct KVCacheBytes {
  std::int64_t base = 0, v_base = 0, k_scales = 0, v_scales = 0;
};
QUIRE_API Result<KVCacheBytes> cache_bytes(const KVCacheLayout& layout, std::int64_t num_blocks);

}  // namespace quire
