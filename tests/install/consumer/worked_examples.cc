// Prints the worked examples of docs/formats, one line at a time; tests/install/run looks each line up there.
// The row is x[i] = (i - 12) / 8, i < 32: stored, then read back by attention over that one token, whose softmax weight
// is 1. Lines are `<mode>  data  <16 bytes>`, `<mode>  scale  <its bits>` and `<mode>  read  <first 8 elements>`.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "quire/quire.h"

namespace {

using quire::DType, quire::Tensor;
constexpr int kHeadSize = 32;

quire::Status print_example(const std::string& mode_name, float tensor_scale) {
  const auto mode = quire::parse_kv_cache_dtype(mode_name);
  if (!mode.ok()) return mode.status();
  quire::KVCacheSpec spec;
  spec.mode = *mode;
  spec.head_size = kHeadSize;
  spec.num_kv_heads = 1;
  spec.block_size = 1;
  const auto layout = quire::make_layout(spec);
  if (!layout.ok()) return layout.status();
  const quire::KVCacheBytes bytes = *quire::cache_bytes(*layout, 1);
  const auto bytes_for = [](std::int64_t size) { return std::vector<std::uint8_t>(static_cast<std::size_t>(size)); };
  auto k = bytes_for(bytes.base), v = bytes_for(bytes.v_base);
  auto k_scales = bytes_for(bytes.k_scales), v_scales = bytes_for(bytes.v_scales);
  const auto cache = quire::make_views(*layout, 1, k.data(), v.data(), k_scales.data(), v_scales.data());

  std::vector<float> row(kHeadSize), out(kHeadSize);
  for (std::size_t i = 0; i < row.size(); ++i) row[i] = (static_cast<float>(i) - 12.0F) / 8.0F;
  std::int64_t slot = 0;
  quire::ReshapeAndCacheArgs store;
  store.mode = *mode;
  store.key = store.value = Tensor::contiguous(row.data(), DType::kFloat32, {1, 1, kHeadSize});
  store.cache = cache;
  store.slot_mapping = Tensor::contiguous(&slot, DType::kInt64, {1});
  if (tensor_scale != 1.0F) store.k_scale = store.v_scale = Tensor::contiguous(&tensor_scale, DType::kFloat32, {1});
  if (quire::Status status = quire::reshape_and_cache(store, nullptr); !status.ok()) return status;

  std::vector<float> query(kHeadSize);
  std::int32_t cu_seqlens_q[] = {0, 1}, seq_len = 1, block = 0;
  quire::UnifiedAttentionArgs read;
  read.mode = *mode;
  read.query = Tensor::contiguous(query.data(), DType::kFloat32, {1, 1, kHeadSize});
  read.out = Tensor::contiguous(out.data(), DType::kFloat32, {1, 1, kHeadSize});
  read.cache = cache;
  read.cu_seqlens_q = Tensor::contiguous(cu_seqlens_q, DType::kInt32, {2});
  read.seq_lens = Tensor::contiguous(&seq_len, DType::kInt32, {1});
  read.block_table = Tensor::contiguous(&block, DType::kInt32, {1, 1});
  read.softmax_scale = 1.0F;
  read.k_descale = store.k_scale;
  read.v_descale = store.v_scale;
  if (quire::Status status = quire::unified_attention(read, nullptr); !status.ok()) return status;

  // The first 16 bytes of the key; all of a slot that K and V share.
  const std::size_t shown = layout->spec.packing == quire::KVPacking::kKVInRow ? k.size() : 16;
  for (std::size_t line = 0; line < shown && line < k.size(); line += 16) {
    std::printf("%s  data ", mode_name.c_str());
    for (std::size_t i = line; i < line + 16 && i < k.size(); ++i) std::printf(" %02x", k[i]);
    std::printf("\n");
  }
  if (!k_scales.empty()) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, k_scales.data(), sizeof(bits));
    std::printf("%s  scale  %08x\n", mode_name.c_str(), bits);
  }
  std::printf("%s  read ", mode_name.c_str());
  for (std::size_t i = 0; i < 8; ++i) std::printf(" %.4f", out[i]);
  std::printf("\n");
  return {};
}

}  // namespace

int main() {
  const struct {
    const char* mode;
    float tensor_scale;
  } examples[] = {
      {"float32", 1.0F},
      {"float16", 1.0F},
      {"bfloat16", 1.0F},
      {"fp8", 0.25F},
      {"fp8_e5m2", 0.25F},
      {"int8_per_token_head", 1.0F},
      {"fp8_per_token_head", 1.0F},
      {"int4_per_token_head", 1.0F},
      {"int2_per_token_head", 1.0F},
      {"turboquant_k8v4", 1.0F},
      {"turboquant_4bit_nc", 1.0F},
      {"turboquant_3bit_nc", 1.0F},
  };
  for (const auto& example : examples) {
    if (quire::Status status = print_example(example.mode, example.tensor_scale); !status.ok()) {
      std::printf("%s: %s\n", example.mode, status.message().c_str());
      return 1;
    }
  }
  return 0;
}
