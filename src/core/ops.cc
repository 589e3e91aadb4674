// The public operations validate their arguments, find out who serves the mode, and hand over to the device.
#include "quire/ops.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>

#include "attention/page_slices.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/guard.h"
#include "core/mode_table.h"
#include "core/plan.h"
#include "core/tensor_fields.h"
#include "core/validate.h"
#include "cpu/cpu.h"
#include "quire/backend.h"

namespace quire {
namespace {

std::atomic<LogHook> log_hook{nullptr};

[[maybe_unused]] const bool forks_are_safe = cpu::end_threads_before_fork();  // when the library is loaded

// Finds the largest power of two, at most 16, that divides the address of every row of a cache.
int row_alignment(const ConstTensor& cache) {
  auto bits = reinterpret_cast<std::uintptr_t>(cache.data) | 16U;
  for (int dim = 0; dim < 3; ++dim) {
    bits |= static_cast<std::uintptr_t>(cache.strides[dim]) * dtype_bytes(cache.dtype);
  }
  return static_cast<int>(bits & -bits);
}

// Finds the slice of a call's pages. There is none where 16 slots of a page are no runs of whole vectors, and none for
// the rows of a registered mode's own format, which quire does not know.
std::optional<attention::PageSlice> slice_of(const UnifiedAttentionArgs& args, const AttentionShape& shape) {
  if (shape.key_format == format::FormatId::kNone || shape.value_format == format::FormatId::kNone) return std::nullopt;
  const ConstKVCacheViews& cache = args.cache;
  attention::PagedRows key, value;
  attention::set_paged_rows(key, cache.key_cache, {cache.k_scale_cache, cache.k_page_meta, cache.k_head_vector});
  attention::set_paged_rows(value, cache.value_cache, {cache.v_scale_cache, cache.v_page_meta, cache.v_head_vector});
  return attention::page_slice(key, format::format_info(shape.key_format).row_bytes(shape.head_size), value,
                               format::format_info(shape.value_format).row_bytes(shape.head_size_v), shape.num_kv_heads,
                               shape.block_size);
}

// Finds the backend of a registered mode; a mode of the table has none here, which null says.
Result<const QuantKVBackend*> registered_backend(const core::ModeRow& mode) {
  if (!mode.registered) return static_cast<const QuantKVBackend*>(nullptr);
  return get_backend(mode.id);
}

// What a call asks for is its problem and, on CUDA, the slice of its pages.
struct Call {
  AttentionProblem problem;
  std::optional<attention::PageSlice> slice;
};

// Fills in what a call asks for. Its arguments have no idle strides; `planned` is the problem of the plan that the call
// brings, or null.
Status look_at(const UnifiedAttentionArgs& args, const AttentionShape& shape, const AttentionProblem* planned,
               Call& call) {
  const core::DeviceOps& device = core::device_ops(args.query.device.type);
  const Result<Arch> arch = device.arch(args.query.device.index);
  if (!arch) return arch.status();
  AttentionProblem& problem = call.problem;
  problem.device = args.query.device;
  problem.arch = *arch;
  problem.mode = args.mode;
  problem.num_q_heads = shape.num_q_heads;
  problem.num_kv_heads = shape.num_kv_heads;
  problem.head_size = shape.head_size;
  problem.head_size_v = shape.head_size_v;
  problem.block_size = shape.block_size;
  problem.query_dtype = args.query.dtype;
  problem.key_cache_dtype = args.cache.key_cache.dtype;
  problem.value_cache_dtype = args.cache.value_cache.dtype;
  problem.has_centre = core::has_centre(args.cache);
  problem.row_alignment = std::min(row_alignment(args.cache.key_cache), row_alignment(args.cache.value_cache));
  // The CPU does not ask for slices, nor does a plan that was made without.
  if (args.query.device.is_cuda() && (planned == nullptr || planned->whole_pages)) call.slice = slice_of(args, shape);
  problem.whole_pages = args.query.device.is_cpu() || call.slice.has_value();
  problem.max_num_tokens = shape.num_tokens;
  problem.max_batch = shape.batch;
  return device.bound_lengths(args, shape, planned, problem);
}

Status other(const char* name, const std::string& given, const std::string& planned) {
  return invalid_argument(name + (" is " + given) + ", but the plan was made for " + planned +
                          "; make a plan for this problem");
}

// The call must lie inside the bounds its plan was made for.
Status check_plan(const PlanData& plan, const AttentionProblem& actual, const AttentionShape& shape) {
  const AttentionProblem& p = plan.problem;
  if (p.device != actual.device) return other("device", to_string(actual.device), to_string(p.device));
  if (p.arch.major != actual.arch.major || p.arch.minor != actual.arch.minor) {
    const auto version = [](const Arch& arch) { return std::to_string(arch.major) + "." + std::to_string(arch.minor); };
    return other("compute capability", version(actual.arch), version(p.arch));
  }
  if (p.mode != actual.mode) return other("mode", core::mode_name(actual.mode), core::mode_name(p.mode));
  // A mode with formats of its own takes bytes as uint8 too; what they mean is the same.
  const struct {
    const char* name;
    DType planned, given;
    bool same;
  } dtypes[] = {
      {"query_dtype", p.query_dtype, actual.query_dtype, p.query_dtype == actual.query_dtype},
      {"key_cache_dtype", p.key_cache_dtype, actual.key_cache_dtype, plan.key_format == shape.key_format},
      {"value_cache_dtype", p.value_cache_dtype, actual.value_cache_dtype, plan.value_format == shape.value_format}};
  for (const auto& dtype : dtypes) {
    if (!dtype.same) {
      return other(dtype.name, std::string(dtype_name(dtype.given)), std::string(dtype_name(dtype.planned)));
    }
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
        "whole_pages; make a plan for this problem");
  }
  return {};
}

}  // namespace

void set_log_hook(LogHook hook) { log_hook = hook; }

namespace core {

void log(const char* message) {
  if (LogHook hook = log_hook) hook(message);
}

Status store(const ReshapeAndCacheArgs& args, const ModeRow& mode, void* stream) {
  return guarded([&]() -> Status {
    Result<StoreProblem> problem = validate_store(args, mode);
    if (!problem) return problem.status();
    const ReshapeAndCacheArgs call = drop_idle_strides(args);
    return device_ops(call.key.device.type).store(call, *problem, stream);
  });
}

Status attend(const UnifiedAttentionArgs& given, const ModeRow& mode, const PlanData* plan, void* workspace,
              std::size_t workspace_bytes, const QuantKVBackend* decoder, void* stream) {
  return guarded([&]() -> Status {
    Result<AttentionShape> shape = validate_attention(given, mode, decoder);
    if (!shape) return shape.status();
    UnifiedAttentionArgs args = drop_idle_strides(given);
    args.mode = mode.id;
    Call call;
    if (Status status = look_at(args, *shape, plan == nullptr ? nullptr : &plan->problem, call); !status) return status;
    if (call.slice) shape->page_slice = &*call.slice;
    const DeviceOps& device = device_ops(args.query.device.type);
    if (plan == nullptr) {
      PlanData own_plan;
      if (Status status = make_plan(call.problem, own_plan); !status) return status;
      return device.attend(own_plan, args, *shape, decoder, nullptr, stream);
    }
    if (Status status = check_plan(*plan, call.problem, *shape); !status) return status;
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
    const Result<const core::ModeRow*> mode = core::known_mode(args.mode);
    if (!mode) return mode.status();
    const Result<const QuantKVBackend*> backend = registered_backend(**mode);
    if (!backend) return backend.status();
    if (*backend == nullptr) return core::store(args, **mode, stream);
    return core::call_backend("reshape_and_cache", args.mode,
                              [&] { return (*backend)->reshape_and_cache(args, stream); });
  });
}

Status unified_attention(const UnifiedAttentionArgs& args, void* stream) {
  return core::guarded([&]() -> Status {
    const Result<const core::ModeRow*> mode = core::known_mode(args.mode);
    if (!mode) return mode.status();
    const Result<const QuantKVBackend*> backend = registered_backend(**mode);
    if (!backend) return backend.status();
    if (*backend == nullptr) return core::attend(args, **mode, nullptr, nullptr, 0, nullptr, stream);
    return core::call_backend("unified_attention", args.mode,
                              [&] { return (*backend)->unified_attention(args, stream); });
  });
}

Status run_unified_attention(const AttentionPlan& plan, const UnifiedAttentionArgs& args, void* workspace,
                             std::size_t workspace_bytes, void* stream) {
  return core::guarded([&]() -> Status {
    const Result<const core::ModeRow*> mode = core::known_mode(args.mode);
    if (!mode) return mode.status();
    if (plan.data() == nullptr) {
      return invalid_argument("plan is empty; take it from plan_unified_attention");
    }
    // A registered mode's backend plans for itself.
    if ((*mode)->registered) return unified_attention(args, stream);
    return core::attend(args, **mode, plan.data(), workspace, workspace_bytes, nullptr, stream);
  });
}

Result<AttentionProblem> problem_of(const UnifiedAttentionArgs& args) {
  return core::guarded([&]() -> Result<AttentionProblem> {
    const Result<const core::ModeRow*> mode = core::known_mode(args.mode);
    if (!mode) return mode.status();
    const Result<const QuantKVBackend*> backend = registered_backend(**mode);
    if (!backend) return backend.status();
    Result<AttentionShape> shape =
        core::call_backend("row_bytes", args.mode, [&] { return core::validate_attention(args, **mode, *backend); });
    if (!shape) return shape.status();
    Call call;
    if (Status status = look_at(core::drop_idle_strides(args), *shape, nullptr, call); !status) return status;
    return call.problem;
  });
}

Status merge_attn_states(const MergeAttnStatesArgs& args, void* stream) {
  return core::guarded([&]() -> Status {
    if (Status status = core::validate_merge(args); !status) return status;
    const MergeAttnStatesArgs call = core::drop_idle_strides(args);
    return core::device_ops(call.prefix_out.device.type).merge(call, stream);
  });
}

Status reshape_and_cache_infer_mode(ReshapeAndCacheArgs args, void* stream) {
  return core::guarded([&]() -> Status {
    core::log("quire: reshape_and_cache without a mode is deprecated; name the mode");
    const char* name = nullptr;
    if (args.cache.key_cache.dtype == DType::kFloat8E4M3) name = "fp8_per_token_head";
    if (args.cache.key_cache.dtype == DType::kInt8) name = "int8_per_token_head";
    if (name == nullptr) {
      return invalid_argument(
          "key_cache is " + std::string(dtype_name(args.cache.key_cache.dtype)) +
          "; without a mode only float8_e4m3fn (fp8_per_token_head) and int8 (int8_per_token_head) can be told apart");
    }
    const Result<ModeId> mode = parse_kv_cache_dtype(name);
    if (!mode) return mode.status();
    args.mode = *mode;
    return reshape_and_cache(args, stream);
  });
}

}  // namespace quire
