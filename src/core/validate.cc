#include "core/validate.h"

#include <bit>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>

namespace quire::core {

using format::FormatInfo;
using format::MetaPlace;

namespace {

template <class Args>
struct TensorField {
  const char* name;
  Tensor Args::*tensor;
};

// Every tensor of a call. The first one given says where the call runs.
constexpr TensorField<ReshapeAndCacheArgs> kStoreTensors[] = {{"key", &ReshapeAndCacheArgs::key},
                                                              {"value", &ReshapeAndCacheArgs::value},
                                                              {"key_cache", &ReshapeAndCacheArgs::key_cache},
                                                              {"value_cache", &ReshapeAndCacheArgs::value_cache},
                                                              {"slot_mapping", &ReshapeAndCacheArgs::slot_mapping},
                                                              {"k_scale_cache", &ReshapeAndCacheArgs::k_scale_cache},
                                                              {"v_scale_cache", &ReshapeAndCacheArgs::v_scale_cache},
                                                              {"k_scale", &ReshapeAndCacheArgs::k_scale},
                                                              {"v_scale", &ReshapeAndCacheArgs::v_scale},
                                                              {"error_counter", &ReshapeAndCacheArgs::error_counter}};
constexpr TensorField<UnifiedAttentionArgs> kAttentionTensors[] = {
    {"query", &UnifiedAttentionArgs::query},
    {"out", &UnifiedAttentionArgs::out},
    {"key_cache", &UnifiedAttentionArgs::key_cache},
    {"value_cache", &UnifiedAttentionArgs::value_cache},
    {"k_scale_cache", &UnifiedAttentionArgs::k_scale_cache},
    {"v_scale_cache", &UnifiedAttentionArgs::v_scale_cache},
    {"cu_seqlens_q", &UnifiedAttentionArgs::cu_seqlens_q},
    {"seq_lens", &UnifiedAttentionArgs::seq_lens},
    {"block_table", &UnifiedAttentionArgs::block_table},
    {"causal_per_seq", &UnifiedAttentionArgs::causal_per_seq},
    {"mm_prefix_range", &UnifiedAttentionArgs::mm_prefix_range},
    {"sinks", &UnifiedAttentionArgs::sinks},
    {"alibi_slopes", &UnifiedAttentionArgs::alibi_slopes},
    {"qq_bias", &UnifiedAttentionArgs::qq_bias},
    {"q_scale", &UnifiedAttentionArgs::q_scale},
    {"k_scale", &UnifiedAttentionArgs::k_scale},
    {"v_scale", &UnifiedAttentionArgs::v_scale},
    {"output_scale", &UnifiedAttentionArgs::output_scale},
    {"lse", &UnifiedAttentionArgs::lse},
    {"error_counter", &UnifiedAttentionArgs::error_counter}};
constexpr TensorField<MergeAttnStatesArgs> kMergeTensors[] = {{"prefix_out", &MergeAttnStatesArgs::prefix_out},
                                                              {"prefix_lse", &MergeAttnStatesArgs::prefix_lse},
                                                              {"suffix_out", &MergeAttnStatesArgs::suffix_out},
                                                              {"suffix_lse", &MergeAttnStatesArgs::suffix_lse},
                                                              {"out", &MergeAttnStatesArgs::out},
                                                              {"lse", &MergeAttnStatesArgs::lse}};

template <class Args, std::size_t kSize>
Status check_tensors(const Args& args, const TensorField<Args> (&fields)[kSize]) {
  const TensorField<Args>* first = nullptr;
  for (const TensorField<Args>& field : fields) {
    const Tensor& tensor = args.*field.tensor;
    if (!tensor.defined()) continue;
    QUIRE_RETURN_IF_ERROR(check_extents(field.name, tensor));
    if (tensor.device != Device::kCpu && tensor.device != Device::kCuda) {
      return invalid_argument(std::string(field.name) + " is on an unknown device; supported: cpu and cuda");
    }
    if (first == nullptr) first = &field;
    if (const Device device = (args.*first->tensor).device; tensor.device != device) {
      return invalid_argument(std::string(field.name) + " is on " + std::string(device_name(tensor.device)) + ", but " +
                              first->name + " is on " + std::string(device_name(device)) +
                              "; all tensors of a call must be on one device");
    }
  }
  return {};
}

template <class Args, std::size_t kSize>
Args drop_idle_strides(const Args& args, const TensorField<Args> (&fields)[kSize]) {
  Args copy = args;
  for (const TensorField<Args>& field : fields) {
    Tensor& tensor = copy.*field.tensor;
    for (int dim = 0; dim < tensor.ndim; ++dim) {
      if (tensor.shape[dim] <= 1) tensor.strides[dim] = 0;
    }
  }
  return copy;
}

}  // namespace

ReshapeAndCacheArgs drop_idle_strides(const ReshapeAndCacheArgs& args) {
  return drop_idle_strides(args, kStoreTensors);
}
UnifiedAttentionArgs drop_idle_strides(const UnifiedAttentionArgs& args) {
  return drop_idle_strides(args, kAttentionTensors);
}
MergeAttnStatesArgs drop_idle_strides(const MergeAttnStatesArgs& args) {
  return drop_idle_strides(args, kMergeTensors);
}

Status check_tensors(const UnifiedAttentionArgs& args) { return check_tensors(args, kAttentionTensors); }

Result<StoreProblem> validate_store(const ReshapeAndCacheArgs& args) {
  const Device device = args.key.device;
  const bool head_major = args.key_cache.ndim == 5;
  Result<FormatPair> pair = resolve(args.mode, args.key_cache, args.value_cache);
  if (!pair) return pair.status();
  const FormatInfo& key_format = format::format_info(pair->key);
  const FormatInfo& value_format = format::format_info(pair->value);

  QUIRE_RETURN_IF_ERROR(check_tensors(args, kStoreTensors));
  QUIRE_RETURN_IF_ERROR(check(args.key, {.name = "key",
                                         .dtypes = kFloatsAndFloat8,
                                         .shape = {kAny, kAny, kAny},
                                         .shape_text = "[num_tokens, num_kv_heads, head_size]"}));
  QUIRE_RETURN_IF_ERROR(check(args.value, {.name = "value",
                                           .dtypes = kFloatsAndFloat8,
                                           .shape = {args.key.shape[0], args.key.shape[1], kAny},
                                           .shape_text = "[num_tokens, num_kv_heads, head_size_v]"}));
  QUIRE_RETURN_IF_ERROR(check(args.slot_mapping, {.name = "slot_mapping",
                                                  .dtypes = {DType::kInt64, DType::kInt32},
                                                  .shape = {kAny},
                                                  .shape_text = "[at most num_tokens]"}));
  for (const auto& [name, tensor, info] :
       {std::tuple{"key", &args.key, &key_format}, std::tuple{"value", &args.value, &value_format}}) {
    if (!is_float8(tensor->dtype)) continue;
    if (!info->tensor_scale || tensor->dtype != info->cache_dtype) {
      return invalid_argument(
          std::string(name) + " is " + std::string(dtype_name(tensor->dtype)) + "; format " + std::string(info->name) +
          " takes float32, float16 and bfloat16" +
          (info->tensor_scale ? ", and " + std::string(dtype_name(info->cache_dtype)) + " to copy" : ""));
    }
  }

  QUIRE_RETURN_IF_ERROR(check_count("key", args.key, "num_kv_heads", args.key.shape[1], 0));
  StoreProblem problem;
  problem.key_format = pair->key;
  problem.value_format = pair->value;
  problem.num_tokens = args.slot_mapping.shape[0];
  problem.num_kv_heads = static_cast<int>(args.key.shape[1]);
  if (problem.num_tokens > args.key.shape[0]) {
    return invalid_argument("slot_mapping has " + str(problem.num_tokens) + " entries for " + str(args.key.shape[0]) +
                            " tokens of key; supported: at most as many");
  }
  QUIRE_RETURN_IF_ERROR(check_head_size("head_size", args.key.shape[2]));
  QUIRE_RETURN_IF_ERROR(check_head_size("head_size_v", args.value.shape[2]));
  problem.head_size = static_cast<int>(args.key.shape[2]);
  problem.head_size_v = static_cast<int>(args.value.shape[2]);
  QUIRE_RETURN_IF_ERROR(check_packing("head_size", key_format, problem.head_size));
  QUIRE_RETURN_IF_ERROR(check_packing("head_size_v", value_format, problem.head_size_v));

  problem.num_blocks = args.key_cache.shape[0];
  if (head_major) {
    if (key_format.meta_place != MetaPlace::kNone || key_format.unit != 1 ||
        value_format.meta_place != MetaPlace::kNone || value_format.unit != 1) {
      return invalid_argument("key_cache is " + to_string(args.key_cache) + ", the head-major layout; format " +
                              std::string(key_format.name) +
                              " is stored as [num_blocks, block_size, num_kv_heads, row] only");
    }
    const std::int64_t x = args.key_cache.shape[4];
    problem.block_size = args.key_cache.shape[3];
    if (x < 1 || problem.head_size % x != 0) {
      return invalid_argument("key_cache is " + to_string(args.key_cache) +
                              "; x, its last dimension, must divide head_size " + str(problem.head_size));
    }
    const auto cache_dtypes = [](const Tensor& cache, const FormatInfo& info) {
      return dtype_bytes(info.cache_dtype) == 1 && cache.dtype == DType::kUInt8 ? DType::kUInt8 : info.cache_dtype;
    };
    QUIRE_RETURN_IF_ERROR(
        check(args.key_cache,
              {.name = "key_cache",
               .dtypes = {cache_dtypes(args.key_cache, key_format)},
               .shape = {problem.num_blocks, problem.num_kv_heads, problem.head_size / x, problem.block_size, x},
               .shape_text = "[num_blocks, num_kv_heads, head_size / x, block_size, x]"}));
    QUIRE_RETURN_IF_ERROR(check(
        args.value_cache, {.name = "value_cache",
                           .dtypes = {cache_dtypes(args.value_cache, value_format)},
                           .shape = {problem.num_blocks, problem.num_kv_heads, problem.head_size_v, problem.block_size},
                           .shape_text = "[num_blocks, num_kv_heads, head_size_v, block_size]"}));
    if (args.k_scale_cache.defined() || args.v_scale_cache.defined()) {
      return invalid_argument(
          "k_scale_cache or v_scale_cache is given, but the head-major layout has none; leave them out");
    }
    problem.head_major_x = static_cast<int>(x);
  } else {
    problem.block_size = args.key_cache.ndim > 1 ? args.key_cache.shape[1] : 0;
    QUIRE_RETURN_IF_ERROR(check_cache("key_cache", args.key_cache, "k_scale_cache", args.k_scale_cache, key_format,
                                      problem.num_kv_heads, problem.head_size, problem.num_blocks, problem.block_size));
    QUIRE_RETURN_IF_ERROR(check_cache("value_cache", args.value_cache, "v_scale_cache", args.v_scale_cache,
                                      value_format, problem.num_kv_heads, problem.head_size_v, problem.num_blocks,
                                      problem.block_size));
  }
  QUIRE_RETURN_IF_ERROR(check_count("key_cache", args.key_cache, "block_size", problem.block_size, 1));
  for (const auto& [name, written] :
       {std::pair{"key_cache", &args.key_cache}, std::pair{"value_cache", &args.value_cache},
        std::pair{"k_scale_cache", &args.k_scale_cache}, std::pair{"v_scale_cache", &args.v_scale_cache}}) {
    QUIRE_RETURN_IF_ERROR(check_apart(name, *written));
  }
  for (const auto& [name, scale, info] :
       {std::tuple{"k_scale", &args.k_scale, &key_format}, std::tuple{"v_scale", &args.v_scale, &value_format}}) {
    if (scale->defined() && !info->tensor_scale) {
      return invalid_argument(std::string(name) + " is given, but format " + std::string(info->name) +
                              " does not divide by a per-tensor scale when it stores; leave it out");
    }
    QUIRE_RETURN_IF_ERROR(check_scale(name, *scale, problem.num_kv_heads, -1));
  }
  QUIRE_RETURN_IF_ERROR(check_counter(args.error_counter, device));

  if (device == Device::kCpu) {
    const std::int64_t num_slots = problem.num_blocks * problem.block_size;
    for (std::int64_t t = 0; t < problem.num_tokens; ++t) {
      if (const std::int64_t slot = int_at(args.slot_mapping, t); slot >= num_slots) {
        return out_of_range("slot_mapping[" + str(t) + "] is " + str(slot) + "; the cache has " +
                            str(problem.num_blocks) + " blocks of " + str(problem.block_size) +
                            (num_slots > 0 ? ", slots 0 to " + str(num_slots - 1) : ", no slots") +
                            " (negative: skip)");
      }
    }
  }
  return problem;
}

namespace {

// On the CPU lengths and sinks can be read, and are.
Status check_contents(const UnifiedAttentionArgs& args, const AttentionShape& shape) {
  if (int_at(args.cu_seqlens_q, 0) != 0) {
    return out_of_range("cu_seqlens_q[0] is " + str(int_at(args.cu_seqlens_q, 0)) + "; it must be 0");
  }
  for (int b = 0; b < shape.batch; ++b) {
    const std::int64_t first = int_at(args.cu_seqlens_q, b);
    const std::int64_t last = int_at(args.cu_seqlens_q, b + 1);
    if (last < first || last > shape.num_tokens) {
      return out_of_range("cu_seqlens_q[" + str(b + 1) + "] is " + str(last) + "; it must lie between cu_seqlens_q[" +
                          str(b) + "] = " + str(first) + " and the " + str(shape.num_tokens) + " tokens of query");
    }
    if (shape.qq_bias_size > 0 && last - first > shape.qq_bias_size) {
      return out_of_range("qq_bias is " + to_string(args.qq_bias) + ", but sequence " + str(b) + " has " +
                          str(last - first) + " query tokens; it must have at least as many rows");
    }
    const std::int64_t seq_len = int_at(args.seq_lens, b);
    if (seq_len < 0 || seq_len > shape.max_keys()) {
      return out_of_range("seq_lens[" + str(b) + "] is " + str(seq_len) + "; block_table holds " +
                          str(shape.max_blocks) + " blocks of " + str(shape.block_size) + " per sequence, 0 to " +
                          str(shape.max_keys()) + " keys");
    }
  }
  if (args.sinks.defined()) {
    for (std::int64_t head = 0; head < shape.num_q_heads; ++head) {
      const float sink = args.sinks.ptr<const float>()[head * args.sinks.strides[0]];
      if (std::isfinite(sink) || sink == -INFINITY) continue;
      return invalid_argument("sinks[" + str(head) + "] is " + std::to_string(sink) +
                              "; supported: finite values, and -inf for no sink");
    }
  }
  return {};
}

// A cache of a registered backend that reads its own rows, and its scale cache.
Status check_own_rows(const char* name, const Tensor& cache, const char* scale_name, const Tensor& scale_cache,
                      const QuantKVBackend& backend, bool is_value, int head_size, const AttentionShape& shape) {
  QUIRE_RETURN_IF_ERROR(check(cache, {.name = name,
                                      .dtypes = kAllDTypes,
                                      .shape = {shape.num_blocks, shape.block_size, shape.num_kv_heads, kAny},
                                      .shape_text = "[num_blocks, block_size, num_kv_heads, row elements]",
                                      .dense_rows = true}));
  if (!backend.has_decode_row()) return {};
  const Result<std::int64_t> row_bytes = backend.row_bytes(head_size, is_value);
  if (!row_bytes) return row_bytes.status();
  const auto element = static_cast<std::int64_t>(dtype_bytes(cache.dtype));
  if (*row_bytes % element != 0 || cache.shape[3] != *row_bytes / element) {
    return invalid_argument(std::string(name) + " is " + to_string(cache) + "; a row of mode " +
                            mode_name(backend.mode()) + " has " + str(*row_bytes) + " bytes at " +
                            (is_value ? "head_size_v " : "head_size ") + str(head_size));
  }
  if (backend.needs_scale_caches()) {
    return check(scale_cache, {.name = scale_name,
                               .dtypes = {DType::kFloat32},
                               .shape = {shape.num_blocks, shape.block_size, shape.num_kv_heads},
                               .shape_text = "[num_blocks, block_size, num_kv_heads]"});
  }
  if (!scale_cache.defined()) return {};
  return invalid_argument(std::string(scale_name) + " is given, but mode " + mode_name(backend.mode()) +
                          " has no scale caches; leave it out");
}

}  // namespace

Result<AttentionShape> validate_attention(const UnifiedAttentionArgs& args, const QuantKVBackend* own_rows) {
  const Device device = args.query.device;
  AttentionShape shape;
  QUIRE_RETURN_IF_ERROR(check_tensors(args));
  QUIRE_RETURN_IF_ERROR(check(args.query, {.name = "query",
                                           .dtypes = kFloatsAndFloat8,
                                           .shape = {kAny, kAny, kAny},
                                           .shape_text = "[num_tokens, num_q_heads, head_size]",
                                           .dense_rows = true}));
  QUIRE_RETURN_IF_ERROR(
      check(args.out, {.name = "out",
                       .dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3},
                       .shape = {args.query.shape[0], args.query.shape[1], kAny},
                       .shape_text = "[num_tokens, num_q_heads, head_size_v]",
                       .dense_rows = true}));
  QUIRE_RETURN_IF_ERROR(check_apart("out", args.out));
  QUIRE_RETURN_IF_ERROR(check_count("query", args.query, "num_q_heads", args.query.shape[1], 0));
  QUIRE_RETURN_IF_ERROR(check_head_size("head_size", args.query.shape[2]));
  QUIRE_RETURN_IF_ERROR(check_head_size("head_size_v", args.out.shape[2]));
  shape.num_tokens = args.query.shape[0];
  shape.num_q_heads = static_cast<int>(args.query.shape[1]);
  shape.head_size = static_cast<int>(args.query.shape[2]);
  shape.head_size_v = static_cast<int>(args.out.shape[2]);

  if (args.key_cache.ndim != 4 || args.value_cache.ndim != 4) {
    return invalid_argument("key_cache is " + to_string(args.key_cache) + " and value_cache " +
                            to_string(args.value_cache) +
                            "; both must be [num_blocks, block_size, num_kv_heads, row elements]");
  }
  QUIRE_RETURN_IF_ERROR(check_count("key_cache", args.key_cache, "block_size", args.key_cache.shape[1], 1));
  QUIRE_RETURN_IF_ERROR(check_count("key_cache", args.key_cache, "num_kv_heads", args.key_cache.shape[2], 1));
  shape.num_blocks = args.key_cache.shape[0];
  shape.block_size = static_cast<int>(args.key_cache.shape[1]);
  shape.num_kv_heads = static_cast<int>(args.key_cache.shape[2]);
  if (shape.num_q_heads % shape.num_kv_heads != 0) {
    return invalid_argument("query has " + str(shape.num_q_heads) + " heads and key_cache " + str(shape.num_kv_heads) +
                            "; query heads must be a multiple of KV heads");
  }
  if (own_rows == nullptr) {
    Result<FormatPair> pair = resolve(args.mode, args.key_cache, args.value_cache);
    if (!pair) return pair.status();
    shape.key_format = pair->key;
    shape.value_format = pair->value;
    const FormatInfo& key_format = format::format_info(pair->key);
    const FormatInfo& value_format = format::format_info(pair->value);
    QUIRE_RETURN_IF_ERROR(check_packing("head_size", key_format, shape.head_size));
    QUIRE_RETURN_IF_ERROR(check_packing("head_size_v", value_format, shape.head_size_v));
    QUIRE_RETURN_IF_ERROR(check_cache("key_cache", args.key_cache, "k_scale_cache", args.k_scale_cache, key_format,
                                      shape.num_kv_heads, shape.head_size, shape.num_blocks, shape.block_size));
    QUIRE_RETURN_IF_ERROR(check_cache("value_cache", args.value_cache, "v_scale_cache", args.v_scale_cache,
                                      value_format, shape.num_kv_heads, shape.head_size_v, shape.num_blocks,
                                      shape.block_size));
  } else {
    QUIRE_RETURN_IF_ERROR(check_own_rows("key_cache", args.key_cache, "k_scale_cache", args.k_scale_cache, *own_rows,
                                         false, shape.head_size, shape));
    QUIRE_RETURN_IF_ERROR(check_own_rows("value_cache", args.value_cache, "v_scale_cache", args.v_scale_cache,
                                         *own_rows, true, shape.head_size_v, shape));
  }

  QUIRE_RETURN_IF_ERROR(
      check(args.cu_seqlens_q,
            {.name = "cu_seqlens_q", .dtypes = {DType::kInt32}, .shape = {kAny}, .shape_text = "[batch + 1]"}));
  if (args.cu_seqlens_q.shape[0] < 1) return invalid_argument("cu_seqlens_q is empty; it must have batch + 1 entries");
  const std::int64_t batch = args.cu_seqlens_q.shape[0] - 1;
  QUIRE_RETURN_IF_ERROR(check_count("cu_seqlens_q", args.cu_seqlens_q, "batch", batch, 0));
  shape.batch = static_cast<int>(batch);
  QUIRE_RETURN_IF_ERROR(
      check(args.seq_lens, {.name = "seq_lens", .dtypes = {DType::kInt32}, .shape = {batch}, .shape_text = "[batch]"}));
  QUIRE_RETURN_IF_ERROR(check(
      args.block_table,
      {.name = "block_table", .dtypes = {DType::kInt32}, .shape = {batch, kAny}, .shape_text = "[batch, max_blocks]"}));
  shape.max_blocks = args.block_table.shape[1];

  if (args.sliding_window != -1 && args.sliding_window < 1) {
    return invalid_argument("sliding_window is " + str(args.sliding_window) +
                            "; supported: 1 and more, or -1 for none");
  }
  if (args.chunk_lookback < -1) {
    return invalid_argument("chunk_lookback is " + str(args.chunk_lookback) +
                            "; supported: 0 and more, or -1 for none");
  }
  if (args.chunk_lookback >= 0 && args.sliding_window <= args.chunk_lookback) {
    return invalid_argument("chunk_lookback is " + str(args.chunk_lookback) + " with sliding_window " +
                            str(args.sliding_window) +
                            "; the window must be given and hold chunk_lookback + 1 chunks of at least one token");
  }
  if (!(args.softcap >= 0.0F && std::isfinite(args.softcap))) {
    return invalid_argument("softcap is " + std::to_string(args.softcap) +
                            "; supported: finite values above 0, or 0 for none");
  }
  if (!std::isfinite(args.softmax_scale)) {
    return invalid_argument("softmax_scale is " + std::to_string(args.softmax_scale) + "; supported: finite values");
  }
  if (args.use_alibi_sqrt && !args.alibi_slopes.defined()) {
    return invalid_argument("use_alibi_sqrt is set, but alibi_slopes is not given; it must be [num_q_heads]");
  }
  const std::int64_t heads = shape.num_q_heads;
  QUIRE_RETURN_IF_ERROR(check(args.sinks, {.name = "sinks",
                                           .dtypes = {DType::kFloat32},
                                           .shape = {heads},
                                           .shape_text = "[num_q_heads]",
                                           .optional = true}));
  QUIRE_RETURN_IF_ERROR(check(args.alibi_slopes, {.name = "alibi_slopes",
                                                  .dtypes = {DType::kFloat32},
                                                  .shape = {heads},
                                                  .shape_text = "[num_q_heads]",
                                                  .optional = true}));
  QUIRE_RETURN_IF_ERROR(check(args.causal_per_seq, {.name = "causal_per_seq",
                                                    .dtypes = {DType::kUInt8},
                                                    .shape = {batch},
                                                    .shape_text = "[batch]",
                                                    .optional = true}));
  QUIRE_RETURN_IF_ERROR(check(args.mm_prefix_range, {.name = "mm_prefix_range",
                                                     .dtypes = {DType::kInt32},
                                                     .shape = {batch, kAny, 2},
                                                     .shape_text = "[batch, num_ranges, 2]",
                                                     .optional = true}));
  if (args.mm_prefix_range.defined()) {
    const std::int64_t num_ranges = args.mm_prefix_range.shape[1];
    QUIRE_RETURN_IF_ERROR(check_count("mm_prefix_range", args.mm_prefix_range, "num_ranges", num_ranges, 0));
    shape.num_mm_ranges = static_cast<int>(num_ranges);
  }
  if (args.qq_bias.defined()) {
    const std::int64_t rows = args.qq_bias.ndim > 0 ? args.qq_bias.shape[0] : 0;
    QUIRE_RETURN_IF_ERROR(check(args.qq_bias, {.name = "qq_bias",
                                               .dtypes = {DType::kFloat32},
                                               .shape = {rows, rows},
                                               .shape_text = "[max_query_len, max_query_len]"}));
    if (args.max_query_len > rows) {
      return invalid_argument("qq_bias is " + to_string(args.qq_bias) + ", but max_query_len is " +
                              str(args.max_query_len) + "; it must have at least as many rows");
    }
    QUIRE_RETURN_IF_ERROR(check_count("qq_bias", args.qq_bias, "max_query_len", rows, 0));
    shape.qq_bias_size = static_cast<int>(rows);
  }

  QUIRE_RETURN_IF_ERROR(check_scale("k_scale", args.k_scale, shape.num_kv_heads, batch));
  QUIRE_RETURN_IF_ERROR(check_scale("v_scale", args.v_scale, shape.num_kv_heads, batch));
  if (args.q_scale.defined() && !is_float8(args.query.dtype)) {
    return invalid_argument("q_scale is given with a query of " + std::string(dtype_name(args.query.dtype)) +
                            "; it belongs to float8 queries");
  }
  QUIRE_RETURN_IF_ERROR(check_scale("q_scale", args.q_scale, shape.num_kv_heads, batch));
  if (args.q_scale.defined() && args.q_scale.ndim == 1 && args.q_scale.numel() != 1) {
    return invalid_argument("q_scale is " + to_string(args.q_scale) +
                            "; supported: one element or [batch, num_kv_heads]");
  }
  const bool float8_out = args.out.dtype == DType::kFloat8E4M3;
  if (float8_out != args.output_scale.defined()) {
    return invalid_argument(std::string("output_scale is ") + (float8_out ? "not given" : "given") +
                            " with an out of " + std::string(dtype_name(args.out.dtype)) +
                            "; a float8_e4m3fn out and output_scale go together");
  }
  if (float8_out) QUIRE_RETURN_IF_ERROR(check_scale("output_scale", args.output_scale, 1, -1));
  QUIRE_RETURN_IF_ERROR(check(args.lse, {.name = "lse",
                                         .dtypes = {DType::kFloat32},
                                         .shape = {shape.num_tokens, heads},
                                         .shape_text = "[num_tokens, num_q_heads]",
                                         .optional = true}));
  QUIRE_RETURN_IF_ERROR(check_apart("lse", args.lse));
  QUIRE_RETURN_IF_ERROR(check_counter(args.error_counter, device));
  for (const auto& [name, bound] :
       {std::pair{"max_query_len", args.max_query_len}, std::pair{"max_seq_len", args.max_seq_len}}) {
    if (bound < 0)
      return invalid_argument(std::string(name) + " is " + str(bound) + "; supported: a bound above 0, or 0 for none");
  }
  if (device == Device::kCpu) QUIRE_RETURN_IF_ERROR(check_contents(args, shape));
  return shape;
}

Status validate_merge(const MergeAttnStatesArgs& args) {
  QUIRE_RETURN_IF_ERROR(check_tensors(args, kMergeTensors));
  QUIRE_RETURN_IF_ERROR(check(args.prefix_out, {.name = "prefix_out",
                                                .dtypes = kFloats,
                                                .shape = {kAny, kAny, kAny},
                                                .shape_text = "[num_tokens, num_q_heads, head_size_v]",
                                                .dense_rows = true}));
  const std::int64_t tokens = args.prefix_out.shape[0];
  const std::int64_t heads = args.prefix_out.shape[1];
  const std::int64_t head_size = args.prefix_out.shape[2];
  for (const auto& [name, tensor] : {std::pair{"suffix_out", &args.suffix_out}, std::pair{"out", &args.out}}) {
    QUIRE_RETURN_IF_ERROR(check(*tensor, {.name = name,
                                          .dtypes = kFloats,
                                          .shape = {tokens, heads, head_size},
                                          .shape_text = "[num_tokens, num_q_heads, head_size_v]",
                                          .dense_rows = true}));
  }
  for (const auto& [name, tensor, optional] :
       {std::tuple{"prefix_lse", &args.prefix_lse, false}, std::tuple{"suffix_lse", &args.suffix_lse, false},
        std::tuple{"lse", &args.lse, true}}) {
    QUIRE_RETURN_IF_ERROR(check(*tensor, {.name = name,
                                          .dtypes = {DType::kFloat32},
                                          .shape = {tokens, heads},
                                          .shape_text = "[num_tokens, num_q_heads]",
                                          .optional = optional}));
  }
  QUIRE_RETURN_IF_ERROR(check_count("prefix_out", args.prefix_out, "num_q_heads", heads, 0));
  QUIRE_RETURN_IF_ERROR(check_count("prefix_out", args.prefix_out, "head_size_v", head_size, 0));
  QUIRE_RETURN_IF_ERROR(check_apart("out", args.out));
  return check_apart("lse", args.lse);
}

Status validate_problem(const AttentionProblem& problem) {
  const Result<ModeInfo> mode = mode_info(problem.mode);
  if (!mode) return mode.status();
  if (!mode->compiled) return mode_not_built(*mode);
  if (problem.device != Device::kCpu && problem.device != Device::kCuda) {
    return invalid_argument("device is unknown; supported: cpu and cuda");
  }
  // Lengths are int32 in every call, so a larger bound on them says nothing.
  const struct {
    const char* name;
    std::int64_t value, least, most;
  } fields[] = {
      {"num_q_heads", problem.num_q_heads, 1, INT32_MAX}, {"num_kv_heads", problem.num_kv_heads, 1, INT32_MAX},
      {"block_size", problem.block_size, 1, INT32_MAX},   {"max_num_tokens", problem.max_num_tokens, 0, INT64_MAX},
      {"max_batch", problem.max_batch, 0, INT32_MAX},     {"max_query_len", problem.max_query_len, 0, INT32_MAX},
      {"max_seq_len", problem.max_seq_len, 0, INT32_MAX}, {"num_splits", problem.num_splits, 0, INT32_MAX}};
  for (const auto& field : fields) {
    if (field.value < field.least || field.value > field.most) {
      return invalid_argument(std::string(field.name) + " is " + str(field.value) + "; supported: " + str(field.least) +
                              " to " + str(field.most));
    }
  }
  if (problem.row_alignment < 1 || problem.row_alignment > 16 ||
      !std::has_single_bit(static_cast<unsigned>(problem.row_alignment))) {
    return invalid_argument("row_alignment is " + str(problem.row_alignment) + "; supported: 1, 2, 4, 8 and 16");
  }
  QUIRE_RETURN_IF_ERROR(check_dtype("query_dtype", problem.query_dtype, kFloatsAndFloat8));
  QUIRE_RETURN_IF_ERROR(check_dtype("cache_dtype", problem.cache_dtype, kAllDTypes));
  if (problem.num_q_heads % problem.num_kv_heads != 0) {
    return invalid_argument("num_q_heads is " + str(problem.num_q_heads) + "; it must be a multiple of num_kv_heads, " +
                            str(problem.num_kv_heads));
  }
  QUIRE_RETURN_IF_ERROR(check_head_size("head_size", problem.head_size));
  QUIRE_RETURN_IF_ERROR(check_head_size("head_size_v", problem.head_size_v));
  const FormatPair pair = formats_of(*mode, problem.cache_dtype, problem.cache_dtype);
  if (!pair.known()) {
    if (mode->registered) return {};  // its backend knows what it packs
    return invalid_argument("cache_dtype is " + std::string(dtype_name(problem.cache_dtype)) + "; mode " + mode->name +
                            " stores float32, float16 or bfloat16");
  }
  QUIRE_RETURN_IF_ERROR(check_packing("head_size", format::format_info(pair.key), problem.head_size));
  return check_packing("head_size_v", format::format_info(pair.value), problem.head_size_v);
}

}  // namespace quire::core
