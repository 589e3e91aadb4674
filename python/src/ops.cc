#include "ops.h"

#include <array>
#include <chrono>

#include "call.h"
#include "docs.h"
#include "plan.h"
#include "quire/ops.h"
#include "reader.h"

namespace quire::python {
namespace {

// ---- reshape_and_cache ----------------------------------------------------------------------------------------------

using StoreCall = Call<ReshapeAndCacheArgs>;

template <auto member>
constexpr Parameter store(const char* name) {
  return parameter<StoreCall, &StoreCall::args, member>(name);
}

constexpr std::array kStore = {
    store<&ReshapeAndCacheArgs::key>("key"),
    store<&ReshapeAndCacheArgs::value>("value"),
    store<&ReshapeAndCacheArgs::cache>("cache"),
    store<&ReshapeAndCacheArgs::slot_mapping>("slot_mapping"),
    store<&ReshapeAndCacheArgs::mode>("mode"),
    store<&ReshapeAndCacheArgs::k_scale>("k_scale"),
    store<&ReshapeAndCacheArgs::v_scale>("v_scale"),
    store<&ReshapeAndCacheArgs::error_counter>("error_counter"),
    parameter<StoreCall, &StoreCall::stream>("stream"),
};
static_assert(same_names(kStore, docs::reshape_and_cache_names));
constinit const Signature store_signature("reshape_and_cache", kStore, 4);

PyObject* call_reshape_and_cache(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
  StoreCall call;
  return store_signature.run(&call, given, count, keywords,
                             [&] { return reshape_and_cache(call.args, call.stream.value); });
}

// ---- unified_attention, its problem, and the run of a plan ----------------------------------------------------------

struct AttentionCall {
  UnifiedAttentionArgs args;
  StreamArgument stream;
  const AttentionPlan* plan = nullptr;  // these two of run_unified_attention alone
  Tensor workspace;
  int repeats = 1;  // of time_unified_attention
};

template <auto... path>
constexpr Parameter attend(const char* name) {
  return parameter<AttentionCall, &AttentionCall::args, path...>(name);
}
template <auto member>
constexpr Parameter mask(const char* name) {
  return attend<&UnifiedAttentionArgs::mask, member>(name);
}

constexpr std::array kAttention = {
    attend<&UnifiedAttentionArgs::query>("query"),
    attend<&UnifiedAttentionArgs::out>("out"),
    attend<&UnifiedAttentionArgs::cache>("cache"),
    attend<&UnifiedAttentionArgs::cu_seqlens_q>("cu_seqlens_q"),
    attend<&UnifiedAttentionArgs::seq_lens>("seq_lens"),
    attend<&UnifiedAttentionArgs::block_table>("block_table"),
    attend<&UnifiedAttentionArgs::softmax_scale>("softmax_scale"),
    attend<&UnifiedAttentionArgs::mode>("mode"),
    mask<&AttentionMask::causal>("causal"),
    mask<&AttentionMask::causal_per_seq>("causal_per_seq"),
    mask<&AttentionMask::sliding_window>("sliding_window"),
    mask<&AttentionMask::chunk_lookback>("chunk_lookback"),
    mask<&AttentionMask::mm_prefix_range>("mm_prefix_range"),
    mask<&AttentionMask::mm_prefix_clamp_window>("mm_prefix_clamp_window"),
    mask<&AttentionMask::rswa_prefix_lens>("rswa_prefix_lens"),
    mask<&AttentionMask::rswa_window>("rswa_window"),
    attend<&UnifiedAttentionArgs::softcap>("softcap"),
    attend<&UnifiedAttentionArgs::sinks>("sinks"),
    attend<&UnifiedAttentionArgs::alibi_slopes>("alibi_slopes"),
    attend<&UnifiedAttentionArgs::use_alibi_sqrt>("use_alibi_sqrt"),
    attend<&UnifiedAttentionArgs::qq_bias>("qq_bias"),
    attend<&UnifiedAttentionArgs::q_descale>("q_descale"),
    attend<&UnifiedAttentionArgs::k_descale>("k_descale"),
    attend<&UnifiedAttentionArgs::v_descale>("v_descale"),
    attend<&UnifiedAttentionArgs::output_scale>("output_scale"),
    attend<&UnifiedAttentionArgs::lse>("lse"),
    attend<&UnifiedAttentionArgs::max_query_len>("max_query_len"),
    attend<&UnifiedAttentionArgs::max_seq_len>("max_seq_len"),
    attend<&UnifiedAttentionArgs::error_counter>("error_counter"),
    parameter<AttentionCall, &AttentionCall::stream>("stream"),
};
constexpr auto kRun = [] {
  std::array<Parameter, kAttention.size() + 2> table{};
  table[0] = parameter<AttentionCall, &AttentionCall::plan>("plan");
  for (std::size_t i = 0; i < kAttention.size(); ++i) table[i + 1] = kAttention[i];
  table[kAttention.size() + 1] = parameter<AttentionCall, &AttentionCall::workspace>("workspace");
  return table;
}();
static_assert(same_names(kAttention, docs::unified_attention_names));
static_assert(same_names(kAttention, docs::problem_of_names));
static_assert(same_names(kRun, docs::run_unified_attention_names));
constinit const Signature attention_signature("unified_attention", kAttention, 7);
constinit const Signature problem_signature("problem_of", kAttention, 7);
constinit const Signature run_signature("run_unified_attention", kRun, 8);

PyObject* call_unified_attention(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
  AttentionCall call;
  return attention_signature.run(&call, given, count, keywords,
                                 [&] { return unified_attention(call.args, call.stream.value); });
}

PyObject* call_run_unified_attention(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
  AttentionCall call;
  return run_signature.run(&call, given, count, keywords, [&]() -> Status {
    if (call.plan == nullptr) return invalid_argument("plan is not given; take it from plan_unified_attention");
    const Tensor& workspace = call.workspace;
    std::int64_t dense = 1;
    for (int i = workspace.ndim - 1; i >= 0; --i) {
      if (workspace.shape[i] != 1 && workspace.strides[i] != dense) {
        return invalid_argument("workspace is not contiguous; it must be a block of bytes");
      }
      dense *= workspace.shape[i];
    }
    if (workspace.defined() && workspace.device != call.args.query.device) {
      return invalid_argument("workspace is on " + to_string(workspace.device) + ", but query is on " +
                              to_string(call.args.query.device));
    }
    const std::size_t num_bytes =
        workspace.defined() ? static_cast<std::size_t>(dense) * dtype_bytes(workspace.dtype) : 0;
    return run_unified_attention(*call.plan, call.args, workspace.data, num_bytes, call.stream.value);
  });
}

PyObject* call_problem_of(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
  AttentionCall call;
  AttentionProblem problem;
  PyObject* done = problem_signature.run(&call, given, count, keywords, [&]() -> Status {
    Result<AttentionProblem> found = problem_of(call.args);
    if (!found) return found.status();
    problem = *std::move(found);
    return {};
  });
  if (done == nullptr) return nullptr;
  Py_DECREF(done);
  return dict_of(problem).release().ptr();
}

// ---- for bench/python_call.py: what reading arrays costs, and what the library costs without Python -----------------

constexpr auto kTimed = [] {
  std::array<Parameter, kAttention.size() + 1> table{};
  for (std::size_t i = 0; i < kAttention.size(); ++i) table[i] = kAttention[i];
  table[kAttention.size()] = parameter<AttentionCall, &AttentionCall::repeats>("repeats");
  return table;
}();
constinit const Signature timed_signature("time_unified_attention", kTimed, 7);

PyObject* call_time_unified_attention(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
  AttentionCall call;
  std::chrono::duration<double> took{};
  PyObject* done = timed_signature.run(&call, given, count, keywords, [&]() -> Status {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < call.repeats; ++i) {
      if (Status status = unified_attention(call.args, call.stream.value); !status) return status;
    }
    took = std::chrono::steady_clock::now() - start;
    return {};
  });
  if (done == nullptr) return nullptr;
  Py_DECREF(done);
  return PyFloat_FromDouble(took.count() / call.repeats);
}

PyObject* call_read_arrays(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject*) {
  Reader reader(nullptr);
  Tensor tensor;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!reader.read("array", given[i], false, &tensor)) return nullptr;
  }
  return reader.finish() ? Py_NewRef(Py_None) : nullptr;
}

// ---- merge_attn_states, hadamard ------------------------------------------------------------------------------------

template <class Args, auto member>
constexpr Parameter of(const char* name) {
  return parameter<Call<Args>, &Call<Args>::args, member>(name);
}

using Merge = MergeAttnStatesArgs;
constexpr std::array kMerge = {
    of<Merge, &Merge::out>("out"),
    of<Merge, &Merge::prefix_out>("prefix_out"),
    of<Merge, &Merge::prefix_lse>("prefix_lse"),
    of<Merge, &Merge::suffix_out>("suffix_out"),
    of<Merge, &Merge::suffix_lse>("suffix_lse"),
    of<Merge, &Merge::lse>("lse"),
    parameter<Call<Merge>, &Call<Merge>::stream>("stream"),
};
static_assert(same_names(kMerge, docs::merge_attn_states_names));
constinit const Signature merge_signature("merge_attn_states", kMerge, 5);

PyObject* call_merge_attn_states(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
  Call<Merge> call;
  return merge_signature.run(&call, given, count, keywords,
                             [&] { return merge_attn_states(call.args, call.stream.value); });
}

constexpr std::array kHadamard = {
    of<HadamardArgs, &HadamardArgs::x>("x"),
    of<HadamardArgs, &HadamardArgs::out>("out"),
    of<HadamardArgs, &HadamardArgs::inverse>("inverse"),
    of<HadamardArgs, &HadamardArgs::signs>("signs"),
    parameter<Call<HadamardArgs>, &Call<HadamardArgs>::stream>("stream"),
};
static_assert(same_names(kHadamard, docs::hadamard_names));
constinit const Signature hadamard_signature("hadamard", kHadamard, 2);

PyObject* call_hadamard(PyObject*, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
  Call<HadamardArgs> call;
  return hadamard_signature.run(&call, given, count, keywords, [&] { return hadamard(call.args, call.stream.value); });
}

// ---- the functions of the module ------------------------------------------------------------------------------------

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);
PyMethodDef method(const char* name, FastCall function, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL | METH_KEYWORDS,
          doc};
}

}  // namespace

bool add_ops(PyObject* module) {
  static PyMethodDef methods[] = {
      method("reshape_and_cache", call_reshape_and_cache, docs::reshape_and_cache),
      method("unified_attention", call_unified_attention, docs::unified_attention),
      method("run_unified_attention", call_run_unified_attention, docs::run_unified_attention),
      method("problem_of", call_problem_of, docs::problem_of),
      method("merge_attn_states", call_merge_attn_states, docs::merge_attn_states),
      method("hadamard", call_hadamard, docs::hadamard),
      method("turboquant_store", call_turboquant_store, docs::turboquant_store),
      method("turboquant_decode_attention", call_turboquant_decode_attention, docs::turboquant_decode_attention),
      method("_time_unified_attention", call_time_unified_attention, nullptr),
      method("_read_arrays", call_read_arrays, nullptr),
      {nullptr, nullptr, 0, nullptr},
  };
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace quire::python
