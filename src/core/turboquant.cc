// vLLM's TurboQuant entry points are written here in terms of the ops.
#include "quire/turboquant.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "core/checks.h"
#include "core/guard.h"
#include "core/validate.h"
#include "cuda/cuda.h"
#include "format/turboquant.h"
#include "quire/layout.h"

namespace quire {
namespace {

// vLLM computes these tables in fp32 from the same recipe; anything farther off is another matrix or codebook.
constexpr float kTableTolerance = 1e-4F;

std::string number(double value) { return std::to_string(value); }

// Gives the last extent of key or query, whose shape is `shape_text`. The tensor must be Float, which the ops check
// again.
Result<int> head_size_of(const char* name, const ConstTensor& rows, const char* shape_text) {
  QUIRE_RETURN_IF_ERROR(core::check_extents(name, rows));
  QUIRE_RETURN_IF_ERROR(core::check(rows, {.name = name,
                                           .dtypes = core::kFloatsAndFloat8,
                                           .shape = {core::kAny, core::kAny, core::kAny},
                                           .shape_text = shape_text}));
  QUIRE_RETURN_IF_ERROR(core::check_head_size("head_size", rows.shape[2]));
  return static_cast<int>(rows.shape[2]);
}

// This is what the tables of a call have in common.
struct TableCall {
  const TurboQuantConfig& config;
  int head_size;
  Device device;
  void* stream;
};

// A float32 table of the caller: `compare` is given its elements on the host, in every call or, of a table on the
// device, until it has said yes once.
Status check_table(const TableCall& call, const ConstTensor& table, const core::Expect& expect,
                   const std::function<Status(const ConstTensor& on_host)>& compare) {
  const std::string name = expect.name;
  QUIRE_RETURN_IF_ERROR(core::check_extents(expect.name, table));
  QUIRE_RETURN_IF_ERROR(core::check_device(expect.name, " is on ", table.device));
  QUIRE_RETURN_IF_ERROR(core::check(table, expect));
  const bool on_cuda = table.device == call.device && call.device.is_cuda();
  if (!on_cuda && !table.device.is_cpu()) {
    return invalid_argument(name + " is on " + to_string(table.device) + ", but the call's other tensors are on " +
                            to_string(call.device) + "; supported: on the cpu, or where they are");
  }
  // Both orders of a matrix are dense, and the one that is supported is symmetric.
  const bool rows_dense = table.strides[table.ndim - 1] == 1 && (table.ndim == 1 || table.strides[0] == table.shape[1]);
  const bool columns_dense = table.ndim == 2 && table.strides[0] == 1 && table.strides[1] == table.shape[0];
  if (!rows_dense && !columns_dense) {
    return invalid_argument(name + " has stride " + core::str(table.strides[table.ndim - 1]) +
                            " in its last dimension" +
                            (table.ndim == 2 ? " and " + core::str(table.strides[0]) + " in its first" : "") +
                            "; supported: elements without gaps");
  }
  if (!on_cuda) return compare(table);
  return cuda::check_table_once(expect.name, table, call.head_size, compare, call.stream);
}

// The one rotation that is supported is the Hadamard matrix over sqrt(block); it is block-diagonal where head_size is
// no power of two.
Status check_rotation(const TableCall& call, const ConstTensor& rotation) {
  if (!rotation.defined() || call.config.key_bits == 8) return {};
  const int head_size = call.head_size;
  const auto compare = [head_size](const ConstTensor& given) -> Status {
    const int block = format::rotation_block(head_size);
    const float unit = 1.0F / std::sqrt(static_cast<float>(block));
    for (int i = 0; i < head_size; ++i) {
      for (int j = 0; j < head_size; ++j) {
        const bool negative =
            __builtin_popcount(static_cast<unsigned>(i & j) & static_cast<unsigned>(block - 1)) % 2 != 0;
        const float expected = i / block != j / block ? 0.0F : (negative ? -unit : unit);
        const float value = given.ptr<const float>()[i * given.strides[0] + j * given.strides[1]];
        if (!(std::fabs(value - expected) <= kTableTolerance)) {
          return unsupported("rotation[" + std::to_string(i) + ", " + std::to_string(j) + "] is " + number(value) +
                             "; only the Walsh-Hadamard matrix over sqrt(" + std::to_string(block) +
                             ") is supported, which has " + number(expected) + " there");
        }
      }
    }
    return {};
  };
  return check_table(call, rotation,
                     {.name = "rotation",
                      .dtypes = {DType::kFloat32},
                      .shape = {head_size, head_size},
                      .shape_text = "[head_size, head_size]"},
                     compare);
}

// A codebook holds the centroids of N(0, 1 / head_size) or, with `midpoints`, the means of neighbouring ones.
Status check_codebook(const TableCall& call, const char* name, const ConstTensor& given, bool midpoints) {
  if (!given.defined() || call.config.key_bits == 8) return {};
  const int bits = call.config.key_bits;
  const int count = (1 << bits) - (midpoints ? 1 : 0);
  const float sigma = 1.0F / std::sqrt(static_cast<float>(call.head_size));
  const auto compare = [=](const ConstTensor& codebook) -> Status {
    const auto centroid = [&](int i) { return sigma * (bits == 3 ? format::centroid<3>(i) : format::centroid<4>(i)); };
    for (int i = 0; i < count; ++i) {
      const float expected = midpoints ? 0.5F * (centroid(i) + centroid(i + 1)) : centroid(i);
      const float value = codebook.ptr<const float>()[i];
      if (!(std::fabs(value - expected) <= kTableTolerance * sigma)) {
        return unsupported(std::string(name) + "[" + std::to_string(i) + "] is " + number(value) +
                           "; only the Lloyd-Max codebook of N(0, 1/head_size) is supported, which has " +
                           number(expected) + " there");
      }
    }
    return {};
  };
  return check_table(call, given,
                     {.name = name,
                      .dtypes = {DType::kFloat32},
                      .shape = {count},
                      .shape_text = midpoints ? "[2^key_bits - 1]" : "[2^key_bits]"},
                     compare);
}

// The mode of the bytes, which norm correction does not change.
Result<ModeId> stored_mode(TurboQuantConfig config) {
  config.norm_correction = true;
  return turboquant_mode(config);
}

}  // namespace

Result<ModeId> turboquant_mode(const TurboQuantConfig& config) {
  return core::guarded([&]() -> Result<ModeId> {
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
  });
}

bool turboquant_uses_e4b15(int major, int minor) { return major < 8 || (major == 8 && minor < 9); }

namespace {

template <class Data>
Result<BasicKVCacheViews<Data>> slot_views(const TurboQuantConfig& config, const BasicTensor<Data>& kv_cache,
                                           int head_size) {
  return core::guarded([&]() -> Result<BasicKVCacheViews<Data>> {
    const Result<ModeId> mode = stored_mode(config);
    if (!mode) return mode.status();
    QUIRE_RETURN_IF_ERROR(core::check_extents("kv_cache", kv_cache));
    QUIRE_RETURN_IF_ERROR(core::check(kv_cache, {.name = "kv_cache",
                                                 .dtypes = {DType::kUInt8},
                                                 .shape = {core::kAny, core::kAny, core::kAny, core::kAny},
                                                 .shape_text = "[num_blocks, block_size, num_kv_heads, slot bytes]",
                                                 .dense_rows = true}));
    KVCacheSpec spec;
    spec.mode = *mode;
    spec.head_size = head_size;
    spec.num_kv_heads = 1;
    const Result<KVCacheLayout> layout = make_layout(spec);
    if (!layout) return layout.status();
    if (kv_cache.shape[3] < layout->bytes_per_token_head) {
      return invalid_argument("kv_cache is " + to_string(kv_cache) + "; a slot of head_size " +
                              std::to_string(head_size) + " has " + std::to_string(layout->bytes_per_token_head) +
                              " bytes (" + std::to_string(layout->k_data_bytes) + " of key, " +
                              std::to_string(layout->v_data_bytes) + " of value, rounded up to even) or more");
    }
    using Byte = std::conditional_t<std::is_const_v<Data>, const std::uint8_t, std::uint8_t>;
    BasicKVCacheViews<Data> views;
    views.key_cache = views.value_cache = kv_cache;
    views.key_cache.shape[3] = layout->k_data_bytes;
    views.value_cache.shape[3] = layout->v_data_bytes;
    if (kv_cache.data != nullptr) views.value_cache.data = static_cast<Byte*>(kv_cache.data) + layout->k_data_bytes;
    return views;
  });
}

}  // namespace

Result<KVCacheViews> turboquant_views(const TurboQuantConfig& config, const Tensor& kv_cache, int head_size) {
  return slot_views(config, kv_cache, head_size);
}

Result<ConstKVCacheViews> turboquant_views(const TurboQuantConfig& config, const ConstTensor& kv_cache, int head_size) {
  return slot_views(config, kv_cache, head_size);
}

Status turboquant_store(const TurboQuantStoreArgs& args, void* stream) {
  return core::guarded([&]() -> Status {
    const Result<ModeId> mode = stored_mode(args.config);
    if (!mode) return mode.status();
    const Result<int> head_size = head_size_of("key", args.key, "[num_tokens, num_kv_heads, head_size]");
    if (!head_size) return head_size.status();
    const Result<KVCacheViews> views = turboquant_views(args.config, args.kv_cache, *head_size);
    if (!views) return views.status();
    const TableCall tables{args.config, *head_size, args.key.device, stream};
    QUIRE_RETURN_IF_ERROR(check_rotation(tables, args.rotation));
    QUIRE_RETURN_IF_ERROR(check_codebook(tables, "midpoints", args.midpoints, true));
    ReshapeAndCacheArgs store;
    store.mode = *mode;
    store.key = args.key;
    store.value = args.value;
    store.cache = *views;
    store.slot_mapping = args.slot_mapping;
    return reshape_and_cache(store, stream);
  });
}

Status turboquant_decode_attention(const TurboQuantDecodeArgs& args, void* stream) {
  return core::guarded([&]() -> Status {
    const Result<ModeId> mode = turboquant_mode(args.config);
    if (!mode) return mode.status();
    const Result<int> head_size = head_size_of("query", args.query, "[batch, num_q_heads, head_size]");
    if (!head_size) return head_size.status();
    const Result<ConstKVCacheViews> views = turboquant_views(args.config, args.kv_cache, *head_size);
    if (!views) return views.status();
    UnifiedAttentionArgs read;
    read.mode = *mode;
    read.query = args.query;
    read.out = args.out;
    read.cache = *views;
    read.seq_lens = args.seq_lens;
    read.block_table = args.block_table;
    read.softmax_scale = args.softmax_scale;
    read.lse = args.lse;
    read.max_query_len = 1;
    read.max_seq_len = args.max_seq_len;
    // Before cu_seqlens_q is allocated, where query is.
    const std::int64_t batch = args.query.shape[0];
    QUIRE_RETURN_IF_ERROR(core::check_tensors(read));
    QUIRE_RETURN_IF_ERROR(core::check_count("query", args.query, "batch", batch, 0));
    QUIRE_RETURN_IF_ERROR(core::check(
        args.seq_lens, {.name = "seq_lens", .dtypes = {DType::kInt32}, .shape = {batch}, .shape_text = "[batch]"}));
    const TableCall tables{args.config, *head_size, args.query.device, stream};
    QUIRE_RETURN_IF_ERROR(check_rotation(tables, args.rotation));
    QUIRE_RETURN_IF_ERROR(check_codebook(tables, "centroids", args.centroids, false));
    if (read.max_seq_len == 0 && args.block_table.ndim == 2 && args.kv_cache.ndim == 4) {
      // unified_attention checks both. At least 1: an empty table has no keys to plan for.
      read.max_seq_len = std::clamp<std::int64_t>(
          checked_product({args.block_table.shape[1], args.kv_cache.shape[1]}).value_or(INT32_MAX), 1, INT32_MAX);
    }
    const auto attend = [&read, stream](const ConstTensor& cu_seqlens_q) {
      read.cu_seqlens_q = cu_seqlens_q;
      return unified_attention(read, stream);
    };
    if (args.query.device.is_cuda()) return cuda::with_one_token_each(args.query.device, batch, attend, stream);
    std::vector<std::int32_t> starts(static_cast<std::size_t>(batch) + 1);
    std::iota(starts.begin(), starts.end(), 0);
    return attend(Tensor::contiguous(starts.data(), DType::kInt32, {batch + 1}));
  });
}

std::vector<int> boundary_skip_layers(int num_layers, int n) {
  constexpr int kMost = 65536;
  n = std::min({n, num_layers / 2, kMost});
  std::vector<int> layers;
  if (n <= 0) return layers;
  for (int i = 0; i < n; ++i) layers.push_back(i);
  for (int i = n; i > 0; --i) layers.push_back(num_layers - i);
  return layers;
}

}  // namespace quire
