"""The DiffKV attention backend: K and V have head sizes of their own and lie in one row, K first."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..vllm import triton_reshape_and_cache_flash_diffkv, unified_attention_diffkv
from .attention import (
    AttentionType,
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
    check_block_size,
    next_power_of_2,
)
from .modes import is_quantized_kv_cache


class TritonAttentionDiffKVMetadataBuilder(TritonAttentionMetadataBuilder):
    """The parent's, with a softmax_segm_output as wide as a row of V."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        width = next_power_of_2(TritonAttentionDiffKVBackend.head_size_v)
        self.softmax_segm_output = self._scratch(
            self.seq_threshold_3D, self.num_heads_q, self.num_par_softmax_segments, width
        )


class TritonAttentionDiffKVBackend(TritonAttentionBackend):
    """What the DiffKV backend can do, and the shapes of its caches."""

    #: V's head size, of the layers that are being made.
    head_size_v: int = 128

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16"]
    _stride_orders: ClassVar[dict[tuple[str, bool], tuple[int, ...]]] = {
        ("NHD", False): (0, 1, 2, 3),
        ("HND", False): (0, 2, 1, 3),
        ("NHD", True): (1, 0, 2, 3, 4),
        ("HND", True): (1, 3, 0, 2, 4),
    }

    @classmethod
    def set_head_size_v(cls, head_size_v: int) -> None:
        """Sets V's head size for the layers made from here on."""
        cls.head_size_v = head_size_v

    @staticmethod
    def get_name() -> str:
        return "TRITON_ATTN_DIFFKV"

    @staticmethod
    def get_impl_cls() -> type:
        return TritonAttentionDiffKVImpl

    @staticmethod
    def get_builder_cls() -> type:
        return TritonAttentionDiffKVMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """(num_blocks, block_size, num_kv_heads, head_size + head_size_v)."""
        check_block_size(block_size)
        return (num_blocks, block_size, num_kv_heads, head_size + TritonAttentionDiffKVBackend.head_size_v)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER


class TritonAttentionDiffKVImpl(TritonAttentionImpl):
    """One layer's attention over a packed cache, [num_blocks, block_size, num_kv_heads, head_size + head_size_v].

    ``allow_fp8`` is False, as in the document: a quantized cache is refused. Set it, and caches of fp8 per tensor are
    served, as vLLM 0.33.0 does.
    """

    allow_fp8: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """The parent's arguments. NotImplementedError for quantized caches and for chunk_lookback."""
        super().__init__(*args, **kwargs)
        if self._is_per_token_head_quant:
            raise NotImplementedError(f"kv_cache_dtype is {self.kv_cache_dtype!r}; DiffKV has no scales for each token")
        if is_quantized_kv_cache(self.kv_cache_dtype) and not self.allow_fp8:
            raise NotImplementedError(
                f"kv_cache_dtype is {self.kv_cache_dtype!r}; DiffKV takes caches that are not "
                f"quantized, unless allow_fp8 is set"
            )
        if self.chunk_lookback > -1:
            raise NotImplementedError(f"chunk_lookback is {self.chunk_lookback}; DiffKV has no chunked attention")
        # The attribute belongs to the class in vLLM, so that a second layer changes the first one's; here it is a
        # layer's.
        self.head_size_v = TritonAttentionDiffKVBackend.head_size_v

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Stores key [T, num_kv_heads, head_size] and value [T, num_kv_heads, head_size_v]."""
        triton_reshape_and_cache_flash_diffkv(
            key, value, kv_cache, slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale
        )

    def fused_rope_kvcache_supported(self) -> bool:
        """False: the packed row is no pair of caches."""
        return False

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TritonAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends with query [T, num_heads, head_size] and writes output [T, num_heads, head_size_v] up to
        num_actual_tokens; returns it, filled with 0 where there is no metadata. key and value are not used.

        NotImplementedError for an output scale, before anything else; AssertionError where use_cascade is not False.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("an output scale is given; DiffKV writes the query's dtype")
        if attn_metadata is None:
            return output.fill_(0)
        assert attn_metadata.use_cascade is False, "use_cascade is not False; DiffKV has no cascade attention"

        num_tokens = attn_metadata.num_actual_tokens
        quantized = is_quantized_kv_cache(self.kv_cache_dtype)
        if quantized:
            kv_cache = kv_cache.view(self.fp8_dtype)
        fp8_query = quantized and query.dtype == self.fp8_dtype
        unified_attention_diffkv(
            q=query[:num_tokens],
            k=kv_cache[..., : self.head_size],
            v=kv_cache[..., self.head_size : self.head_size + self.head_size_v],
            out=output[:num_tokens],
            cu_seqlens_q=attn_metadata.query_start_loc,
            seqused_k=attn_metadata.seq_lens,
            softmax_scale=self.scale,
            causal=True,
            alibi_slopes=self.alibi_slopes,
            use_alibi_sqrt=self.use_alibi_sqrt,
            window_size=self.sliding_window,
            block_table=attn_metadata.block_table,
            softcap=self.logits_soft_cap,
            sinks=self.sinks,
            max_seqlen_q=attn_metadata.max_query_len,
            seq_threshold_3D=attn_metadata.seq_threshold_3D,
            num_par_softmax_segments=attn_metadata.num_par_softmax_segments,
            softmax_segm_output=attn_metadata.softmax_segm_output,
            softmax_segm_max=attn_metadata.softmax_segm_max,
            softmax_segm_expsum=attn_metadata.softmax_segm_expsum,
            k_descale=layer._k_scale if quantized else None,
            v_descale=layer._v_scale if quantized else None,
            q_descale=layer._q_scale if fp8_query else None,
        )
        return output
