"""KVQuantMode as pull request 39074 numbers it, and vLLM's functions over kv_cache_dtype strings."""

from __future__ import annotations

import enum
from typing import Any

import quire


class KVQuantMode(enum.IntEnum):
    """How a KV cache is quantized. vLLM 0.33.0 numbers its members otherwise (5 is NVFP4 there): compare names."""

    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4
    INT2_PER_TOKEN_HEAD = 5
    NVFP4 = 6

    @property
    def is_per_token_head(self) -> bool:
        """Whether the mode has an fp32 scale for each (token, head)."""
        return self.name.endswith("_PER_TOKEN_HEAD")

    @property
    def is_nvfp4(self) -> bool:
        """Whether it is NVFP4, which quire does not have."""
        return self is KVQuantMode.NVFP4

    @property
    def packing_factor(self) -> int:
        """Elements of a row for each element of the cache: 4 for int2, 2 for int4, else 1."""
        return quire.KVQuantMode[self.name].packing_factor if self.is_per_token_head else 1

    def packed_head_size(self, head_size: int) -> int:
        """``head_size // packing_factor``; AssertionError where that leaves a rest."""
        assert head_size % self.packing_factor == 0, (
            f"head_size is {head_size}; {self.name} packs multiples of {self.packing_factor}"
        )
        return head_size // self.packing_factor


def mode_key(mode: Any) -> Any:
    """The member of KVQuantMode that a mode means: members of other enums by name, plain ints by number.

    A member of an enum of the user's stays itself. Its number must be none of KVQuantMode's, or the two would be one
    key of a dict (ValueError).
    """
    if isinstance(mode, KVQuantMode):
        return mode
    name = getattr(mode, "name", None)
    if name is None:
        return KVQuantMode(mode)
    if name in KVQuantMode.__members__:
        return KVQuantMode[name]
    if mode in tuple(KVQuantMode):
        raise ValueError(f"{name} has the number {int(mode)}, which is {KVQuantMode(mode).name}'s; give it another")
    return mode


def get_kv_quant_mode(kv_cache_dtype: str) -> KVQuantMode:
    """The mode of a kv_cache_dtype; NONE for strings that the enum does not know, TurboQuant's among them."""
    if kv_cache_dtype.startswith("nvfp4"):
        return KVQuantMode.NVFP4
    return KVQuantMode[quire.get_kv_quant_mode(kv_cache_dtype).name]


def is_quantized_kv_cache(kv_cache_dtype: str) -> bool:
    """Whether its mode is another than NONE."""
    return get_kv_quant_mode(kv_cache_dtype) != KVQuantMode.NONE


def kv_cache_uses_per_token_head_scales(kv_cache_dtype: str) -> bool:
    """Whether its mode has a scale for each (token, head)."""
    return get_kv_quant_mode(kv_cache_dtype).is_per_token_head
