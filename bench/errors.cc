// How far the CPU's attention is from the double-precision oracle on the same bytes, mode by mode: the table of errors
// of docs/results/cpu.md, as Markdown.
//
//   cmake --build build --target quire_errors && build/bin/quire_errors
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "format/float_types.h"
#include "quire/layout.h"
#include "quire/mode.h"
#include "quire/ops.h"
#include "reference/attention.h"

namespace {

using quire::DType;
using quire::Status;
using quire::Tensor;

constexpr int kQueryHeads = 32, kHeads = 8, kSize = 128, kBlock = 16;
const quire::Device kCpu = quire::Device::cpu();

// The largest difference of an output over the largest output, and of an LSE.
struct Errors {
  double out = 0.0, lse = 0.0;
};

std::vector<std::uint16_t> normal_rows(std::int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> rows(static_cast<std::size_t>(count));
  for (std::uint16_t& x : rows) x = quire::format::float_to_bfloat16(normal(random));
  return rows;
}

// One sequence of num_keys keys, whose last num_tokens tokens ask.
Status measure(quire::ModeId mode, std::int64_t num_keys, std::int64_t num_tokens, Errors& errors) {
  quire::KVCacheSpec spec;
  spec.mode = mode;
  spec.head_size = spec.head_size_v = kSize;
  spec.num_kv_heads = kHeads;
  spec.block_size = kBlock;
  const quire::Result<quire::KVCacheLayout> layout = quire::make_layout(spec);
  if (!layout) return layout.status();
  const std::int64_t num_blocks = num_keys / kBlock;
  const auto sizes = quire::cache_bytes(*layout, num_blocks);
  if (!sizes) return sizes.status();
  const auto bytes = [](std::int64_t count) { return std::vector<std::uint8_t>(static_cast<std::size_t>(count)); };
  std::vector<std::uint8_t> base = bytes(sizes->base), v_base = bytes(sizes->v_base);
  std::vector<std::uint8_t> k_scales = bytes(sizes->k_scales), v_scales = bytes(sizes->v_scales);
  const quire::KVCacheViews views =
      quire::make_views(*layout, num_blocks, base.data(), v_base.data(), k_scales.data(), v_scales.data(), kCpu);

  std::vector<std::uint16_t> key = normal_rows(num_keys * kHeads * kSize, 1);
  std::vector<std::uint16_t> value = normal_rows(num_keys * kHeads * kSize, 2);
  std::vector<std::int64_t> slots(static_cast<std::size_t>(num_keys));
  for (std::int64_t i = 0; i < num_keys; ++i) slots[static_cast<std::size_t>(i)] = i;
  quire::ReshapeAndCacheArgs store;
  store.mode = mode;
  store.cache = views;
  store.key = Tensor::contiguous(key.data(), DType::kBFloat16, {num_keys, kHeads, kSize}, kCpu);
  store.value = Tensor::contiguous(value.data(), DType::kBFloat16, {num_keys, kHeads, kSize}, kCpu);
  store.slot_mapping = Tensor::contiguous(slots.data(), DType::kInt64, {num_keys}, kCpu);
  if (Status status = reshape_and_cache(store, nullptr); !status) return status;

  std::vector<std::uint16_t> query = normal_rows(num_tokens * kQueryHeads * kSize, 3);
  std::vector<std::int32_t> cu_seqlens = {0, static_cast<std::int32_t>(num_tokens)};
  std::vector<std::int32_t> seq_lens = {static_cast<std::int32_t>(num_keys)};
  std::vector<std::int32_t> table(static_cast<std::size_t>(num_blocks));
  for (std::int64_t i = 0; i < num_blocks; ++i) table[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i);
  std::vector<float> outs[2], lses[2];
  for (int side = 0; side < 2; ++side) {
    outs[side].resize(static_cast<std::size_t>(num_tokens * kQueryHeads * kSize));
    lses[side].resize(static_cast<std::size_t>(num_tokens * kQueryHeads));
    quire::UnifiedAttentionArgs args;
    args.mode = mode;
    args.query = Tensor::contiguous(query.data(), DType::kBFloat16, {num_tokens, kQueryHeads, kSize}, kCpu);
    args.out = Tensor::contiguous(outs[side].data(), DType::kFloat32, {num_tokens, kQueryHeads, kSize}, kCpu);
    args.lse = Tensor::contiguous(lses[side].data(), DType::kFloat32, {num_tokens, kQueryHeads}, kCpu);
    args.cache = views;
    args.cu_seqlens_q = Tensor::contiguous(cu_seqlens.data(), DType::kInt32, {2}, kCpu);
    args.seq_lens = Tensor::contiguous(seq_lens.data(), DType::kInt32, {1}, kCpu);
    args.block_table = Tensor::contiguous(table.data(), DType::kInt32, {1, num_blocks}, kCpu);
    args.softmax_scale = 1.0F / std::sqrt(static_cast<float>(kSize));
    const Status status = side == 0 ? unified_attention(args, nullptr) : quire::reference::unified_attention(args);
    if (!status) return status;
  }
  double largest = 0.0;
  for (std::size_t i = 0; i < outs[0].size(); ++i) {
    largest = std::max(largest, std::abs(static_cast<double>(outs[1][i])));
    errors.out = std::max(errors.out, std::abs(static_cast<double>(outs[0][i]) - outs[1][i]));
  }
  errors.out /= largest;
  for (std::size_t i = 0; i < lses[0].size(); ++i) {
    errors.lse = std::max(errors.lse, std::abs(static_cast<double>(lses[0][i]) - lses[1][i]));
  }
  return {};
}

}  // namespace

int main() {
  std::printf("| mode | decode | LSE | prefill | LSE |\n|---|---|---|---|---|\n");
  for (const quire::ModeInfo& mode : quire::list_modes()) {
    if (mode.name == "auto" || mode.name == "float32") continue;
    const quire::Result<quire::ModeId> id = quire::parse_kv_cache_dtype(mode.name);
    if (!id) continue;  // not in this build
    Errors decode, prefill;
    Status status = measure(*id, 2048, 1, decode);
    if (status) status = measure(*id, 256, 256, prefill);
    if (!status) {
      std::fprintf(stderr, "%s: %s\n", mode.name.c_str(), status.message().c_str());
      return 1;
    }
    std::printf("| %s | %.1e | %.1e | %.1e | %.1e |\n", mode.name.c_str(), decode.out, decode.lse, prefill.out,
                prefill.lse);
    std::fflush(stdout);
  }
  return 0;
}
