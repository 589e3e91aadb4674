// The two halves of a paged KV cache, as an engine keeps them.
//
//   KVCache         the memory, on any device: per layer, pages of `block_size` token slots in that layer's mode,
//                   written and read only by quire's two ops. A block id names the same page of every layer.
//   BlockAllocator  the bookkeeping: which block ids are free, how many sequences use each one, and which hold a prefix
//                   that a new sequence can share instead of computing it again.
//
// Position p of a sequence lives in slot  blocks[p / block_size] * block_size + p % block_size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device_memory.h"
#include "llm/config.h"
#include "quire/layout.h"
#include "quire/ops.h"
#include "quire/status.h"

namespace quire::llm {

struct KVCacheOptions {
  std::vector<ModeId> layer_modes;    // one per layer, or a single one for all
  std::vector<int> skip_layers = {};  // these stay in the model's own dtype whatever layer_modes says
  int block_size = 16;
  std::int64_t num_blocks = 0;
  Device device = Device::cpu();  // where the pages live and both ops run
};

// The layers that a list such as "0,1,last" names, ascending; "last" is layer num_layers - 1.
Result<std::vector<int>> parse_layers(const std::string& list, int num_layers);

class KVCache {
 public:
  static Result<KVCache> create(const ModelConfig& config, const KVCacheOptions& options);

  // Fills in the caches and the mode of `layer` and runs the op. All other tensors live on the host; for a cache on a
  // CUDA device they are copied there and the output back, in each call.
  Status reshape_and_cache(int layer, ReshapeAndCacheArgs args) const;
  Status unified_attention(int layer, UnifiedAttentionArgs args);

  int block_size() const { return block_size_; }
  std::int64_t num_blocks() const { return num_blocks_; }
  Device device() const { return device_; }
  const KVCacheLayout& layout(int layer) const { return layers_[static_cast<std::size_t>(layer)].layout; }
  std::int64_t bytes_per_token() const;  // all layers
  std::int64_t bytes() const;            // all layers, all blocks

 private:
  struct Layer {
    KVCacheLayout layout;
    KVCacheViews views;
    Memory base, v_base, k_scales, v_scales;  // cache_bytes(layout, num_blocks)
  };
  template <class Args>
  static void fill_in(const Layer& layer, Args& args);  // mode and caches
  Status attend(const UnifiedAttentionArgs& args);

  std::vector<Layer> layers_;
  int block_size_ = 0;
  std::int64_t num_blocks_ = 0;
  Device device_ = Device::cpu();
  Memory workspace_;  // as large as any plan has needed so far
};

// A sequence of token ids and the blocks that hold its keys and values.
// Invariant: the cache holds positions [0, num_stored), and `blocks` covers at least those.
struct Sequence {
  std::vector<std::int32_t> tokens;
  std::vector<std::int32_t> blocks;
  std::int64_t num_stored = 0;
};

class BlockAllocator {
 public:
  BlockAllocator(std::int64_t num_blocks, int block_size, bool share_prefixes);

  // Gives `sequence` blocks for its first `num_tokens` positions. Full blocks of tokens that another sequence has
  // stored already are shared; num_stored says how many positions that saved, and the last token is always left to
  // compute. A sequence that holds blocks keeps them with what is stored in them, gets the ones it lacks, and never
  // loses any. Where too few blocks are free, reserve returns false and changes nothing.
  bool reserve(Sequence& sequence, std::int64_t num_tokens);

  // Makes the full stored blocks of `sequence` findable by later ones.
  void publish(const Sequence& sequence);

  // Takes the blocks back. A published block stays findable until its memory is needed.
  void release(Sequence& sequence);

  std::int64_t num_free() const { return static_cast<std::int64_t>(free_.size()); }
  int use_count(std::int32_t block) const { return blocks_[static_cast<std::size_t>(block)].use_count; }

 private:
  // A prefix is identified by its parent prefix (0 for the empty one) and the tokens of its last block, compared
  // exactly instead of by a hash. Ids are never used twice, so a child of a forgotten prefix cannot be found by
  // mistake.
  using PrefixKey = std::pair<std::uint64_t, std::vector<std::int32_t>>;
  struct Prefix {
    std::uint64_t id;
    std::int32_t block;
  };
  struct Block {
    int use_count = 0;
    std::uint64_t freed_at = 0;
    const PrefixKey* key = nullptr;  // points into prefixes_ where the block is published
  };

  const Prefix* find(std::uint64_t parent, const std::vector<std::int32_t>& tokens, std::int64_t block_index) const;
  std::int32_t take_oldest();

  int block_size_;
  bool share_prefixes_;
  std::uint64_t clock_ = 0, last_prefix_id_ = 0;
  std::vector<Block> blocks_;
  std::map<std::uint64_t, std::int32_t> free_;  // by freed_at, so the block that was unused the longest comes first
  std::map<PrefixKey, Prefix> prefixes_;
};

}  // namespace quire::llm
