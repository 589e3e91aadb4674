// The C ABI over the public C++ headers: structs are copied in, statuses become codes and a sentence of the thread.
#include "quire/quire_c.h"

#include <memory>
#include <new>
#include <string>

#include "capi/convert.h"
#include "quire/quire.h"

struct quire_plan {
  quire::AttentionPlan plan;
  std::string description;
};

namespace quire::capi {
namespace {

std::string& last_error() {
  thread_local std::string sentence;
  return sentence;
}

quire_code code_of(const Status& status) {
  if (status.ok()) return QUIRE_OK;
  try {
    last_error() = status.message();
  } catch (const std::bad_alloc&) {
    last_error().clear();
  }
  return static_cast<quire_code>(status.code());
}

// Runs body(), which gives a Status; no exception leaves.
template <class Body>
quire_code call(const Body& body) {
  try {
    return code_of(body());
  } catch (const std::bad_alloc&) {
    return code_of(Status(StatusCode::kInternal, {}));
  }
}

// Where an answer goes.
Status check_pointer(const char* name, const void* pointer) {
  if (pointer != nullptr) return {};
  return invalid_argument(std::string(name) + " is a null pointer; the answer needs a place");
}

const QuantKVBackend* backend_of(const quire_backend* backend) {
  return reinterpret_cast<const QuantKVBackend*>(backend);
}

// What a registered backend's method throws must not reach C.
template <class Method>
Status ask(const quire_backend* backend, const char* what, const Method& method) {
  QUIRE_RETURN_IF_BAD(check_pointer("backend", backend));
  try {
    return method(*backend_of(backend));
  } catch (...) {
    return internal_error(std::string(what) + " of a registered backend threw an exception");
  }
}

}  // namespace
}  // namespace quire::capi

using namespace quire;
using namespace quire::capi;

const char* quire_last_error(void) {
  const std::string& sentence = last_error();
  return sentence.empty() ? "out of memory" : sentence.c_str();
}

const char* quire_version(void) { return version(); }
int quire_version_number(void) { return version_number(); }

quire_code quire_device_count(int32_t type, int32_t* count) {
  return call([&]() -> Status {
    QUIRE_RETURN_IF_BAD(check_pointer("count", count));
    const Result<int> answer = device_count(enum_of<DeviceType>(type));
    if (!answer) return answer.status();
    *count = *answer;
    return {};
  });
}

quire_code quire_set_num_threads(int32_t count) {
  return call([&] { return set_num_threads(count); });
}

quire_code quire_set_executor(int32_t count,
                              void (*run_parts)(void* pool, int num_parts, void (*part)(void* context, int index),
                                                void* context),
                              void* pool) {
  return call([&] { return set_executor({run_parts == nullptr ? 1 : count, run_parts, pool}); });
}

quire_code quire_parse_kv_cache_dtype(const char* name, quire_mode* mode) {
  return call([&]() -> Status {
    QUIRE_RETURN_IF_BAD(check_pointer("mode", mode));
    if (name == nullptr) return invalid_argument("name is a null pointer; it must be a kv_cache_dtype");
    const Result<ModeId> parsed = parse_kv_cache_dtype(name);
    if (!parsed) return parsed.status();
    *mode = static_cast<quire_mode>(*parsed);
    return {};
  });
}

const char* quire_mode_name(quire_mode mode) {
  const Result<const ModeInfo*> info = mode_info(static_cast<ModeId>(mode));
  return info ? (*info)->name.c_str() : nullptr;
}

quire_code quire_get_backend(quire_mode mode, const quire_backend** backend) {
  return call([&]() -> Status {
    QUIRE_RETURN_IF_BAD(check_pointer("backend", backend));
    const Result<const QuantKVBackend*> found = get_backend(static_cast<ModeId>(mode));
    if (!found) return found.status();
    *backend = reinterpret_cast<const quire_backend*>(*found);
    return {};
  });
}

quire_code quire_backend_row_bytes(const quire_backend* backend, int32_t head_size, int32_t is_value,
                                   int64_t* row_bytes) {
  return call([&] {
    return ask(backend, "row_bytes", [&](const QuantKVBackend& its) -> Status {
      QUIRE_RETURN_IF_BAD(check_pointer("row_bytes", row_bytes));
      const Result<std::int64_t> bytes = its.row_bytes(head_size, is_value != 0);
      if (!bytes) return bytes.status();
      *row_bytes = *bytes;
      return {};
    });
  });
}

quire_code quire_backend_packed_head_size(const quire_backend* backend, int32_t head_size, int32_t* packed_head_size) {
  return call([&] {
    return ask(backend, "packed_head_size", [&](const QuantKVBackend& its) -> Status {
      QUIRE_RETURN_IF_BAD(check_pointer("packed_head_size", packed_head_size));
      const Result<int> packed = its.packed_head_size(head_size);
      if (!packed) return packed.status();
      *packed_head_size = *packed;
      return {};
    });
  });
}

int32_t quire_backend_needs_scale_caches(const quire_backend* backend) {
  bool needs = false;
  const Status status = ask(backend, "needs_scale_caches", [&](const QuantKVBackend& its) -> Status {
    needs = its.needs_scale_caches();
    return {};
  });
  return status.ok() && needs ? 1 : 0;
}

quire_code quire_make_layout(const quire_kv_cache_spec* spec, quire_kv_cache_layout* layout) {
  return call([&]() -> Status {
    KVCacheSpec own;
    QUIRE_RETURN_IF_BAD(spec_of(spec, own));
    const Result<KVCacheLayout> made = make_layout(own);
    if (!made) return made.status();
    quire_kv_cache_layout answer = quire_kv_cache_layout_default();
    answer.bytes_per_token = made->bytes_per_token;
    answer.bytes_per_block = made->bytes_per_block;
    answer.tokens_per_gib = made->tokens_per_gib;
    answer.k_block_stride = made->k_block_stride;
    answer.k_slot_stride = made->k_slot_stride;
    answer.k_head_stride = made->k_head_stride;
    answer.v_block_stride = made->v_block_stride;
    answer.v_slot_stride = made->v_slot_stride;
    answer.v_head_stride = made->v_head_stride;
    answer.v_offset = made->v_offset;
    answer.k_scale_offset = made->k_scale_offset;
    answer.v_scale_offset = made->v_scale_offset;
    answer.key_cache_dtype = static_cast<std::int32_t>(made->key_cache_dtype);
    answer.value_cache_dtype = static_cast<std::int32_t>(made->value_cache_dtype);
    return give("layout", answer, layout);
  });
}

quire_code quire_cache_bytes(const quire_kv_cache_spec* spec, int64_t num_blocks, quire_kv_cache_memory* memory) {
  return call([&]() -> Status {
    KVCacheSpec own;
    QUIRE_RETURN_IF_BAD(spec_of(spec, own));
    const Result<KVCacheLayout> layout = make_layout(own);
    if (!layout) return layout.status();
    const Result<KVCacheBytes> bytes = cache_bytes(*layout, num_blocks);
    if (!bytes) return bytes.status();
    quire_kv_cache_memory answer = quire_kv_cache_memory_default();
    QUIRE_RETURN_IF_BAD(take("memory", memory, answer));
    answer.num_blocks = num_blocks;
    answer.base_bytes = bytes->base;
    answer.v_base_bytes = bytes->v_base;
    answer.k_scale_bytes = bytes->k_scales;
    answer.v_scale_bytes = bytes->v_scales;
    return give("memory", answer, memory);
  });
}

quire_code quire_make_views(const quire_kv_cache_spec* spec, const quire_kv_cache_memory* memory,
                            quire_kv_cache_views* views) {
  return call([&]() -> Status {
    KVCacheSpec own;
    QUIRE_RETURN_IF_BAD(spec_of(spec, own));
    quire_kv_cache_memory where = quire_kv_cache_memory_default();
    QUIRE_RETURN_IF_BAD(take("memory", memory, where));
    const Result<KVCacheLayout> layout = make_layout(own);
    if (!layout) return layout.status();
    if (const Result<KVCacheBytes> bytes = cache_bytes(*layout, where.num_blocks); !bytes) return bytes.status();
    const KVCacheViews made = make_views(*layout, where.num_blocks, where.base, where.v_base, where.k_scale_base,
                                         where.v_scale_base, device_of(where.device));
    quire_kv_cache_views answer = quire_kv_cache_views_default();
    answer.key_cache = c_tensor(made.key_cache);
    answer.value_cache = c_tensor(made.value_cache);
    answer.k_scale_cache = c_tensor(made.k_scale_cache);
    answer.v_scale_cache = c_tensor(made.v_scale_cache);
    return give("views", answer, views);
  });
}

quire_code quire_reshape_and_cache(const quire_reshape_and_cache_args* args, void* stream) {
  return call([&]() -> Status {
    ReshapeAndCacheArgs own;
    QUIRE_RETURN_IF_BAD(store_args(args, own));
    return reshape_and_cache(own, stream);
  });
}

quire_code quire_unified_attention(const quire_attention_args* args, void* stream) {
  return call([&]() -> Status {
    UnifiedAttentionArgs own;
    QUIRE_RETURN_IF_BAD(attention_args(args, own));
    return unified_attention(own, stream);
  });
}

quire_code quire_merge_attn_states(const quire_merge_args* args, void* stream) {
  return call([&]() -> Status {
    quire_merge_args own = quire_merge_args_default();
    QUIRE_RETURN_IF_BAD(take("args", args, own));
    return merge_attn_states({written(own.out), written(own.lse), read(own.prefix_out), read(own.prefix_lse),
                              read(own.suffix_out), read(own.suffix_lse)},
                             stream);
  });
}

quire_code quire_hadamard(const quire_tensor* x, const quire_tensor* out, int32_t inverse, int32_t signs,
                          void* stream) {
  return call([&]() -> Status {
    return hadamard(
        {x == nullptr ? ConstTensor() : read(*x), out == nullptr ? Tensor() : written(*out), inverse != 0, signs != 0},
        stream);
  });
}

quire_code quire_problem_of(const quire_attention_args* args, quire_attention_problem* problem) {
  return call([&]() -> Status {
    UnifiedAttentionArgs own;
    QUIRE_RETURN_IF_BAD(attention_args(args, own));
    const Result<AttentionProblem> found = problem_of(own);
    if (!found) return found.status();
    return give("problem", c_problem(*found), problem);
  });
}

quire_code quire_supports(const quire_attention_problem* problem, int32_t* tensor_cores, size_t* workspace_bytes) {
  return call([&]() -> Status {
    AttentionProblem own;
    QUIRE_RETURN_IF_BAD(problem_from(problem, own));
    const Result<AttentionSupport> support = supports(own);
    if (!support) return support.status();
    if (tensor_cores != nullptr) *tensor_cores = support->tensor_cores ? 1 : 0;
    if (workspace_bytes != nullptr) *workspace_bytes = support->workspace_bytes;
    return {};
  });
}

quire_code quire_plan_create(const quire_attention_problem* problem, quire_plan** plan) {
  return call([&]() -> Status {
    QUIRE_RETURN_IF_BAD(check_pointer("plan", plan));
    AttentionProblem own;
    QUIRE_RETURN_IF_BAD(problem_from(problem, own));
    const Result<AttentionPlan> made = plan_unified_attention(own);
    if (!made) return made.status();
    auto handle = std::make_unique<quire_plan>();
    handle->plan = *made;
    handle->description = made->describe();
    *plan = handle.release();
    return {};
  });
}

void quire_plan_destroy(quire_plan* plan) { delete plan; }

size_t quire_plan_workspace_bytes(const quire_plan* plan) { return plan == nullptr ? 0 : plan->plan.workspace_bytes(); }

const char* quire_plan_describe(const quire_plan* plan) {
  return plan == nullptr ? "an empty plan" : plan->description.c_str();
}

quire_code quire_run_unified_attention(const quire_plan* plan, const quire_attention_args* args, void* workspace,
                                       size_t workspace_bytes, void* stream) {
  return call([&]() -> Status {
    UnifiedAttentionArgs own;
    QUIRE_RETURN_IF_BAD(attention_args(args, own));
    return run_unified_attention(plan == nullptr ? AttentionPlan() : plan->plan, own, workspace, workspace_bytes,
                                 stream);
  });
}
