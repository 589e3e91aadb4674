"""kv_cache_dtypes of vLLM and the modes of quire: which there are, what their pages hold, and views of such pages.

The pages are vLLM's own: for each token and head ``[K | V]``, with an fp32 scale after K and after V in the
``*_per_token_head`` modes. That is quire's packing ``kv_in_row`` with inline scales, so make_layout knows every offset.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

import quire

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

# The formats of vLLM 0.33 that quire serves, by kv_cache_dtype. vLLM stores e4m3 whatever the fp8 is called.
VLLM_MODES = {name: name for name in ("auto", "bfloat16", "float16", "int8_per_token_head", "fp8_per_token_head",
                                      "int4_per_token_head")}
VLLM_MODES |= {"fp8": "fp8", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8"}
TURBOQUANT_MODES = {f"turboquant_{name}": f"turboquant_{name}" for name in ("k8v4", "4bit_nc", "k3v4_nc", "3bit_nc")}
# Those that vLLM does not have; they reach it through register_kv_cache_dtype.
OWN_MODES = {name: name for name in ("int2_per_token_head", "k=int8_per_token_head,v=int4_per_token_head",
                                     "k=fp8_per_token_head,v=int4_per_token_head")}
MODES = VLLM_MODES | TURBOQUANT_MODES | OWN_MODES

_own_mode_in_use: str | None = None


def register_kv_cache_dtypes() -> None:
    """Tells vLLM's configuration about OWN_MODES."""
    from vllm.config.cache import get_kv_cache_dtype_handler, register_kv_cache_dtype
    from vllm.v1.kv_cache_interface import KVQuantMode

    for name in OWN_MODES:
        if get_kv_cache_dtype_handler(name) is not None:
            continue

        class Handler:
            def torch_dtype(self) -> torch.dtype:
                return torch.uint8

            def quant_mode(self) -> KVQuantMode:
                return KVQuantMode.CUSTOM

        Handler.name = name
        register_kv_cache_dtype(name)(Handler)


def use(kv_cache_dtype: str) -> str:
    """The mode of a layer's kv_cache_dtype.

    A KVCacheSpec names vLLM's own formats but says of all others only that they are custom, so a process keeps in mind
    which of OWN_MODES its layers were made with. An engine has one kv_cache_dtype, besides "auto".
    """
    global _own_mode_in_use
    if kv_cache_dtype not in MODES:
        raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}; quire serves {', '.join(MODES)}")
    if kv_cache_dtype in OWN_MODES:
        _own_mode_in_use = kv_cache_dtype
    return MODES[kv_cache_dtype]


def mode_of_spec(spec: AttentionSpec) -> str | None:
    """The mode of a layer's spec; None for the float formats and fp8 per tensor, whose bytes vLLM counts itself."""
    name = spec.kv_quant_mode.name.lower()
    if name in TURBOQUANT_MODES or name.endswith("_per_token_head"):
        return MODES[name]
    if spec.kv_quant_mode.is_custom_mode and spec.dtype == torch.uint8:
        if _own_mode_in_use is None:
            raise ValueError("the KV cache's format is a custom one, and no layer of this process told quire which")
        return OWN_MODES[_own_mode_in_use]
    return None


@functools.cache
def layout_of(mode: str, num_kv_heads: int, head_size: int, head_size_v: int, block_size: int,
              model_dtype: str) -> quire.KVCacheLayout:
    """Where K, V and their scales are inside one token's and head's bytes."""
    return quire.make_layout(quire.KVCacheSpec(mode, head_size=head_size, head_size_v=head_size_v,
                                               num_kv_heads=num_kv_heads, block_size=block_size,
                                               model_dtype=model_dtype, packing="kv_in_row", scales="inline"))


def content_bytes(spec: AttentionSpec) -> int | None:
    """The bytes of one token and head, or None where vLLM knows them."""
    mode = mode_of_spec(spec)
    if mode is None:
        return None
    return layout_of(mode, spec.num_kv_heads, spec.head_size, spec.head_size_v, 16, "bfloat16").bytes_per_token_head


def views_of(kv_cache: torch.Tensor, mode: str, head_size: int, head_size_v: int) -> quire.KVCacheViews:
    """The cache of a layer as quire's ops take it.

    kv_cache: [num_blocks, Hk, block_size, content], as vLLM hands it over: any strides, but that content is contiguous.
    """
    _, num_kv_heads, block_size, _ = kv_cache.shape
    model_dtype = kv_cache.dtype if kv_cache.dtype.is_floating_point and kv_cache.element_size() > 1 else "bfloat16"
    layout = layout_of(mode, num_kv_heads, head_size, head_size_v, block_size, quire.layout.dtype_name(model_dtype))
    content = kv_cache.transpose(1, 2).view(torch.uint8)

    def rows(offset: int, num_bytes: int, dtype: str) -> torch.Tensor:
        return content[..., offset:offset + num_bytes].view(getattr(torch, dtype))

    def scales(offset: int, num_bytes: int, row_offset: int) -> Any:
        return rows(row_offset + offset, num_bytes, "float32")[..., 0] if num_bytes else None

    return quire.KVCacheViews(
        rows(0, layout.k_data_bytes, layout.key_cache_dtype),
        rows(layout.v_offset, layout.v_data_bytes, layout.value_cache_dtype),
        scales(layout.k_scale_offset, layout.k_scale_bytes, 0),
        scales(layout.v_scale_offset, layout.v_scale_bytes, layout.v_offset),
        mode=mode)
