// What validation found out about a call: sizes and formats, device-independent. The facade fills these once; the CPU
// and CUDA code receive them next to the arguments and trust them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>

#include "format/formats.h"

namespace quire {

namespace attention {
struct PageSlice;
}

// The product of sizes made from a caller's bounds, none negative; nothing where it does not fit 63 bits.
inline std::optional<std::int64_t> checked_product(std::initializer_list<std::int64_t> sizes) {
  std::int64_t product = 1;
  for (const std::int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product)) return std::nullopt;
  }
  return product;
}

struct StoreProblem {
  format::FormatId key_format = format::FormatId::kNone;
  format::FormatId value_format = format::FormatId::kNone;
  std::int64_t num_tokens = 0;  // entries of slot_mapping
  int num_kv_heads = 0;
  int head_size = 0;
  int head_size_v = 0;
  std::int64_t num_blocks = 0;
  std::int64_t block_size = 0;
  // Head-major layout: K [num_blocks, Hk, d/x, block_size, x], V [num_blocks, Hk, dv, block_size]. x is 0 otherwise.
  int head_major_x = 0;
};

struct AttentionShape {
  format::FormatId key_format = format::FormatId::kNone;  // kNone: rows are decoded by a registered backend
  format::FormatId value_format = format::FormatId::kNone;
  std::int64_t num_tokens = 0;  // rows of query
  int batch = 0;
  int num_q_heads = 0;
  int num_kv_heads = 0;
  int head_size = 0;
  int head_size_v = 0;
  std::int64_t num_blocks = 0;
  int block_size = 0;
  std::int64_t max_blocks = 0;  // columns of block_table
  int num_mm_ranges = 0;
  int qq_bias_size = 0;
  const attention::PageSlice* page_slice = nullptr;  // of the call's caches, where their pages have one and CUDA asks

  int group_size() const { return num_q_heads / num_kv_heads; }

  // The most keys of a sequence: what block_table holds, and an int32 length can say.
  std::int64_t max_keys() const {
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
    return std::min(kMost, std::min(kMost, max_blocks) * block_size);
  }
};

// A per-tensor scale by (sequence, KV head): one element, [Hk] or [B, Hk]. A null pointer reads as 1.
struct ScaleView {
  const float* data = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t head_stride = 0;
  QUIRE_HD float at(std::int64_t batch, std::int64_t head) const {
    return data == nullptr ? 1.0F : data[batch * batch_stride + head * head_stride];
  }
};

inline ScaleView make_scale_view(const ConstTensor& scale) {
  ScaleView view;
  if (!scale.defined()) return view;
  view.data = scale.ptr<const float>();
  if (scale.numel() == 1) return view;
  view.head_stride = scale.strides[scale.ndim - 1];
  if (scale.ndim == 2) view.batch_stride = scale.strides[0];
  return view;
}

}  // namespace quire
