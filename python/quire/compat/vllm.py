"""The names of vLLM 0.33.0's Triton kernels, with vLLM's signatures, over quire's ops.

    from vllm.v1.attention.ops.triton_unified_attention import unified_attention      # before
    from quire.compat.vllm import unified_attention                                   # after

Tensors are PyTorch's, on the CPU or on a GPU, and are never copied but for dtypes that vLLM's kernels convert while
they load (slopes, sinks and the like, a few numbers each). N query tokens of B sequences, T stored tokens, Hq query
heads, Hk KV heads, head sizes d of K and dv of V. docs/python_vllm.md lists every difference.
"""

from __future__ import annotations

import enum
from typing import Any

import torch

from . import _call
from ._rotate import fast_hadamard_transform, single_rht
from ._turboquant import triton_turboquant_decode_attention, triton_turboquant_store
from ._turboquant_config import TQ_PRESETS, TurboQuantConfig, get_centroids, solve_lloyd_max

__all__ = [
    "KVQuantMode",
    "TQ_PRESETS",
    "TurboQuantConfig",
    "fast_hadamard_transform",
    "get_centroids",
    "get_kv_quant_mode",
    "is_quantized_kv_cache",
    "kv_cache_uses_per_token_head_scales",
    "reshape_and_cache_int4",
    "single_rht",
    "solve_lloyd_max",
    "triton_reshape_and_cache_flash",
    "triton_reshape_and_cache_flash_diffkv",
    "triton_reshape_and_cache_flash_per_token_head_quant",
    "triton_turboquant_decode_attention",
    "triton_turboquant_store",
    "unified_attention",
    "unified_attention_diffkv",
    "unified_attention_int4",
]


class KVQuantMode(enum.IntEnum):
    """vLLM 0.33.0's enum. quire serves NONE, FP8_PER_TENSOR, *_PER_TOKEN_HEAD and TURBOQUANT_*.

    Its functions take members of any version's enum and look at the name: the numbers have moved (5 was INT2 once).
    """

    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4
    NVFP4 = 5
    TURBOQUANT_K8V4 = 6
    TURBOQUANT_4BIT_NC = 7
    TURBOQUANT_K3V4_NC = 8
    TURBOQUANT_3BIT_NC = 9
    NVFP4_DS_MLA = 10
    ULTRAQUANT_4BIT = 11
    OCTAVE_K3V4 = 12
    OCTAVE_K3V3 = 13
    OCTAVE_K3V3_COMPACT = 14
    CUSTOM = 12  # an alias of OCTAVE_K3V4, as in vLLM

    @property
    def is_per_token_head(self) -> bool:
        """Whether the mode has an fp32 scale for each (token, head)."""
        return self.name.endswith("_PER_TOKEN_HEAD")

    @property
    def is_nvfp4(self) -> bool:
        """Whether it is NVFP4."""
        return self is KVQuantMode.NVFP4

    @property
    def is_turboquant(self) -> bool:
        """Whether it is one of TurboQuant's four."""
        return self.name.startswith("TURBOQUANT_")

    @property
    def is_ultraquant(self) -> bool:
        """Whether it is UltraQuant."""
        return self is KVQuantMode.ULTRAQUANT_4BIT

    @property
    def is_octave(self) -> bool:
        """Whether it is one of Octave's three."""
        return self.name.startswith("OCTAVE_")

    @property
    def is_custom_mode(self) -> bool:
        """Whether it is CUSTOM, and so, in vLLM too, OCTAVE_K3V4."""
        return self is KVQuantMode.CUSTOM


def get_kv_quant_mode(kv_cache_dtype: str) -> KVQuantMode:
    """The mode of a ``kv_cache_dtype``; NONE for what the enum does not know, and KeyError for an unknown name that
    begins with ``turboquant_`` or ``octave_``."""
    if kv_cache_dtype.startswith("nvfp4"):
        return KVQuantMode.NVFP4_DS_MLA if kv_cache_dtype == "nvfp4_ds_mla" else KVQuantMode.NVFP4
    if kv_cache_dtype.startswith(("turboquant_", "octave_")):
        return KVQuantMode[kv_cache_dtype.upper()]
    named = {mode.name.lower(): mode for mode in KVQuantMode if mode.is_per_token_head or mode.is_ultraquant}
    if kv_cache_dtype in named:
        return named[kv_cache_dtype]
    return KVQuantMode.FP8_PER_TENSOR if kv_cache_dtype.startswith("fp8") else KVQuantMode.NONE


def is_quantized_kv_cache(kv_cache_dtype: str) -> bool:
    """Whether its mode is another than NONE."""
    return get_kv_quant_mode(kv_cache_dtype) != KVQuantMode.NONE


def kv_cache_uses_per_token_head_scales(kv_cache_dtype: str) -> bool:
    """Whether it is one of the ``*_per_token_head`` dtypes."""
    return get_kv_quant_mode(kv_cache_dtype).is_per_token_head


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
    causal: bool | torch.Tensor,
    window_size: tuple[int, int],
    block_table: torch.Tensor,
    softcap: float | None,
    q_descale: Any,
    k_descale: Any,
    v_descale: Any,
    seq_threshold_3D: int | None = None,
    num_par_softmax_segments: int | None = None,
    softmax_segm_output: torch.Tensor | None = None,
    softmax_segm_max: torch.Tensor | None = None,
    softmax_segm_expsum: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    output_scale: Any = None,
    qq_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    mm_prefix_range: torch.Tensor | None = None,
    rswa_prefix_lens: torch.Tensor | None = None,
    rswa_window: int | None = None,
    use_alibi_sqrt: bool = False,
    kv_quant_mode: Any = KVQuantMode.NONE,
    k_scale_cache: torch.Tensor | None = None,
    v_scale_cache: torch.Tensor | None = None,
    chunk_lookback: int = -1,
    use_td: bool = False,
    mm_prefix_clamp_sliding_window: bool = False,
) -> None:
    """Paged attention, written into ``out``.

    q: [N, Hq, d] Float or float8. k: [num_blocks, block_size, Hk, row], v the same with V's row; rows of float, float8,
    int8, or packed in uint8; the last dimension may be wider than the row, as vLLM's views with inline scales are. out:
    [N, Hq, dv] Float or float8_e4m3fn. cu_seqlens_q: [B + 1], seqused_k: [B], block_table: [B, max_blocks], integers.
    max_seqlen_q, max_seqlen_k: bounds on the lengths; quire plans with them, so on CUDA they must hold.

    causal: a bool, or a bool or integer of each sequence. window_size: (W - 1, anything); below 0: none. softcap: None
    and <= 0 are off. q_descale, k_descale, v_descale: read for FP8_PER_TENSOR alone; a number, one element, or [B, Hk].
    k_scale_cache, v_scale_cache: [num_blocks, block_size, Hk] float32, of the *_PER_TOKEN_HEAD modes, any strides.
    alibi_slopes [Hq], sinks [Hq], qq_bias [Lq, Lq]: any Float. output_scale: out is result / output_scale, saturated to
    float8_e4m3fn's range. mm_prefix_range: [B, R, 2]. rswa_prefix_lens: [B], with rswa_window.
    seq_threshold_3D, num_par_softmax_segments, softmax_segm_*, use_td: ignored. quire splits as its plan says.

    AssertionError, ValueError: as vLLM. quire.Error: what else is wrong; nothing has been written then.
    """
    name = _call.enum_name(kv_quant_mode, KVQuantMode)
    if name != "FP8_PER_TENSOR":
        q_descale = k_descale = v_descale = None
    elif q.dtype not in _call.FLOAT8:
        q_descale = None
    _call.attend(
        _call.mode_of(name, k),
        q,
        k,
        v,
        out,
        cu_seqlens_q=cu_seqlens_q,
        seqused_k=seqused_k,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        use_alibi_sqrt=use_alibi_sqrt,
        qq_bias=qq_bias,
        mm_prefix_range=mm_prefix_range,
        mm_prefix_clamp=mm_prefix_clamp_sliding_window,
        rswa_prefix_lens=rswa_prefix_lens,
        rswa_window=rswa_window,
        chunk_lookback=chunk_lookback,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        output_scale=output_scale,
        k_scale_cache=k_scale_cache,
        v_scale_cache=v_scale_cache,
    )


def unified_attention_int4(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    window_size: tuple[int, int],
    block_table: torch.Tensor,
    softcap: float,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    use_alibi_sqrt: bool,
    qq_bias: torch.Tensor | None,
    output_scale: torch.Tensor | None,
    mm_prefix_range: torch.Tensor | None,
    k_scale_cache: torch.Tensor,
    v_scale_cache: torch.Tensor,
    seq_threshold_3D: int | None = None,
    num_par_softmax_segments: int | None = None,
    softmax_segm_output: torch.Tensor | None = None,
    softmax_segm_max: torch.Tensor | None = None,
    softmax_segm_expsum: torch.Tensor | None = None,
) -> None:
    """unified_attention of INT4_PER_TOKEN_HEAD, causal: q and out are not rotated, the cache is."""
    unified_attention(
        q,
        k_cache,
        v_cache,
        out,
        cu_seqlens_q,
        max_seqlen_q,
        seqused_k,
        max_seqlen_k,
        softmax_scale,
        True,
        window_size,
        block_table,
        softcap,
        None,
        None,
        None,
        alibi_slopes=alibi_slopes,
        output_scale=output_scale,
        qq_bias=qq_bias,
        sinks=sinks,
        mm_prefix_range=mm_prefix_range,
        use_alibi_sqrt=use_alibi_sqrt,
        kv_quant_mode=KVQuantMode.INT4_PER_TOKEN_HEAD,
        k_scale_cache=k_scale_cache,
        v_scale_cache=v_scale_cache,
    )


def unified_attention_diffkv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    block_table: torch.Tensor,
    softcap: float | None,
    max_seqlen_q: int = 1,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    use_alibi_sqrt: bool = False,
    seq_threshold_3D: int | None = None,
    num_par_softmax_segments: int | None = None,
    softmax_segm_output: torch.Tensor | None = None,
    softmax_segm_max: torch.Tensor | None = None,
    softmax_segm_expsum: torch.Tensor | None = None,
    k_descale: Any = None,
    v_descale: Any = None,
    q_descale: Any = None,
) -> None:
    """Paged attention where K and V have head sizes of their own, both views of one packed cache.

    q: [N, Hq, d]. k: [num_blocks, block_size, Hk, d], v: [num_blocks, block_size, Hk, dv], Float or float8, last stride
    1. out: [N, Hq, dv]. Descales are applied where they are given. The other arguments are those of unified_attention.
    AssertionError where causal is not true, as in vLLM. max_seqlen_q must bound the query lengths; those of keys are
    bounded by what block_table has room for.
    """
    assert causal, "causal is not true; unified_attention serves the others"
    _call.attend(
        _call.mode_of("NONE", k),
        q,
        k,
        v,
        out,
        cu_seqlens_q=cu_seqlens_q,
        seqused_k=seqused_k,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=True,
        window_size=window_size,
        softcap=softcap,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=_call.table_bound(block_table, k),
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        use_alibi_sqrt=use_alibi_sqrt,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )


def triton_reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    interleaved_v_pack_factor: int = 0,
) -> None:
    """Stores rows as they are, or divided by k_scale and v_scale as float8_e4m3fn.

    key, value: [T, Hk, d] Float or float8. Caches: [num_blocks, block_size, Hk, d], or head-major, K [num_blocks, Hk, d
    / x, block_size, x] with V [num_blocks, Hk, d, block_size]. slot_mapping: [<= T] integers, negative: skipped.
    kv_cache_dtype: "auto" and the names of floats: what the cache's dtype says, scales ignored; "fp8*", fp8_e5m2
    included: float8_e4m3fn, in caches of any dtype of one byte. AssertionError for other names, NotImplementedError for
    an interleaved_v_pack_factor.
    """
    if interleaved_v_pack_factor:
        raise NotImplementedError(f"interleaved_v_pack_factor is {interleaved_v_pack_factor}; supported: 0")
    mode, key_cache, value_cache = _flash_mode(kv_cache_dtype, key_cache, value_cache)
    if mode == "auto" or key.dtype in _call.FLOAT8:
        k_scale = v_scale = None
    _call.store(mode, key, value, key_cache, value_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)


def triton_reshape_and_cache_flash_diffkv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
) -> None:
    """Stores K rows and behind them V rows: kv_cache is [num_blocks, block_size, Hk, d + dv], of any strides."""
    d = key.shape[-1]
    triton_reshape_and_cache_flash(
        key,
        value,
        kv_cache[..., :d],
        kv_cache[..., d : d + value.shape[-1]],
        slot_mapping,
        kv_cache_dtype,
        k_scale,
        v_scale,
    )


def _flash_mode(kv_cache_dtype: str, key_cache: torch.Tensor, value_cache: torch.Tensor) -> tuple[str, Any, Any]:
    if kv_cache_dtype.startswith("fp8") and not kv_cache_dtype.endswith("_per_token_head"):
        # Every name of fp8 means e4m3fn in vLLM's Triton kernels.
        e4m3 = torch.float8_e4m3fn
        return "fp8", key_cache.view(e4m3), value_cache.view(e4m3)
    assert kv_cache_dtype in ("auto", "float16", "half", "bfloat16", "float32", "float"), (
        f"kv_cache_dtype is {kv_cache_dtype}; supported: auto, float16, bfloat16, float32 and fp8"
    )
    return _call.mode_of("NONE", key_cache), key_cache, value_cache


def triton_reshape_and_cache_flash_per_token_head_quant(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    k_scale_cache: torch.Tensor,
    v_scale_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_quant_mode: Any,
) -> None:
    """Quantizes rows with a scale for each (token, head) and stores them.

    key: [T, Hk, d], value: [T, Hk, dv] Float. Caches: [num_blocks, block_size, Hk, row or wider] int8, float8_e4m3fn,
    or uint8. Scale caches: [num_blocks, block_size, Hk] float32, of any strides: views into the pages do. slot_mapping:
    integers, negative: skipped. kv_quant_mode: a *_PER_TOKEN_HEAD member; with another, as in vLLM, the dtype of the
    cache decides, and ValueError where it is neither int8 nor float8_e4m3fn.
    """
    name = _call.enum_name(kv_quant_mode, KVQuantMode)
    if not name.endswith("_PER_TOKEN_HEAD"):
        name = {torch.int8: "INT8_PER_TOKEN_HEAD", torch.float8_e4m3fn: "FP8_PER_TOKEN_HEAD"}.get(key_cache.dtype, "")
        if not name:
            raise ValueError(f"key_cache is {key_cache.dtype}; supported: torch.int8, torch.float8_e4m3fn")
    _call.store(
        _call.mode_of(name, key_cache), key, value, key_cache, value_cache, slot_mapping, k_scale_cache, v_scale_cache
    )


def reshape_and_cache_int4(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale_cache: torch.Tensor,
    v_scale_cache: torch.Tensor,
) -> None:
    """Rotates, quantizes and stores rows as INT4_PER_TOKEN_HEAD."""
    triton_reshape_and_cache_flash_per_token_head_quant(
        key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping, KVQuantMode.INT4_PER_TOKEN_HEAD
    )
