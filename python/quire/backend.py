"""The object that serves one quantizing mode, and the registry it is found through.

The modes of the table need none of this: subclass QuantKVBackend to bring a way of storing that the table does not
have, in Python. It serves calls from Python, of both ops, and is called with the objects that they were given.

    class Halves(quire.QuantKVBackend):
        def reshape_and_cache(self, key, value, cache, slot_mapping, **_): ...
        def unified_attention(self, query, out, cache, cu_seqlens_q, seq_lens, block_table, softmax_scale, **_): ...

    quire.register_mode("halves")
    quire.register_backend("halves", Halves)        # Halves() runs at the first get_backend or op
    quire.reshape_and_cache(key, value, cache, slots, mode="halves")
"""

from __future__ import annotations

from typing import Any

from . import _quire
from .errors import InvalidArgumentError, UnsupportedError
from .modes import KVQuantMode, mode_from_kv_quant_mode


class QuantKVBackend:
    """Serves a mode. Override what differs:

    1. writes differently, the same bytes to read: ``reshape_and_cache``, and ``read_format`` to name the format;
    2. new bytes: ``reshape_and_cache`` and ``decode_row`` (generic reading, which is slow), or ``unified_attention``.

    What a method raises becomes the cause of the quire.InternalError that the op raises; a quire.Error passes as it is.
    """

    mode: str = ""  # the kv_cache_dtype that it is registered for; set by the registry

    def needs_scale_caches(self) -> bool:
        """Whether the ops need k_scale_cache and v_scale_cache, [num_blocks, block_size, Hk] float32."""
        return False

    def packing_factor(self) -> int:
        """Elements of a key row for each element of the key cache."""
        return 1

    def packed_head_size(self, head_size: int) -> int:
        """The last extent of the key cache, in elements of its dtype: by default the bytes of a key row."""
        return self.row_bytes(head_size, False)

    def row_bytes(self, head_size: int, is_value: bool) -> int:
        """Bytes of one row of K, or of V: by default head_size / packing_factor."""
        factor = self.packing_factor()
        if head_size % factor:
            raise InvalidArgumentError(f"head_size is {head_size}; mode {self.mode} packs multiples of {factor}")
        return head_size // factor

    def allocate_scale_caches(self, num_blocks: int, block_size: int, num_kv_heads: int) -> tuple[Any, Any]:
        """The scale caches, zeros in host memory: (k, v), each a quire.Tensor [num_blocks, block_size, num_kv_heads]
        float32, or None where the mode needs none."""
        return _quire.backend_scale_caches(self.mode, num_blocks, block_size, num_kv_heads)

    def reshape_and_cache(
        self, key: Any, value: Any, cache: _quire.KVCacheViews, slot_mapping: Any, **options: Any
    ) -> None:
        """Stores, with the arguments of quire.reshape_and_cache: by default in ``read_format``."""
        _quire.reshape_and_cache(key, value, cache.with_mode(self._format()), slot_mapping, **options)

    def unified_attention(
        self,
        query: Any,
        out: Any,
        cache: _quire.KVCacheViews,
        cu_seqlens_q: Any,
        seq_lens: Any,
        block_table: Any,
        softmax_scale: float,
        **options: Any,
    ) -> None:
        """Reads, with the arguments of quire.unified_attention: by default ``read_format``, else through
        ``decode_row``."""
        _quire.unified_attention(
            query, out, cache.with_mode(self._format()), cu_seqlens_q, seq_lens, block_table, softmax_scale, **options
        )

    def read_format(self) -> str:
        """The kv_cache_dtype whose bytes this backend writes, or "". Asked once, after the constructor."""
        return ""

    def decode_row(self, data: memoryview, scale: float | None, head_size: int, is_value: bool) -> Any:
        """Decodes one row of row_bytes(head_size, is_value) bytes: an array [head_size] float32, or None where that is
        not possible. ``data`` is the cache itself and ends with the call; ``scale`` is the row's entry of the scale
        cache, None where there is none. Called from several threads, one at a time."""
        raise UnsupportedError(f"the backend of mode {self.mode} has no decode_row")

    def _format(self) -> str:
        name = self.read_format()
        if not name:
            raise UnsupportedError(f"the backend of mode {self.mode} neither overrides this op nor names a read_format")
        return name


class _TableBackend(QuantKVBackend):
    """The backend of a mode of the table."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def needs_scale_caches(self) -> bool:
        return _quire.backend_needs_scale_caches(self.mode)

    def packing_factor(self) -> int:
        return _quire.backend_packing_factor(self.mode)

    def packed_head_size(self, head_size: int) -> int:
        return _quire.backend_packed_head_size(self.mode, head_size)

    def row_bytes(self, head_size: int, is_value: bool) -> int:
        return _quire.backend_row_bytes(self.mode, head_size, is_value)

    def read_format(self) -> str:
        return self.mode


def register_backend(mode: str, backend_class: type[QuantKVBackend]) -> None:
    """Registers the class that serves a mode; it is constructed, without arguments, at the first use.

    The same class again is accepted. AlreadyExistsError for a second class of a mode; InvalidArgumentError for the
    modes of NONE and FP8_PER_TENSOR, which have no backend. Thread-safe.
    """
    if not (isinstance(backend_class, type) and issubclass(backend_class, QuantKVBackend)):
        raise TypeError("backend_class must be a subclass of quire.QuantKVBackend")
    _quire.register_backend(mode, backend_class)


def _name(mode: str | KVQuantMode) -> str:
    return mode_from_kv_quant_mode(mode) if isinstance(mode, KVQuantMode) else mode


_table_backends: dict[str, _TableBackend] = {}


def get_backend(mode: str | KVQuantMode) -> QuantKVBackend:
    """The backend of a mode, the same object every time.

    InvalidArgumentError for the modes of NONE (nothing to quantize) and FP8_PER_TENSOR (both ops serve them without a
    backend), NotFoundError where a registered mode has none.
    """
    written_in_python: QuantKVBackend | None = _quire.backend_object(_name(mode))
    if written_in_python is not None:
        return written_in_python
    name = _quire.mode_info(_name(mode))["name"]
    return _table_backends.setdefault(name, _TableBackend(name))


def has_backend(mode: str | KVQuantMode) -> bool:
    """Whether the mode has a backend, constructed or not."""
    try:
        return _quire.has_backend(_name(mode))
    except InvalidArgumentError:
        return False
