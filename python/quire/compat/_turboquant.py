"""vLLM's TurboQuant launchers over quire's."""

from __future__ import annotations

import math
from typing import Any

import torch

import quire

_USES_E4B15: dict[int, int] = {}


def _use_fp8_e4b15(device: int = 0) -> int:
    """1 where vLLM keeps fp8 keys as e4b15: on GPUs below compute capability 8.9. 0 elsewhere, CPUs included."""
    if device not in _USES_E4B15:
        _USES_E4B15[device] = int(
            torch.cuda.is_available() and quire.turboquant_uses_e4b15(*torch.cuda.get_device_capability(device))
        )
    return _USES_E4B15[device]


def _bits(
    cache: torch.Tensor, head_size: int, mse_bits: int, key_packed_size: int, value_quant_bits: int, key_fp8: bool
) -> dict[str, Any]:
    """The configuration in quire's words. Where the value row begins is not free."""
    key_bytes = head_size if key_fp8 else math.ceil(head_size * mse_bits / 8) + 2
    if key_packed_size != key_bytes:
        raise quire.InvalidArgumentError(
            f"key_packed_size is {key_packed_size}; a key row of head_size {head_size} has "
            f"{key_bytes} bytes, and the value row begins there"
        )
    e4b15 = key_fp8 and cache.is_cuda and _use_fp8_e4b15(cache.device.index or 0) == 1
    return {"key_bits": 8 if key_fp8 else mse_bits, "value_bits": value_quant_bits, "key_e4b15": e4b15}


def triton_turboquant_store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    PiT: torch.Tensor,
    midpoints: torch.Tensor,
    mse_bits: int,
    key_packed_size: int,
    value_quant_bits: int,
    key_fp8: bool = False,
) -> None:
    """Stores rows in TurboQuant's slots.

    key, value: [N, Hk, D] Float. kv_cache: [num_blocks, block_size, Hk, slot bytes] uint8, of any strides; a slot may
    be wider than the format's. slot_mapping: [N] int32 or int64, negative: skipped. PiT: [D, D] float32, the Hadamard
    matrix over sqrt(D); midpoints: [2**mse_bits - 1] float32, of the Lloyd-Max centroids for N(0, 1/D). quire computes
    both and refuses others (UnsupportedError). On CUDA it compares a table in the first call that names it, which waits
    for the stream: not to be the first call of a graph capture. key_fp8: fp8 keys, without tables. value_quant_bits: 3
    or 4.
    """
    tables = {} if key_fp8 else {"rotation": PiT, "midpoints": midpoints}
    quire.turboquant_store(
        key,
        value,
        kv_cache,
        slot_mapping,
        **_bits(kv_cache, key.shape[-1], mse_bits, key_packed_size, value_quant_bits, key_fp8),
        **tables,
    )


def triton_turboquant_decode_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    Pi: torch.Tensor,
    centroids: torch.Tensor,
    scale: float,
    mse_bits: int,
    key_packed_size: int,
    value_quant_bits: int,
    key_fp8: bool = False,
    norm_correction: bool = False,
    PiT: torch.Tensor | None = None,
    mid_o_buf: torch.Tensor | None = None,
    output_buf: torch.Tensor | None = None,
    lse_buf: torch.Tensor | None = None,
    buf_holder: Any = None,
    max_num_kv_splits: int = 32,
) -> torch.Tensor:
    """Attends with one query token a sequence over TurboQuant's slots; returns [B, Hq, D] in the query's dtype.

    query: [B, Hq, D] Float; block_table: [B, max_blocks] int32; seq_lens: [B] int32. Pi, PiT and centroids: as for
    triton_turboquant_store. 3- and 4-bit keys are read with norm_correction only (UnsupportedError).
    output_buf, lse_buf: where given and large enough, the result and its LSE (natural logarithm) are views of them, as
    in vLLM; else buf_holder, where given, is handed new ones. mid_o_buf and max_num_kv_splits are ignored: quire splits
    as its plan says.
    """
    batch, heads, head_size = query.shape
    out = _buffer(output_buf, (batch, heads, head_size), query.dtype, query.device, buf_holder, "_tq_output_buf")
    lse = _buffer(lse_buf, (batch, heads), torch.float32, query.device, buf_holder, "_tq_lse_buf")
    tables = {} if key_fp8 else {"rotation": Pi if PiT is None else PiT, "centroids": centroids}
    bits = _bits(kv_cache, head_size, mse_bits, key_packed_size, value_quant_bits, key_fp8)
    quire.turboquant_decode_attention(
        query,
        out,
        kv_cache,
        block_table.to(torch.int32),
        seq_lens.to(torch.int32),
        float(scale),
        **bits,
        norm_correction=key_fp8 or norm_correction,
        lse=lse,
        **tables,
    )
    return out


def _buffer(
    given: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, holder: Any, name: str
) -> torch.Tensor:
    """vLLM's scratch: the caller's, cut to shape, where it is large enough, else a new one that the holder keeps."""
    if given is not None and given.dtype == dtype and all(have >= need for have, need in zip(given.shape, shape)):
        return given[tuple(slice(need) for need in shape)]
    made = torch.empty(shape, dtype=dtype, device=device)
    if holder is not None:
        setattr(holder, name, made)
    return made
