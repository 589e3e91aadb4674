"""vLLM's rotations as PyTorch functions over quire.hadamard."""

from __future__ import annotations

import torch

import quire


def _rotated(x: torch.Tensor, *, inverse: bool = False, signs: bool = False) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    # quire takes up to six dimensions; more are rows of two.
    given, written = (x, out) if 1 <= x.ndim <= 6 else (x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1]))
    quire.hadamard(given, written, inverse=inverse, signs=signs)
    return out


def fast_hadamard_transform(x: torch.Tensor) -> torch.Tensor:
    """H x along the last dimension, H the Walsh-Hadamard matrix of Sylvester's order with H H = d I.

    x: [..., d] Float, d a power of two (AssertionError) up to 512. Returns a new tensor of x's shape and dtype,
    computed in fp32 and rounded once.
    """
    d = x.shape[-1]
    assert d & (d - 1) == 0, f"the last dimension is {d}; supported: powers of two"
    return _rotated(x)


def single_rht(x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """The randomized Hadamard transform that int4 rows are stored in: H (s x), and with ``inverse`` s (H x), which is b
    times the inverse of the first.

    x: [..., d] Float, d up to 512. H works in blocks of b, the largest power of two that divides d; the signs s are
    fixed, the same in every block. Returns a new tensor of x's shape and dtype.
    """
    return _rotated(x, inverse=inverse, signs=True)
