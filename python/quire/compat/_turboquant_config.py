"""vLLM's description of a TurboQuant cache: presets, sizes of a slot, centroids."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch

import quire

#: The modes that vLLM names: bits of a key (8: fp8) and of a value, and whether a reader corrects the norm of keys.
TQ_PRESETS: dict[str, dict[str, Any]] = {
    name: {"key_quant_bits": key, "value_quant_bits": value, "norm_correction": key != 8}
    for name, key, value in (
        ("turboquant_k8v4", 8, 4),
        ("turboquant_4bit_nc", 4, 4),
        ("turboquant_k3v4_nc", 3, 4),
        ("turboquant_3bit_nc", 3, 3),
    )
}


@dataclasses.dataclass
class TurboQuantConfig:
    """The sizes of a slot: a key row of ``key_packed_size`` bytes, then a value row of ``value_packed_size``."""

    head_dim: int = 128
    key_quant_bits: int = 3  # 3 or 4: codes of the rotated key; 8: fp8
    value_quant_bits: int = 4  # 3 or 4
    seed: int = 42  # not used
    norm_correction: bool = False

    @property
    def key_fp8(self) -> bool:
        """Whether keys are fp8."""
        return self.key_quant_bits == 8

    @property
    def key_mse_bits(self) -> int:
        """Bits of a key's code; 0 for fp8 keys."""
        return 0 if self.key_fp8 else self.key_quant_bits

    @property
    def mse_bits(self) -> int:
        """key_mse_bits or, for fp8 keys, which have no centroids, the bits of a value."""
        return self.key_mse_bits or self.value_quant_bits

    centroid_bits = mse_bits

    @property
    def n_centroids(self) -> int:
        """2 ** mse_bits."""
        return 2**self.mse_bits

    @property
    def effective_value_quant_bits(self) -> int:
        """value_quant_bits."""
        return self.value_quant_bits

    @property
    def key_packed_size(self) -> int:
        """Bytes of a key row: fp8, or codes and an fp16 norm."""
        return self.head_dim if self.key_fp8 else math.ceil(self.head_dim * self.key_mse_bits / 8) + 2

    @property
    def value_packed_size(self) -> int:
        """Bytes of a value row: codes, an fp16 scale and an fp16 minimum."""
        return math.ceil(self.head_dim * self.value_quant_bits / 8) + 4

    @property
    def slot_size(self) -> int:
        """Bytes of both rows."""
        return self.key_packed_size + self.value_packed_size

    @property
    def slot_size_aligned(self) -> int:
        """slot_size, rounded up to an even number."""
        return self.slot_size + self.slot_size % 2

    @staticmethod
    def from_cache_dtype(cache_dtype: str, head_dim: int) -> TurboQuantConfig:
        """The configuration of a preset; ValueError for other names."""
        if cache_dtype not in TQ_PRESETS:
            raise ValueError(f"Unknown TurboQuant mode {cache_dtype!r}; supported: {', '.join(TQ_PRESETS)}")
        return TurboQuantConfig(head_dim=head_dim, **TQ_PRESETS[cache_dtype])

    @staticmethod
    def get_boundary_skip_layers(model_config: Any, n: int = 2) -> list[str]:
        """The layers that stay unquantized, as strings: the first n and the last n, at most half of them at each end.

        Of a hybrid model none, and NotImplementedError where its configuration does not say which layers attend.
        """
        if model_config.is_hybrid:
            if not _get_full_attention_layer_indices(model_config):
                raise NotImplementedError("the model is hybrid, and its configuration names no attention layers")
            return []
        num_layers = model_config.hf_text_config.num_hidden_layers
        return [str(layer) for layer in quire.boundary_skip_layers(num_layers, n)] if min(n, num_layers) > 0 else []


def _get_full_attention_layer_indices(model_config: Any) -> list[int]:
    """The layers of a hybrid model that attend over a KV cache, by the names that models use for that."""
    text, whole = model_config.hf_text_config, model_config.hf_config
    for holder, name, attends in (
        (text, "layer_types", ("full_attention", "attention")),
        (text, "layers_block_type", ("attention", "hybrid")),
        (whole, "attn_type_list", (1,)),
    ):
        kinds = getattr(holder, name, None)
        if kinds is not None:
            return [i for i, kind in enumerate(kinds) if kind in attends]
    return []


def solve_lloyd_max(d: int, bits: int, max_iter: int = 200, tol: float = 1e-10) -> tuple[torch.Tensor, torch.Tensor]:
    """The Lloyd-Max codebook of N(0, 1 / d): (centroids [2**bits], boundaries [2**bits - 1]), ascending float32.

    By vLLM's recipe, because where it stops is part of the codebook: from 2**bits even steps over 3.5 sigma on each
    side, at most max_iter times, each cell integrated by 200 trapezoids (docs/formats/turboquant.md). Both are on
    PyTorch's default device.
    """
    device = torch.get_default_device()
    sigma = 1 / math.sqrt(d)
    centroids = sigma * (-3.5 + 7 * (torch.arange(2**bits, dtype=torch.float64, device="cpu") + 0.5) / 2**bits)
    steps = torch.linspace(0, 1, 201, dtype=torch.float64, device="cpu")
    end = torch.tensor([10.5 * sigma], dtype=torch.float64, device="cpu")
    for _ in range(max_iter):
        edges = torch.cat([-end, (centroids[1:] + centroids[:-1]) / 2, end])
        x = edges[:-1, None] + (edges[1:] - edges[:-1])[:, None] * steps
        density = torch.exp(-0.5 * d * x * x)
        found = torch.trapezoid(x * density, dim=1) / torch.trapezoid(density, dim=1)
        if (found - centroids).abs().max() < tol:
            break
        centroids = found
    return centroids.float().to(device), ((centroids[1:] + centroids[:-1]) / 2).float().to(device)


@functools.lru_cache(maxsize=32)
def get_centroids(d: int, bits: int) -> torch.Tensor:
    """The centroids of solve_lloyd_max; the same tensor each time."""
    return solve_lloyd_max(d, bits)[0]
