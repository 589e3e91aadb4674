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

from . import dcp


@dataclasses.dataclass
class QuireMetadata(AttentionMetadata):
    """One batch. Tensors are vLLM's persistent buffers, so a CUDA graph replays with what they hold then.

    Under decode context parallelism the sequences are those of a dcp.LocalBatch, over the keys of this rank.
    """

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
    rows: torch.Tensor | None = None  # [T] int64: the batch's row i is row rows[i] of the layer's; None: the same rows


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
        from vllm.distributed.parallel_state import get_dcp_world_size_and_rank
        from vllm.model_executor.layers.attention import Attention

        self.block_size = kv_cache_spec.block_size
        scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
        self.rswa_window = getattr(model, "rswa_window", None)
        self.rswa_prefix_lens = None
        if self.rswa_window is not None:
            self.rswa_prefix_lens = torch.empty(scheduler.max_num_seqs, dtype=torch.int32, device=device)
            self.supports_draft_decode_metadata_update = False
        self.dcp_size, self.dcp_rank = get_dcp_world_size_and_rank(kv_cache_spec.dcp_sharded)
        self.dcp_interleave = vllm_config.parallel_config.cp_kv_cache_interleave_size
        if self.dcp_size > 1:
            self.supports_draft_decode_metadata_update = False
            self.local_seq_lens = torch.zeros(scheduler.max_num_seqs, dtype=torch.int32, device=device)
        rank_block = self.block_size * self.dcp_size  # the tokens that a block of each rank holds
        table_tokens = -(-model.max_model_len // rank_block) * self.block_size
        for layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).values():
            reserve = getattr(layer.impl, "reserve", None)
            if reserve is not None:
                reserve(kv_cache_spec, model.dtype, device, scheduler.max_num_batched_tokens, scheduler.max_num_seqs,
                        table_tokens)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        if vllm_config.parallel_config.decode_context_parallel_size > 1 and kv_cache_spec.dcp_sharded:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE  # other batches are made anew in each step
        return cls._cudagraph_support

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
        metadata = QuireMetadata(
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
        return metadata if self.dcp_size == 1 else self._localized(metadata, common.max_seq_len)

    def _localized(self, metadata: QuireMetadata, max_seq_len: int) -> QuireMetadata:
        """The batch over the keys that this rank stores. Lengths of a decode, which a CUDA graph may have captured, are
        in a buffer of this builder."""
        if (not metadata.causal or metadata.causal_per_seq is not None or metadata.mm_prefix_range is not None
                or metadata.rswa_window >= 0):
            raise NotImplementedError("the batch is not causal, has multimodal prefixes or R-SWA; quire serves decode "
                                      "context parallelism with causal attention over all keys")
        split = (self.dcp_size, self.dcp_rank, self.dcp_interleave)
        rounds = -(-max_seq_len // (self.dcp_size * self.dcp_interleave))
        bound = seq_len_bound(rounds * self.dcp_interleave, metadata.block_table.shape[1] * self.block_size)
        if metadata.max_query_len == 1:
            lens = self.local_seq_lens[:metadata.seq_lens.shape[0]]
            lens.copy_(dcp.local_lens(metadata.seq_lens, *split))
            return dataclasses.replace(metadata, seq_lens=lens, max_seq_len=bound)
        batch = dcp.local_batch(metadata.query_start_loc, metadata.seq_lens,
                                metadata.block_table[:, :-(-bound // self.block_size)], metadata.max_query_len,
                                metadata.num_actual_tokens, *split)
        return dataclasses.replace(metadata, max_seq_len=bound, **vars(batch))

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
exchanges = Workspaces()  # the buffers of dcp.Exchange


def plan_bytes(problem: quire.AttentionProblem) -> int:
    """The workspace of a problem; 0 where there is no plan for it, which the call will then say."""
    try:
        return quire.supports(problem).workspace_bytes
    except quire.Error:
        return 0
