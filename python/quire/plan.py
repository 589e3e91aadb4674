"""Plans of unified_attention: bounds in, the choice of kernels and the size of the workspace out."""

from __future__ import annotations

import dataclasses
from typing import Any

from . import _quire
from ._quire import AttentionPlan, plan_unified_attention
from .layout import dtype_name

__all__ = [
    "Arch",
    "AttentionPlan",
    "AttentionProblem",
    "AttentionSupport",
    "device_arch",
    "device_count",
    "plan_unified_attention",
    "problem_of",
    "supports",
]


@dataclasses.dataclass(frozen=True)
class Arch:
    """What a plan needs to know of a GPU. On the CPU all of it is 0."""

    major: int = 0  # compute capability
    minor: int = 0
    num_multiprocessors: int = 0
    shared_bytes: int = 0  # of shared memory that a block can have


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """What a plan needs to know: bounds, not contents. A plan serves every call inside its bounds.

    Lengths count tokens; ``row_alignment`` is the power of two, at most 16, that divides the address of every row of
    both caches. ``arch`` None: that of ``device``, asked when a plan is made. ``num_splits`` 0: the plan chooses.
    ``batch_invariant``: a sequence's bits do not depend on the rest of the batch.
    """

    mode: str
    num_q_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    max_num_tokens: int
    max_batch: int
    max_query_len: int
    max_seq_len: int
    head_size_v: int = 0  # 0: head_size
    device: str = "cpu"
    arch: Arch | None = None
    query_dtype: str = "bfloat16"
    key_cache_dtype: str = "bfloat16"  # what a cache of mode "auto" holds; the others say so themselves
    value_cache_dtype: str = "bfloat16"
    row_alignment: int = 16
    whole_pages: bool = True
    has_centre: bool = False
    num_splits: int = 0
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("query_dtype", "key_cache_dtype", "value_cache_dtype"):
            object.__setattr__(self, name, dtype_name(getattr(self, name)))
        if self.head_size_v == 0:
            object.__setattr__(self, "head_size_v", self.head_size)


@dataclasses.dataclass(frozen=True)
class AttentionSupport:
    """What ``supports`` answers."""

    tensor_cores: bool
    workspace_bytes: int


def problem_from(fields: dict[str, Any]) -> AttentionProblem:
    """The problem of the fields that the extension module gives."""
    return AttentionProblem(arch=Arch(*fields.pop("arch")), **fields)


def problem_of(*args: Any, **kwargs: Any) -> AttentionProblem:
    """The problem of one call: takes what ``unified_attention`` takes.

    Its bounds come from the arguments or, on the CPU, from the lengths themselves.
    """
    return problem_from(_quire.problem_of(*args, **kwargs))


def supports(problem: AttentionProblem) -> AttentionSupport:
    """Whether there would be a plan for a problem, and of what kind, without making one. Raises what the plan would."""
    return AttentionSupport(*_quire.supports(problem))


def device_count(type: str) -> int:
    """The devices of a type, "cpu" or "cuda", that this process can use. UnsupportedError in a build without CUDA,
    InternalError where there is no driver."""
    return _quire.device_count(type)


def device_arch(device: Any) -> Arch:
    """The facts of a device, "cpu" or "cuda:0". UnsupportedError in a build without CUDA,
    InternalError where there is no driver."""
    return Arch(*_quire.device_arch(device))
