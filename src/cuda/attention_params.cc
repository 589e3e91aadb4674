#include "cuda/attention_params.h"

#include <bit>
#include <cstdint>

#include "cuda/launch.h"
#include "format/formats.h"

namespace quire::cuda {
namespace {

void set_cache_side(CacheSide& side, const ConstTensor& cache, const attention::SideTensors<const void>& tensors,
                    format::FormatId id, int head_size) {
  const format::FormatInfo& info = format::format_info(id);
  attention::set_paged_rows(side, cache, tensors);
  side.format = id;
  side.access = access_bytes(cache.data, {side.block_stride, side.slot_stride, side.head_stride,
                                          info.code_bytes(head_size), info.code_bytes(kChunk)});
  side.row_access = access_bytes(cache.data, {side.block_stride, side.slot_stride, side.head_stride});
}

// Rows [num_tokens, num_heads, head_size] of 16-bit elements that are whole 16-byte vectors.
bool whole_vectors(const ConstTensor& rows) {
  return dtype_bytes(rows.dtype) == 2 &&
         access_bytes(rows.data, {rows.strides[0] * 2, rows.strides[1] * 2, rows.shape[2] * 2}) >= 16;
}

}  // namespace

AttentionParams make_attention_params(const PlanData& plan, const UnifiedAttentionArgs& args,
                                      const AttentionShape& shape) {
  AttentionParams p;
  p.query = args.query.ptr<const std::uint8_t>();
  p.query_dtype = args.query.dtype;
  p.query_element_bytes = static_cast<int>(dtype_bytes(args.query.dtype));
  p.query_token_stride = args.query.strides[0] * p.query_element_bytes;
  p.query_head_stride = args.query.strides[1] * p.query_element_bytes;
  p.query_vectors = whole_vectors(args.query);
  const ConstKVCacheViews& cache = args.cache;
  set_cache_side(p.key, cache.key_cache, {cache.k_scale_cache, cache.k_page_meta, cache.k_head_vector},
                 shape.key_format, shape.head_size);
  set_cache_side(p.value, cache.value_cache, {cache.v_scale_cache, cache.v_page_meta, cache.v_head_vector},
                 shape.value_format, shape.head_size_v);

  p.cu_seqlens_q = args.cu_seqlens_q.ptr<const std::int32_t>();
  p.cu_stride = args.cu_seqlens_q.strides[0];
  p.seq_lens = args.seq_lens.ptr<const std::int32_t>();
  p.seq_stride = args.seq_lens.strides[0];
  p.block_table = args.block_table.ptr<const std::int32_t>();
  p.table_batch_stride = args.block_table.strides[0];
  p.table_block_stride = args.block_table.strides[1];

  p.mask = attention::make_mask_rule(args.mask.sliding_window, args.mask.chunk_lookback, args.mask.rswa_window,
                                     args.mask.mm_prefix_clamp_window);
  p.plain_mask =
      p.mask.window < 0 && p.mask.chunk == 0 && p.mask.rswa_window < 0 && !args.mask.mm_prefix_range.defined();
  p.causal = args.mask.causal;
  if (args.mask.causal_per_seq.defined()) {
    p.causal_per_seq = args.mask.causal_per_seq.ptr<const std::uint8_t>();
    p.causal_stride = args.mask.causal_per_seq.strides[0];
  }
  if (args.mask.mm_prefix_range.defined()) {
    p.ranges = args.mask.mm_prefix_range.ptr<const std::int32_t>();
    p.ranges_batch_stride = args.mask.mm_prefix_range.strides[0];
    p.range_stride = args.mask.mm_prefix_range.strides[1];
    p.bound_stride = args.mask.mm_prefix_range.strides[2];
    p.num_ranges = shape.num_mm_ranges;
  }
  if (args.mask.rswa_prefix_lens.defined()) {
    p.prefix_lens = args.mask.rswa_prefix_lens.ptr<const std::int32_t>();
    p.prefix_stride = args.mask.rswa_prefix_lens.strides[0];
  }

  p.softcap = args.softcap;
  if (args.alibi_slopes.defined()) {
    p.alibi_slopes = args.alibi_slopes.ptr<const float>();
    p.alibi_stride = args.alibi_slopes.strides[0];
  }
  p.alibi_sqrt = args.use_alibi_sqrt;
  if (args.qq_bias.defined()) {
    p.qq_bias = args.qq_bias.ptr<const float>();
    p.qq_row_stride = args.qq_bias.strides[0];
    p.qq_column_stride = args.qq_bias.strides[1];
    p.qq_size = shape.qq_bias_size;
  }
  p.softmax_scale = args.softmax_scale;
  const format::FormatInfo& key = format::format_info(shape.key_format);
  const format::FormatInfo& value = format::format_info(shape.value_format);
  p.key_rotation = key.rotation;
  p.key_unrotate = key.unrotate(format::row_shape(shape.head_size));
  // attend_any turns rows that have a centre into values, norm and all.
  const auto divides_later = [](const format::FormatInfo& info, const CacheSide& side) {
    return info.level_norm && side.pages == nullptr && side.head_vectors == nullptr;
  };
  p.key_level_norm = divides_later(key, p.key);
  p.value_level_norm = divides_later(value, p.value);
  p.q_scale = make_scale_view(args.q_descale);
  p.k_scale = make_scale_view(args.k_descale);
  p.v_scale = make_scale_view(args.v_descale);

  p.num_tokens = shape.num_tokens;
  p.batch = shape.batch;
  p.num_q_heads = shape.num_q_heads;
  p.group_size = shape.group_size();
  p.head_size = shape.head_size;
  p.head_size_v = shape.head_size_v;
  p.num_blocks = shape.num_blocks;
  p.max_blocks = shape.max_blocks;
  p.block_size = shape.block_size;
  p.block_shift = std::has_single_bit(static_cast<unsigned>(shape.block_size))
                      ? std::countr_zero(static_cast<unsigned>(shape.block_size))
                      : -1;
  p.split_size = plan.split_size;
  p.max_splits = static_cast<int>(plan.max_splits);

  const auto out_bytes = static_cast<std::int64_t>(dtype_bytes(args.out.dtype));
  p.output.out = args.out.ptr<std::uint8_t>();
  p.output.dtype = args.out.dtype;
  p.output.vectors = whole_vectors(args.out);
  p.output.token_stride = args.out.strides[0] * out_bytes;
  p.output.head_stride = args.out.strides[1] * out_bytes;
  p.output.output_scale = args.output_scale.ptr<const float>();
  if (args.lse.defined()) {
    p.output.lse = args.lse.ptr<float>();
    p.output.lse_token_stride = args.lse.strides[0];
    p.output.lse_head_stride = args.lse.strides[1];
  }
  if (args.sinks.defined()) {
    p.output.sinks = args.sinks.ptr<const float>();
    p.output.sink_stride = args.sinks.strides[0];
  }
  p.output.shape = format::row_shape(shape.head_size_v);
  p.output.rotation = value.rotation;
  p.output.unrotate = value.unrotate(p.output.shape);
  p.page_slice = shape.page_slice;
  p.error_counter = args.error_counter.ptr<unsigned long long>();
  return p;
}

}  // namespace quire::cuda
