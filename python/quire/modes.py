"""Modes: the named ways of storing a KV cache, known by their ``kv_cache_dtype`` strings as vLLM spells them."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from . import _quire


class KVQuantMode(enum.IntEnum):
    """vLLM's enum. Its numbers have moved between vLLM versions: exchange modes by name, not by number."""

    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4
    INT2_PER_TOKEN_HEAD = 5

    @property
    def is_per_token_head(self) -> bool:
        """Whether the mode has an fp32 scale for each (token, head)."""
        return self >= KVQuantMode.INT8_PER_TOKEN_HEAD

    @property
    def packing_factor(self) -> int:
        """Elements of a row for each element of the cache: 4 for int2, 2 for int4, else 1."""
        return _quire.packing_factor(int(self))

    def packed_head_size(self, head_size: int) -> int:
        """``head_size / packing_factor``; InvalidArgumentError where that is no whole number."""
        return _quire.packed_head_size(int(self), head_size)


@dataclasses.dataclass(frozen=True)
class ModeInfo:
    """One mode: a row of the table in src/format/modes.def, or a mode that was registered."""

    name: str
    aliases: tuple[str, ...]
    kv_quant_mode: KVQuantMode | None  # None for modes that vLLM's enum does not know
    key_format: str  # a format's name; "auto" is the cache's own float dtype
    value_format: str  # empty for a registered mode that brings its own bytes
    shared_slot: bool  # K row and V row side by side in one slot of one array
    compiled: bool  # False where this build leaves the mode out
    registered: bool  # True where it came from register_mode
    composed: bool  # True where it is spelled k=<format>,v=<format> and is no row of the table


def _info(fields: dict[str, Any]) -> ModeInfo:
    value = fields.pop("kv_quant_mode")
    return ModeInfo(kv_quant_mode=None if value is None else KVQuantMode(value), **fields)


def modes() -> list[ModeInfo]:
    """Every mode that has a name of its own: those of the table in its order, then the registered ones."""
    return [_info(fields) for fields in _quire.modes()]


def mode_info(name: str) -> ModeInfo:
    """The mode of a name or an alias, or of a pair of formats: ``k=int8_per_token_head,v=turboquant_v3``.

    NotFoundError lists the names that exist.
    """
    return _info(_quire.mode_info(name))


def get_kv_quant_mode(kv_cache_dtype: str) -> KVQuantMode:
    """vLLM's function of that name: NONE for every string that its enum does not know."""
    return KVQuantMode(_quire.get_kv_quant_mode(kv_cache_dtype))


def mode_from_kv_quant_mode(value: KVQuantMode) -> str:
    """The name of the mode of an enum value; InvalidArgumentError where several modes share it."""
    return _quire.mode_from_kv_quant_mode(int(value))
