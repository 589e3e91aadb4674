// Every tensor of an op's arguments, by name: what holds for all of them (checks, idle strides, copies to a device) is
// written over this list. visit(name, tensor) gets a Tensor where the op writes and a ConstTensor where it only reads.
// The first one given says where the call runs.
#pragma once

#include <type_traits>

#include "quire/ops.h"

namespace quire::call {

template <class Args, class Wanted>
concept ArgsOf = std::is_same_v<std::remove_const_t<Args>, Wanted>;

template <class Views, class Visit>
void for_each_cache_tensor(Views& cache, const Visit& visit) {
  visit("key_cache", cache.key_cache);
  visit("value_cache", cache.value_cache);
  visit("k_scale_cache", cache.k_scale_cache);
  visit("v_scale_cache", cache.v_scale_cache);
  visit("k_page_meta", cache.k_page_meta);
  visit("v_page_meta", cache.v_page_meta);
  visit("k_head_vector", cache.k_head_vector);
  visit("v_head_vector", cache.v_head_vector);
}

template <ArgsOf<ReshapeAndCacheArgs> Args, class Visit>
void for_each_tensor(Args& args, const Visit& visit) {
  visit("key", args.key);
  visit("value", args.value);
  for_each_cache_tensor(args.cache, visit);
  visit("slot_mapping", args.slot_mapping);
  visit("k_scale", args.k_scale);
  visit("v_scale", args.v_scale);
  visit("error_counter", args.error_counter);
}

template <ArgsOf<UnifiedAttentionArgs> Args, class Visit>
void for_each_tensor(Args& args, const Visit& visit) {
  visit("query", args.query);
  visit("out", args.out);
  for_each_cache_tensor(args.cache, visit);
  visit("cu_seqlens_q", args.cu_seqlens_q);
  visit("seq_lens", args.seq_lens);
  visit("block_table", args.block_table);
  visit("causal_per_seq", args.mask.causal_per_seq);
  visit("mm_prefix_range", args.mask.mm_prefix_range);
  visit("rswa_prefix_lens", args.mask.rswa_prefix_lens);
  visit("sinks", args.sinks);
  visit("alibi_slopes", args.alibi_slopes);
  visit("qq_bias", args.qq_bias);
  visit("q_descale", args.q_descale);
  visit("k_descale", args.k_descale);
  visit("v_descale", args.v_descale);
  visit("output_scale", args.output_scale);
  visit("lse", args.lse);
  visit("error_counter", args.error_counter);
}

template <ArgsOf<MergeAttnStatesArgs> Args, class Visit>
void for_each_tensor(Args& args, const Visit& visit) {
  visit("prefix_out", args.prefix_out);
  visit("prefix_lse", args.prefix_lse);
  visit("suffix_out", args.suffix_out);
  visit("suffix_lse", args.suffix_lse);
  visit("out", args.out);
  visit("lse", args.lse);
}

template <ArgsOf<HadamardArgs> Args, class Visit>
void for_each_tensor(Args& args, const Visit& visit) {
  visit("x", args.x);
  visit("out", args.out);
}

}  // namespace quire::call
