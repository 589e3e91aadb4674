"""vLLM's Triton attention backend as it was around pull request 39074: metadata, builder, backend, implementation.

They know nothing of vLLM: a configuration, a layer or a batch is any object with the attributes that are read here.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, ClassVar

import torch

from .. import _call
from ..vllm import triton_reshape_and_cache_flash
from .dispatch import triton_reshape_and_cache_flash_per_token_head_quant, unified_attention
from .modes import KVQuantMode, get_kv_quant_mode, is_quantized_kv_cache, kv_cache_uses_per_token_head_scales
from .spec import SCALE_BYTES

MIN_LAUNCH_GRID_SIZE_2D = 128
NUM_PAR_SOFTMAX_SEGMENTS = 16
FP8_DTYPE = torch.float8_e4m3fn


class AttentionType:
    """What an attention layer attends over."""

    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_ONLY = "encoder_only"
    ENCODER_DECODER = "encoder_decoder"


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclasses.dataclass
class TritonAttentionMetadata:
    """What forward needs of a step. Its softmax buffers have vLLM's shapes; quire's kernels bring their own
    workspace."""

    num_actual_tokens: int  # without padding
    max_query_len: int
    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    max_seq_len: int
    seq_lens: torch.Tensor  # [num_reqs] int32
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32
    slot_mapping: torch.Tensor  # [num_actual_tokens or more] int64

    seq_threshold_3D: int
    num_par_softmax_segments: int
    softmax_segm_output: torch.Tensor
    softmax_segm_max: torch.Tensor
    softmax_segm_expsum: torch.Tensor

    use_cascade: bool = False
    common_prefix_len: int = 0
    cu_prefix_query_lens: torch.Tensor | None = None
    prefix_kv_lens: torch.Tensor | None = None
    suffix_kv_lens: torch.Tensor | None = None

    scheduler_metadata: torch.Tensor | None = None
    prefix_scheduler_metadata: torch.Tensor | None = None
    mm_prefix_range: dict[int, list[tuple[int, int]]] | None = None
    causal: bool | torch.Tensor = True

    @property
    def mm_prefix_range_tensor(self) -> torch.Tensor | None:
        """mm_prefix_range as [num_reqs, ranges, 2] int32, padded with (0, 0); None where there is none."""
        if not self.mm_prefix_range:
            return None
        most = max(len(ranges) for ranges in self.mm_prefix_range.values())
        table = torch.zeros((self.seq_lens.shape[0], max(1, most), 2), dtype=torch.int32)
        for request, ranges in self.mm_prefix_range.items():
            if ranges:
                table[request, : len(ranges)] = torch.tensor(ranges, dtype=torch.int32)
        return table.to(self.seq_lens.device)


class TritonAttentionMetadataBuilder:
    """Makes the metadata of a step from what an engine knows of it."""

    _cudagraph_support: ClassVar[str] = "ALWAYS"

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        """Reads kv_cache_spec.block_size, vllm_config.model_config (get_num_attention_heads and get_num_kv_heads of
        vllm_config.parallel_config, get_head_size) and vllm_config.compilation_config (cudagraph_mode,
        cudagraph_capture_sizes)."""
        self.kv_cache_spec, self.layer_names, self.vllm_config, self.device = (
            kv_cache_spec,
            layer_names,
            vllm_config,
            device,
        )
        self.block_size = kv_cache_spec.block_size
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        self.num_heads_q = model.get_num_attention_heads(parallel)
        self.num_heads_kv = model.get_num_kv_heads(parallel)
        self.headdim = model.get_head_size()
        self.num_par_softmax_segments = NUM_PAR_SOFTMAX_SEGMENTS

        # From this many sequences on vLLM does not split keys. Captured graphs must not straddle it.
        self.seq_threshold_3D = MIN_LAUNCH_GRID_SIZE_2D // self.num_heads_kv
        compilation = vllm_config.compilation_config
        graphs = getattr(compilation.cudagraph_mode, "name", compilation.cudagraph_mode)
        self.decode_cudagraph_enabled = graphs in ("FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "FULL")
        if self.decode_cudagraph_enabled:
            sizes = compilation.cudagraph_capture_sizes
            assert sizes, "cudagraph_mode captures decode, but cudagraph_capture_sizes is empty"
            self.seq_threshold_3D = min(sizes, key=lambda size: abs(size - self.seq_threshold_3D))

        rows = (self.seq_threshold_3D, self.num_heads_q, self.num_par_softmax_segments)
        self.softmax_segm_output = self._scratch(*rows, next_power_of_2(self.headdim))
        self.softmax_segm_max = self._scratch(*rows)
        self.softmax_segm_expsum = self._scratch(*rows)

    def _scratch(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> TritonAttentionMetadata:
        """build, with every sequence of one key, so that capturing is quick."""
        metadata = self.build(0, common_attn_metadata)
        metadata.seq_lens.fill_(1)
        return metadata

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> TritonAttentionMetadata:
        """The metadata of a batch. Reads num_actual_tokens, max_query_len, max_seq_len, query_start_loc, seq_lens,
        block_table_tensor and slot_mapping of common_attn_metadata, and causal where it has one."""
        common = common_attn_metadata
        metadata = TritonAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            seq_threshold_3D=self.seq_threshold_3D,
            num_par_softmax_segments=self.num_par_softmax_segments,
            softmax_segm_output=self.softmax_segm_output,
            softmax_segm_max=self.softmax_segm_max,
            softmax_segm_expsum=self.softmax_segm_expsum,
            use_cascade=common_prefix_len > 0,
            common_prefix_len=common_prefix_len,
            causal=getattr(common, "causal", True),
        )
        if metadata.use_cascade:

            def numbers(*values: int) -> torch.Tensor:
                return torch.tensor(values, dtype=torch.int32, device=self.device)

            metadata.cu_prefix_query_lens = numbers(0, common.num_actual_tokens)
            metadata.prefix_kv_lens = numbers(common_prefix_len)
            metadata.suffix_kv_lens = common.seq_lens - common_prefix_len
        return metadata


def kv_cache_layout() -> str:
    """NHD or HND, as the environment variable VLLM_KV_CACHE_LAYOUT says; NHD without it, ValueError for others."""
    layout = os.environ.get("VLLM_KV_CACHE_LAYOUT") or "NHD"
    if layout not in ("NHD", "HND"):
        raise ValueError(f"VLLM_KV_CACHE_LAYOUT is {layout}; supported: NHD, HND")
    return layout


def check_block_size(block_size: int) -> None:
    if block_size % 16:
        raise ValueError(f"block_size is {block_size}; this backend takes multiples of 16 (quire's ops take any)")


class TritonAttentionBackend:
    """What the backend can do, and the shapes of its caches."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
        "fp8_e5m2",
        "int2_per_token_head",
        "int4_per_token_head",
        "int8_per_token_head",
        "fp8_per_token_head",
    ]
    forward_includes_kv_cache_update: bool = False

    #: (layout, with a layer axis) to the order of strides.
    _stride_orders: ClassVar[dict[tuple[str, bool], tuple[int, ...]]] = {
        ("NHD", False): (0, 1, 2, 3, 4),
        ("HND", False): (0, 1, 3, 2, 4),
        ("NHD", True): (1, 0, 2, 3, 4, 5),
        ("HND", True): (1, 2, 4, 0, 3, 5),
    }

    @staticmethod
    def get_name() -> str:
        return "TRITON_ATTN"

    @staticmethod
    def get_impl_cls() -> type:
        return TritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type:
        return TritonAttentionMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """(num_blocks, 2, block_size, num_kv_heads, row): K and V; a row ends with its fp32 scale where it has one.
        ValueError where block_size is no multiple of 16."""
        check_block_size(block_size)
        mode = get_kv_quant_mode(cache_dtype_str)
        row = mode.packed_head_size(head_size) + (SCALE_BYTES if mode.is_per_token_head else 0)
        return (num_blocks, 2, block_size, num_kv_heads, row)

    @classmethod
    def get_kv_cache_stride_order(cls, include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """How the dimensions of the shape lie in memory, outermost first, for the layout of kv_cache_layout()."""
        return cls._stride_orders[kv_cache_layout(), include_num_layers_dimension]

    @staticmethod
    def use_cascade_attention(*args: Any, **kwargs: Any) -> bool:
        return False

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size >= 32

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in ("decoder", "encoder", "encoder_only", "encoder_decoder")

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return True

    supports_mm_prefix = supports_sink = supports_alibi_sqrt = classmethod(lambda cls: True)
    supports_non_causal = supports_batch_invariance = supports_mm_prefix


class TritonAttentionImpl:
    """One layer's attention over its cache, [num_blocks, 2, block_size, num_kv_heads, row]."""

    # Views of the scales that lie in the pages, made when a cache is first seen.
    _k_scale_cache: torch.Tensor | None = None
    _v_scale_cache: torch.Tensor | None = None

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        use_alibi_sqrt: bool = False,
        chunk_lookback: int = -1,
    ) -> None:
        """sliding_window: W keys with the query's own, None: all. logits_soft_cap: None or 0: none. AssertionError
        where sinks are not one for each head."""
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, float(scale), num_kv_heads
        self.num_queries_per_kv = num_heads // num_kv_heads
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.attn_type = attn_type
        if sliding_window is None:
            self.sliding_window = (-1, -1)
        else:
            self.sliding_window = (sliding_window - 1, sliding_window - 1 if self._is_encoder else 0)
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = 0 if logits_soft_cap is None else logits_soft_cap
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.fp8_dtype = FP8_DTYPE
        if sinks is not None:
            assert sinks.shape[0] == num_heads, f"sinks is {list(sinks.shape)}; the layer has {num_heads} heads"
        self.sinks = sinks
        self.use_alibi_sqrt = use_alibi_sqrt
        self.chunk_lookback = chunk_lookback
        self.supports_quant_query_input = torch.cuda.is_available()
        self._kv_quant_mode = get_kv_quant_mode(kv_cache_dtype)
        self._is_per_token_head_quant = kv_cache_uses_per_token_head_scales(kv_cache_dtype)

    @property
    def _is_encoder(self) -> bool:
        return self.attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Whether forward takes an output_scale of this kind: static, per tensor, symmetric, float8_e4m3fn."""
        scale = getattr(quant_key, "scale", None)
        return (
            scale is not None
            and quant_key.dtype == FP8_DTYPE
            and scale.static
            and quant_key.symmetric
            and getattr(quant_key, "scale2", None) is None
            and tuple(scale.group_shape) == (-1, -1)
        )

    def fused_rope_kvcache_supported(self) -> bool:
        """False: quire's store does not apply rotary embeddings."""
        return False

    def _ensure_scale_caches(self, kv_cache: torch.Tensor) -> None:
        """Makes the views of the fp32 scales at the ends of the rows. vLLM fills them with 1 here; that would wipe out
        the scales of a cache that another layer shares, and rows that were not written are never read, so this does
        not."""
        if self._k_scale_cache is not None:
            return
        bytes_ = kv_cache.view(torch.uint8)
        scales = bytes_[..., bytes_.shape[-1] - SCALE_BYTES :].view(torch.float32)[..., 0]
        self._k_scale_cache, self._v_scale_cache = scales.unbind(1)

    def _caches(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._is_per_token_head_quant:
            self._ensure_scale_caches(kv_cache)
        if is_quantized_kv_cache(self.kv_cache_dtype) and self.kv_cache_dtype.startswith("fp8"):
            kv_cache = kv_cache.view(self.fp8_dtype)
        key_cache, value_cache = kv_cache.unbind(1)
        return key_cache, value_cache

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Stores key and value [T, num_kv_heads, head_size]; layer._k_scale and layer._v_scale are those of fp8 per
        tensor. Encoders keep no cache, and nothing happens."""
        if self._is_encoder:
            return
        key_cache, value_cache = self._caches(kv_cache)
        if self._is_per_token_head_quant:
            triton_reshape_and_cache_flash_per_token_head_quant(
                key,
                value,
                key_cache,
                value_cache,
                self._k_scale_cache,
                self._v_scale_cache,
                slot_mapping,
                kv_quant_mode=self._kv_quant_mode,
            )
        else:
            triton_reshape_and_cache_flash(
                key, value, key_cache, value_cache, slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale
            )

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
        """Attends with query [T, num_heads, head_size] and writes output, of the same shape, up to num_actual_tokens.

        Returns output; without metadata, filled with 0. key and value are an encoder's; others read the cache.
        NotImplementedError for output_block_scale and for an encoder's quantized cache, AssertionError for cascades.
        """
        if output_block_scale is not None:
            raise NotImplementedError("output_block_scale is given; supported: output_scale")
        if attn_metadata is None:
            return output.fill_(0)
        assert attn_metadata.use_cascade is False, "use_cascade is not False; this backend has no cascade attention"
        num_tokens = attn_metadata.num_actual_tokens
        if self._is_encoder:
            return self._forward_encoder_attention(
                query[:num_tokens], key[:num_tokens], value[:num_tokens], output[:num_tokens], attn_metadata, layer
            )
        key_cache, value_cache = self._caches(kv_cache)
        per_tensor = self._kv_quant_mode == KVQuantMode.FP8_PER_TENSOR
        fp8_query = per_tensor and query.dtype == self.fp8_dtype
        unified_attention(
            query[:num_tokens],
            key_cache,
            value_cache,
            output[:num_tokens],
            attn_metadata.query_start_loc,
            attn_metadata.max_query_len,
            attn_metadata.seq_lens,
            attn_metadata.max_seq_len,
            self.scale,
            attn_metadata.causal,
            self.sliding_window,
            attn_metadata.block_table,
            self.logits_soft_cap,
            layer._q_scale if fp8_query else None,
            layer._k_scale if per_tensor else None,
            layer._v_scale if per_tensor else None,
            alibi_slopes=self.alibi_slopes,
            use_alibi_sqrt=self.use_alibi_sqrt,
            sinks=self.sinks,
            output_scale=output_scale,
            mm_prefix_range=attn_metadata.mm_prefix_range_tensor,
            kv_quant_mode=self._kv_quant_mode,
            k_scale_cache=self._k_scale_cache,
            v_scale_cache=self._v_scale_cache,
            **({} if self.chunk_lookback < 0 else {"chunk_lookback": self.chunk_lookback}),
        )
        return output

    def _forward_encoder_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        attn_metadata: TritonAttentionMetadata,
        layer: Any,
    ) -> torch.Tensor:
        """Attention in both directions over key and value themselves: a cache whose pages have one token."""
        if is_quantized_kv_cache(self.kv_cache_dtype):
            raise NotImplementedError(f"kv_cache_dtype is {self.kv_cache_dtype}; an encoder keeps its keys as they are")
        starts = attn_metadata.query_start_loc
        longest = attn_metadata.max_query_len
        pages = starts[:-1, None] + torch.arange(longest, dtype=starts.dtype, device=starts.device)
        _call.attend(
            "auto",
            query,
            key.unsqueeze(1),
            value.unsqueeze(1),
            output,
            cu_seqlens_q=starts,
            seqused_k=attn_metadata.seq_lens,
            block_table=pages,
            softmax_scale=self.scale,
            causal=False,
            window_size=self.sliding_window,
            softcap=self.logits_soft_cap,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            sinks=self.sinks,
        )
        return output
