// The public operations: validate, find who serves the mode, hand over to the device.
#include "quire/ops.h"

#include <algorithm>
#include <atomic>

#include "attention/page_slices.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/guard.h"
#include "core/mode_table.h"
#include "core/validate.h"
#include "cpu/cpu.h"
#include "quire/backend.h"

namespace quire {
namespace {

std::atomic<LogHook> log_hook{nullptr};

[[maybe_unused]] const bool forks_are_safe = cpu::end_threads_before_fork();  // when the library is loaded

// The largest power of two up to 16 that divides the address of every row of a cache.
int row_alignment(const Tensor& cache) {
  auto bits = reinterpret_cast<std::uintptr_t>(cache.data) | 16U;
  for (int dim = 0; dim < 3; ++dim) {
    bits |= static_cast<std::uintptr_t>(cache.strides[dim]) * dtype_bytes(cache.dtype);
  }
  return static_cast<int>(bits & -bits);
}

// Whether 16 slots of a page are runs of whole vectors. Rows of a registered mode's own format are not known.
bool whole_pages(const UnifiedAttentionArgs& args, const AttentionShape& shape) {
  if (shape.key_format == format::FormatId::kNone || shape.value_format == format::FormatId::kNone) return false;
  attention::PagedRows key, value;
  attention::set_paged_rows(key, args.key_cache, {args.k_scale_cache, args.k_page_meta, args.k_head_vector});
  attention::set_paged_rows(value, args.value_cache, {args.v_scale_cache, args.v_page_meta, args.v_head_vector});
  return attention::page_slice(key, format::format_info(shape.key_format).row_bytes(shape.head_size), value,
                               format::format_info(shape.value_format).row_bytes(shape.head_size_v), shape.num_kv_heads,
                               shape.block_size)
      .has_value();
}

// The backend of a registered mode, or null for a mode of the table.
Result<const QuantKVBackend*> registered_backend(ModeId id) {
  const Result<ModeInfo> mode = mode_info(id);
  if (!mode) return mode.status();
  if (!mode->registered) return static_cast<const QuantKVBackend*>(nullptr);
  return get_backend(id);
}

// args without idle strides. `planned`: the problem of the plan that the call brings, or null.
Result<AttentionProblem> problem_for(const UnifiedAttentionArgs& args, const AttentionShape& shape,
                                     const AttentionProblem* planned) {
  const core::DeviceOps& device = core::device_ops(args.query.device);
  const Result<Arch> arch = device.arch();
  if (!arch) return arch.status();
  AttentionProblem problem;
  problem.device = args.query.device;
  problem.arch = *arch;
  problem.mode = args.mode;
  problem.num_q_heads = shape.num_q_heads;
  problem.num_kv_heads = shape.num_kv_heads;
  problem.head_size = shape.head_size;
  problem.head_size_v = shape.head_size_v;
  problem.block_size = shape.block_size;
  problem.query_dtype = args.query.dtype;
  problem.cache_dtype = args.key_cache.dtype;
  for (const Tensor* side : {&args.k_page_meta, &args.v_page_meta, &args.k_head_vector, &args.v_head_vector}) {
    problem.has_centre = problem.has_centre || side->defined();
  }
  problem.row_alignment = std::min(row_alignment(args.key_cache), row_alignment(args.value_cache));
  problem.whole_pages = args.query.device == Device::kCpu || whole_pages(args, shape);  // the CPU does not ask
  problem.max_num_tokens = shape.num_tokens;
  problem.max_batch = shape.batch;
  device.bound_lengths(args, shape, planned, problem);
  return problem;
}

// The call must lie inside the bounds its plan was made for.
Status check_plan(const AttentionPlan& plan, const AttentionProblem& actual) {
  const AttentionProblem& p = plan.problem;
  if (plan.query_tile < 1 || plan.split_size < 1 || plan.max_splits < 1) {
    return invalid_argument("plan has query_tile " + std::to_string(plan.query_tile) + ", split_size " +
                            std::to_string(plan.split_size) + " and max_splits " + std::to_string(plan.max_splits) +
                            "; take it from plan_unified_attention");
  }
  const auto other = [](const char* name, const std::string& given, const std::string& planned) {
    return invalid_argument(name + (" is " + given) + ", but the plan was made for " + planned +
                            "; make a plan for this problem");
  };
  if (p.device != actual.device) {
    return other("device", std::string(device_name(actual.device)), std::string(device_name(p.device)));
  }
  if (p.arch.major != actual.arch.major || p.arch.minor != actual.arch.minor) {
    const auto version = [](const Arch& arch) { return std::to_string(arch.major) + "." + std::to_string(arch.minor); };
    return other("compute capability", version(actual.arch), version(p.arch));
  }
  if (p.mode != actual.mode) return other("mode", core::mode_name(actual.mode), core::mode_name(p.mode));
  if (p.query_dtype != actual.query_dtype) {
    return other("query_dtype", std::string(dtype_name(actual.query_dtype)), std::string(dtype_name(p.query_dtype)));
  }
  // Other modes say themselves what their caches hold, and take bytes as uint8 too.
  if (p.cache_dtype != actual.cache_dtype && mode_info(p.mode)->key_format == format::AutoFloat::kName) {
    return other("cache_dtype", std::string(dtype_name(actual.cache_dtype)), std::string(dtype_name(p.cache_dtype)));
  }
  const struct {
    const char* name;
    std::int64_t planned, given;
    bool bound;
  } fields[] = {{"num_q_heads", p.num_q_heads, actual.num_q_heads, false},
                {"num_kv_heads", p.num_kv_heads, actual.num_kv_heads, false},
                {"head_size", p.head_size, actual.head_size, false},
                {"head_size_v", p.head_size_v, actual.head_size_v, false},
                {"block_size", p.block_size, actual.block_size, false},
                {"has_centre", p.has_centre ? 1 : 0, actual.has_centre ? 1 : 0, false},
                {"num_tokens", p.max_num_tokens, actual.max_num_tokens, true},
                {"batch", p.max_batch, actual.max_batch, true},
                {"query_len", p.max_query_len, actual.max_query_len, true},
                {"seq_len", p.max_seq_len, actual.max_seq_len, true}};
  for (const auto& field : fields) {
    if (field.bound ? field.given > field.planned : field.given != field.planned) {
      return other(field.name, std::to_string(field.given),
                   (field.bound ? "at most " : "") + std::to_string(field.planned));
    }
  }
  if (actual.row_alignment < p.row_alignment) {
    return invalid_argument("a cache has rows aligned to " + std::to_string(actual.row_alignment) +
                            " bytes, but the plan was made for row_alignment " + std::to_string(p.row_alignment) +
                            "; make a plan for this problem");
  }
  if (p.whole_pages && !actual.whole_pages) {
    return invalid_argument(
        "the caches' pages do not lie in runs of whole, aligned 16-byte vectors, but the plan was made for "
        "whole_pages; "
        "make a plan for this problem");
  }
  return {};
}

}  // namespace

void set_log_hook(LogHook hook) { log_hook = hook; }

namespace core {

void log(const char* message) {
  if (LogHook hook = log_hook) hook(message);
}

Status store(const ReshapeAndCacheArgs& args, void* stream) {
  return guarded([&]() -> Status {
    Result<StoreProblem> problem = validate_store(args);
    if (!problem) return problem.status();
    const ReshapeAndCacheArgs call = drop_idle_strides(args);
    return device_ops(call.key.device).store(call, *problem, stream);
  });
}

Status attend(const UnifiedAttentionArgs& given, const AttentionPlan* plan, void* workspace,
              std::size_t workspace_bytes, const QuantKVBackend* decoder, void* stream) {
  return guarded([&]() -> Status {
    Result<AttentionShape> shape = validate_attention(given, decoder);
    if (!shape) return shape.status();
    const UnifiedAttentionArgs args = drop_idle_strides(given);
    const Result<AttentionProblem> problem = problem_for(args, *shape, plan == nullptr ? nullptr : &plan->problem);
    if (!problem) return problem.status();
    const DeviceOps& device = device_ops(args.query.device);
    if (plan == nullptr) {
      const Result<AttentionPlan> own_plan = plan_unified_attention(*problem);
      if (!own_plan) return own_plan.status();
      return device.attend(*own_plan, args, *shape, decoder, nullptr, stream);
    }
    if (Status status = check_plan(*plan, *problem); !status) return status;
    if (plan->workspace_bytes > 0 && (workspace == nullptr || workspace_bytes < plan->workspace_bytes)) {
      return invalid_argument("workspace has " + std::to_string(workspace == nullptr ? 0 : workspace_bytes) +
                              " bytes; the plan needs " + std::to_string(plan->workspace_bytes));
    }
    if (reinterpret_cast<std::uintptr_t>(workspace) % 16 != 0) {
      return invalid_argument("workspace is not aligned to 16 bytes");
    }
    return device.attend(*plan, args, *shape, decoder, workspace, stream);
  });
}

}  // namespace core

Status reshape_and_cache(const ReshapeAndCacheArgs& args, void* stream) {
  return core::guarded([&]() -> Status {
    const Result<const QuantKVBackend*> backend = registered_backend(args.mode);
    if (!backend) return backend.status();
    if (*backend == nullptr) return core::store(args, stream);
    return core::call_backend("reshape_and_cache", args.mode,
                              [&] { return (*backend)->reshape_and_cache(args, stream); });
  });
}

Status unified_attention(const UnifiedAttentionArgs& args, void* stream) {
  return core::guarded([&]() -> Status {
    const Result<const QuantKVBackend*> backend = registered_backend(args.mode);
    if (!backend) return backend.status();
    if (*backend == nullptr) return core::attend(args, nullptr, nullptr, 0, nullptr, stream);
    return core::call_backend("unified_attention", args.mode,
                              [&] { return (*backend)->unified_attention(args, stream); });
  });
}

Status run_unified_attention(const AttentionPlan& plan, const UnifiedAttentionArgs& args, void* workspace,
                             std::size_t workspace_bytes, void* stream) {
  return core::guarded([&]() -> Status {
    const Result<const QuantKVBackend*> backend = registered_backend(args.mode);
    if (!backend) return backend.status();
    if (*backend == nullptr) return core::attend(args, &plan, workspace, workspace_bytes, nullptr, stream);
    return unified_attention(args, stream);  // a registered mode's backend plans for itself
  });
}

Result<AttentionProblem> problem_of(const UnifiedAttentionArgs& args) {
  return core::guarded([&]() -> Result<AttentionProblem> {
    const Result<const QuantKVBackend*> backend = registered_backend(args.mode);
    if (!backend) return backend.status();
    Result<AttentionShape> shape =
        core::call_backend("row_bytes", args.mode, [&] { return core::validate_attention(args, *backend); });
    if (!shape) return shape.status();
    return problem_for(core::drop_idle_strides(args), *shape, nullptr);
  });
}

Status merge_attn_states(const MergeAttnStatesArgs& args, void* stream) {
  return core::guarded([&]() -> Status {
    if (Status status = core::validate_merge(args); !status) return status;
    const MergeAttnStatesArgs call = core::drop_idle_strides(args);
    return core::device_ops(call.prefix_out.device).merge(call, stream);
  });
}

Status reshape_and_cache_infer_mode(ReshapeAndCacheArgs args, void* stream) {
  return core::guarded([&]() -> Status {
    core::log("quire: reshape_and_cache without a mode is deprecated; name the mode");
    const char* name = nullptr;
    if (args.key_cache.dtype == DType::kFloat8E4M3) name = "fp8_per_token_head";
    if (args.key_cache.dtype == DType::kInt8) name = "int8_per_token_head";
    if (name == nullptr) {
      return invalid_argument(
          "key_cache is " + std::string(dtype_name(args.key_cache.dtype)) +
          "; without a mode only float8_e4m3fn (fp8_per_token_head) and int8 (int8_per_token_head) can be told apart");
    }
    const Result<ModeId> mode = parse_kv_cache_dtype(name);
    if (!mode) return mode.status();
    args.mode = *mode;
    return reshape_and_cache(args, stream);
  });
}

}  // namespace quire
