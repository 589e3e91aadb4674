#include "cuda/store_params.h"

#include <limits>

#include "cuda/launch.h"

namespace quire::cuda {
namespace {

bool is_float8(DType dtype) { return dtype == DType::kFloat8E4M3 || dtype == DType::kFloat8E5M2; }

void set_side(StoreSide& side, const ConstTensor& input, const Tensor& cache,
              const attention::SideTensors<void>& tensors, const ConstTensor& scale, format::FormatId id,
              int head_size) {
  const auto input_bytes = static_cast<std::int64_t>(dtype_bytes(input.dtype));
  const auto cache_bytes = static_cast<std::int64_t>(dtype_bytes(cache.dtype));
  side.format = id;
  side.head_size = head_size;
  side.input = input.ptr<const std::uint8_t>();
  side.input_dtype = input.dtype;
  side.input_token_stride = input.strides[0] * input_bytes;
  side.input_head_stride = input.strides[1] * input_bytes;
  side.input_element_stride = input.strides[2] * input_bytes;
  if (input.strides[2] == 1 && input_bytes > 1) {
    const int access =
        access_bytes(input.data, {side.input_token_stride, side.input_head_stride, head_size * input_bytes});
    side.input_access = access >= input_bytes ? access : 0;
  }
  attention::set_paged_rows(side, cache, tensors);
  side.element_stride = cache_bytes;
  // The row's own length limits the width too: its last lane may be partly filled.
  side.access = access_bytes(cache.data, {side.block_stride, side.slot_stride, side.head_stride,
                                          format::format_info(id).code_bytes(head_size)});
  if (scale.defined()) {
    side.tensor_scale = scale.ptr<const float>();
    side.tensor_scale_stride = scale.numel() == 1 ? 0 : scale.strides[scale.ndim - 1];
  }
  side.copy_codes = is_float8(input.dtype);
}

}  // namespace

StoreParams make_store_params(const ReshapeAndCacheArgs& args, const StoreProblem& problem) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  StoreParams params;
  const KVCacheViews& cache = args.cache;
  set_side(params.key, args.key, cache.key_cache, {cache.k_scale_cache, cache.k_page_meta, cache.k_head_vector},
           args.k_scale, problem.key_format, problem.head_size);
  set_side(params.value, args.value, cache.value_cache, {cache.v_scale_cache, cache.v_page_meta, cache.v_head_vector},
           args.v_scale, problem.value_format, problem.head_size_v);
  if (problem.head_major_x > 0) {
    const auto bytes = static_cast<std::int64_t>(dtype_bytes(cache.key_cache.dtype));
    const auto bytes_v = static_cast<std::int64_t>(dtype_bytes(cache.value_cache.dtype));
    // K [num_blocks, Hk, d/x, block_size, x]
    params.key.head_stride = cache.key_cache.strides[1] * bytes;
    params.key.group = problem.head_major_x;
    params.key.group_stride = cache.key_cache.strides[2] * bytes;
    params.key.slot_stride = cache.key_cache.strides[3] * bytes;
    params.key.element_stride = cache.key_cache.strides[4] * bytes;
    // V [num_blocks, Hk, dv, block_size]
    params.value.head_stride = cache.value_cache.strides[1] * bytes_v;
    params.value.group_stride = cache.value_cache.strides[2] * bytes_v;
    params.value.slot_stride = cache.value_cache.strides[3] * bytes_v;
  } else {
    params.key.group = problem.head_size;
    params.value.group = problem.head_size_v;
  }
  params.slot_mapping = args.slot_mapping.ptr<const std::uint8_t>();
  params.slot_mapping_stride =
      args.slot_mapping.strides[0] * static_cast<std::int64_t>(dtype_bytes(args.slot_mapping.dtype));
  params.slots_are_int64 = args.slot_mapping.dtype == DType::kInt64;
  params.num_tokens = problem.num_tokens;
  params.error_counter = args.error_counter.ptr<unsigned long long>();
  params.num_heads = Divider::by(static_cast<std::uint32_t>(problem.num_kv_heads));
  params.block_size = problem.block_size;
  params.num_slots = problem.num_blocks * problem.block_size;
  params.slots_fit_31_bits = params.num_slots <= kMost && params.block_size <= kMost;
  if (params.slots_fit_31_bits) params.block = Divider::by(static_cast<std::uint32_t>(params.block_size));
  return params;
}

}  // namespace quire::cuda
