"""vLLM's conventions in quire's words: what both compat modules say in the same way.

vLLM's kernels take a window as ``(W - 1, 0)``, a softcap that is off at 0, a causal flag that may be a tensor, scales
that only fp8 per tensor looks at, and caches whose rows may be followed by other bytes.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

import quire

from ..plan import plan_unified_attention, problem_of

MIN_HEAD_SIZE = 32  # of quire's ops; vLLM's stores take any
FP8_MAX = 448.0  # of float8_e4m3fn
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# vLLM reads this when it is imported, and so does this module.
BATCH_INVARIANT = bool(int(os.environ.get("VLLM_BATCH_INVARIANT", "0") or 0))

_ELEMENTS_PER_BYTE = {"int4_per_token_head": 2, "int2_per_token_head": 4}


def mode_of(name: str, cache: torch.Tensor) -> str:
    """The quire mode of the name of a KVQuantMode. Enums of vLLM's versions agree on names, not on numbers."""
    if name == "NONE":  # no scale of its own: the cache's dtype says it all
        return {torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8_e5m2"}.get(cache.dtype, "auto")
    if name == "FP8_PER_TENSOR":
        return "fp8_e5m2" if cache.dtype == torch.float8_e5m2 else "fp8"
    return _named(name)


@functools.cache
def _named(name: str) -> str:
    mode = name.lower()
    try:
        quire.mode_info(mode)
    except quire.NotFoundError:
        raise quire.UnsupportedError(f"kv_quant_mode {name} is none of quire's modes") from None
    return mode


def enum_name(kv_quant_mode: Any, own: Any) -> str:
    """The name of a member of any version's enum; a plain int is one of ``own``."""
    return getattr(kv_quant_mode, "name", None) or own(kv_quant_mode).name


def rows_of(cache: torch.Tensor, mode: str, head_size: int) -> torch.Tensor:
    """The part of a cache's last dimension that is the row: vLLM's views end behind the inline scale, or later."""
    row = head_size // _ELEMENTS_PER_BYTE.get(mode, 1)
    return cache.narrow(-1, 0, row) if cache.shape[-1] > row else cache


def float32(value: Any, like: torch.Tensor) -> torch.Tensor | None:
    """A scale, slope, sink or bias as quire takes it. vLLM's kernels convert while they load."""
    if value is None:
        return None
    if not isinstance(value, torch.Tensor):
        return torch.full((1,), float(value), dtype=torch.float32, device=like.device)
    value = value.detach() if value.requires_grad else value  # sinks and slopes may be parameters
    return value if value.dtype == torch.float32 else value.to(torch.float32)


def int32(value: torch.Tensor | None) -> torch.Tensor | None:
    return value if value is None or value.dtype == torch.int32 else value.to(torch.int32)


def store(
    mode: str,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale_cache: torch.Tensor | None = None,
    v_scale_cache: torch.Tensor | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
) -> None:
    """reshape_and_cache of NHD caches whose last dimension may be wider than the row."""
    head_size, head_size_v = key.shape[-1], value.shape[-1]
    if min(head_size, head_size_v) < MIN_HEAD_SIZE and mode in ("int8_per_token_head", "fp8_per_token_head"):
        _store_narrow(mode, key, value, key_cache, value_cache, slot_mapping, k_scale_cache, v_scale_cache)
        return
    if key_cache.ndim == 4:
        key_cache, value_cache = rows_of(key_cache, mode, head_size), rows_of(value_cache, mode, head_size_v)
    views = quire.KVCacheViews(key_cache, value_cache, k_scale_cache, v_scale_cache, mode=mode)
    quire.reshape_and_cache(
        key, value, views, slot_mapping, k_scale=float32(k_scale, key), v_scale=float32(v_scale, key)
    )


def _store_narrow(mode, key, value, key_cache, value_cache, slot_mapping, k_scale_cache, v_scale_cache):
    """Heads narrower than quire stores: zeros behind a row change neither its absmax nor its codes, so the rows are
    stored wide in a cache of their own and copied over. It waits for the device; no model has such heads."""
    tokens, heads = slot_mapping.shape[0], key.shape[1]
    slots = torch.arange(tokens, device=key.device)
    written = slot_mapping >= 0
    where = slot_mapping[written].long()
    block_size = key_cache.shape[1]
    for rows, cache, scales in ((key, key_cache, k_scale_cache), (value, value_cache, v_scale_cache)):
        width = max(MIN_HEAD_SIZE, rows.shape[-1])
        wide = rows.new_zeros((tokens, heads, width))
        wide[..., : rows.shape[-1]] = rows[:tokens]
        codes = torch.empty((tokens, 1, heads, width), dtype=torch.uint8, device=key.device)
        own_scales = torch.empty((tokens, 1, heads), dtype=torch.float32, device=key.device)
        views = quire.KVCacheViews(codes, torch.empty_like(codes), own_scales, torch.empty_like(own_scales), mode=mode)
        quire.reshape_and_cache(wide, wide, views, slots)
        block, offset = where // block_size, where % block_size
        cache.view(torch.uint8)[block, offset, :, : rows.shape[-1]] = codes[written, 0, :, : rows.shape[-1]]
        scales[block, offset] = own_scales[written, 0]


def attend(
    mode: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool | torch.Tensor,
    window_size: Any,
    softcap: float | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    use_alibi_sqrt: bool = False,
    qq_bias: torch.Tensor | None = None,
    mm_prefix_range: torch.Tensor | None = None,
    mm_prefix_clamp: bool = False,
    rswa_prefix_lens: torch.Tensor | None = None,
    rswa_window: int | None = None,
    chunk_lookback: int = -1,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    output_scale: Any = None,
    k_scale_cache: torch.Tensor | None = None,
    v_scale_cache: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """unified_attention with vLLM's conventions; what it raises and quire does not, vLLM raises in the same way."""
    if sinks is not None:
        assert sinks.shape[0] == q.shape[1], f"sinks has {sinks.shape[0]} elements; q has {q.shape[1]} heads"
    if mode.endswith("_per_token_head"):
        assert k_scale_cache is not None and v_scale_cache is not None, f"{mode} needs k_scale_cache and v_scale_cache"
    if mm_prefix_range is not None and mm_prefix_range.ndim != 3:
        raise ValueError(f"mm_prefix_range is {list(mm_prefix_range.shape)}; supported: [num_seqs, ranges, 2]")

    window = window_size[0] + 1 if window_size[0] >= 0 else -1
    if window < 0:
        chunk_lookback = -1  # chunks are parts of a window
    if chunk_lookback >= 0:
        assert window // (chunk_lookback + 1) > 0, f"a window of {window} has no chunks with lookback {chunk_lookback}"
    rswa = rswa_window is not None and rswa_prefix_lens is not None
    if rswa and chunk_lookback < 0 and not (mm_prefix_clamp and mm_prefix_range is not None):
        window = -1  # R-SWA takes the window's place

    options: dict[str, Any] = {}
    if isinstance(causal, torch.Tensor):
        options["causal_per_seq"] = causal if causal.dtype in (torch.bool, torch.uint8) else causal.ne(0)
    elif not causal:
        options["causal"] = False
    if rswa:
        options["rswa_window"], options["rswa_prefix_lens"] = rswa_window, int32(rswa_prefix_lens)
    if mm_prefix_range is not None:
        options["mm_prefix_range"], options["mm_prefix_clamp_window"] = int32(mm_prefix_range), mm_prefix_clamp
    if alibi_slopes is not None:
        options["alibi_slopes"], options["use_alibi_sqrt"] = float32(alibi_slopes, q), use_alibi_sqrt
    if softcap is not None and softcap > 0:
        options["softcap"] = float(softcap)
    for name, value in (
        ("sinks", sinks),
        ("qq_bias", qq_bias),
        ("q_descale", q_descale),
        ("k_descale", k_descale),
        ("v_descale", v_descale),
    ):
        if value is not None:
            options[name] = float32(value, q)

    # vLLM divides by output_scale for every dtype of out; quire only where out is float8_e4m3fn.
    target = out
    if out.dtype in FLOAT8:
        options["output_scale"] = float32(1.0 if output_scale is None else output_scale, q)
    elif output_scale is not None:
        target = torch.empty(out.shape, dtype=torch.float32, device=out.device)

    views = quire.KVCacheViews(
        rows_of(k, mode, q.shape[-1]), rows_of(v, mode, out.shape[-1]), k_scale_cache, v_scale_cache, mode=mode
    )
    args = (q, target, views, int32(cu_seqlens_q), int32(seqused_k), int32(block_table), float(softmax_scale))
    options.update(
        sliding_window=window,
        chunk_lookback=chunk_lookback,
        lse=lse,
        max_query_len=int(max_seqlen_q),
        max_seq_len=int(max_seqlen_k),
    )
    if BATCH_INVARIANT:
        _attend_batch_invariant(args, options)
    else:
        quire.unified_attention(*args, **options)
    if target is not out:
        out.copy_((target / float32(output_scale, q)).clamp_(-FP8_MAX, FP8_MAX))


def _attend_batch_invariant(args: tuple, options: dict[str, Any]) -> None:
    import dataclasses

    plan = plan_unified_attention(dataclasses.replace(problem_of(*args, **options), batch_invariant=True))
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=args[0].device)
    quire.run_unified_attention(plan, *args, **options, workspace=workspace if plan.workspace_bytes else None)


def table_bound(block_table: torch.Tensor, cache: torch.Tensor) -> int:
    """The keys that a block table has room for: a bound on lengths where the caller gives none."""
    return int(block_table.shape[1]) * int(cache.shape[1])
