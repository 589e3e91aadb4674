"""Decode context parallelism (DCP): the keys of a sequence are spread over the ranks of a group, and every rank attends
to its own for the query heads of all ranks. The partial results go to the ranks of their heads and are merged by LSE.

Of ``size`` ranks, rank r stores the tokens at positions p with ``p // interleave % size == r``, in ascending order.
What one step's queries see of them is again a causal batch, which local_batch makes. So the op needs no mask of its
own, and all that is read are stored rows, the new tokens' included, as on one GPU.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

import quire

if TYPE_CHECKING:
    from .metadata import Workspaces

_ALIGNMENT = 16  # bytes; of a row in an exchange, and what its LSE takes


def local_lens(lens: torch.Tensor, size: int, rank: int, interleave: int) -> torch.Tensor:
    """How many of the first ``lens`` tokens of a sequence a rank stores."""
    rounds = lens // (size * interleave)
    rest = lens - rounds * (size * interleave)
    return rounds * interleave + (rest - rank * interleave).clamp(0, interleave)


@dataclasses.dataclass
class LocalBatch:
    """A step's batch over the keys of one rank: what unified_attention takes, with S sequences for the B of vLLM."""

    query_start_loc: torch.Tensor  # [S + 1] int32
    seq_lens: torch.Tensor  # [S] int32
    block_table: torch.Tensor  # [S, max_blocks] int32
    max_query_len: int
    rows: torch.Tensor | None  # [T] int64: row i of the batch is row rows[i] of vLLM's; None: the rows are vLLM's


def local_batch(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, max_query_len: int,
                num_tokens: int, size: int, rank: int, interleave: int) -> LocalBatch:
    """The batch of a step with several query tokens a sequence; lengths stay on their device.

    Row i of a sequence sees local_lens(context_len + i + 1) keys of a rank. With interleave 1 that grows by one from
    row i to row i + size, so the rows i, i + size, i + 2 size... are a causal sequence, and there are ``size`` of them,
    over the same keys, for one of vLLM's. With another interleave it grows by no fixed step, so each row is a sequence
    by itself, which is right too, but reads the keys once for every row.
    """
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=seq_lens.device)
    starts, ends = query_start_loc[:-1], query_start_loc[1:]
    query_lens = ends - starts
    context_lens = seq_lens - query_lens

    def owners(boundaries: torch.Tensor) -> torch.Tensor:
        """The sequence of each token; rows of padding, behind the last one, count as its own."""
        return torch.searchsorted(boundaries, tokens, right=True).clamp_max(boundaries.shape[0] - 1)

    if interleave != 1:
        sequence = owners(ends)
        last = tokens - starts[sequence] + context_lens[sequence] + 1
        cu = torch.arange(num_tokens + 1, dtype=torch.int32, device=seq_lens.device).clamp_max(ends[-1])
        lens = torch.where(tokens < ends[-1], local_lens(last, size, rank, interleave), 0)
        return LocalBatch(cu, lens.int(), block_table[sequence], 1, None)

    first = torch.arange(size, dtype=torch.int32, device=seq_lens.device)
    lens = query_lens[:, None]
    counts = (lens - first + size - 1) // size  # [B, size]; 0 where there is no such row
    keys = local_lens(context_lens[:, None] + first + 1, size, rank, 1) + counts - 1
    begins = starts[:, None] + first * (lens // size) + torch.minimum(first, lens % size)
    cu = torch.cat((begins.flatten(), ends[-1:]))
    part = owners(cu[1:])
    sequence = part // size
    rows = starts[sequence] + part % size + (tokens - cu[part]) * size
    return LocalBatch(cu, torch.where(counts > 0, keys, 0).flatten().int(), block_table.repeat_interleave(size, 0),
                      -(-max_query_len // size), torch.where(tokens < ends[-1], rows, tokens).long())


@dataclasses.dataclass
class Exchange:
    """Where the partial results of T query tokens and Hq heads a rank lie. Each row has its LSE in its first bytes, so
    one all-to-all moves both, and heads come first, so what goes to a rank is contiguous.

    out: [T, size * Hq, dv], lse: [T, size * Hq] float32, strided: this rank's results for the heads of all ranks.
    parts: of each rank, (out [T, Hq, dv], lse [T, Hq]) for the heads of this one, once they were exchanged.
    """

    send: torch.Tensor  # [size * Hq, T, row bytes] uint8
    received: torch.Tensor  # the same
    out: torch.Tensor
    lse: torch.Tensor
    parts: list[tuple[torch.Tensor, torch.Tensor]]

    def exchange(self, group: dist.ProcessGroup) -> None:
        dist.all_to_all_single(self.received, self.send, group=group)


def _row_bytes(head_size_v: int, dtype: torch.dtype) -> int:
    return _ALIGNMENT + -(-head_size_v * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def exchange_bytes(num_tokens: int, num_heads: int, size: int, head_size_v: int, dtype: torch.dtype) -> int:
    """The bytes of an exchange with ``num_heads`` heads a rank."""
    return 2 * size * num_heads * num_tokens * _row_bytes(head_size_v, dtype)


@functools.lru_cache(maxsize=4096)
def exchange_of(buffers: Workspaces, num_tokens: int, num_heads: int, size: int, head_size_v: int, dtype: torch.dtype,
                device: torch.device) -> Exchange:
    """The exchange of a step's shape, which all layers use in turn."""
    row_bytes = _row_bytes(head_size_v, dtype)
    num_bytes = exchange_bytes(num_tokens, num_heads, size, head_size_v, dtype)
    buffer = buffers.get(device, num_bytes)[:num_bytes]
    send, received = buffer.view(2, size * num_heads, num_tokens, row_bytes)

    def split(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = rows[..., _ALIGNMENT:_ALIGNMENT + head_size_v * dtype.itemsize].view(dtype)
        return out.transpose(0, 1), rows[..., :4].view(torch.float32)[..., 0].transpose(0, 1)

    return Exchange(send, received, *split(send), [split(rows) for rows in received.split(num_heads)])


def merge(out: torch.Tensor, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Merges two or more partial results into ``out``, which may be the first; the first is overwritten."""
    (first_out, first_lse), *middle, last = parts
    for part in middle:
        quire.merge_attn_states(first_out, first_out, first_lse, *part, lse=first_lse)
    quire.merge_attn_states(out, first_out, first_lse, *last)
