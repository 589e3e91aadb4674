#include "llm/paged_cache.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <set>

namespace quire::llm {

Result<std::vector<int>> parse_layers(const std::string& list, int num_layers) {
  std::set<int> layers;
  for (std::size_t begin = 0, end; !list.empty() && begin <= list.size(); begin = end + 1) {
    end = std::min(list.find(',', begin), list.size());
    const std::string name = list.substr(begin, end - begin);
    int layer = num_layers - 1;
    if (name != "last") {
      const auto error = std::from_chars(name.data(), name.data() + name.size(), layer).ec;
      if (error != std::errc() || std::to_string(layer) != name || layer < 0 || layer >= num_layers) {
        return invalid_argument("'" + name + "' in the list of layers '" + list + "' is not a layer; supported: 0 to " +
                                std::to_string(num_layers - 1) + " and last, separated by commas");
      }
    }
    layers.insert(layer);
  }
  return std::vector<int>(layers.begin(), layers.end());
}

Result<KVCache> KVCache::create(const ModelConfig& config, const KVCacheOptions& options) {
  const auto num_layers = static_cast<std::size_t>(config.num_layers);
  if (options.layer_modes.size() != 1 && options.layer_modes.size() != num_layers) {
    return invalid_argument("layer_modes has " + std::to_string(options.layer_modes.size()) +
                            " entries, expected 1 or one for each of the " + std::to_string(num_layers) + " layers");
  }
  if (options.block_size < 1 || options.num_blocks < 1 ||
      options.num_blocks > std::numeric_limits<std::int32_t>::max()) {
    return invalid_argument("a cache of " + std::to_string(options.num_blocks) + " blocks of " +
                            std::to_string(options.block_size) + " tokens is not possible");
  }
  for (int layer : options.skip_layers) {
    if (layer >= 0 && layer < config.num_layers) continue;
    return invalid_argument("skip_layers names layer " + std::to_string(layer) + ", the model has layers 0 to " +
                            std::to_string(config.num_layers - 1));
  }
  if (Status status = device_available(options.device); !status) return status;
  const Result<ModeId> model_dtype = parse_kv_cache_dtype("auto");
  if (!model_dtype.ok()) return model_dtype.status();
  KVCache cache;
  cache.block_size_ = options.block_size;
  cache.num_blocks_ = options.num_blocks;
  cache.device_ = options.device;
  for (std::size_t i = 0; i < num_layers; ++i) {
    KVCacheSpec spec;
    spec.mode = options.layer_modes.size() == 1 ? options.layer_modes[0] : options.layer_modes[i];
    if (std::ranges::find(options.skip_layers, static_cast<int>(i)) != options.skip_layers.end()) {
      spec.mode = *model_dtype;
    }
    spec.head_size = config.head_size;
    spec.num_kv_heads = config.num_kv_heads;
    spec.block_size = options.block_size;
    spec.model_dtype = config.dtype;
    Result<KVCacheLayout> layout = make_layout(spec);
    if (!layout.ok()) return layout.status();

    Layer layer;
    layer.layout = *layout;
    const Result<KVCacheBytes> bytes = cache_bytes(layer.layout, options.num_blocks);
    if (!bytes.ok()) return bytes.status();
    for (const auto& [memory, size] : {std::pair(&layer.base, bytes->base),
                                       {&layer.v_base, bytes->v_base},
                                       {&layer.k_scales, bytes->k_scales},
                                       {&layer.v_scales, bytes->v_scales}}) {
      Result<Memory> allocated = Memory::allocate(options.device, static_cast<std::size_t>(size));
      if (!allocated.ok()) return allocated.status();
      *memory = std::move(*allocated);
    }
    layer.views = make_views(layer.layout, options.num_blocks, layer.base.data(), layer.v_base.data(),
                             layer.k_scales.data(), layer.v_scales.data(), options.device);
    cache.layers_.push_back(std::move(layer));
  }
  return cache;
}

template <class Args>
void KVCache::fill_in(const Layer& layer, Args& args) {
  args.mode = layer.layout.spec.mode;
  args.cache = layer.views;
}

Status KVCache::reshape_and_cache(int layer, ReshapeAndCacheArgs args) const {
  fill_in(layers_[static_cast<std::size_t>(layer)], args);
  const auto store = [](const ReshapeAndCacheArgs& a) { return quire::reshape_and_cache(a, nullptr); };
  return device_.is_cpu() ? store(args) : cuda::run_on_device(args, store, device_);
}

Status KVCache::unified_attention(int layer, UnifiedAttentionArgs args) {
  fill_in(layers_[static_cast<std::size_t>(layer)], args);

  if (device_.is_cpu()) return attend(args);
  return cuda::run_on_device(
      args, [this](const UnifiedAttentionArgs& on_device) { return attend(on_device); }, device_);
}

// Here every tensor is on the cache's device.
Status KVCache::attend(const UnifiedAttentionArgs& args) {
  Result<AttentionProblem> problem = problem_of(args);
  if (!problem.ok()) return problem.status();
  problem->batch_invariant = true;  // a sequence's output does not depend on its neighbours in the step
  Result<AttentionPlan> plan = plan_unified_attention(*problem);
  if (!plan.ok()) return plan.status();
  if (workspace_.bytes() < plan->workspace_bytes()) {
    Result<Memory> larger = Memory::allocate(device_, plan->workspace_bytes());
    if (!larger.ok()) return larger.status();
    workspace_ = std::move(*larger);
  }
  return run_unified_attention(*plan, args, workspace_.data(), workspace_.bytes(), nullptr);
}

std::int64_t KVCache::bytes_per_token() const {
  std::int64_t sum = 0;
  for (const Layer& layer : layers_) sum += layer.layout.bytes_per_token;
  return sum;
}

std::int64_t KVCache::bytes() const {
  std::int64_t sum = 0;
  for (const Layer& layer : layers_) sum += layer.layout.bytes_per_block * num_blocks_;
  return sum;
}

BlockAllocator::BlockAllocator(std::int64_t num_blocks, int block_size, bool share_prefixes)
    : block_size_(block_size), share_prefixes_(share_prefixes), blocks_(static_cast<std::size_t>(num_blocks)) {
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(num_blocks); ++i) free_.emplace(++clock_, i);
  for (const auto& [time, block] : free_) blocks_[static_cast<std::size_t>(block)].freed_at = time;
}

const BlockAllocator::Prefix* BlockAllocator::find(std::uint64_t parent, const std::vector<std::int32_t>& tokens,
                                                   std::int64_t block_index) const {
  const auto begin = tokens.begin() + block_index * block_size_;
  const auto found = prefixes_.find(PrefixKey(parent, {begin, begin + block_size_}));
  return found == prefixes_.end() ? nullptr : &found->second;
}

std::int32_t BlockAllocator::take_oldest() {
  const std::int32_t id = free_.begin()->second;
  free_.erase(free_.begin());
  Block& block = blocks_[static_cast<std::size_t>(id)];
  if (block.key != nullptr) prefixes_.erase(prefixes_.find(*block.key));
  block = {.use_count = 1};
  return id;
}

bool BlockAllocator::reserve(Sequence& sequence, std::int64_t num_tokens) {
  const std::int64_t needed = (num_tokens + block_size_ - 1) / block_size_;
  const auto held = static_cast<std::int64_t>(sequence.blocks.size());
  if (held > 0) {
    if (needed - held > num_free()) return false;
    while (static_cast<std::int64_t>(sequence.blocks.size()) < needed) sequence.blocks.push_back(take_oldest());
    return true;
  }
  std::vector<std::int32_t> shared;
  if (share_prefixes_) {
    const std::int64_t full = (static_cast<std::int64_t>(sequence.tokens.size()) - 1) / block_size_;
    std::uint64_t parent = 0;
    for (std::int64_t i = 0; i < std::min(full, needed); ++i) {
      const Prefix* prefix = find(parent, sequence.tokens, i);
      if (prefix == nullptr) break;
      shared.push_back(prefix->block);
      parent = prefix->id;
    }
  }
  // Shared blocks that nobody uses at the moment leave the free list as well.
  const auto from_free =
      needed - std::count_if(shared.begin(), shared.end(), [&](auto id) { return use_count(id) > 0; });
  if (from_free > num_free()) return false;

  for (std::int32_t id : shared) {
    Block& block = blocks_[static_cast<std::size_t>(id)];
    if (block.use_count++ == 0) free_.erase(block.freed_at);
  }
  sequence.blocks = std::move(shared);
  sequence.num_stored = static_cast<std::int64_t>(sequence.blocks.size()) * block_size_;
  while (static_cast<std::int64_t>(sequence.blocks.size()) < needed) sequence.blocks.push_back(take_oldest());
  return true;
}

void BlockAllocator::publish(const Sequence& sequence) {
  if (!share_prefixes_) return;
  std::uint64_t parent = 0;
  for (std::int64_t i = 0; i < sequence.num_stored / block_size_; ++i) {
    Block& block = blocks_[static_cast<std::size_t>(sequence.blocks[static_cast<std::size_t>(i)])];
    const Prefix* prefix = find(parent, sequence.tokens, i);
    if (prefix == nullptr) {
      if (block.key != nullptr) return;  // it is known under another parent, which was forgotten
      const auto begin = sequence.tokens.begin() + i * block_size_;
      const Prefix fresh{++last_prefix_id_, sequence.blocks[static_cast<std::size_t>(i)]};
      const auto inserted = prefixes_.emplace(PrefixKey(parent, {begin, begin + block_size_}), fresh).first;
      block.key = &inserted->first;
      prefix = &inserted->second;
    }
    parent = prefix->id;
  }
}

void BlockAllocator::release(Sequence& sequence) {
  // The end of a sequence is less likely to be shared than its beginning, so it is reused first.
  for (auto id = sequence.blocks.rbegin(); id != sequence.blocks.rend(); ++id) {
    Block& block = blocks_[static_cast<std::size_t>(*id)];
    if (--block.use_count > 0) continue;
    block.freed_at = ++clock_;
    free_.emplace(block.freed_at, *id);
  }
  sequence.blocks.clear();
  sequence.num_stored = 0;
}

}  // namespace quire::llm
