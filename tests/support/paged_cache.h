// The caches of one mode in one of the layouts below, over memory that starts as poison: 0xFF is NaN in every float
// type and in every scale. Rows sit at odd strides and offsets, and every buffer ends where its last row ends.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "quire/quire.h"
#include "support/modes.h"
#include "support/owned_tensor.h"

namespace quire::testing {

// How rows lie in memory. "row" is a format's row in bytes.
enum class Layout {
  kNhd,              // [blocks, slots, heads, row], K and V apart, scale caches apart
  kHnd,              // [blocks, heads, slots, row], scale caches likewise
  kPadded,           // kNhd with gaps after every row and every page, everything at an offset
  kPackedRow,        // [blocks, slots, heads, K row | V row]
  kInlineScale,      // [blocks, slots, heads, row | scale], K and V apart
  kPackedInline,     // [blocks, heads, slots, K row | scale | V row | scale]: vLLM's LBHNC
  kKVInBlock,        // [blocks, 2, slots, heads, row]
  kLayerInBlock,     // [blocks, slots, 3 layers, heads, row]: the tensors are the middle layer
  kPackedInlineNhd,  // [blocks, slots, heads, K row | scale | V row | scale]: vLLM's LBNHC
  kPaddedPages,      // kHnd with a gap after every page and none inside
  kLayerPages,       // [blocks, 3 layers, page of kPackedInline]: the middle layer (vLLM's BLHNC)
};
inline constexpr Layout kAllLayouts[] = {Layout::kNhd,         Layout::kHnd,          Layout::kPadded,
                                         Layout::kPackedRow,   Layout::kInlineScale,  Layout::kPackedInline,
                                         Layout::kKVInBlock,   Layout::kLayerInBlock, Layout::kPackedInlineNhd,
                                         Layout::kPaddedPages, Layout::kLayerPages};
std::string_view layout_name(Layout layout);

// The caches of one layer over memory that starts as `poison`.
class PagedCache {
 public:
  struct Options {
    std::string mode = "int4_per_token_head";
    int head_size = 64;
    int head_size_v = 0;  // 0: head_size
    int num_kv_heads = 2;
    int block_size = 16;
    std::int64_t num_blocks = 8;
    DType auto_dtype = DType::kBFloat16;  // what "auto" stores
    Layout layout = Layout::kNhd;
    std::uint8_t poison = 0xFF;
    bool centre = false;  // formats that have a centre (tests/format/guests) get one, the others nothing
  };

  explicit PagedCache(const Options& options);
  PagedCache(const PagedCache&) = delete;
  PagedCache& operator=(const PagedCache&) = delete;

  const Options& options() const { return options_; }

  // Sets mode and caches of either op's arguments.
  template <class Args>
  void apply(Args& args) const {
    args.mode = mode_of(options_.mode);
    args.cache = views();
  }

  KVCacheViews views() const {
    return {key_cache,        value_cache,      k_scale_cache,      v_scale_cache,
            k_page_meta.view, v_page_meta.view, k_head_vector.view, v_head_vector.view};
  }

  // Every byte, gaps included. Two caches of equal options hold the same exactly when these are equal.
  const std::vector<std::vector<std::uint8_t>>& bytes() const { return buffers_; }

  Tensor key_cache, value_cache, k_scale_cache, v_scale_cache;
  OwnedTensor k_page_meta, v_page_meta, k_head_vector, v_head_vector;  // where there is a centre

 private:
  Options options_;
  std::vector<std::vector<std::uint8_t>> buffers_;
};

}  // namespace quire::testing
