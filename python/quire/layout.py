"""What a KV cache costs and how its bytes lie. Sizes, strides and offsets are in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from . import _quire


def dtype_name(dtype: Any) -> str:
    """The name that quire, PyTorch and NumPy share for a dtype: ``"bfloat16"`` for ``torch.bfloat16``."""
    if isinstance(dtype, str):
        return dtype.removeprefix("torch.")
    return str(getattr(dtype, "__name__", dtype)).removeprefix("torch.")


@dataclasses.dataclass(frozen=True)
class KVCacheSpec:
    """Describes a paged KV cache: its mode, its heads, its pages, the order of its bytes.

    ``mode`` is a ``kv_cache_dtype``, as a str. ``head_size_v`` 0 means ``head_size``. ``model_dtype`` is what the mode
    "auto" stores. ``order``: "NHD" (a page is [block_size, num_kv_heads, row]) or "HND" (heads first). ``packing``:
    "separate" (a K array and a V array), "kv_in_block" (a page has its K plane, then its V plane) or "kv_in_row" (K
    row, then V row, for each token and head; modes whose K and V share a slot are always so). ``scales``: "separate"
    (fp32 scale caches) or "inline" (right after the row). A page's bytes are rounded up to ``page_alignment``.
    """

    mode: str
    head_size: int = 128
    head_size_v: int = 0
    num_kv_heads: int = 8
    num_layers: int = 1
    block_size: int = 16
    model_dtype: str = "bfloat16"
    order: str = "NHD"
    packing: str = "separate"
    scales: str = "separate"
    page_alignment: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_dtype", dtype_name(self.model_dtype))


@dataclasses.dataclass(frozen=True)
class KVCacheLayout:
    """What ``make_layout`` answers; every size is in bytes."""

    spec: KVCacheSpec  # with defaults resolved

    # One (token, head).
    k_data_bytes: int  # codes, and the metadata that a format keeps inside its row
    v_data_bytes: int
    k_scale_bytes: int  # 4 where the format has a scale cache, else 0
    v_scale_bytes: int
    k_row_bytes: int  # from a K row to what follows it: data, and the scale where it is inline
    v_row_bytes: int
    bytes_per_token_head: int  # K, V and scales

    # Sums.
    bytes_per_token: int  # all heads of all layers, padding not counted
    bytes_per_block: int  # one layer's page, padding counted
    tokens_per_gib: int  # 2**30 over the padded cost of a token in all layers

    # Where things are, from the base of the buffer they live in.
    k_block_stride: int
    k_slot_stride: int
    k_head_stride: int
    v_block_stride: int
    v_slot_stride: int
    v_head_stride: int
    v_offset: int
    k_scale_offset: int  # of an inline scale from its row's first byte; -1: not inline
    v_scale_offset: int

    # vLLM's page accounting, in elements of the cache's dtype.
    effective_head_size: int  # the data of a row
    effective_head_size_v: int
    padded_head_size: int  # data and scale
    padded_head_size_v: int

    key_cache_dtype: str
    value_cache_dtype: str


@dataclasses.dataclass(frozen=True)
class KVCacheBytes:
    """The bytes that each buffer of ``make_views`` needs; 0 where there is none."""

    base: int
    v_base: int
    k_scales: int
    v_scales: int


def make_layout(spec: KVCacheSpec) -> KVCacheLayout:
    """Lays a cache out. InvalidArgumentError where a field is out of range or the mode's packing does not divide a
    head size."""
    resolved, fields = _quire.make_layout(spec)
    return KVCacheLayout(spec=dataclasses.replace(spec, **resolved), **fields)


def cache_bytes(spec: KVCacheSpec, num_blocks: int) -> KVCacheBytes:
    """How many bytes each buffer of a cache of ``num_blocks`` pages takes."""
    return KVCacheBytes(*_quire.cache_bytes(spec, num_blocks))


def allocate_cache(
    spec: KVCacheSpec, num_blocks: int, *, device: Any = "cpu", empty: Callable[[int], Any] | None = None
) -> _quire.KVCacheViews:
    """Allocates the memory of one layer's cache, zeroed, and makes the views that the ops take.

    ``device``: "cpu", for which quire allocates itself, or "cuda:0" and so on, for which PyTorch does, or CuPy where
    there is no PyTorch. ``empty`` takes their place: a function from a number of bytes to a writable, contiguous array
    of at least as many bytes, on any device, which it should have filled with zeros. It is called for each buffer of
    ``cache_bytes`` that is not empty.
    """
    if empty is None:
        empty = _quire.allocate if str(device) == "cpu" else _device_allocator(str(device))
    sizes = cache_bytes(spec, num_blocks)
    buffers = [empty(size) if size else None for size in (sizes.base, sizes.v_base, sizes.k_scales, sizes.v_scales)]
    if num_blocks == 0:
        buffers[0] = empty(0)
    return _quire.make_views(spec, num_blocks, *buffers)


def _device_allocator(device: str) -> Callable[[int], Any]:
    try:
        import torch  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        pass
    else:
        return lambda num_bytes: torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    try:
        import cupy  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise _quire_unsupported(device) from None

    def zeros(num_bytes: int) -> Any:
        with cupy.cuda.Device(int(device.partition(":")[2] or 0)):
            return cupy.zeros(num_bytes, dtype=cupy.uint8)

    return zeros


def _quire_unsupported(device: str) -> Exception:
    from .errors import UnsupportedError

    return UnsupportedError(
        f"device is {device}, and neither PyTorch nor CuPy is there to allocate on it; give `empty`"
    )
