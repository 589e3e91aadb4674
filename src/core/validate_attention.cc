#include <cmath>
#include <string>
#include <utility>

#include "core/tensor_fields.h"
#include "core/validate.h"

namespace quire::core {

using format::FormatInfo;

namespace {

// Each step fills what it has found out of `shape`, and may use what earlier ones have.
Status check_query_and_out(const UnifiedAttentionArgs& args, AttentionShape& shape) {
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
  return {};
}

// A cache of a registered backend that reads its own rows, and its scale cache.
Status check_own_rows(const char* name, const ConstTensor& cache, const char* scale_name,
                      const ConstTensor& scale_cache, const QuantKVBackend& backend, bool is_value, int head_size,
                      const AttentionShape& shape) {
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

Status check_caches(const UnifiedAttentionArgs& args, const ModeRow& mode, const QuantKVBackend* own_rows,
                    AttentionShape& shape) {
  if (args.cache.key_cache.ndim != 4 || args.cache.value_cache.ndim != 4) {
    return invalid_argument("key_cache is " + to_string(args.cache.key_cache) + " and value_cache " +
                            to_string(args.cache.value_cache) +
                            "; both must be [num_blocks, block_size, num_kv_heads, row elements]");
  }
  QUIRE_RETURN_IF_ERROR(check_count("key_cache", args.cache.key_cache, "block_size", args.cache.key_cache.shape[1], 1));
  QUIRE_RETURN_IF_ERROR(
      check_count("key_cache", args.cache.key_cache, "num_kv_heads", args.cache.key_cache.shape[2], 1));
  shape.num_blocks = args.cache.key_cache.shape[0];
  shape.block_size = static_cast<int>(args.cache.key_cache.shape[1]);
  shape.num_kv_heads = static_cast<int>(args.cache.key_cache.shape[2]);
  if (shape.num_q_heads % shape.num_kv_heads != 0) {
    return invalid_argument("query has " + str(shape.num_q_heads) + " heads and key_cache " + str(shape.num_kv_heads) +
                            "; query heads must be a multiple of KV heads");
  }
  if (own_rows == nullptr) {
    Result<FormatPair> pair = resolve(mode, args.cache.key_cache, args.cache.value_cache);
    if (!pair) return pair.status();
    shape.key_format = pair->key;
    shape.value_format = pair->value;
    const FormatInfo& key_format = format::format_info(pair->key);
    const FormatInfo& value_format = format::format_info(pair->value);
    QUIRE_RETURN_IF_ERROR(check_packing("head_size", key_format, shape.head_size));
    QUIRE_RETURN_IF_ERROR(check_packing("head_size_v", value_format, shape.head_size_v));
    QUIRE_RETURN_IF_ERROR(check_cache("key_cache", args.cache.key_cache, "k_scale_cache", args.cache.k_scale_cache,
                                      key_format, shape.num_kv_heads, shape.head_size, shape.num_blocks,
                                      shape.block_size));
    QUIRE_RETURN_IF_ERROR(check_cache("value_cache", args.cache.value_cache, "v_scale_cache", args.cache.v_scale_cache,
                                      value_format, shape.num_kv_heads, shape.head_size_v, shape.num_blocks,
                                      shape.block_size));
    QUIRE_RETURN_IF_ERROR(check_centre("k_page_meta", args.cache.k_page_meta, "k_head_vector", args.cache.k_head_vector,
                                       key_format, shape.num_blocks, shape.num_kv_heads, shape.head_size));
    QUIRE_RETURN_IF_ERROR(check_centre("v_page_meta", args.cache.v_page_meta, "v_head_vector", args.cache.v_head_vector,
                                       value_format, shape.num_blocks, shape.num_kv_heads, shape.head_size_v));
  } else {
    QUIRE_RETURN_IF_ERROR(check_own_rows("key_cache", args.cache.key_cache, "k_scale_cache", args.cache.k_scale_cache,
                                         *own_rows, false, shape.head_size, shape));
    QUIRE_RETURN_IF_ERROR(check_own_rows("value_cache", args.cache.value_cache, "v_scale_cache",
                                         args.cache.v_scale_cache, *own_rows, true, shape.head_size_v, shape));
  }
  return {};
}

Status check_sequences(const UnifiedAttentionArgs& args, AttentionShape& shape) {
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
  return {};
}

Status check_scalars(const UnifiedAttentionArgs& args) {
  if (args.mask.sliding_window != -1 && args.mask.sliding_window < 1) {
    return invalid_argument("sliding_window is " + str(args.mask.sliding_window) +
                            "; supported: 1 and more, or -1 for none");
  }
  if (args.mask.chunk_lookback < -1) {
    return invalid_argument("chunk_lookback is " + str(args.mask.chunk_lookback) +
                            "; supported: 0 and more, or -1 for none");
  }
  if (args.mask.chunk_lookback >= 0 && args.mask.sliding_window <= args.mask.chunk_lookback) {
    return invalid_argument("chunk_lookback is " + str(args.mask.chunk_lookback) + " with sliding_window " +
                            str(args.mask.sliding_window) +
                            "; the window must be given and hold chunk_lookback + 1 chunks of at least one token");
  }
  if (args.mask.rswa_window != -1 && args.mask.rswa_window < 1) {
    return invalid_argument("rswa_window is " + str(args.mask.rswa_window) + "; supported: 1 and more, or -1 for none");
  }
  if ((args.mask.rswa_window == -1) == args.mask.rswa_prefix_lens.defined()) {
    return invalid_argument(
        "rswa_prefix_lens is " +
        (args.mask.rswa_prefix_lens.defined() ? to_string(args.mask.rswa_prefix_lens) : "not given") +
        " with rswa_window " + str(args.mask.rswa_window) + "; the two go together");
  }
  if (args.mask.rswa_window != -1 && args.mask.sliding_window != -1) {
    return invalid_argument("rswa_window is " + str(args.mask.rswa_window) + " with sliding_window " +
                            str(args.mask.sliding_window) +
                            "; R-SWA takes the window's place and has no chunks: sliding_window must be -1");
  }
  if (!(args.softcap >= 0.0F && std::isfinite(args.softcap))) {
    return invalid_argument("softcap is " + std::to_string(args.softcap) +
                            "; supported: finite values above 0, or 0 for none");
  }
  if (!std::isfinite(args.softmax_scale) || args.softmax_scale == 0.0F) {
    return invalid_argument("softmax_scale is " + std::to_string(args.softmax_scale) +
                            "; it is required, finite and not 0, usually 1 / sqrt(head_size)");
  }
  if (args.use_alibi_sqrt && !args.alibi_slopes.defined()) {
    return invalid_argument("use_alibi_sqrt is set, but alibi_slopes is not given; it must be [num_q_heads]");
  }
  return {};
}

// What masks are made of, and what is added to the logits.
Status check_masks_and_biases(const UnifiedAttentionArgs& args, AttentionShape& shape) {
  const std::int64_t batch = shape.batch;
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
  QUIRE_RETURN_IF_ERROR(check(args.mask.causal_per_seq, {.name = "causal_per_seq",
                                                         .dtypes = {DType::kUInt8},
                                                         .shape = {batch},
                                                         .shape_text = "[batch]",
                                                         .optional = true}));
  QUIRE_RETURN_IF_ERROR(check(args.mask.mm_prefix_range, {.name = "mm_prefix_range",
                                                          .dtypes = {DType::kInt32},
                                                          .shape = {batch, kAny, 2},
                                                          .shape_text = "[batch, num_ranges, 2]",
                                                          .optional = true}));
  if (args.mask.mm_prefix_range.defined()) {
    const std::int64_t num_ranges = args.mask.mm_prefix_range.shape[1];
    QUIRE_RETURN_IF_ERROR(check_count("mm_prefix_range", args.mask.mm_prefix_range, "num_ranges", num_ranges, 0));
    shape.num_mm_ranges = static_cast<int>(num_ranges);
  }
  QUIRE_RETURN_IF_ERROR(check(args.mask.rswa_prefix_lens, {.name = "rswa_prefix_lens",
                                                           .dtypes = {DType::kInt32},
                                                           .shape = {batch},
                                                           .shape_text = "[batch]",
                                                           .optional = true}));
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
  return {};
}

Status check_scales(const UnifiedAttentionArgs& args, const AttentionShape& shape) {
  QUIRE_RETURN_IF_ERROR(check_scale("k_descale", args.k_descale, shape.num_kv_heads, shape.batch));
  QUIRE_RETURN_IF_ERROR(check_scale("v_descale", args.v_descale, shape.num_kv_heads, shape.batch));
  if (args.q_descale.defined() && !is_float8(args.query.dtype)) {
    return invalid_argument("q_descale is given with a query of " + std::string(dtype_name(args.query.dtype)) +
                            "; it belongs to float8 queries");
  }
  QUIRE_RETURN_IF_ERROR(check_scale("q_descale", args.q_descale, shape.num_kv_heads, shape.batch));
  if (args.q_descale.defined() && args.q_descale.ndim == 1 && args.q_descale.numel() != 1) {
    return invalid_argument("q_descale is " + to_string(args.q_descale) +
                            "; supported: one element or [batch, num_kv_heads]");
  }
  const bool float8_out = args.out.dtype == DType::kFloat8E4M3;
  if (float8_out != args.output_scale.defined()) {
    return invalid_argument(std::string("output_scale is ") + (float8_out ? "not given" : "given") +
                            " with an out of " + std::string(dtype_name(args.out.dtype)) +
                            "; a float8_e4m3fn out and output_scale go together");
  }
  if (float8_out) QUIRE_RETURN_IF_ERROR(check_scale("output_scale", args.output_scale, 1, -1));
  return {};
}

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

}  // namespace

Status check_tensors(const UnifiedAttentionArgs& args) { return check_tensors<UnifiedAttentionArgs>(args); }

Result<AttentionShape> validate_attention(const UnifiedAttentionArgs& args, const ModeRow& mode,
                                          const QuantKVBackend* own_rows) {
  AttentionShape shape;
  QUIRE_RETURN_IF_ERROR(check_tensors(args));
  QUIRE_RETURN_IF_ERROR(check_query_and_out(args, shape));
  QUIRE_RETURN_IF_ERROR(check_caches(args, mode, own_rows, shape));
  QUIRE_RETURN_IF_ERROR(check_sequences(args, shape));
  QUIRE_RETURN_IF_ERROR(check_scalars(args));
  QUIRE_RETURN_IF_ERROR(check_masks_and_biases(args, shape));
  QUIRE_RETURN_IF_ERROR(check_scales(args, shape));
  QUIRE_RETURN_IF_ERROR(check(args.lse, {.name = "lse",
                                         .dtypes = {DType::kFloat32},
                                         .shape = {shape.num_tokens, shape.num_q_heads},
                                         .shape_text = "[num_tokens, num_q_heads]",
                                         .optional = true}));
  QUIRE_RETURN_IF_ERROR(check_apart("lse", args.lse));
  QUIRE_RETURN_IF_ERROR(check_counter(args.error_counter, args.query.device));
  for (const auto& [name, bound] :
       {std::pair{"max_query_len", args.max_query_len}, std::pair{"max_seq_len", args.max_seq_len}}) {
    if (bound < 0)
      return invalid_argument(std::string(name) + " is " + str(bound) +
                              "; it is an upper bound on the lengths of the batch, not negative");
  }
  if (args.query.device.is_cpu()) QUIRE_RETURN_IF_ERROR(check_contents(args, shape));
  return shape;
}

}  // namespace quire::core
