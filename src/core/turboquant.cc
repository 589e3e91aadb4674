// vLLM's TurboQuant entry points in terms of the ops.
#include "quire/turboquant.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "core/mode_table.h"
#include "format/turboquant.h"
#include "quire/layout.h"

namespace quire {
namespace {

// vLLM computes these tables in fp32 from the same recipe; anything farther off is another matrix or codebook.
constexpr float kTableTolerance = 1e-4F;

std::string number(double value) { return std::to_string(value); }

Status check_table_tensor(const char* name, const Tensor& tensor, std::initializer_list<std::int64_t> shape) {
  bool ok =
      tensor.ndim == static_cast<int>(shape.size()) && tensor.dtype == DType::kFloat32 && tensor.device == Device::kCpu;
  int dim = 0;
  std::string wanted;
  for (std::int64_t extent : shape) {
    ok = ok && tensor.shape[dim++] == extent;
    wanted += (wanted.empty() ? "" : ", ") + std::to_string(extent);
  }
  if (ok && tensor.data != nullptr) return {};
  return invalid_argument(std::string(name) + " is " + to_string(tensor) + "; it must be [" + wanted +
                          "] float32 on the cpu, or left out");
}

// Only the Hadamard matrix over sqrt(block), block-diagonal where head_size is no power of two.
Status check_rotation(const TurboQuantConfig& config, const Tensor& rotation, int head_size) {
  if (!rotation.defined() || config.key_bits == 8) return {};
  if (Status status = check_table_tensor("rotation", rotation, {head_size, head_size}); !status) return status;
  const int block = format::rotation_block(head_size);
  const float unit = 1.0F / std::sqrt(static_cast<float>(block));
  for (int i = 0; i < head_size; ++i) {
    for (int j = 0; j < head_size; ++j) {
      const bool negative =
          __builtin_popcount(static_cast<unsigned>(i & j) & static_cast<unsigned>(block - 1)) % 2 != 0;
      const float expected = i / block != j / block ? 0.0F : (negative ? -unit : unit);
      const float given = rotation.ptr<const float>()[i * rotation.strides[0] + j * rotation.strides[1]];
      if (!(std::fabs(given - expected) <= kTableTolerance)) {
        return unsupported("rotation[" + std::to_string(i) + ", " + std::to_string(j) + "] is " + number(given) +
                           "; only the Walsh-Hadamard matrix over sqrt(" + std::to_string(block) +
                           ") is supported, which has " + number(expected) + " there");
      }
    }
  }
  return {};
}

// Centroids (or, with `midpoints`, the means of neighbours) of N(0, 1 / head_size).
Status check_codebook(const char* name, const TurboQuantConfig& config, const Tensor& given, int head_size,
                      bool midpoints) {
  if (!given.defined() || config.key_bits == 8) return {};
  const int num_centroids = 1 << config.key_bits;
  const int count = num_centroids - (midpoints ? 1 : 0);
  if (Status status = check_table_tensor(name, given, {count}); !status) return status;
  const float sigma = 1.0F / std::sqrt(static_cast<float>(head_size));
  const auto centroid = [&](int i) {
    return sigma * (config.key_bits == 3 ? format::centroid<3>(i) : format::centroid<4>(i));
  };
  for (int i = 0; i < count; ++i) {
    const float expected = midpoints ? 0.5F * (centroid(i) + centroid(i + 1)) : centroid(i);
    const float value = given.ptr<const float>()[i * given.strides[0]];
    if (!(std::fabs(value - expected) <= kTableTolerance * sigma)) {
      return unsupported(std::string(name) + "[" + std::to_string(i) + "] is " + number(value) +
                         "; only the Lloyd-Max codebook of N(0, 1/head_size) is supported, which has " +
                         number(expected) + " there");
    }
  }
  return {};
}

}  // namespace

Result<ModeId> turboquant_mode(const TurboQuantConfig& config) {
  if (config.key_bits != 3 && config.key_bits != 4 && config.key_bits != 8) {
    return unsupported("key_bits is " + std::to_string(config.key_bits) + "; supported: 3, 4 and 8 (fp8)");
  }
  if (config.value_bits != 3 && config.value_bits != 4) {
    return unsupported("value_bits is " + std::to_string(config.value_bits) + "; supported: 3 and 4");
  }
  if (config.key_bits != 8 && !config.norm_correction) {
    return unsupported("norm_correction is off with " + std::to_string(config.key_bits) +
                       "-bit keys; supported: on, as in the turboquant_*_nc presets");
  }
  const std::string key = config.key_bits == 8 ? (config.key_e4b15 ? "turboquant_k8_e4b15" : "turboquant_k8")
                                               : "turboquant_k" + std::to_string(config.key_bits);
  return parse_kv_cache_dtype("k=" + key + ",v=turboquant_v" + std::to_string(config.value_bits));
}

Result<SlotViews> turboquant_views(const TurboQuantConfig& config, const Tensor& kv_cache, int head_size) {
  const Result<ModeId> mode = turboquant_mode(config);
  if (!mode) return mode.status();
  if (kv_cache.ndim != 4 || kv_cache.dtype != DType::kUInt8) {
    return invalid_argument("kv_cache is " + to_string(kv_cache) +
                            "; it must be [num_blocks, block_size, num_kv_heads, slot bytes] uint8");
  }
  KVCacheSpec spec;
  spec.mode = *mode;
  spec.head_size = head_size;
  spec.num_kv_heads = 1;
  const Result<KVCacheLayout> layout = make_layout(spec);
  if (!layout) return layout.status();
  if (kv_cache.shape[3] != layout->bytes_per_token_head) {
    return invalid_argument("kv_cache is " + to_string(kv_cache) + "; a slot of head_size " +
                            std::to_string(head_size) + " has " + std::to_string(layout->bytes_per_token_head) +
                            " bytes (" + std::to_string(layout->k_data_bytes) + " of key, " +
                            std::to_string(layout->v_data_bytes) + " of value, rounded up to even)");
  }
  const std::int64_t value_end = layout->k_data_bytes + layout->v_data_bytes;
  return SlotViews{kv_cache.slice_last(0, layout->k_data_bytes), kv_cache.slice_last(layout->k_data_bytes, value_end)};
}

Status turboquant_store(const TurboQuantStoreArgs& args, void* stream) {
  if (args.key.ndim != 3) {
    return invalid_argument("key is " + to_string(args.key) + "; it must be [num_tokens, num_kv_heads, head_size]");
  }
  const int head_size = static_cast<int>(args.key.shape[2]);
  const Result<SlotViews> views = turboquant_views(args.config, args.kv_cache, head_size);
  if (!views) return views.status();
  if (Status status = check_rotation(args.config, args.rotation, head_size); !status) return status;
  if (Status status = check_codebook("midpoints", args.config, args.midpoints, head_size, true); !status) return status;
  ReshapeAndCacheArgs store;
  store.mode = *turboquant_mode(args.config);
  store.key = args.key;
  store.value = args.value;
  store.key_cache = views->key_cache;
  store.value_cache = views->value_cache;
  store.slot_mapping = args.slot_mapping;
  return reshape_and_cache(store, stream);
}

Status turboquant_decode_attention(const TurboQuantDecodeArgs& args, void* stream) {
  if (args.query.ndim != 3) {
    return invalid_argument("query is " + to_string(args.query) + "; it must be [batch, num_q_heads, head_size]");
  }
  if (args.query.device != Device::kCpu) {
    return unsupported(
        "query is on cuda; turboquant_decode_attention builds its cu_seqlens_q on the cpu: on cuda call "
        "unified_attention");
  }
  const int head_size = static_cast<int>(args.query.shape[2]);
  const Result<SlotViews> views = turboquant_views(args.config, args.kv_cache, head_size);
  if (!views) return views.status();
  if (Status status = check_rotation(args.config, args.rotation, head_size); !status) return status;
  if (Status status = check_codebook("centroids", args.config, args.centroids, head_size, false); !status)
    return status;
  std::vector<std::int32_t> cu_seqlens(static_cast<std::size_t>(args.query.shape[0]) + 1);
  for (std::size_t i = 0; i < cu_seqlens.size(); ++i) cu_seqlens[i] = static_cast<std::int32_t>(i);
  UnifiedAttentionArgs read;
  read.mode = *turboquant_mode(args.config);
  read.query = args.query;
  read.out = args.out;
  read.key_cache = views->key_cache;
  read.value_cache = views->value_cache;
  read.cu_seqlens_q = Tensor::contiguous(cu_seqlens.data(), DType::kInt32, {args.query.shape[0] + 1});
  read.seq_lens = args.seq_lens;
  read.block_table = args.block_table;
  read.softmax_scale = args.softmax_scale;
  read.lse = args.lse;
  return unified_attention(read, stream);
}

std::vector<int> boundary_skip_layers(int num_layers, int n) {
  n = std::min(n, num_layers / 2);
  std::vector<int> layers;
  for (int layer = 0; layer < n; ++layer) layers.push_back(layer);
  for (int layer = num_layers - n; n > 0 && layer < num_layers; ++layer) layers.push_back(layer);
  return layers;
}

}  // namespace quire
