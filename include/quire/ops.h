// The two operations: reshape_and_cache (quantize rows and scatter them into pages) and unified_attention (read them).
// Argument names, shapes and meanings are vLLM's; docs/semantics.md states the exact arithmetic. All tensors of a call
// are on one device. A refused call has written nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "quire/export.h"
#include "quire/mode.h"
#include "quire/status.h"
#include "quire/tensor.h"

namespace quire {

// T tokens, Hk KV heads, d = head_size of K, dv = head_size of V. Float means float32, float16 or bfloat16.
struct ReshapeAndCacheArgs {
  ModeId mode{};
  Tensor key;    // [T, Hk, d]  Float (also float8 where the cache is the same float8: copied)
  Tensor value;  // [T, Hk, dv]
  // [num_blocks, block_size, Hk, row] with row = the format's row in elements of the cache dtype; last stride 1.
  // Float modes and fp8 per tensor also take the head-major layout: key_cache [num_blocks, Hk, d/x, block_size, x] and
  // value_cache [num_blocks, Hk, dv, block_size].
  Tensor key_cache, value_cache;
  // [<= T] int64 or int32; block * block_size + offset, negative: skip that token. The slots of a call must be unique:
  // of two tokens for one slot the CPU keeps the last, on CUDA the row may mix them (docs/semantics.md has the reason).
  Tensor slot_mapping;
  Tensor k_scale_cache, v_scale_cache;  // [num_blocks, block_size, Hk] float32: *_per_token_head modes, else not given
  Tensor k_scale, v_scale;              // float32, one element or [Hk]: fp8 per tensor only; not given means 1
  // For formats whose rows are stored less a centre, optional, read: [num_blocks, Hk, page bytes] uint8 or, where the
  // centre is the same for all pages, [Hk, d] ([Hk, dv]) float32. No format of this version has one.
  Tensor k_page_meta, v_page_meta;
  Tensor k_head_vector, v_head_vector;
  // Optional, CUDA: int64[1] device counter, incremented for each slot outside the cache (the token is skipped).
  Tensor error_counter;
};

QUIRE_API Status reshape_and_cache(const ReshapeAndCacheArgs& args, void* stream = nullptr);

// B sequences, N query tokens in all, Hq query heads; Hq % Hk == 0; KV head of query head h is h / (Hq / Hk).
// Query row i of a sequence sits at absolute position p = seq_len - query_len + i.
struct UnifiedAttentionArgs {
  ModeId mode{};
  Tensor query;                         // [N, Hq, d] Float or float8 (then real = code * q_scale); last stride 1
  Tensor out;                           // [N, Hq, dv] Float, or float8_e4m3fn with output_scale; last stride 1
  Tensor key_cache, value_cache;        // as in ReshapeAndCacheArgs (not head-major)
  Tensor k_scale_cache, v_scale_cache;  // as in ReshapeAndCacheArgs
  Tensor k_page_meta, v_page_meta;      // as in ReshapeAndCacheArgs
  Tensor k_head_vector, v_head_vector;  // as in ReshapeAndCacheArgs
  Tensor cu_seqlens_q;                  // [B+1] int32, ascending from 0; rows past the last entry are not touched
  Tensor seq_lens;                      // [B] int32, keys of each sequence, the new tokens included
  Tensor block_table;  // [B, max_blocks] int32; entries past a sequence, or out of its window, are not read
  float softmax_scale = 1.0F;

  bool causal = true;
  Tensor causal_per_seq;                // [B] uint8, optional: overrides `causal` for each sequence
  int sliding_window = -1;              // >= 1: keys with p - j < window (non-causal: also j - p < window); -1: off
  int chunk_lookback = -1;              // >= 0: chunked local attention, replaces the window test; -1: off
  Tensor mm_prefix_range;               // [B, R, 2] int32, optional: inclusive spans that see themselves both ways
  bool mm_prefix_clamp_window = false;  // the window also limits those spans
  Tensor rswa_prefix_lens;              // [B] int32, optional, with rswa_window: R-SWA, keys below it stay visible
  int rswa_window = -1;                 // >= 1: and keys with p - j < rswa_window, instead of sliding_window; -1: off
  float softcap = 0.0F;                 // > 0, finite: s = softcap * tanh(s / softcap)
  Tensor sinks;                         // [Hq] float32, optional: one extra logit per head, finite or -inf (none)
  Tensor alibi_slopes;                  // [Hq] float32, optional
  bool use_alibi_sqrt = false;
  Tensor qq_bias;  // [Lq, Lq] float32, optional; every query_len <= Lq

  Tensor q_scale;           // float32, one element or [B, Hk]; float8 queries
  Tensor k_scale, v_scale;  // float32, one element, [Hk] or [B, Hk]: multiplies what is read, in every mode
  Tensor output_scale;      // float32, one element, required for a float8_e4m3fn out

  Tensor lse;  // [N, Hq] float32, any strides, optional: natural log of the softmax denominator; -inf for an empty row

  // CUDA: upper bounds, since lengths live on the device. 0: N and max_blocks * block_size. The CPU reads the lengths.
  std::int64_t max_query_len = 0;
  std::int64_t max_seq_len = 0;
  Tensor error_counter;  // CUDA, optional: int64[1], counts block ids outside the cache (their keys are skipped)
};

// What a plan needs to know of a GPU. All 0 on the CPU.
struct Arch {
  int major = 0, minor = 0;  // compute capability
  int num_multiprocessors = 0;
  int shared_bytes = 0;  // of shared memory that a block can have
};

// The facts of a device: of the current one, on CUDA. kUnsupported in a build without CUDA.
QUIRE_API Result<Arch> device_arch(Device device);

// What a plan needs to know: bounds, not contents. Captured graphs replay with any lengths inside the bounds.
struct AttentionProblem {
  Device device = Device::kCpu;
  Arch arch;  // of the device that will run the plan; problem_of fills it in
  ModeId mode{};
  int num_q_heads = 0;
  int num_kv_heads = 0;
  int head_size = 0;
  int head_size_v = 0;
  int block_size = 0;
  std::int64_t max_num_tokens = 0;
  std::int64_t max_batch = 0;  // this and the lengths: at most 2^31 - 1
  std::int64_t max_query_len = 0;
  std::int64_t max_seq_len = 0;
  DType query_dtype = DType::kBFloat16;
  DType cache_dtype = DType::kBFloat16;  // what an "auto" cache holds
  int row_alignment = 16;  // the power of two, at most 16, that divides the address of every row of both caches
  // CUDA: 16 neighbouring slots of a page, with their heads and scales, lie in few runs of whole, aligned 16-byte vectors.
  bool whole_pages = true;
  bool has_centre = false;       // rows of a cache have a centre (UnifiedAttentionArgs::k_page_meta, k_head_vector, ..)
  int num_splits = 0;            // hint: how many ways to split the keys; 0: the plan chooses
  bool batch_invariant = false;  // fixed split size: a sequence's bits do not depend on the rest of the batch
};

struct AttentionPlan {
  AttentionProblem problem;
  std::string kernel;               // the kernel that will run, in words: for logs and benchmarks
  int kernel_ids[2] = {-1, -1};     // the device's numbers for it: for sequences of few and of many query rows
  bool tensor_cores = false;        // its products are of 16-bit numbers; otherwise of fp32
  int query_tile = 1;               // query tokens of one sequence handled together
  std::int64_t split_size = 0;      // keys of one split, a multiple of the key tile
  std::int64_t max_splits = 1;      // splits of the longest sequence within the bounds
  std::size_t workspace_bytes = 0;  // grows only with the bounds
};

// A pure function of the problem: it asks no device.
QUIRE_API Result<AttentionPlan> plan_unified_attention(const AttentionProblem& problem);

// Allocates nothing on the device and reads nothing back. `workspace` holds plan.workspace_bytes, 16-byte aligned, on
// the plan's device; it needs no initialisation. `stream` is a cudaStream_t, ignored on the CPU.
QUIRE_API Status run_unified_attention(const AttentionPlan& plan, const UnifiedAttentionArgs& args, void* workspace,
                                       std::size_t workspace_bytes, void* stream = nullptr);

// The problem of one call: bounds taken from the arguments (on the CPU, from the lengths themselves).
QUIRE_API Result<AttentionProblem> problem_of(const UnifiedAttentionArgs& args);

// problem_of, plan, workspace and run in one call.
QUIRE_API Status unified_attention(const UnifiedAttentionArgs& args, void* stream = nullptr);

// Combines two partial results over disjoint key sets exactly: out = sum_i exp(lse_i - lse) out_i, lse = log sum exp
// lse_i. Outputs [N, Hq, dv] Float, LSE [N, Hq] float32, any strides; an empty part (LSE -inf) is neutral. If sinks are
// used, exactly one of the parts was computed with them. out may alias a part.
struct MergeAttnStatesArgs {
  Tensor out, lse;  // lse optional
  Tensor prefix_out, prefix_lse;
  Tensor suffix_out, suffix_lse;
};
QUIRE_API Status merge_attn_states(const MergeAttnStatesArgs& args, void* stream = nullptr);

// The entry point from before modes were explicit: takes the mode from the cache's dtype (float8_e4m3fn:
// fp8_per_token_head, int8: int8_per_token_head) and refuses any other, since uint8 cannot tell int4 from int2.
[[deprecated("name the mode: set args.mode and call reshape_and_cache")]] QUIRE_API Status
reshape_and_cache_infer_mode(ReshapeAndCacheArgs args, void* stream = nullptr);

// Where the library's rare remarks go (deprecated entry points, slower paths). Null, the default, drops them.
using LogHook = void (*)(const char* message);
QUIRE_API void set_log_hook(LogHook hook);

}  // namespace quire
