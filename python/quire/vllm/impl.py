"""One attention layer of vLLM, served by quire."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from vllm.distributed import get_dcp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

import quire

from . import dcp, modes
from .metadata import QuireMetadata, exchanges, plan_bytes, workspaces

logger = init_logger("vllm.quire")
_MAX_PLANS = 4096


@functools.cache
def _log_once(sentence: str) -> None:
    logger.info(sentence)


class QuireImpl(AttentionImpl[QuireMetadata]):
    """Stores and attends with quire's two ops. A plan is made for each shape of a batch and kept."""

    supports_dcp = True
    can_return_lse_for_decode = True
    lse_base_on_e = True
    supports_mtp_with_cp_non_trivial_interleave_size = True

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
                 alibi_slopes: list[float] | None = None, sliding_window: int | None = None,
                 kv_cache_dtype: str = "auto", logits_soft_cap: float | None = None,
                 attn_type: str = AttentionType.DECODER, kv_sharing_target_layer_name: str | None = None,
                 sinks: torch.Tensor | None = None, use_alibi_sqrt: bool = False, chunk_lookback: int = -1) -> None:
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"attn_type is {attn_type!r}; quire serves decoder layers, which have a KV cache")
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.mode = modes.use(kv_cache_dtype)
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.sinks_fp32 = sinks if sinks is None or sinks.dtype == torch.float32 else None
        self.alibi_slopes = None
        if alibi_slopes is not None:
            self.alibi_slopes = torch.tensor(alibi_slopes, dtype=torch.float32)
        self.sliding_window = -1 if sliding_window is None else sliding_window
        self.softcap = logits_soft_cap or 0.0
        self.per_tensor = self.mode == "fp8"
        self.supports_quant_query_input = self.per_tensor and current_platform.is_cuda() and self.dcp_world_size == 1
        if self.dcp_world_size > 1:
            self._check_dcp(chunk_lookback)
        # What run_unified_attention is given in every call.
        self.options: dict[str, Any] = {"use_alibi_sqrt": use_alibi_sqrt, "softcap": self.softcap,
                                        "chunk_lookback": chunk_lookback}
        self.plans: dict[tuple[Any, ...], tuple[quire.AttentionPlan, torch.Tensor | None]] = {}
        self.views: quire.KVCacheViews | None = None
        self.views_at = (0, 0)
        _log_once(f"quire {quire.__version__} serves attention with kv_cache_dtype {kv_cache_dtype}.")

    def _check_dcp(self, chunk_lookback: int) -> None:
        """A rank knows how many of its keys a query sees, not how far away they are."""
        for name, given in (("sliding_window", self.sliding_window >= 0), ("chunk_lookback", chunk_lookback >= 0),
                            ("alibi_slopes", self.alibi_slopes is not None)):
            if given:
                raise NotImplementedError(f"{name} is given; quire serves decode context parallelism without it")
        if self.num_kv_heads != 1:
            raise NotImplementedError(f"num_kv_heads is {self.num_kv_heads} on a rank; quire serves decode context "
                                      "parallelism with 1, the head that the ranks of the group share")

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return quant_key == kFp8StaticTensorSym and self.dcp_world_size == 1

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        if self.sinks is not None:
            self.sinks_fp32 = self.sinks.detach().float()

    def reserve(self, spec: Any, dtype: torch.dtype, device: torch.device, max_tokens: int, max_batch: int,
                max_seq_len: int) -> None:
        """Allocates the workspace for the largest batch, before a CUDA graph can capture a smaller one."""
        batch_invariant = _batch_invariant()
        size = self.dcp_world_size
        if size > 1:
            exchanges.get(device, dcp.exchange_bytes(max_tokens, self.num_heads, size, spec.head_size_v, dtype))
        for whole_pages in (True, False):
            for query_len in (1, 8, max_tokens):
                problem = quire.AttentionProblem(
                    mode=self.mode, num_q_heads=self.num_heads * size, num_kv_heads=self.num_kv_heads,
                    head_size=spec.head_size, head_size_v=spec.head_size_v, block_size=spec.block_size,
                    max_num_tokens=max_tokens, max_batch=min(max_batch * size, max_tokens), max_query_len=query_len,
                    max_seq_len=max_seq_len, device=_device_name(device), whole_pages=whole_pages,
                    batch_invariant=batch_invariant)
                workspaces.get(device, plan_bytes(problem))

    def cache_of(self, kv_cache: torch.Tensor, head_size_v: int) -> quire.KVCacheViews:
        """The views of the layer's cache, made once for as long as it stays where it is."""
        at = (kv_cache.data_ptr(), kv_cache.shape[0])
        if self.views is None or at != self.views_at:
            self.views = modes.views_of(kv_cache, self.mode, self.head_size, head_size_v)
            self.views_at = at
        return self.views

    def do_kv_cache_update(self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor,
                           slot_mapping: torch.Tensor) -> None:
        """Encodes the new tokens' keys and values into their slots; a negative slot is skipped."""
        cache = self.cache_of(kv_cache, value.shape[2])
        if self.per_tensor:
            quire.reshape_and_cache(key, value, cache, slot_mapping, k_scale=layer._k_scale, v_scale=layer._v_scale)
        else:
            quire.reshape_and_cache(key, value, cache, slot_mapping)

    def forward(self, layer: Any, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None,
                kv_cache: torch.Tensor, attn_metadata: QuireMetadata | None, output: torch.Tensor,
                output_scale: torch.Tensor | None = None,
                output_block_scale: torch.Tensor | None = None) -> torch.Tensor:
        """query [T, Hq, d], output [T, Hq, dv]; rows past the batch's tokens are not touched."""
        if output_block_scale is not None:
            raise NotImplementedError("output_block_scale is given; quire writes fp8 output with one scale")
        if attn_metadata is None:  # a profiling run
            return output.fill_(0)
        options = dict(self.options)
        options["sliding_window"] = self.sliding_window
        if attn_metadata.rswa_window >= 0:
            options["sliding_window"] = -1
            options["rswa_window"] = attn_metadata.rswa_window
            options["rswa_prefix_lens"] = attn_metadata.rswa_prefix_lens
        if attn_metadata.mm_prefix_range is not None:
            options["mm_prefix_range"] = attn_metadata.mm_prefix_range
            options["mm_prefix_clamp_window"] = getattr(layer, "mm_prefix_clamp_sliding_window", False)
        if self.per_tensor:
            options["k_descale"] = layer._k_scale
            options["v_descale"] = layer._v_scale
        if query.element_size() == 1:
            options["q_descale"] = layer._q_scale
        sinks = None if self.sinks is None else self.sinks.float() if self.sinks_fp32 is None else self.sinks_fp32
        if self.alibi_slopes is not None:
            if self.alibi_slopes.device != query.device:
                self.alibi_slopes = self.alibi_slopes.to(query.device)
            options["alibi_slopes"] = self.alibi_slopes
        options["causal"] = attn_metadata.causal
        options["causal_per_seq"] = attn_metadata.causal_per_seq
        options["output_scale"] = output_scale
        cache = self.cache_of(kv_cache, output.shape[2])
        if self.dcp_world_size > 1:
            self.attend_across_ranks(query, output, cache, attn_metadata, options, sinks)
        else:
            self.attend(query, output, cache, attn_metadata, options | {"sinks": sinks})
        return output

    def attend_across_ranks(self, query: torch.Tensor, output: torch.Tensor, cache: quire.KVCacheViews,
                            metadata: QuireMetadata, options: dict[str, Any], sinks: torch.Tensor | None) -> None:
        """Decode context parallelism: this rank's keys for the heads of all ranks, then all keys for its own heads."""
        group, num_tokens = get_dcp_group(), metadata.num_actual_tokens
        query, output = query[:num_tokens], output[:num_tokens]
        query = query.contiguous() if metadata.rows is None else query[metadata.rows]
        exchange = dcp.exchange_of(exchanges, num_tokens, self.num_heads, self.dcp_world_size, output.shape[2],
                                   output.dtype, output.device)
        self.attend(group.all_gather(query, dim=1), exchange.out, cache, metadata, options | {"lse": exchange.lse})
        exchange.exchange(group.device_group)
        parts = list(exchange.parts)
        if sinks is not None:  # a part of its own, of logits without values
            parts.append((output.new_zeros(output.shape[2]).expand(output.shape), sinks.expand(output.shape[:2])))
        if metadata.rows is None:
            dcp.merge(output, parts)
        else:
            dcp.merge(parts[0][0], parts)
            output[metadata.rows] = parts[0][0]

    def attend(self, query: torch.Tensor, output: torch.Tensor, cache: quire.KVCacheViews, metadata: QuireMetadata,
               options: dict[str, Any]) -> None:
        """quire.run_unified_attention with a plan that was made for such a batch before, or is made now."""
        args = (query, output, cache, metadata.query_start_loc, metadata.seq_lens, metadata.block_table, self.scale)
        key = (query.shape[0], metadata.seq_lens.shape[0], metadata.max_query_len, metadata.max_seq_len, query.dtype,
               output.dtype)
        found = self.plans.get(key)
        if found is None:
            problem = quire.problem_of(*args, max_query_len=metadata.max_query_len, max_seq_len=metadata.max_seq_len,
                                       **options)
            # On the CPU the bounds would be this call's own lengths.
            problem = dataclasses.replace(problem, max_query_len=metadata.max_query_len,
                                          max_seq_len=metadata.max_seq_len, batch_invariant=_batch_invariant())
            plan = quire.plan_unified_attention(problem)
            if len(self.plans) >= _MAX_PLANS:
                self.plans.clear()
            found = self.plans[key] = (plan, workspaces.get(query.device, plan.workspace_bytes))
        plan, workspace = found
        quire.run_unified_attention(plan, *args, workspace=workspace, **options)


@functools.cache
def _batch_invariant() -> bool:
    import vllm.envs as envs

    return bool(envs.VLLM_BATCH_INVARIANT)


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return f"{device.type}:{torch.cuda.current_device() if device.index is None else device.index}"
