// The operations: reshape_and_cache (quantize rows and scatter them into pages), unified_attention (read them),
// merge_attn_states and hadamard. Argument names, shapes and meanings are vLLM's; docs/semantics.md states the exact
// arithmetic, docs/api.md shows the life of a cache. All tensors of a call are on one device, by type and index. A
// refused call has written nothing.
//
// `stream` is a cudaStream_t of the tensors' device, null for its default stream; the CPU ignores it. It has no
// default: a forgotten stream would order the call behind nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quire/export.h"
#include "quire/layout.h"
#include "quire/mode.h"
#include "quire/plan.h"
#include "quire/status.h"
#include "quire/tensor.h"

namespace quire {

// T tokens, Hk KV heads, d = head_size of K, dv = head_size of V. Float means float32, float16 or bfloat16.
struct ReshapeAndCacheArgs {
  ModeId mode{};
  ConstTensor key;     // [T, Hk, d]  Float (also float8 where the cache is the same float8: copied)
  ConstTensor value;   // [T, Hk, dv]
  KVCacheViews cache;  // shapes in layout.h
  // [<= T] int64 or int32; block * block_size + offset, negative: skip that token. The slots of a call must be unique:
  // of two tokens for one slot the CPU keeps the last, on CUDA the row may mix them (docs/semantics.md has the reason).
  ConstTensor slot_mapping;
  // float32, one element or [Hk]: fp8 per tensor only, which stores x / k_scale; not given means 1. A read multiplies
  // by k_descale and v_descale, so the same tensors go there.
  ConstTensor k_scale, v_scale;
  // Optional, CUDA: int64[1] device counter, incremented for each slot outside the cache (the token is skipped).
  Tensor error_counter;
};

QUIRE_API Status reshape_and_cache(const ReshapeAndCacheArgs& args, void* stream);

// Which keys a query sees. Query row i of a sequence sits at absolute position p = seq_len - query_len + i, key j at
// position j. The default is causal attention over all keys.
struct AttentionMask {
  bool causal = true;
  ConstTensor causal_per_seq;  // [B] uint8, optional: overrides `causal` for each sequence
  // W >= 1: keys with p - j < W (non-causal: also j - p < W), so W keys with the query's own; -1: off. A model's
  // config.json and vLLM's layers have the same W; the kernels of vLLM and FlashAttention count neighbours instead and
  // take it as window_size (W - 1, 0), non-causal as (W - 1, W - 1).
  int sliding_window = -1;
  int chunk_lookback = -1;              // >= 0: chunked local attention, replaces the window test; -1: off
  ConstTensor mm_prefix_range;          // [B, R, 2] int32, optional: inclusive spans that see themselves both ways
  bool mm_prefix_clamp_window = false;  // the window also limits those spans, to keys with p - j < W
  ConstTensor rswa_prefix_lens;         // [B] int32, optional, with rswa_window: R-SWA, keys below it stay visible
  int rswa_window = -1;                 // >= 1: and keys with p - j < rswa_window, instead of sliding_window; -1: off
};

// B sequences, N query tokens in all, Hq query heads; Hq % Hk == 0; KV head of query head h is h / (Hq / Hk).
struct UnifiedAttentionArgs {
  ModeId mode{};
  ConstTensor query;           // [N, Hq, d] Float or float8 (then real = code * q_descale); last stride 1
  Tensor out;                  // [N, Hq, dv] Float, or float8_e4m3fn with output_scale; last stride 1
  ConstKVCacheViews cache;     // shapes in layout.h; not head-major
  ConstTensor cu_seqlens_q;    // [B+1] int32, ascending from 0; rows past the last entry are not touched
  ConstTensor seq_lens;        // [B] int32, keys of each sequence, the new tokens included
  ConstTensor block_table;     // [B, max_blocks] int32; entries past a sequence, or out of its window, are not read
  float softmax_scale = 0.0F;  // required, finite and not 0; usually 1 / sqrt(d)

  AttentionMask mask;
  float softcap = 0.0F;      // > 0, finite: s = softcap * tanh(s / softcap)
  ConstTensor sinks;         // [Hq] float32, optional: one extra logit per head, finite or -inf (none)
  ConstTensor alibi_slopes;  // [Hq] float32, optional
  bool use_alibi_sqrt = false;
  ConstTensor qq_bias;  // [Lq, Lq] float32, optional; every query_len <= Lq

  ConstTensor q_descale;  // float32, one element or [B, Hk]; float8 queries
  // float32, one element, [Hk] or [B, Hk]: multiplies what is read, in every mode. Not given means 1.
  ConstTensor k_descale, v_descale;
  ConstTensor output_scale;  // float32, one element, required for a float8_e4m3fn out

  Tensor lse;  // [N, Hq] float32, any strides, optional: natural log of the softmax denominator; -inf for an empty row

  // Upper bounds on the lengths, which live on the device. CUDA: required (the longest query_len and seq_len of the
  // batch, or more) unless the call brings a plan, whose bounds they are then; they choose the kernels. The CPU reads
  // the lengths.
  std::int64_t max_query_len = 0;
  std::int64_t max_seq_len = 0;
  Tensor error_counter;  // CUDA, optional: int64[1], counts block ids outside the cache (their keys are skipped)
};

// Finds the problem of one call: its bounds come from the arguments or, on the CPU, from the lengths themselves.
QUIRE_API Result<AttentionProblem> problem_of(const UnifiedAttentionArgs& args);

// Runs a plan. Allocates nothing and reads nothing back. `workspace` holds plan.workspace_bytes(), 16-byte aligned, on
// the plan's device; it needs no initialisation. The call must lie inside the bounds of the plan, on its device and in
// its dtypes.
QUIRE_API Status run_unified_attention(const AttentionPlan& plan, const UnifiedAttentionArgs& args, void* workspace,
                                       std::size_t workspace_bytes, void* stream);

// Does it all in one call: it finds the problem, makes a plan, runs it, and drops the plan. Where the plan has a
// workspace (where keys are split, or a kernel keeps partial results), the call allocates one: on the CPU from operator
// new until it returns, on CUDA by cudaMallocAsync and cudaFreeAsync in `stream`, so a captured call becomes memory
// nodes of the graph. A caller that must not allocate plans once and calls run_unified_attention with a workspace of
// its own.
QUIRE_API Status unified_attention(const UnifiedAttentionArgs& args, void* stream);

// Combines two partial results over disjoint key sets exactly: out = sum_i exp(lse_i - lse) out_i, lse = log sum exp
// lse_i. Outputs [N, Hq, dv] Float, LSE [N, Hq] float32, any strides; an empty part (LSE -inf) is neutral. If sinks are
// used, exactly one of the parts was computed with them. out may alias a part.
struct MergeAttnStatesArgs {
  Tensor out, lse;  // lse optional
  ConstTensor prefix_out, prefix_lse;
  ConstTensor suffix_out, suffix_lse;
};
QUIRE_API Status merge_attn_states(const MergeAttnStatesArgs& args, void* stream);

// The rotations that int4, int2 and TurboQuant rows are stored in, row by row along the last dimension, in fp32:
//
//   out = H x            signs = false: H is its own inverse up to b, so `inverse` changes nothing
//   out = H (s .* x)     signs = true: the randomized Hadamard transform (RHT), vLLM's single_rht(x)
//   out = s .* (H x)     signs = true, inverse = true: b times the inverse of the RHT, vLLM's single_rht(x, True)
//
// H is the unnormalized Walsh-Hadamard matrix in Sylvester order (H H = b I), in blocks of b, the largest power of two
// that divides the row's size d; vLLM's fast_hadamard_transform is the case b = d. s are the signs of
// src/format/rotation.h: the first b outputs of MT19937 seeded with 0x9E3779B9, again in every block. The bits are the
// same on every device.
struct HadamardArgs {
  ConstTensor x;  // [any, d] Float, 1 to 6 dimensions, d from 1 to 512, any strides
  Tensor out;     // the shape of x, Float, any strides without overlap; it may be x itself, element for element
  bool inverse = false;
  bool signs = false;
};
QUIRE_API Status hadamard(const HadamardArgs& args, void* stream);

// The entry point from before modes were explicit: takes the mode from the cache's dtype (float8_e4m3fn:
// fp8_per_token_head, int8: int8_per_token_head) and refuses any other, since uint8 cannot tell int4 from int2.
[[deprecated("name the mode: set args.mode and call reshape_and_cache")]] QUIRE_API Status
reshape_and_cache_infer_mode(ReshapeAndCacheArgs args, void* stream);

// Says where the library's rare remarks go (deprecated entry points, slower paths). Null, the default, drops them.
using LogHook = void (*)(const char* message);
QUIRE_API void set_log_hook(LogHook hook);

}  // namespace quire
