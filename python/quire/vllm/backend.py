"""quire as an attention backend of vLLM: under its own name, and in the place of three of vLLM's."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import EncoderOnlyAttentionSpec, CrossAttentionSpec, KVCacheLayout

import quire

from . import modes
from .impl import QuireImpl
from .metadata import QuireMetadataBuilder


class QuireBackend(AttentionBackend):
    """``--attention-backend QUIRE``: decoder layers in every format of modes.MODES."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(modes.MODES)

    @staticmethod
    def get_name() -> str:
        return "QUIRE"

    @staticmethod
    def get_impl_cls() -> type:
        return QuireImpl

    @staticmethod
    def get_builder_cls() -> type:
        return QuireMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC, KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Says how many bytes a token and head take, where they are not head_size elements of the cache's dtype."""
        if spec.state_content_bytes is not None:
            return spec
        content = modes.content_bytes(spec)
        return spec if content is None else dataclasses.replace(spec, state_content_bytes=content)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 1 <= head_size <= 512

    @classmethod
    def supports_combination(cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None,
                             block_size: int | None, use_mla: bool, has_sink: bool, use_sparse: bool,
                             use_mm_prefix: bool, device_capability: Any) -> str | None:
        """The sentence with which quire refuses a decode of one token with these, or None."""
        try:
            quire.supports(quire.AttentionProblem(
                mode=modes.MODES.get(kv_cache_dtype or "auto", "auto"), num_q_heads=1, num_kv_heads=1,
                head_size=head_size, block_size=block_size or 16, max_num_tokens=1, max_batch=1, max_query_len=1,
                max_seq_len=16, query_dtype=dtype, key_cache_dtype=dtype, value_cache_dtype=dtype))
        except quire.Error as refusal:
            return str(refusal)
        return None

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_rswa(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True


def in_place_of(name: str, path: str) -> type[QuireBackend]:
    """A backend that serves decoder layers under the name of one of vLLM's, and leaves encoder layers, which have no KV
    cache, to that one. Both kinds of layer get an implementation and a builder by what they are constructed with."""
    module, _, vllm_class = path.rpartition(".")

    def original() -> type[AttentionBackend]:
        import importlib

        return getattr(importlib.import_module(module), vllm_class)

    class Impl(QuireImpl):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            attn_type = kwargs.get("attn_type", args[8] if len(args) > 8 else AttentionType.DECODER)
            if attn_type != AttentionType.DECODER:
                return original().get_impl_cls()(*args, **kwargs)
            return super().__new__(cls)

    class Builder(QuireMetadataBuilder):
        def __new__(cls, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(kv_cache_spec, (EncoderOnlyAttentionSpec, CrossAttentionSpec)):
                return original().get_builder_cls()(kv_cache_spec, *args, **kwargs)
            return super().__new__(cls)

    class Backend(QuireBackend):
        @staticmethod
        def get_name() -> str:
            return name

        @staticmethod
        def get_impl_cls() -> type:
            return Impl

        @staticmethod
        def get_builder_cls() -> type:
            return Builder

        @classmethod
        def supports_attn_type(cls, attn_type: str) -> bool:
            return attn_type == AttentionType.DECODER or original().supports_attn_type(attn_type)

    return Backend


def _backend(name: str, qualname: str, kv_cache_dtypes: dict[str, str]) -> type[QuireBackend]:
    backend = in_place_of(name, AttentionBackendEnum[name].value)
    backend.__name__ = backend.__qualname__ = qualname
    backend.__module__ = __name__
    backend.supported_kv_cache_dtypes = list(kv_cache_dtypes)
    return backend


QuireTritonAttentionBackend = _backend("TRITON_ATTN", "QuireTritonAttentionBackend", modes.VLLM_MODES | modes.OWN_MODES)
QuireTurboQuantBackend = _backend("TURBOQUANT", "QuireTurboQuantBackend", modes.TURBOQUANT_MODES)
QuireCPUAttentionBackend = _backend("CPU_ATTN", "QuireCPUAttentionBackend", modes.MODES)
