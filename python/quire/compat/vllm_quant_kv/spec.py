"""How many bytes a layer's page has, by vLLM's formula."""

from __future__ import annotations

import dataclasses

import torch

from .modes import KVQuantMode

SCALE_BYTES = 4  # fp32, for each (token, head) of K and of V


def _effective_head_size(head_size: int, kv_quant_mode: KVQuantMode) -> int:
    """Elements of the cache that a row's data takes: d, d / 2 for int4, d / 4 for int2. Its scale is not in it; the
    page formula adds that."""
    return kv_quant_mode.packed_head_size(head_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One layer's cache: pages of ``block_size`` tokens of ``num_kv_heads`` heads, elements of ``dtype``.

    ``page_size_padded``: the bytes of a page where a group of layers has pages of one size; AssertionError where that
    is less than what is in it.
    """

    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    kv_quant_mode: KVQuantMode = KVQuantMode.NONE
    page_size_padded: int | None = None

    @property
    def _effective_head_size(self) -> int:
        return _effective_head_size(self.head_size, self.kv_quant_mode)

    @property
    def _effective_head_size_v(self) -> int:
        return self._effective_head_size

    @property
    def real_page_size_bytes(self) -> int:
        """The bytes of a page, scales included, padding not."""
        rows = self.block_size * self.num_kv_heads
        data = rows * (self._effective_head_size + self._effective_head_size_v) * self.dtype.itemsize
        return data + (2 * rows * SCALE_BYTES if self.kv_quant_mode.is_per_token_head else 0)

    @property
    def page_size_bytes(self) -> int:
        """The bytes of a page."""
        real = self.real_page_size_bytes
        if self.page_size_padded is None:
            return real
        assert self.page_size_padded >= real, f"page_size_padded is {self.page_size_padded}; a page has {real} bytes"
        return self.page_size_padded


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullAttentionSpec(AttentionSpec):
    """AttentionSpec with a head size of V's own; None: that of K."""

    head_size_v: int | None = None

    def __post_init__(self) -> None:
        if self.head_size_v is None:
            object.__setattr__(self, "head_size_v", self.head_size)

    @property
    def _effective_head_size_v(self) -> int:
        return _effective_head_size(self.head_size_v or self.head_size, self.kv_quant_mode)
