"""What quire's four backends have in common: quire's ops serve every mode in the same way."""

from __future__ import annotations

from typing import Any

import torch

from ..vllm import triton_reshape_and_cache_flash_per_token_head_quant, unified_attention
from .base import QuantKVBackend
from .modes import KVQuantMode


class PerTokenHeadBackend(QuantKVBackend):
    """Stores and reads one of the ``*_per_token_head`` modes. ``reshape_and_cache`` without scale caches is an
    AssertionError."""

    needs_scale_caches = True

    def __init__(self, mode: KVQuantMode) -> None:
        self.mode = mode
        self.packing_factor = mode.packing_factor

    def reshape_and_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        *,
        k_scale_cache: torch.Tensor | None = None,
        v_scale_cache: torch.Tensor | None = None,
    ) -> None:
        assert k_scale_cache is not None and v_scale_cache is not None, (
            f"{self.mode.name} needs k_scale_cache and v_scale_cache"
        )
        triton_reshape_and_cache_flash_per_token_head_quant(
            key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping, self.mode
        )

    def unified_attention(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor, **options: Any
    ) -> None:
        unified_attention(
            q,
            k_cache,
            v_cache,
            out,
            causal=True,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            kv_quant_mode=self.mode,
            **options,
        )
