#include <cstdint>
#include <cstdio>
#include <numeric>
#include <vector>

#include "quire/quire.h"

int main() {
  constexpr int kTokens = 40, kHeads = 8, kQueryHeads = 32, kHeadSize = 128, kBlocks = 3;
  const auto floats = [](std::vector<float>& data, int rows, int heads) {
    return quire::Tensor::contiguous(data.data(), quire::DType::kFloat32, {rows, heads, kHeadSize});
  };
  const auto bytes_for = [](std::int64_t size) { return std::vector<std::uint8_t>(static_cast<std::size_t>(size)); };
  quire::KVCacheSpec spec;  // 8 KV heads of size 128, pages of 16 tokens
  spec.mode = *quire::parse_kv_cache_dtype("int8_per_token_head");
  const quire::KVCacheLayout layout = *quire::make_layout(spec);
  const quire::KVCacheBytes bytes = *quire::cache_bytes(layout, kBlocks);
  auto k = bytes_for(bytes.base), v = bytes_for(bytes.v_base);
  auto k_scales = bytes_for(bytes.k_scales), v_scales = bytes_for(bytes.v_scales);
  const auto cache = quire::make_views(layout, kBlocks, k.data(), v.data(), k_scales.data(), v_scales.data());

  std::vector<float> key(kTokens * kHeads * kHeadSize, 0.5F), value(key.size(), 0.25F);
  std::vector<std::int64_t> slots(kTokens);  // block * block_size + offset of each token
  std::iota(slots.begin(), slots.end(), 0);
  quire::ReshapeAndCacheArgs store;
  store.mode = spec.mode;
  store.key = floats(key, kTokens, kHeads);
  store.value = floats(value, kTokens, kHeads);
  store.cache = cache;
  store.slot_mapping = quire::Tensor::contiguous(slots.data(), quire::DType::kInt64, {kTokens});
  if (quire::Status status = quire::reshape_and_cache(store, nullptr); !status.ok())  // nullptr: the CPU has no stream
    return std::puts(status.message().c_str()), 1;

  std::vector<float> query(kQueryHeads * kHeadSize, 1.0F), out(query.size());
  std::int32_t cu_seqlens_q[] = {0, 1}, seq_lens[] = {kTokens}, block_table[] = {0, 1, 2};
  quire::UnifiedAttentionArgs read;
  read.mode = spec.mode;
  read.query = floats(query, 1, kQueryHeads);
  read.out = floats(out, 1, kQueryHeads);
  read.cache = cache;
  read.cu_seqlens_q = quire::Tensor::contiguous(cu_seqlens_q, quire::DType::kInt32, {2});
  read.seq_lens = quire::Tensor::contiguous(seq_lens, quire::DType::kInt32, {1});
  read.block_table = quire::Tensor::contiguous(block_table, quire::DType::kInt32, {1, kBlocks});
  read.softmax_scale = 0.088388F;  // 1 / sqrt(kHeadSize)
  if (quire::Status status = quire::unified_attention(read, nullptr); !status.ok())
    return std::puts(status.message().c_str()), 1;

  std::printf("%d bytes per token, output %.3f\n", static_cast<int>(layout.bytes_per_token), out[0]);
}
