"""What transformers calls: the attention function and the mask function of the attention implementation "quire"."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from ..errors import InvalidArgumentError, UnsupportedError

NAME = "quire"
_HOW = (
    f'call model.set_attn_implementation("{NAME}") before the cache is used; supported are decoders that hand what '
    "Cache.update answers straight to transformers' attention interface (docs/hf.md)"
)
_REFUSED = ("position_bias", "cu_seq_lens_q", "block_table", "head_mask")


class Rows:
    """New keys or values on their way from Cache.update to the attention function. It is no tensor: whoever else uses
    it as one is told what to do."""

    __slots__ = ("layer", "tensor", "stored")

    def __init__(self, layer: Any, tensor: torch.Tensor):
        self.layer, self.tensor, self.stored = layer, tensor, False

    def to(self, device: Any) -> Rows:
        """Models whose layers share rows (Gemma 3n) move them to where the query is. They stay in the cache."""
        if torch.device(device) != self.layer.device:
            raise UnsupportedError(
                f"layer {self.layer.index} of QuireCache is on {self.layer.device}, and a layer that shares "
                f"its rows is on {device}; both must be on one device"
            )
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _misused(f"the model asked for their {name}")

    def __getitem__(self, index: Any) -> Any:
        raise _misused("the model indexed them")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        raise _misused(f"the model gave them to torch.{getattr(function, '__name__', function)}")


def _misused(what: str) -> Exception:
    return InvalidArgumentError(
        f"the keys and values of QuireCache are read by its own attention alone, and {what}; {_HOW}"
    )


@torch.compiler.disable
def attention(
    module: Any,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Stores the new rows and attends over the cache.

    query: [B, Hq, L, d]. key, value: what QuireCache.update answered. attention_mask: [B, columns] bool or None. s_aux:
    [Hq], the sinks. Answers [B, L, Hq, dv].
    """
    if not isinstance(key, Rows):
        raise InvalidArgumentError(
            f'attention implementation "{NAME}" got keys of type {type(key).__name__} in {type(module).__name__}; '
            "it reads those of a QuireCache: give past_key_values=QuireCache(model.config, mode=...), and leave it out "
            'of parts without one, such as encoders: model.set_attn_implementation({"text_config": "quire"})'
        )
    if dropout:
        raise UnsupportedError(
            f"dropout is {dropout} in {type(module).__name__}; QuireCache is for inference: model.eval()"
        )
    if query.requires_grad:
        raise UnsupportedError(
            "query requires a gradient, and QuireCache is for inference: call the model under "
            "torch.no_grad() or torch.inference_mode()"
        )
    if not (others.get("is_causal", True) is not False and getattr(module, "is_causal", True)):
        raise UnsupportedError(f"{type(module).__name__} is not causal; QuireCache serves causal attention")
    for name in _REFUSED:
        if others.get(name) is not None:
            raise UnsupportedError(
                f"{name} is given to attention in {type(module).__name__}; QuireCache does not support it"
            )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedError(
            f"attention_mask is {list(attention_mask.shape)}; supported: [batch, columns], True or 1 for "
            "tokens and False or 0 for padding"
        )
    return key.layer.attend(query, key, value, attention_mask, scaling, sliding_window, softcap, s_aux), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **others: Any,
) -> torch.Tensor | None:
    """Hands the 2-D padding mask through: [B, columns], or None. What it cannot express is refused."""
    supported = [masking_utils.causal_mask_function]
    if local_size is not None:
        supported.append(masking_utils.sliding_window_causal_mask_function(local_size))
        supported.append(masking_utils.chunked_causal_mask_function(local_size, torch.zeros(batch_size, dtype=int)))
    if not any(_same(mask_function, one) for one in supported):
        raise UnsupportedError(
            "the model asks for a mask that is neither causal, nor a causal window, nor causal chunks (an "
            "overlay of its own, packed sequences or bidirectional attention); QuireCache does not "
            "support it"
        )
    return attention_mask


def _same(a: Any, b: Any) -> bool:
    """Whether two functions are of the same code and closures. Tensors count as equal: they are where padding ends."""
    if callable(a) and callable(b) and hasattr(a, "__code__") and hasattr(b, "__code__"):
        inside = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (a, b)]
        return a is b or (a.__code__ is b.__code__ and _same(*inside))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return True
    return type(a) is type(b) and a == b


def register() -> None:
    """Makes ``model.set_attn_implementation("quire")`` possible. Importing quire.hf has done it."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
