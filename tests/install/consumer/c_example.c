/* What README's program does, in C, with a plan. tests/install/run compares what both print. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "quire/quire_c.h"

#define CHECK(call)                                \
  do {                                             \
    if ((call) != QUIRE_OK) {                      \
      fprintf(stderr, "%s\n", quire_last_error()); \
      return 1;                                    \
    }                                              \
  } while (0)

enum { TOKENS = 40, HEADS = 8, QUERY_HEADS = 32, HEAD_SIZE = 128, BLOCKS = 3 };

static float key[TOKENS * HEADS * HEAD_SIZE], value[TOKENS * HEADS * HEAD_SIZE];
static float query[QUERY_HEADS * HEAD_SIZE], out[QUERY_HEADS * HEAD_SIZE];
static int64_t slots[TOKENS];

int main(void) {
  const quire_device cpu = {QUIRE_CPU, 0};
  const int64_t key_shape[] = {TOKENS, HEADS, HEAD_SIZE}, query_shape[] = {1, QUERY_HEADS, HEAD_SIZE};
  const int64_t tokens = TOKENS, two = 2, one = 1, table_shape[] = {1, BLOCKS};
  int32_t cu_seqlens_q[] = {0, 1}, seq_lens[] = {TOKENS}, block_table[] = {0, 1, 2};

  quire_kv_cache_spec spec = quire_kv_cache_spec_default(); /* 8 KV heads of size 128, pages of 16 tokens */
  quire_kv_cache_layout layout = quire_kv_cache_layout_default();
  quire_kv_cache_memory memory = quire_kv_cache_memory_default();
  quire_kv_cache_views cache = quire_kv_cache_views_default();
  CHECK(quire_parse_kv_cache_dtype("int8_per_token_head", &spec.mode));
  CHECK(quire_make_layout(&spec, &layout));
  CHECK(quire_cache_bytes(&spec, BLOCKS, &memory));
  memory.base = malloc((size_t)memory.base_bytes);
  memory.v_base = malloc((size_t)memory.v_base_bytes);
  memory.k_scale_base = malloc((size_t)memory.k_scale_bytes);
  memory.v_scale_base = malloc((size_t)memory.v_scale_bytes);
  CHECK(quire_make_views(&spec, &memory, &cache));

  for (size_t i = 0; i < sizeof key / sizeof key[0]; ++i) {
    key[i] = 0.5F;
    value[i] = 0.25F;
  }
  for (size_t i = 0; i < sizeof query / sizeof query[0]; ++i) query[i] = 1.0F;
  for (int i = 0; i < TOKENS; ++i) slots[i] = i;

  quire_reshape_and_cache_args store = quire_reshape_and_cache_args_default();
  store.mode = spec.mode;
  store.cache = &cache;
  store.key = quire_dense_tensor(key, QUIRE_FLOAT32, cpu, 3, key_shape);
  store.value = quire_dense_tensor(value, QUIRE_FLOAT32, cpu, 3, key_shape);
  store.slot_mapping = quire_dense_tensor(slots, QUIRE_INT64, cpu, 1, &tokens);
  CHECK(quire_reshape_and_cache(&store, NULL));

  quire_attention_args read = quire_attention_args_default();
  read.mode = spec.mode;
  read.cache = &cache;
  read.query = quire_dense_tensor(query, QUIRE_FLOAT32, cpu, 3, query_shape);
  read.out = quire_dense_tensor(out, QUIRE_FLOAT32, cpu, 3, query_shape);
  read.cu_seqlens_q = quire_dense_tensor(cu_seqlens_q, QUIRE_INT32, cpu, 1, &two);
  read.seq_lens = quire_dense_tensor(seq_lens, QUIRE_INT32, cpu, 1, &one);
  read.block_table = quire_dense_tensor(block_table, QUIRE_INT32, cpu, 2, table_shape);

  /* A call that is refused says why, and has written nothing. */
  if (quire_unified_attention(&read, NULL) != QUIRE_INVALID_ARGUMENT) return 1;
  fprintf(stderr, "refused: %s\n", quire_last_error());

  read.softmax_scale = 0.088388F; /* 1 / sqrt(HEAD_SIZE) */
  quire_attention_problem problem = quire_attention_problem_default();
  quire_plan* plan = NULL;
  CHECK(quire_problem_of(&read, &problem));
  CHECK(quire_plan_create(&problem, &plan));
  void* workspace = malloc(quire_plan_workspace_bytes(plan) + 1);
  CHECK(quire_run_unified_attention(plan, &read, workspace, quire_plan_workspace_bytes(plan), NULL));
  printf("%d bytes per token, output %.3f\n", (int)layout.bytes_per_token, (double)out[0]);

  free(workspace);
  quire_plan_destroy(plan);
  free(memory.base);
  free(memory.v_base);
  free(memory.k_scale_base);
  free(memory.v_scale_base);
  return 0;
}
