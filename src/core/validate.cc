#include "core/validate.h"

#include <string>
#include <tuple>
#include <utility>

#include "core/checks.h"

namespace quire::core {

using format::FormatInfo;
using format::MetaPlace;

Result<StoreProblem> validate_store(const ReshapeAndCacheArgs& args) {
  const Device device = args.key.device;
  const bool head_major = args.key_cache.ndim == 5;
  Result<FormatPair> pair = resolve(args.mode, args.key_cache, args.value_cache);
  if (!pair) return pair.status();
  const FormatInfo& key_format = format::format_info(pair->key);
  const FormatInfo& value_format = format::format_info(pair->value);

  QUIRE_RETURN_IF_ERROR(check(args.key, device,
                              {.name = "key",
                               .dtypes = kFloatsAndFloat8,
                               .shape = {kAny, kAny, kAny},
                               .shape_text = "[num_tokens, num_kv_heads, head_size]"}));
  QUIRE_RETURN_IF_ERROR(check(args.value, device,
                              {.name = "value",
                               .dtypes = kFloatsAndFloat8,
                               .shape = {args.key.shape[0], args.key.shape[1], kAny},
                               .shape_text = "[num_tokens, num_kv_heads, head_size_v]"}));
  QUIRE_RETURN_IF_ERROR(check(args.slot_mapping, device,
                              {.name = "slot_mapping",
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
        check(args.key_cache, device,
              {.name = "key_cache",
               .dtypes = {cache_dtypes(args.key_cache, key_format)},
               .shape = {problem.num_blocks, problem.num_kv_heads, problem.head_size / x, problem.block_size, x},
               .shape_text = "[num_blocks, num_kv_heads, head_size / x, block_size, x]"}));
    QUIRE_RETURN_IF_ERROR(
        check(args.value_cache, device,
              {.name = "value_cache",
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
    QUIRE_RETURN_IF_ERROR(check_cache("key_cache", args.key_cache, "k_scale_cache", args.k_scale_cache, device,
                                      key_format, problem.num_kv_heads, problem.head_size, problem.num_blocks,
                                      problem.block_size));
    QUIRE_RETURN_IF_ERROR(check_cache("value_cache", args.value_cache, "v_scale_cache", args.v_scale_cache, device,
                                      value_format, problem.num_kv_heads, problem.head_size_v, problem.num_blocks,
                                      problem.block_size));
  }
  for (const auto& [name, scale, info] :
       {std::tuple{"k_scale", &args.k_scale, &key_format}, std::tuple{"v_scale", &args.v_scale, &value_format}}) {
    if (scale->defined() && !info->tensor_scale) {
      return invalid_argument(std::string(name) + " is given, but format " + std::string(info->name) +
                              " does not divide by a per-tensor scale when it stores; leave it out");
    }
    QUIRE_RETURN_IF_ERROR(check_scale(name, *scale, device, problem.num_kv_heads, -1));
  }
  QUIRE_RETURN_IF_ERROR(check_counter(args.error_counter, device));

  if (device == Device::kCpu) {
    const std::int64_t num_slots = problem.num_blocks * problem.block_size;
    for (std::int64_t t = 0; t < problem.num_tokens; ++t) {
      if (const std::int64_t slot = int_at(args.slot_mapping, t); slot >= num_slots) {
        return out_of_range("slot_mapping[" + str(t) + "] is " + str(slot) + "; the cache has " +
                            str(problem.num_blocks) + " blocks of " + str(problem.block_size) + ", slots 0 to " +
                            str(num_slots - 1) + " (negative: skip)");
      }
    }
  }
  return problem;
}

namespace {

// On the CPU the contents of the index tensors can be read, and are.
Status check_lengths(const UnifiedAttentionArgs& args, const AttentionShape& shape) {
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
    if (seq_len < 0 || seq_len > shape.max_blocks * shape.block_size) {
      return out_of_range("seq_lens[" + str(b) + "] is " + str(seq_len) + "; block_table holds " +
                          str(shape.max_blocks) + " blocks of " + str(shape.block_size) + " per sequence, 0 to " +
                          str(shape.max_blocks * shape.block_size) + " keys");
    }
  }
  return {};
}

}  // namespace

Result<AttentionShape> validate_attention(const UnifiedAttentionArgs& args, bool own_rows) {
  const Device device = args.query.device;
  AttentionShape shape;
  QUIRE_RETURN_IF_ERROR(check(args.query, device,
                              {.name = "query",
                               .dtypes = kFloatsAndFloat8,
                               .shape = {kAny, kAny, kAny},
                               .shape_text = "[num_tokens, num_q_heads, head_size]",
                               .dense_rows = true}));
  QUIRE_RETURN_IF_ERROR(check(args.out, device,
                              {.name = "out",
                               .dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3},
                               .shape = {args.query.shape[0], args.query.shape[1], kAny},
                               .shape_text = "[num_tokens, num_q_heads, head_size_v]",
                               .dense_rows = true}));
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
  shape.num_blocks = args.key_cache.shape[0];
  shape.num_kv_heads = static_cast<int>(args.key_cache.shape[2]);
  if (args.key_cache.shape[1] < 1 || args.key_cache.shape[1] > INT32_MAX) {
    return invalid_argument("key_cache is " + to_string(args.key_cache) +
                            "; block_size, its second dimension, must be at least 1");
  }
  shape.block_size = static_cast<int>(args.key_cache.shape[1]);
  if (shape.num_kv_heads < 1 || shape.num_q_heads % shape.num_kv_heads != 0) {
    return invalid_argument("query has " + str(shape.num_q_heads) + " heads and key_cache " + str(shape.num_kv_heads) +
                            "; query heads must be a multiple of KV heads");
  }
  if (!own_rows) {
    Result<FormatPair> pair = resolve(args.mode, args.key_cache, args.value_cache);
    if (!pair) return pair.status();
    shape.key_format = pair->key;
    shape.value_format = pair->value;
    const FormatInfo& key_format = format::format_info(pair->key);
    const FormatInfo& value_format = format::format_info(pair->value);
    QUIRE_RETURN_IF_ERROR(check_packing("head_size", key_format, shape.head_size));
    QUIRE_RETURN_IF_ERROR(check_packing("head_size_v", value_format, shape.head_size_v));
    QUIRE_RETURN_IF_ERROR(check_cache("key_cache", args.key_cache, "k_scale_cache", args.k_scale_cache, device,
                                      key_format, shape.num_kv_heads, shape.head_size, shape.num_blocks,
                                      shape.block_size));
    QUIRE_RETURN_IF_ERROR(check_cache("value_cache", args.value_cache, "v_scale_cache", args.v_scale_cache, device,
                                      value_format, shape.num_kv_heads, shape.head_size_v, shape.num_blocks,
                                      shape.block_size));
  } else {
    for (const auto& [name, cache] :
         {std::pair{"key_cache", &args.key_cache}, std::pair{"value_cache", &args.value_cache}}) {
      QUIRE_RETURN_IF_ERROR(check(*cache, device,
                                  {.name = name,
                                   .dtypes = {cache->dtype},
                                   .shape = {shape.num_blocks, shape.block_size, shape.num_kv_heads, kAny},
                                   .shape_text = "[num_blocks, block_size, num_kv_heads, row elements]",
                                   .dense_rows = true}));
    }
  }

  QUIRE_RETURN_IF_ERROR(
      check(args.cu_seqlens_q, device,
            {.name = "cu_seqlens_q", .dtypes = {DType::kInt32}, .shape = {kAny}, .shape_text = "[batch + 1]"}));
  if (args.cu_seqlens_q.shape[0] < 1) return invalid_argument("cu_seqlens_q is empty; it must have batch + 1 entries");
  const std::int64_t batch = args.cu_seqlens_q.shape[0] - 1;
  shape.batch = static_cast<int>(batch);
  QUIRE_RETURN_IF_ERROR(
      check(args.seq_lens, device,
            {.name = "seq_lens", .dtypes = {DType::kInt32}, .shape = {batch}, .shape_text = "[batch]"}));
  QUIRE_RETURN_IF_ERROR(check(
      args.block_table, device,
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
  if (args.chunk_lookback >= 0 && args.sliding_window < args.chunk_lookback + 1) {
    return invalid_argument("chunk_lookback is " + str(args.chunk_lookback) + " with sliding_window " +
                            str(args.sliding_window) +
                            "; the window must be given and hold chunk_lookback + 1 chunks of at least one token");
  }
  if (!(args.softcap >= 0.0F)) {
    return invalid_argument("softcap is " + std::to_string(args.softcap) + "; supported: above 0, or 0 for none");
  }
  if (args.use_alibi_sqrt && !args.alibi_slopes.defined()) {
    return invalid_argument("use_alibi_sqrt is set, but alibi_slopes is not given; it must be [num_q_heads]");
  }
  const std::int64_t heads = shape.num_q_heads;
  QUIRE_RETURN_IF_ERROR(check(args.sinks, device,
                              {.name = "sinks",
                               .dtypes = {DType::kFloat32},
                               .shape = {heads},
                               .shape_text = "[num_q_heads]",
                               .optional = true}));
  QUIRE_RETURN_IF_ERROR(check(args.alibi_slopes, device,
                              {.name = "alibi_slopes",
                               .dtypes = {DType::kFloat32},
                               .shape = {heads},
                               .shape_text = "[num_q_heads]",
                               .optional = true}));
  QUIRE_RETURN_IF_ERROR(check(args.causal_per_seq, device,
                              {.name = "causal_per_seq",
                               .dtypes = {DType::kUInt8},
                               .shape = {batch},
                               .shape_text = "[batch]",
                               .optional = true}));
  QUIRE_RETURN_IF_ERROR(check(args.mm_prefix_range, device,
                              {.name = "mm_prefix_range",
                               .dtypes = {DType::kInt32},
                               .shape = {batch, kAny, 2},
                               .shape_text = "[batch, num_ranges, 2]",
                               .optional = true}));
  if (args.mm_prefix_range.defined()) shape.num_mm_ranges = static_cast<int>(args.mm_prefix_range.shape[1]);
  if (args.qq_bias.defined()) {
    const std::int64_t rows = args.qq_bias.ndim > 0 ? args.qq_bias.shape[0] : 0;
    QUIRE_RETURN_IF_ERROR(check(args.qq_bias, device,
                                {.name = "qq_bias",
                                 .dtypes = {DType::kFloat32},
                                 .shape = {rows, rows},
                                 .shape_text = "[max_query_len, max_query_len]"}));
    if (args.max_query_len > rows) {
      return invalid_argument("qq_bias is " + to_string(args.qq_bias) + ", but max_query_len is " +
                              str(args.max_query_len) + "; it must have at least as many rows");
    }
    shape.qq_bias_size = static_cast<int>(rows);
  }

  QUIRE_RETURN_IF_ERROR(check_scale("k_scale", args.k_scale, device, shape.num_kv_heads, batch));
  QUIRE_RETURN_IF_ERROR(check_scale("v_scale", args.v_scale, device, shape.num_kv_heads, batch));
  if (args.q_scale.defined() && !is_float8(args.query.dtype)) {
    return invalid_argument("q_scale is given with a query of " + std::string(dtype_name(args.query.dtype)) +
                            "; it belongs to float8 queries");
  }
  QUIRE_RETURN_IF_ERROR(check_scale("q_scale", args.q_scale, device, shape.num_kv_heads, batch));
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
  if (float8_out) QUIRE_RETURN_IF_ERROR(check_scale("output_scale", args.output_scale, device, 1, -1));
  QUIRE_RETURN_IF_ERROR(check(args.lse, device,
                              {.name = "lse",
                               .dtypes = {DType::kFloat32},
                               .shape = {shape.num_tokens, heads},
                               .shape_text = "[num_tokens, num_q_heads]",
                               .optional = true}));
  QUIRE_RETURN_IF_ERROR(check_counter(args.error_counter, device));
  for (const auto& [name, bound] :
       {std::pair{"max_query_len", args.max_query_len}, std::pair{"max_seq_len", args.max_seq_len}}) {
    if (bound < 0)
      return invalid_argument(std::string(name) + " is " + str(bound) + "; supported: a bound above 0, or 0 for none");
  }
  if (device == Device::kCpu) QUIRE_RETURN_IF_ERROR(check_lengths(args, shape));
  return shape;
}

Status validate_merge(const MergeAttnStatesArgs& args) {
  const Device device = args.prefix_out.device;
  QUIRE_RETURN_IF_ERROR(check(args.prefix_out, device,
                              {.name = "prefix_out",
                               .dtypes = kFloats,
                               .shape = {kAny, kAny, kAny},
                               .shape_text = "[num_tokens, num_q_heads, head_size_v]",
                               .dense_rows = true}));
  const std::int64_t tokens = args.prefix_out.shape[0];
  const std::int64_t heads = args.prefix_out.shape[1];
  const std::int64_t head_size = args.prefix_out.shape[2];
  for (const auto& [name, tensor] : {std::pair{"suffix_out", &args.suffix_out}, std::pair{"out", &args.out}}) {
    QUIRE_RETURN_IF_ERROR(check(*tensor, device,
                                {.name = name,
                                 .dtypes = kFloats,
                                 .shape = {tokens, heads, head_size},
                                 .shape_text = "[num_tokens, num_q_heads, head_size_v]",
                                 .dense_rows = true}));
  }
  for (const auto& [name, tensor, optional] :
       {std::tuple{"prefix_lse", &args.prefix_lse, false}, std::tuple{"suffix_lse", &args.suffix_lse, false},
        std::tuple{"lse", &args.lse, true}}) {
    QUIRE_RETURN_IF_ERROR(check(*tensor, device,
                                {.name = name,
                                 .dtypes = {DType::kFloat32},
                                 .shape = {tokens, heads},
                                 .shape_text = "[num_tokens, num_q_heads]",
                                 .optional = optional}));
  }
  return {};
}

Status validate_problem(const AttentionProblem& problem) {
  const Result<ModeInfo> mode = mode_info(problem.mode);
  if (!mode) return mode.status();
  const struct {
    const char* name;
    std::int64_t value;
    std::int64_t least;
  } fields[] = {{"num_q_heads", problem.num_q_heads, 1}, {"num_kv_heads", problem.num_kv_heads, 1},
                {"block_size", problem.block_size, 1},   {"max_num_tokens", problem.max_num_tokens, 0},
                {"max_batch", problem.max_batch, 0},     {"max_query_len", problem.max_query_len, 0},
                {"max_seq_len", problem.max_seq_len, 0}, {"row_alignment", problem.row_alignment, 1},
                {"num_splits", problem.num_splits, 0}};
  for (const auto& field : fields) {
    if (field.value < field.least) {
      return invalid_argument(std::string(field.name) + " is " + str(field.value) + "; supported: " + str(field.least) +
                              " and more");
    }
  }
  if (problem.num_q_heads % problem.num_kv_heads != 0) {
    return invalid_argument("num_q_heads is " + str(problem.num_q_heads) + "; it must be a multiple of num_kv_heads, " +
                            str(problem.num_kv_heads));
  }
  QUIRE_RETURN_IF_ERROR(check_head_size("head_size", problem.head_size));
  return check_head_size("head_size_v", problem.head_size_v);
}

}  // namespace quire::core
