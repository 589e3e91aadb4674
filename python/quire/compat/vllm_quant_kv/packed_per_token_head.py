"""The backends of INT4_PER_TOKEN_HEAD and INT2_PER_TOKEN_HEAD: rows are rotated before they are packed, and attention
rotates the query and the output, so neither is seen by a caller."""

from __future__ import annotations

from . import _register_own
from .modes import KVQuantMode
from .per_token_head import PerTokenHeadBackend


class Int4PerTokenHeadBackend(PerTokenHeadBackend):
    """4-bit codes; the scale's low 4 bits are the zero point."""


class Int2PerTokenHeadBackend(PerTokenHeadBackend):
    """2-bit codes of a Lloyd-Max codebook; the scale is the row's norm over d**1.5."""


_register_own(Int4PerTokenHeadBackend(KVQuantMode.INT4_PER_TOKEN_HEAD))
_register_own(Int2PerTokenHeadBackend(KVQuantMode.INT2_PER_TOKEN_HEAD))
