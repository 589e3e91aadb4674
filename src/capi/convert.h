// The structs of quire_c.h to those of C++ and back.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>
#include <utility>

#include "quire/quire.h"
#include "quire/quire_c.h"

#define QUIRE_RETURN_IF_BAD(expression)            \
  do {                                             \
    if (Status status_ = (expression); !status_) { \
      return status_;                              \
    }                                              \
  } while (false)

namespace quire::capi {

static_assert(QUIRE_INTERNAL == static_cast<int>(StatusCode::kInternal));
static_assert(QUIRE_INT64 == static_cast<int>(DType::kInt64) && QUIRE_UINT8 == static_cast<int>(DType::kUInt8));
static_assert(QUIRE_CUDA == static_cast<int>(DeviceType::kCuda));
static_assert(QUIRE_HND == static_cast<int>(CacheOrder::kHND));
static_assert(QUIRE_KV_IN_ROW == static_cast<int>(KVPacking::kKVInRow));
static_assert(QUIRE_SCALES_INLINE == static_cast<int>(ScalePlacement::kInline));
static_assert(QUIRE_MAX_DIMS == Tensor::kMaxDims);

inline Status check_size(const char* name, const void* given, std::size_t struct_size) {
  if (given == nullptr) return invalid_argument(std::string(name) + " is a null pointer; it must point to its struct");
  if (struct_size < sizeof(std::size_t)) {
    return invalid_argument(std::string(name) + ".struct_size is " + std::to_string(struct_size) +
                            "; it must be sizeof of the struct, as its default function sets it");
  }
  return {};
}

// The caller's struct, whose size may be that of another version: what it lacks has the defaults of `own`, and what it
// has too much must be zeros.
template <class Struct>
inline Status take(const char* name, const Struct* given, Struct& own) {
  QUIRE_RETURN_IF_BAD(check_size(name, given, given == nullptr ? 0 : given->struct_size));
  const std::size_t size = given->struct_size;
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (std::size_t i = sizeof(Struct); i < size; ++i) {
    if (bytes[i] != 0) {
      return unsupported(std::string(name) + ".struct_size is " + std::to_string(size) +
                         ", of a newer quire, and byte " + std::to_string(i) + " is set; this library knows " +
                         std::to_string(sizeof(Struct)) + " bytes");
    }
  }
  std::memcpy(static_cast<void*>(&own), given, std::min(size, sizeof(Struct)));
  own.struct_size = sizeof(Struct);
  return {};
}

// As much of an answer as the caller's struct has room for.
template <class Struct>
inline Status give(const char* name, Struct answer, Struct* to) {
  QUIRE_RETURN_IF_BAD(check_size(name, to, to == nullptr ? 0 : to->struct_size));
  answer.struct_size = to->struct_size;
  std::memcpy(static_cast<void*>(to), &answer, std::min(to->struct_size, sizeof(Struct)));
  return {};
}

// An enum's number; one that is none becomes the last of its bytes, which every op refuses.
template <class Enum>
Enum enum_of(std::int32_t number) {
  return static_cast<Enum>(number < 0 || number > 255 ? 255 : number);
}

inline Device device_of(const quire_device& device) { return {enum_of<DeviceType>(device.type), device.index}; }
inline quire_device c_device(const Device& device) { return {static_cast<std::int32_t>(device.type), device.index}; }

template <class T>
T tensor_of(const quire_tensor& given) {
  T tensor;
  tensor.data = given.data;
  tensor.dtype = enum_of<DType>(given.dtype);
  tensor.device = device_of(given.device);
  tensor.ndim = given.ndim;
  std::copy_n(given.shape, QUIRE_MAX_DIMS, tensor.shape);
  std::copy_n(given.strides, QUIRE_MAX_DIMS, tensor.strides);
  return tensor;
}
inline Tensor written(const quire_tensor& given) { return tensor_of<Tensor>(given); }
inline ConstTensor read(const quire_tensor& given) { return tensor_of<ConstTensor>(given); }

inline quire_tensor c_tensor(const Tensor& given) {
  quire_tensor tensor = quire_no_tensor();
  tensor.data = given.data;
  tensor.dtype = static_cast<std::int32_t>(given.dtype);
  tensor.device = c_device(given.device);
  tensor.ndim = given.ndim;
  std::copy_n(given.shape, QUIRE_MAX_DIMS, tensor.shape);
  std::copy_n(given.strides, QUIRE_MAX_DIMS, tensor.strides);
  return tensor;
}

inline Status views_of(const quire_kv_cache_views* given, KVCacheViews& views) {
  quire_kv_cache_views own = quire_kv_cache_views_default();
  QUIRE_RETURN_IF_BAD(take("cache", given, own));
  for (const auto& [name, scales] :
       {std::pair{"k_channel_scales", &own.k_channel_scales}, std::pair{"v_channel_scales", &own.v_channel_scales}}) {
    if (read(*scales).defined()) {
      return invalid_argument(std::string(name) +
                              " is given, but no format of this version has channel scales; leave it out");
    }
  }
  views = {written(own.key_cache),   written(own.value_cache), written(own.k_scale_cache), written(own.v_scale_cache),
           written(own.k_page_meta), written(own.v_page_meta), read(own.k_head_vector),    read(own.v_head_vector)};
  return {};
}

inline Status spec_of(const quire_kv_cache_spec* given, KVCacheSpec& spec) {
  quire_kv_cache_spec own = quire_kv_cache_spec_default();
  QUIRE_RETURN_IF_BAD(take("spec", given, own));
  spec.mode = static_cast<ModeId>(own.mode);
  spec.head_size = own.head_size;
  spec.head_size_v = own.head_size_v;
  spec.num_kv_heads = own.num_kv_heads;
  spec.num_layers = own.num_layers;
  spec.block_size = own.block_size;
  spec.model_dtype = enum_of<DType>(own.model_dtype);
  spec.order = enum_of<CacheOrder>(own.order);
  spec.packing = enum_of<KVPacking>(own.packing);
  spec.scales = enum_of<ScalePlacement>(own.scales);
  spec.page_alignment = own.page_alignment;
  return {};
}

inline Status store_args(const quire_reshape_and_cache_args* given, ReshapeAndCacheArgs& args) {
  quire_reshape_and_cache_args own = quire_reshape_and_cache_args_default();
  QUIRE_RETURN_IF_BAD(take("args", given, own));
  QUIRE_RETURN_IF_BAD(views_of(own.cache, args.cache));
  args.mode = static_cast<ModeId>(own.mode);
  args.key = read(own.key);
  args.value = read(own.value);
  args.slot_mapping = read(own.slot_mapping);
  args.k_scale = read(own.k_scale);
  args.v_scale = read(own.v_scale);
  args.error_counter = written(own.error_counter);
  return {};
}

inline Status mask_of(const quire_attention_mask* given, AttentionMask& mask) {
  if (given == nullptr) return {};
  quire_attention_mask own = quire_attention_mask_default();
  QUIRE_RETURN_IF_BAD(take("mask", given, own));
  mask.causal = own.causal != 0;
  mask.causal_per_seq = read(own.causal_per_seq);
  mask.sliding_window = own.sliding_window;
  mask.chunk_lookback = own.chunk_lookback;
  mask.mm_prefix_range = read(own.mm_prefix_range);
  mask.mm_prefix_clamp_window = own.mm_prefix_clamp_window != 0;
  mask.rswa_prefix_lens = read(own.rswa_prefix_lens);
  mask.rswa_window = own.rswa_window;
  return {};
}

inline Status attention_args(const quire_attention_args* given, UnifiedAttentionArgs& args) {
  quire_attention_args own = quire_attention_args_default();
  QUIRE_RETURN_IF_BAD(take("args", given, own));
  KVCacheViews cache;
  QUIRE_RETURN_IF_BAD(views_of(own.cache, cache));
  QUIRE_RETURN_IF_BAD(mask_of(own.mask, args.mask));
  args.cache = cache;
  args.mode = static_cast<ModeId>(own.mode);
  args.query = read(own.query);
  args.out = written(own.out);
  args.cu_seqlens_q = read(own.cu_seqlens_q);
  args.seq_lens = read(own.seq_lens);
  args.block_table = read(own.block_table);
  args.softmax_scale = own.softmax_scale;
  args.softcap = own.softcap;
  args.sinks = read(own.sinks);
  args.alibi_slopes = read(own.alibi_slopes);
  args.use_alibi_sqrt = own.use_alibi_sqrt != 0;
  args.qq_bias = read(own.qq_bias);
  args.q_descale = read(own.q_descale);
  args.k_descale = read(own.k_descale);
  args.v_descale = read(own.v_descale);
  args.output_scale = read(own.output_scale);
  args.lse = written(own.lse);
  args.max_query_len = own.max_query_len;
  args.max_seq_len = own.max_seq_len;
  args.error_counter = written(own.error_counter);
  return {};
}

inline Status problem_from(const quire_attention_problem* given, AttentionProblem& problem) {
  quire_attention_problem own = quire_attention_problem_default();
  QUIRE_RETURN_IF_BAD(take("problem", given, own));
  problem.device = device_of(own.device);
  problem.arch = {own.arch_major, own.arch_minor, own.num_multiprocessors, own.shared_bytes};
  problem.mode = static_cast<ModeId>(own.mode);
  problem.num_q_heads = own.num_q_heads;
  problem.num_kv_heads = own.num_kv_heads;
  problem.head_size = own.head_size;
  problem.head_size_v = own.head_size_v;
  problem.block_size = own.block_size;
  problem.query_dtype = enum_of<DType>(own.query_dtype);
  problem.key_cache_dtype = enum_of<DType>(own.key_cache_dtype);
  problem.value_cache_dtype = enum_of<DType>(own.value_cache_dtype);
  problem.row_alignment = own.row_alignment;
  problem.whole_pages = own.whole_pages != 0;
  problem.has_centre = own.has_centre != 0;
  problem.num_splits = own.num_splits;
  problem.batch_invariant = own.batch_invariant != 0;
  problem.max_num_tokens = own.max_num_tokens;
  problem.max_batch = own.max_batch;
  problem.max_query_len = own.max_query_len;
  problem.max_seq_len = own.max_seq_len;
  return {};
}

inline quire_attention_problem c_problem(const AttentionProblem& problem) {
  quire_attention_problem answer = quire_attention_problem_default();
  answer.device = c_device(problem.device);
  answer.arch_major = problem.arch.major;
  answer.arch_minor = problem.arch.minor;
  answer.num_multiprocessors = problem.arch.num_multiprocessors;
  answer.shared_bytes = problem.arch.shared_bytes;
  answer.mode = static_cast<quire_mode>(problem.mode);
  answer.num_q_heads = problem.num_q_heads;
  answer.num_kv_heads = problem.num_kv_heads;
  answer.head_size = problem.head_size;
  answer.head_size_v = problem.head_size_v;
  answer.block_size = problem.block_size;
  answer.query_dtype = static_cast<std::int32_t>(problem.query_dtype);
  answer.key_cache_dtype = static_cast<std::int32_t>(problem.key_cache_dtype);
  answer.value_cache_dtype = static_cast<std::int32_t>(problem.value_cache_dtype);
  answer.row_alignment = problem.row_alignment;
  answer.whole_pages = problem.whole_pages ? 1 : 0;
  answer.has_centre = problem.has_centre ? 1 : 0;
  answer.num_splits = problem.num_splits;
  answer.batch_invariant = problem.batch_invariant ? 1 : 0;
  answer.max_num_tokens = problem.max_num_tokens;
  answer.max_batch = problem.max_batch;
  answer.max_query_len = problem.max_query_len;
  answer.max_seq_len = problem.max_seq_len;
  return answer;
}

}  // namespace quire::capi
