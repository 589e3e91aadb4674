"""What a step of vLLM's engine says about its batch, and the plans and the workspace that its layers share."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

import quire


@dataclasses.dataclass
class QuireMetadata(AttentionMetadata):
    """One batch. Tensors are vLLM's persistent buffers, so a CUDA graph replays with what they hold then."""

    num_actual_tokens: int
    query_start_loc: torch.Tensor  # [B + 1] int32
    seq_lens: torch.Tensor  # [B] int32
    block_table: torch.Tensor  # [B, max_blocks] int32
    slot_mapping: torch.Tensor  # [T] int64
    max_query_len: int
    max_seq_len: int  # a bound that few batches change: plans are kept by it
    causal: bool
    causal_per_seq: torch.Tensor | None  # [B] bool or uint8, instead of causal
    mm_prefix_range: torch.Tensor | None  # [B, R, 2] int32
    rswa_prefix_lens: torch.Tensor | None  # [B] int32
    rswa_window: int


def seq_len_bound(max_seq_len: int, table_tokens: int) -> int:
    """A power of two that bounds the lengths of a batch, as far as the block table reaches."""
    return min(1 << max(max_seq_len - 1, 127).bit_length(), table_tokens)


class QuireMetadataBuilder(AttentionMetadataBuilder[QuireMetadata]):
    """Makes QuireMetadata of vLLM's common one. Nothing is computed on the device but R-SWA's prefixes, a copy."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    supports_draft_decode_metadata_update = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention import Attention

        self.block_size = kv_cache_spec.block_size
        scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
        self.rswa_window = getattr(model, "rswa_window", None)
        self.rswa_prefix_lens = None
        if self.rswa_window is not None:
            self.rswa_prefix_lens = torch.empty(scheduler.max_num_seqs, dtype=torch.int32, device=device)
            self.supports_draft_decode_metadata_update = False
        table_tokens = -(-model.max_model_len // self.block_size) * self.block_size
        for layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).values():
            reserve = getattr(layer.impl, "reserve", None)
            if reserve is not None:
                reserve(kv_cache_spec, device, scheduler.max_num_batched_tokens, scheduler.max_num_seqs, table_tokens)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata,
              fast_build: bool = False) -> QuireMetadata:
        common = common_attn_metadata
        block_table = common.block_table_tensor
        per_sequence = isinstance(common.causal, torch.Tensor)
        mm_prefix_range = None
        if common.mm_req_doc_ranges is not None:
            from vllm.v1.attention.backends.utils import compute_mm_prefix_range_tensor

            mm_prefix_range = compute_mm_prefix_range_tensor(common.mm_req_doc_ranges, common.num_reqs,
                                                             common.seq_lens.device)
        rswa_prefix_lens = None
        if self.rswa_prefix_lens is not None and common.rswa_prefix_lens is not None:
            rswa_prefix_lens = self.rswa_prefix_lens[:common.num_reqs]
            rswa_prefix_lens.copy_(common.rswa_prefix_lens[:common.num_reqs], non_blocking=True)
        return QuireMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=block_table,
            slot_mapping=common.slot_mapping,
            max_query_len=common.max_query_len,
            max_seq_len=seq_len_bound(common.max_seq_len, block_table.shape[1] * self.block_size),
            causal=True if per_sequence else bool(common.causal),
            causal_per_seq=common.causal if per_sequence else None,
            mm_prefix_range=mm_prefix_range,
            rswa_prefix_lens=rswa_prefix_lens,
            rswa_window=self.rswa_window if rswa_prefix_lens is not None else -1)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> QuireMetadata:
        metadata = self.build(0, common_attn_metadata)
        metadata.seq_lens.fill_(1)  # what is captured does not depend on the lengths, and short ones are quick
        return metadata

    def update_draft_decode_metadata(self, metadata: QuireMetadata) -> None:
        """Nothing to do: all tensors are persistent buffers."""


class Workspaces:
    """One workspace for each device, which all layers use in turn. It grows where a larger plan comes, and what it
    outgrew stays alive, since a CUDA graph may have captured it."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, list[torch.Tensor]] = {}

    def get(self, device: torch.device, num_bytes: int) -> torch.Tensor | None:
        """At least num_bytes on a device, or None where that is 0."""
        if num_bytes == 0:
            return None
        buffers = self._buffers.setdefault(device, [])
        if not buffers or buffers[-1].numel() < num_bytes:
            buffers.append(torch.empty(num_bytes, dtype=torch.uint8, device=device))
        return buffers[-1]


workspaces = Workspaces()


def plan_bytes(problem: quire.AttentionProblem) -> int:
    """The workspace of a problem; 0 where there is no plan for it, which the call will then say."""
    try:
        return quire.supports(problem).workspace_bytes
    except quire.Error:
        return 0
