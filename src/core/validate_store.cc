#include <string>
#include <tuple>
#include <utility>

#include "core/tensor_fields.h"
#include "core/validate.h"

namespace quire::core {

using format::FormatInfo;
using format::MetaPlace;

namespace {

Status check_rows(const ReshapeAndCacheArgs& args, const FormatInfo& key_format, const FormatInfo& value_format) {
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
  return {};
}

// Finds out how many rows there are, and of which size.
Status check_sizes(const ReshapeAndCacheArgs& args, const FormatInfo& key_format, const FormatInfo& value_format,
                   StoreProblem& problem) {
  QUIRE_RETURN_IF_ERROR(check_count("key", args.key, "num_kv_heads", args.key.shape[1], 0));
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
  return {};
}

// These caches have 5 and 4 dimensions: K [num_blocks, Hk, d / x, block_size, x], V [num_blocks, Hk, dv, block_size].
Status check_head_major_caches(const ReshapeAndCacheArgs& args, const FormatInfo& key_format,
                               const FormatInfo& value_format, StoreProblem& problem) {
  if (key_format.meta_place != MetaPlace::kNone || key_format.unit != 1 ||
      value_format.meta_place != MetaPlace::kNone || value_format.unit != 1) {
    return invalid_argument("key_cache is " + to_string(args.cache.key_cache) + ", the head-major layout; format " +
                            std::string(key_format.name) +
                            " is stored as [num_blocks, block_size, num_kv_heads, row] only");
  }
  const std::int64_t x = args.cache.key_cache.shape[4];
  problem.block_size = args.cache.key_cache.shape[3];
  if (x < 1 || problem.head_size % x != 0) {
    return invalid_argument("key_cache is " + to_string(args.cache.key_cache) +
                            "; x, its last dimension, must divide head_size " + str(problem.head_size));
  }
  const auto cache_dtypes = [](const ConstTensor& cache, const FormatInfo& info) {
    return dtype_bytes(info.cache_dtype) == 1 && cache.dtype == DType::kUInt8 ? DType::kUInt8 : info.cache_dtype;
  };
  QUIRE_RETURN_IF_ERROR(
      check(args.cache.key_cache,
            {.name = "key_cache",
             .dtypes = {cache_dtypes(args.cache.key_cache, key_format)},
             .shape = {problem.num_blocks, problem.num_kv_heads, problem.head_size / x, problem.block_size, x},
             .shape_text = "[num_blocks, num_kv_heads, head_size / x, block_size, x]"}));
  QUIRE_RETURN_IF_ERROR(
      check(args.cache.value_cache,
            {.name = "value_cache",
             .dtypes = {cache_dtypes(args.cache.value_cache, value_format)},
             .shape = {problem.num_blocks, problem.num_kv_heads, problem.head_size_v, problem.block_size},
             .shape_text = "[num_blocks, num_kv_heads, head_size_v, block_size]"}));
  if (args.cache.k_scale_cache.defined() || args.cache.v_scale_cache.defined()) {
    return invalid_argument(
        "k_scale_cache or v_scale_cache is given, but the head-major layout has none; leave them out");
  }
  if (has_centre(args.cache)) {
    return invalid_argument(
        "k_page_meta, v_page_meta, k_head_vector or v_head_vector is given, but rows of the head-major layout have no "
        "centre; leave them out");
  }
  problem.head_major_x = static_cast<int>(x);
  return {};
}

Status check_paged_caches(const ReshapeAndCacheArgs& args, const FormatInfo& key_format, const FormatInfo& value_format,
                          StoreProblem& problem) {
  problem.block_size = args.cache.key_cache.ndim > 1 ? args.cache.key_cache.shape[1] : 0;
  QUIRE_RETURN_IF_ERROR(check_cache("key_cache", args.cache.key_cache, "k_scale_cache", args.cache.k_scale_cache,
                                    key_format, problem.num_kv_heads, problem.head_size, problem.num_blocks,
                                    problem.block_size));
  QUIRE_RETURN_IF_ERROR(check_cache("value_cache", args.cache.value_cache, "v_scale_cache", args.cache.v_scale_cache,
                                    value_format, problem.num_kv_heads, problem.head_size_v, problem.num_blocks,
                                    problem.block_size));
  return {};
}

Status check_tensor_scales(const ReshapeAndCacheArgs& args, const FormatInfo& key_format,
                           const FormatInfo& value_format, int num_kv_heads) {
  for (const auto& [name, scale, info] :
       {std::tuple{"k_scale", &args.k_scale, &key_format}, std::tuple{"v_scale", &args.v_scale, &value_format}}) {
    if (scale->defined() && !info->tensor_scale) {
      return invalid_argument(std::string(name) + " is given, but format " + std::string(info->name) +
                              " does not divide by a per-tensor scale when it stores; leave it out");
    }
    QUIRE_RETURN_IF_ERROR(check_scale(name, *scale, num_kv_heads, -1));
  }
  return {};
}

// The host can read the slots of a call on the CPU, so they are checked one by one.
Status check_slots(const ConstTensor& slot_mapping, const StoreProblem& problem) {
  const std::int64_t num_slots = problem.num_blocks * problem.block_size;
  for (std::int64_t t = 0; t < problem.num_tokens; ++t) {
    if (const std::int64_t slot = int_at(slot_mapping, t); slot >= num_slots) {
      return out_of_range("slot_mapping[" + str(t) + "] is " + str(slot) + "; the cache has " +
                          str(problem.num_blocks) + " blocks of " + str(problem.block_size) +
                          (num_slots > 0 ? ", slots 0 to " + str(num_slots - 1) : ", no slots") + " (negative: skip)");
    }
  }
  return {};
}

}  // namespace

Result<StoreProblem> validate_store(const ReshapeAndCacheArgs& args, const ModeRow& mode) {
  Result<FormatPair> pair = resolve(mode, args.cache.key_cache, args.cache.value_cache);
  if (!pair) return pair.status();
  const FormatInfo& key_format = format::format_info(pair->key);
  const FormatInfo& value_format = format::format_info(pair->value);

  StoreProblem problem;
  problem.key_format = pair->key;
  problem.value_format = pair->value;
  QUIRE_RETURN_IF_ERROR(check_tensors(args));
  QUIRE_RETURN_IF_ERROR(check_rows(args, key_format, value_format));
  QUIRE_RETURN_IF_ERROR(check_sizes(args, key_format, value_format, problem));
  problem.num_blocks = args.cache.key_cache.shape[0];
  const auto check_caches = args.cache.key_cache.ndim == 5 ? check_head_major_caches : check_paged_caches;
  QUIRE_RETURN_IF_ERROR(check_caches(args, key_format, value_format, problem));
  QUIRE_RETURN_IF_ERROR(check_count("key_cache", args.cache.key_cache, "block_size", problem.block_size, 1));
  for (const auto& [name, written] :
       {std::pair{"key_cache", &args.cache.key_cache}, std::pair{"value_cache", &args.cache.value_cache},
        std::pair{"k_scale_cache", &args.cache.k_scale_cache}, std::pair{"v_scale_cache", &args.cache.v_scale_cache}}) {
    QUIRE_RETURN_IF_ERROR(check_apart(name, *written));
  }
  QUIRE_RETURN_IF_ERROR(check_tensor_scales(args, key_format, value_format, problem.num_kv_heads));
  QUIRE_RETURN_IF_ERROR(check_centre("k_page_meta", args.cache.k_page_meta, "k_head_vector", args.cache.k_head_vector,
                                     key_format, problem.num_blocks, problem.num_kv_heads, problem.head_size));
  QUIRE_RETURN_IF_ERROR(check_centre("v_page_meta", args.cache.v_page_meta, "v_head_vector", args.cache.v_head_vector,
                                     value_format, problem.num_blocks, problem.num_kv_heads, problem.head_size_v));
  QUIRE_RETURN_IF_ERROR(check_counter(args.error_counter, args.key.device));
  if (args.key.device.is_cpu()) QUIRE_RETURN_IF_ERROR(check_slots(args.slot_mapping, problem));
  return problem;
}

}  // namespace quire::core
