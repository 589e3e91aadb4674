"""The backends of INT8_PER_TOKEN_HEAD and FP8_PER_TOKEN_HEAD. vLLM's have no attention of their own; quire's do."""

from __future__ import annotations

from . import _register_own
from .modes import KVQuantMode
from .per_token_head import PerTokenHeadBackend


class Int8PerTokenHeadBackend(PerTokenHeadBackend):
    """8-bit codes and an absmax scale."""


class Fp8PerTokenHeadBackend(PerTokenHeadBackend):
    """float8_e4m3fn and an absmax scale."""


_register_own(Int8PerTokenHeadBackend(KVQuantMode.INT8_PER_TOKEN_HEAD))
_register_own(Fp8PerTokenHeadBackend(KVQuantMode.FP8_PER_TOKEN_HEAD))
