/* quire for C, and for every language that calls C: the ops, layouts and plans of the C++ headers over a stable ABI.
 * What the arguments mean is said there (ops.h, layout.h, plan.h); here are their forms.
 *
 *   - A struct that is passed by pointer begins with its own size, so that it can grow: fill it with its _default()
 *     function, or set struct_size to sizeof of the struct and the rest to what you mean. A library newer than its
 *     caller sees the smaller size and takes defaults for what is missing; one that is older refuses what it does not
 *     know.
 *   - A tensor of zeros, quire_no_tensor(), is one that is not given.
 *   - A function that can fail returns a code, QUIRE_OK or not; quire_last_error() has the sentence. It writes nothing
 *     where it fails.
 *   - `stream` is a cudaStream_t of the tensors' device, ignored on the CPU.
 */
#ifndef QUIRE_QUIRE_C_H_
#define QUIRE_QUIRE_C_H_

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "quire/export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- versions, errors, devices ----------------------------------------------------------------------------------- */

typedef enum quire_code { /* StatusCode of status.h */
                          QUIRE_OK = 0,
                          QUIRE_INVALID_ARGUMENT,
                          QUIRE_OUT_OF_RANGE,
                          QUIRE_NOT_FOUND,
                          QUIRE_UNSUPPORTED,
                          QUIRE_ALREADY_EXISTS,
                          QUIRE_INTERNAL
} quire_code;

/* The sentence of this thread's last call that failed; it stays until the thread's next one. Never null. */
QUIRE_API const char* quire_last_error(void);

QUIRE_API const char* quire_version(void); /* "0.1.0" */
QUIRE_API int quire_version_number(void);  /* 100 for 0.1.0 */

typedef enum quire_device_type { QUIRE_CPU = 0, QUIRE_CUDA = 1 } quire_device_type;

typedef struct quire_device {
  int32_t type;  /* quire_device_type */
  int32_t index; /* 0 on the CPU */
} quire_device;

QUIRE_API quire_code quire_device_count(int32_t type, int32_t* count);

/* quire's own threads for the ops of the CPU; 0 takes as many as OpenMP would (executor.h). */
QUIRE_API quire_code quire_set_num_threads(int32_t num_threads);
/* A thread pool of the caller instead; run_parts null: quire's own threads again. */
QUIRE_API quire_code quire_set_executor(int32_t num_threads,
                                        void (*run_parts)(void* pool, int num_parts,
                                                          void (*part)(void* context, int index), void* context),
                                        void* pool);

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

typedef enum quire_dtype {
  QUIRE_FLOAT32 = 0,
  QUIRE_FLOAT16,
  QUIRE_BFLOAT16,
  QUIRE_FLOAT8_E4M3FN,
  QUIRE_FLOAT8_E5M2,
  QUIRE_INT8,
  QUIRE_UINT8,
  QUIRE_INT32,
  QUIRE_INT64
} quire_dtype;

#define QUIRE_MAX_DIMS 6

/* A view: it owns nothing. It has no size of its own, since args hold it by value, and will not change. */
typedef struct quire_tensor {
  void* data; /* of an input: only read */
  int32_t dtype;
  int32_t ndim;
  quire_device device;
  int64_t shape[QUIRE_MAX_DIMS];
  int64_t strides[QUIRE_MAX_DIMS]; /* in elements */
} quire_tensor;

static inline quire_tensor quire_no_tensor(void) {
  quire_tensor tensor;
  memset(&tensor, 0, sizeof tensor);
  return tensor;
}

/* A dense row-major view. More than QUIRE_MAX_DIMS extents give a tensor that every op refuses. */
static inline quire_tensor quire_dense_tensor(void* data, int32_t dtype, quire_device device, int32_t ndim,
                                              const int64_t* shape) {
  quire_tensor tensor = quire_no_tensor();
  int64_t stride = 1;
  tensor.data = data;
  tensor.dtype = dtype;
  tensor.device = device;
  tensor.ndim = ndim;
  for (int32_t i = ndim < QUIRE_MAX_DIMS ? ndim - 1 : QUIRE_MAX_DIMS - 1; i >= 0; --i) {
    tensor.shape[i] = shape[i];
    tensor.strides[i] = stride;
    stride *= shape[i];
  }
  return tensor;
}

/* ---- modes and backends ------------------------------------------------------------------------------------------ */

typedef int32_t quire_mode; /* ModeId */

/* "int4_per_token_head", or "k=<format>,v=<format>". */
QUIRE_API quire_code quire_parse_kv_cache_dtype(const char* name, quire_mode* mode);
/* The name of a mode, for the life of the process; null for what is no mode. */
QUIRE_API const char* quire_mode_name(quire_mode mode);

/* The object that serves a quantizing mode; it lives as long as the process. */
typedef struct quire_backend quire_backend;
QUIRE_API quire_code quire_get_backend(quire_mode mode, const quire_backend** backend);
QUIRE_API quire_code quire_backend_row_bytes(const quire_backend* backend, int32_t head_size, int32_t is_value,
                                             int64_t* row_bytes);
QUIRE_API quire_code quire_backend_packed_head_size(const quire_backend* backend, int32_t head_size,
                                                    int32_t* packed_head_size);
QUIRE_API int32_t quire_backend_needs_scale_caches(const quire_backend* backend);

/* ---- layouts ----------------------------------------------------------------------------------------------------- */

typedef enum quire_cache_order { QUIRE_NHD = 0, QUIRE_HND } quire_cache_order;
typedef enum quire_kv_packing { QUIRE_SEPARATE = 0, QUIRE_KV_IN_BLOCK, QUIRE_KV_IN_ROW } quire_kv_packing;
typedef enum quire_scale_placement { QUIRE_SCALES_SEPARATE = 0, QUIRE_SCALES_INLINE } quire_scale_placement;

typedef struct quire_kv_cache_spec { /* KVCacheSpec of layout.h */
  size_t struct_size;
  quire_mode mode;
  int32_t head_size;
  int32_t head_size_v; /* 0: head_size */
  int32_t num_kv_heads;
  int32_t num_layers;
  int32_t block_size;
  int32_t model_dtype;
  int32_t order;
  int32_t packing;
  int32_t scales;
  int64_t page_alignment;
} quire_kv_cache_spec;

static inline quire_kv_cache_spec quire_kv_cache_spec_default(void) {
  quire_kv_cache_spec spec;
  memset(&spec, 0, sizeof spec);
  spec.struct_size = sizeof spec;
  spec.head_size = 128;
  spec.num_kv_heads = 8;
  spec.num_layers = 1;
  spec.block_size = 16;
  spec.model_dtype = QUIRE_BFLOAT16;
  spec.page_alignment = 1;
  return spec;
}

/* What make_layout answers and an allocator needs. Strides and offsets, in bytes, are those of the views. */
typedef struct quire_kv_cache_layout {
  size_t struct_size;
  int64_t bytes_per_token;
  int64_t bytes_per_block;
  int64_t tokens_per_gib;
  int64_t k_block_stride, k_slot_stride, k_head_stride;
  int64_t v_block_stride, v_slot_stride, v_head_stride;
  int64_t v_offset;
  int64_t k_scale_offset, v_scale_offset; /* -1: not inline */
  int32_t key_cache_dtype, value_cache_dtype;
} quire_kv_cache_layout;

static inline quire_kv_cache_layout quire_kv_cache_layout_default(void) {
  quire_kv_cache_layout layout;
  memset(&layout, 0, sizeof layout);
  layout.struct_size = sizeof layout;
  return layout;
}

QUIRE_API quire_code quire_make_layout(const quire_kv_cache_spec* spec, quire_kv_cache_layout* layout);

/* The memory of a cache of num_blocks pages: how many bytes each part needs (quire_cache_bytes fills in the bytes), and
 * where it is (the caller fills in the pointers). A part of 0 bytes needs no pointer. */
typedef struct quire_kv_cache_memory {
  size_t struct_size;
  int64_t num_blocks;
  int64_t base_bytes, v_base_bytes, k_scale_bytes, v_scale_bytes;
  void* base;
  void* v_base;
  void* k_scale_base;
  void* v_scale_base;
  quire_device device;
} quire_kv_cache_memory;

static inline quire_kv_cache_memory quire_kv_cache_memory_default(void) {
  quire_kv_cache_memory memory;
  memset(&memory, 0, sizeof memory);
  memory.struct_size = sizeof memory;
  return memory;
}

QUIRE_API quire_code quire_cache_bytes(const quire_kv_cache_spec* spec, int64_t num_blocks,
                                       quire_kv_cache_memory* memory);

/* KVCacheViews of layout.h. The channel scales are for formats to come: none of this version has any. */
typedef struct quire_kv_cache_views {
  size_t struct_size;
  quire_tensor key_cache, value_cache;
  quire_tensor k_scale_cache, v_scale_cache;
  quire_tensor k_page_meta, v_page_meta;
  quire_tensor k_head_vector, v_head_vector;
  quire_tensor k_channel_scales, v_channel_scales;
} quire_kv_cache_views;

static inline quire_kv_cache_views quire_kv_cache_views_default(void) {
  quire_kv_cache_views views;
  memset(&views, 0, sizeof views);
  views.struct_size = sizeof views;
  return views;
}

QUIRE_API quire_code quire_make_views(const quire_kv_cache_spec* spec, const quire_kv_cache_memory* memory,
                                      quire_kv_cache_views* views);

/* ---- ops --------------------------------------------------------------------------------------------------------- */

typedef struct quire_reshape_and_cache_args { /* ReshapeAndCacheArgs of ops.h */
  size_t struct_size;
  quire_mode mode;
  const quire_kv_cache_views* cache; /* required */
  quire_tensor key, value;
  quire_tensor slot_mapping;
  quire_tensor k_scale, v_scale;
  quire_tensor error_counter;
} quire_reshape_and_cache_args;

static inline quire_reshape_and_cache_args quire_reshape_and_cache_args_default(void) {
  quire_reshape_and_cache_args args;
  memset(&args, 0, sizeof args);
  args.struct_size = sizeof args;
  return args;
}

QUIRE_API quire_code quire_reshape_and_cache(const quire_reshape_and_cache_args* args, void* stream);

typedef struct quire_attention_mask { /* AttentionMask of ops.h */
  size_t struct_size;
  int32_t causal;
  int32_t sliding_window; /* W keys with the query's own, -1: off; window_size (W - 1, 0) of the kernels of vLLM */
  int32_t chunk_lookback; /* -1: off */
  int32_t rswa_window;    /* -1: off */
  int32_t mm_prefix_clamp_window;
  quire_tensor causal_per_seq;
  quire_tensor mm_prefix_range;
  quire_tensor rswa_prefix_lens;
} quire_attention_mask;

static inline quire_attention_mask quire_attention_mask_default(void) {
  quire_attention_mask mask;
  memset(&mask, 0, sizeof mask);
  mask.struct_size = sizeof mask;
  mask.causal = 1;
  mask.sliding_window = mask.chunk_lookback = mask.rswa_window = -1;
  return mask;
}

typedef struct quire_attention_args { /* UnifiedAttentionArgs of ops.h */
  size_t struct_size;
  quire_mode mode;
  float softmax_scale; /* required */
  float softcap;
  int32_t use_alibi_sqrt;
  const quire_kv_cache_views* cache;  /* required; only read */
  const quire_attention_mask* mask;   /* null: causal, over all keys */
  int64_t max_query_len, max_seq_len; /* required on CUDA, without a plan */
  quire_tensor query, out;
  quire_tensor cu_seqlens_q, seq_lens, block_table;
  quire_tensor sinks, alibi_slopes, qq_bias;
  quire_tensor q_descale, k_descale, v_descale, output_scale;
  quire_tensor lse;
  quire_tensor error_counter;
} quire_attention_args;

static inline quire_attention_args quire_attention_args_default(void) {
  quire_attention_args args;
  memset(&args, 0, sizeof args);
  args.struct_size = sizeof args;
  return args;
}

/* Plans, finds a workspace, and runs. */
/* Plans in each call, and allocates a workspace where the plan has one; see unified_attention in ops.h.
   quire_run_unified_attention does neither. */
QUIRE_API quire_code quire_unified_attention(const quire_attention_args* args, void* stream);

typedef struct quire_merge_args { /* MergeAttnStatesArgs of ops.h */
  size_t struct_size;
  quire_tensor out, lse;
  quire_tensor prefix_out, prefix_lse;
  quire_tensor suffix_out, suffix_lse;
} quire_merge_args;

static inline quire_merge_args quire_merge_args_default(void) {
  quire_merge_args args;
  memset(&args, 0, sizeof args);
  args.struct_size = sizeof args;
  return args;
}

QUIRE_API quire_code quire_merge_attn_states(const quire_merge_args* args, void* stream);

/* HadamardArgs of ops.h. */
QUIRE_API quire_code quire_hadamard(const quire_tensor* x, const quire_tensor* out, int32_t inverse, int32_t signs,
                                    void* stream);

/* ---- plans ------------------------------------------------------------------------------------------------------- */

typedef struct quire_attention_problem { /* AttentionProblem of plan.h */
  size_t struct_size;
  quire_device device;
  int32_t arch_major, arch_minor, num_multiprocessors, shared_bytes;
  quire_mode mode;
  int32_t num_q_heads, num_kv_heads, head_size, head_size_v, block_size;
  int32_t query_dtype, key_cache_dtype, value_cache_dtype;
  int32_t row_alignment, whole_pages, has_centre, num_splits, batch_invariant;
  int64_t max_num_tokens, max_batch, max_query_len, max_seq_len;
} quire_attention_problem;

static inline quire_attention_problem quire_attention_problem_default(void) {
  quire_attention_problem problem;
  memset(&problem, 0, sizeof problem);
  problem.struct_size = sizeof problem;
  problem.query_dtype = problem.key_cache_dtype = problem.value_cache_dtype = QUIRE_BFLOAT16;
  problem.row_alignment = 16;
  problem.whole_pages = 1;
  return problem;
}

QUIRE_API quire_code quire_problem_of(const quire_attention_args* args, quire_attention_problem* problem);

/* Whether a problem could be planned, without a plan: tensor_cores and workspace_bytes may be null. */
QUIRE_API quire_code quire_supports(const quire_attention_problem* problem, int32_t* tensor_cores,
                                    size_t* workspace_bytes);

typedef struct quire_plan quire_plan;
/* The caller destroys what it has created; null is destroyed by doing nothing. */
QUIRE_API quire_code quire_plan_create(const quire_attention_problem* problem, quire_plan** plan);
QUIRE_API void quire_plan_destroy(quire_plan* plan);
QUIRE_API size_t quire_plan_workspace_bytes(const quire_plan* plan);
/* The kernels in words; the text lives as long as the plan. */
QUIRE_API const char* quire_plan_describe(const quire_plan* plan);
QUIRE_API quire_code quire_run_unified_attention(const quire_plan* plan, const quire_attention_args* args,
                                                 void* workspace, size_t workspace_bytes, void* stream);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* QUIRE_QUIRE_C_H_ */
