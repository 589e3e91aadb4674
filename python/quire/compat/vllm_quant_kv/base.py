"""The base class of backends."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from .modes import KVQuantMode


class QuantKVBackend(ABC):
    """Stores, and where it likes also reads, the caches of one mode.

    A subclass sets ``mode`` and has ``reshape_and_cache``; the rest has defaults. An instance is registered with
    ``register``.
    """

    #: The mode that it serves.
    mode: KVQuantMode
    #: Elements of a row for each element of the cache.
    packing_factor: int = 1
    #: Whether the mode needs k_scale_cache and v_scale_cache.
    needs_scale_caches: bool = False

    def packed_head_size(self, head_size: int) -> int:
        """Elements of the cache for a row: ``head_size // packing_factor``; AssertionError where that leaves a rest."""
        assert head_size % self.packing_factor == 0, (
            f"head_size is {head_size}; {self.mode.name} packs multiples of {self.packing_factor}"
        )
        return head_size // self.packing_factor

    def allocate_scale_caches(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        device: torch.device,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The scale caches of K and V: zeros [num_blocks, block_size, num_kv_heads] float32 on ``device``, or (None,
        None) where ``needs_scale_caches`` is False. Override it for another shape or dtype."""
        if not self.needs_scale_caches:
            return (None, None)
        shape = (num_blocks, block_size, num_kv_heads)
        k, v = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
        return (k, v)

    @abstractmethod
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
        """Stores the rows of key [T, Hk, d] and value [T, Hk, dv] into caches [num_blocks, block_size, Hk, row], at the
        slots of slot_mapping [T] (negative: skipped), and their scales, where the mode has them."""

    def unified_attention(
        self,
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
        k_scale_cache: torch.Tensor | None = None,
        v_scale_cache: torch.Tensor | None = None,
        seq_threshold_3D: int | None = None,
        num_par_softmax_segments: int | None = None,
        softmax_segm_output: torch.Tensor | None = None,
        softmax_segm_max: torch.Tensor | None = None,
        softmax_segm_expsum: torch.Tensor | None = None,
    ) -> None:
        """Causal paged attention over the caches of this mode, written into ``out``;
        quire.compat.vllm.unified_attention explains the arguments. NotImplementedError in this class."""
        raise NotImplementedError(f"{type(self).__name__} has no attention of its own")
