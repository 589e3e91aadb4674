"""The ops as PyTorch operators, ``torch.ops.quire.*``: for torch.compile, CUDA graphs and export.

Importing this module registers them. Arguments mean what they mean in quire.unified_attention and the others, but a
cache is given as its tensors, and its mode always is, as ``kv_cache_dtype``. Operators without ``_out`` allocate their
results; those with it write to the tensors they are given and answer nothing. Every operator has a fake kernel, so
torch.compile(fullgraph=True) takes them, with dynamic shapes too. None has a derivative.

    torch.ops.quire.reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, ...)
    torch.ops.quire.unified_attention(query, key_cache, value_cache, cu_seqlens_q, seq_lens, block_table,
                                      softmax_scale, kv_cache_dtype, ...) -> out
    torch.ops.quire.unified_attention_lse(the same) -> (out, lse)
    torch.ops.quire.unified_attention_out(out, lse or None, the same)
    torch.ops.quire.merge_attn_states(prefix_out, prefix_lse, suffix_out, suffix_lse) -> (out, lse)
    torch.ops.quire.merge_attn_states_out(out, lse or None, the same)
    torch.ops.quire.hadamard(x, inverse=False, signs=False) -> out
    torch.ops.quire.hadamard_out(out, x, inverse=False, signs=False)

A call that says ``max_query_len`` and ``max_seq_len``, as CUDA requires, is planned once for its shapes and bounds, and
takes its workspace from PyTorch's allocator: nothing is read back and nothing else allocated, so a CUDA graph captures
it, and replays it with other lengths, tables and slots inside the bounds.
"""

from __future__ import annotations

try:
    import torch
except ImportError as error:
    raise ImportError("quire.torch_ops needs PyTorch, which is not installed") from error

from . import _quire
from .plan import AttentionPlan, plan_unified_attention, problem_of

_STORE = (
    "Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, "
    "str kv_cache_dtype, *, Tensor(c!)? k_scale_cache=None, Tensor(d!)? v_scale_cache=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None, Tensor(e!)? error_counter=None"
)
_READ = (
    "Tensor query, Tensor key_cache, Tensor value_cache, Tensor cu_seqlens_q, Tensor seq_lens, Tensor block_table, "
    "float softmax_scale, str kv_cache_dtype, *, Tensor? k_scale_cache=None, Tensor? v_scale_cache=None, "
    "bool causal=True, Tensor? causal_per_seq=None, int sliding_window=-1, int chunk_lookback=-1, "
    "Tensor? mm_prefix_range=None, bool mm_prefix_clamp_window=False, "
    "Tensor? rswa_prefix_lens=None, int rswa_window=-1, float softcap=0.0, Tensor? sinks=None, "
    "Tensor? alibi_slopes=None, bool use_alibi_sqrt=False, Tensor? qq_bias=None, Tensor? q_descale=None, "
    "Tensor? k_descale=None, Tensor? v_descale=None, Tensor? output_scale=None, "
    "SymInt max_query_len=0, SymInt max_seq_len=0"
)
_RESULT = (
    ", SymInt head_size_v=0, ScalarType? out_dtype=None"  # 0: that of query; None: that of query, bfloat16 for float8
)
_MERGE = "Tensor prefix_out, Tensor prefix_lse, Tensor suffix_out, Tensor suffix_lse"
_HADAMARD = "Tensor x, *, bool inverse=False, bool signs=False"


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _reshape_and_cache(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    kv_cache_dtype,
    *,
    k_scale_cache=None,
    v_scale_cache=None,
    k_scale=None,
    v_scale=None,
    error_counter=None,
):
    views = _quire.KVCacheViews(key_cache, value_cache, k_scale_cache, v_scale_cache)
    _quire.reshape_and_cache(
        key,
        value,
        views,
        slot_mapping,
        mode=kv_cache_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
        error_counter=error_counter,
    )


_plans: dict[tuple, AttentionPlan] = {}


def _unified_attention_out(
    out,
    lse,
    query,
    key_cache,
    value_cache,
    cu_seqlens_q,
    seq_lens,
    block_table,
    softmax_scale,
    kv_cache_dtype,
    *,
    k_scale_cache=None,
    v_scale_cache=None,
    max_query_len=0,
    max_seq_len=0,
    **options,
):
    views = _quire.KVCacheViews(key_cache, value_cache, k_scale_cache, v_scale_cache)
    arguments = (query, out, views, cu_seqlens_q, seq_lens, block_table, softmax_scale)
    options.update(mode=kv_cache_dtype, lse=lse)
    if max_query_len <= 0 or max_seq_len <= 0:  # the CPU reads the lengths; CUDA says what is missing
        _quire.unified_attention(*arguments, **options, max_query_len=max_query_len, max_seq_len=max_seq_len)
        return
    caches = tuple(
        (c.shape, c.stride(), c.dtype, c.data_ptr() % 16)
        for c in (key_cache, value_cache, k_scale_cache, v_scale_cache)
        if c is not None
    )
    key = (
        kv_cache_dtype,
        query.shape,
        query.dtype,
        query.device,
        out.shape[-1],
        caches,
        seq_lens.shape,
        max_query_len,
        max_seq_len,
    )
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 256:
            _plans.clear()
        problem = problem_of(*arguments, **options, max_query_len=max_query_len, max_seq_len=max_seq_len)
        plan = _plans[key] = plan_unified_attention(problem)
    workspace = None
    if plan.workspace_bytes:
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=query.device)
    _quire.run_unified_attention(plan, *arguments, **options, workspace=workspace)


def _merge_attn_states_out(out, lse, prefix_out, prefix_lse, suffix_out, suffix_lse):
    _quire.merge_attn_states(out, prefix_out, prefix_lse, suffix_out, suffix_lse, lse=lse)


def _hadamard_out(out, x, *, inverse=False, signs=False):
    _quire.hadamard(x, out, inverse=inverse, signs=signs)


# ---- results: the same code for real and for fake tensors ------------------------------------------------------------


def _attention_result(query, options):
    head_size_v, dtype = options.pop("head_size_v", 0), options.pop("out_dtype", None)
    if dtype is None:
        dtype = query.dtype if query.dtype.itemsize > 1 else torch.bfloat16
    return query.new_empty((query.shape[0], query.shape[1], head_size_v or query.shape[2]), dtype=dtype)


def _lse_of(query):
    return query.new_empty(query.shape[:2], dtype=torch.float32)


def _unified_attention(query, *arguments, **options):
    out = _attention_result(query, options)
    _unified_attention_out(out, None, query, *arguments, **options)
    return out


def _unified_attention_lse(query, *arguments, **options):
    out, lse = _attention_result(query, options), _lse_of(query)
    _unified_attention_out(out, lse, query, *arguments, **options)
    return out, lse


def _merge_attn_states(prefix_out, prefix_lse, suffix_out, suffix_lse):
    out, lse = prefix_out.new_empty(prefix_out.shape), prefix_lse.new_empty(prefix_lse.shape)
    _merge_attn_states_out(out, lse, prefix_out, prefix_lse, suffix_out, suffix_lse)
    return out, lse


def _hadamard(x, *, inverse=False, signs=False):
    out = x.new_empty(x.shape)
    _hadamard_out(out, x, inverse=inverse, signs=signs)
    return out


def _nothing(*arguments, **options):
    return None


_OPERATORS = {  # name: arguments, what it answers, the kernel, the fake kernel
    "reshape_and_cache": (_STORE, "()", _reshape_and_cache, _nothing),
    "unified_attention": (
        _READ + _RESULT,
        "Tensor",
        _unified_attention,
        lambda query, *arguments, **options: _attention_result(query, options),
    ),
    "unified_attention_lse": (
        _READ + _RESULT,
        "(Tensor, Tensor)",
        _unified_attention_lse,
        lambda query, *arguments, **options: (_attention_result(query, options), _lse_of(query)),
    ),
    "unified_attention_out": ("Tensor(a!) out, Tensor(b!)? lse, " + _READ, "()", _unified_attention_out, _nothing),
    "merge_attn_states": (
        _MERGE,
        "(Tensor, Tensor)",
        _merge_attn_states,
        lambda out, lse, *others: (out.new_empty(out.shape), lse.new_empty(lse.shape)),
    ),
    "merge_attn_states_out": ("Tensor(a!) out, Tensor(b!)? lse, " + _MERGE, "()", _merge_attn_states_out, _nothing),
    "hadamard": (_HADAMARD, "Tensor", _hadamard, lambda x, **options: x.new_empty(x.shape)),
    "hadamard_out": ("Tensor(a!) out, " + _HADAMARD, "()", _hadamard_out, _nothing),
}

_library = torch.library.Library("quire", "DEF")
for _name, (_arguments, _answer, _kernel, _fake) in _OPERATORS.items():
    _library.define(f"{_name}({_arguments}) -> {_answer}", tags=(torch.Tag.needs_fixed_stride_order,))
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"quire::{_name}", _fake, lib=_library)
    globals()[_name] = getattr(torch.ops.quire, _name)
__all__ = list(_OPERATORS)
