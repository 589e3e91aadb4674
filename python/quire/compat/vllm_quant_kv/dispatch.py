"""The functions of vLLM that look for a backend."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from .. import vllm
from . import get_backend
from .modes import KVQuantMode, mode_key


def triton_reshape_and_cache_flash_per_token_head_quant(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    k_scale_cache: torch.Tensor,
    v_scale_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_quant_mode: Any = None,
) -> None:
    """Quantizes rows and stores them, by ``get_backend(kv_quant_mode).reshape_and_cache``.

    Shapes as in QuantKVBackend.reshape_and_cache. Without a kv_quant_mode the cache's dtype says it, with a
    DeprecationWarning: float8_e4m3fn is FP8_PER_TOKEN_HEAD, everything else INT8_PER_TOKEN_HEAD. int4 and int2 lie in
    uint8, so uint8 rows that are narrower than a row of int8 are a ValueError; vLLM would write over their neighbours.
    """
    if kv_quant_mode is None:
        warnings.warn(
            "triton_reshape_and_cache_flash_per_token_head_quant without kv_quant_mode is deprecated, because a "
            "cache's dtype does not tell int4 from int2; pass the KVQuantMode",
            DeprecationWarning,
            stacklevel=2,
        )
        if key_cache.dtype == torch.float8_e4m3fn:
            kv_quant_mode = KVQuantMode.FP8_PER_TOKEN_HEAD
        else:
            kv_quant_mode = KVQuantMode.INT8_PER_TOKEN_HEAD
            if key_cache.shape[-1] < key.shape[-1]:
                raise ValueError(
                    f"key_cache has rows of {key_cache.shape[-1]} elements for a head_size of {key.shape[-1]}; "
                    f"pass kv_quant_mode, which this dtype ({key_cache.dtype}) does not tell"
                )
    get_backend(kv_quant_mode).reshape_and_cache(
        key=key,
        value=value,
        key_cache=key_cache,
        value_cache=value_cache,
        slot_mapping=slot_mapping,
        k_scale_cache=k_scale_cache,
        v_scale_cache=v_scale_cache,
    )


def unified_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    block_table: torch.Tensor,
    softcap: float | None,
    q_descale: Any,
    k_descale: Any,
    v_descale: Any,
    **options: Any,
) -> None:
    """quire.compat.vllm.unified_attention, whose arguments it takes; the causal attention of modes that are neither
    NONE nor fp8 per tensor is their backend's, so that a registered one is asked."""
    mode = mode_key(options.get("kv_quant_mode", KVQuantMode.NONE))
    beyond = ("rswa_prefix_lens", "rswa_window", "chunk_lookback", "use_td", "mm_prefix_clamp_sliding_window")
    if (
        mode in (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR)
        or causal is not True
        or any(n in options for n in beyond)
    ):
        vllm.unified_attention(
            q,
            k,
            v,
            out,
            cu_seqlens_q,
            max_seqlen_q,
            seqused_k,
            max_seqlen_k,
            softmax_scale,
            causal,
            window_size,
            block_table,
            softcap,
            q_descale,
            k_descale,
            v_descale,
            **{**options, "kv_quant_mode": mode},
        )
        return
    options.pop("kv_quant_mode")
    for name in ("sinks", "alibi_slopes", "qq_bias", "output_scale", "mm_prefix_range"):
        options.setdefault(name, None)
    options.setdefault("use_alibi_sqrt", False)
    get_backend(mode).unified_attention(
        q,
        k,
        v,
        out,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        seqused_k=seqused_k,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=softmax_scale,
        window_size=window_size,
        block_table=block_table,
        softcap=softcap,
        **options,
    )
