"""vLLM's ``triton_quant_kv`` and what stands around it in pull request 39074, over quire's ops.

A registry of backends, one for each quantizing mode, each imported when it is first asked for; int8, fp8, int4 and int2
per token and head are there. To bring a mode of your own:

    from quire.compat import vllm_quant_kv as quant_kv

    class MyBackend(quant_kv.QuantKVBackend):
        mode = MyMode.MINE                       # a member of KVQuantMode, or of an IntEnum of yours
        def reshape_and_cache(self, key, value, key_cache, value_cache, slot_mapping, *, k_scale_cache=None,
                              v_scale_cache=None): ...

    quant_kv.register(MyBackend())               # or quant_kv._MODULES[MyMode.MINE] = "my.module", which does this

Beside it: the functions of ``triton_reshape_and_cache_flash`` and ``triton_turboquant_store``, and the classes of the
DiffKV attention backend with their parents. Everything is checked against the documents' words: names, arguments,
shapes, types of exceptions. docs/python_vllm.md has the table of names.
"""

from __future__ import annotations

import importlib
from typing import Any

from .._rotate import fast_hadamard_transform, single_rht
from .._turboquant import _use_fp8_e4b15, triton_turboquant_decode_attention, triton_turboquant_store
from .._turboquant_config import TQ_PRESETS, TurboQuantConfig
from ..vllm import triton_reshape_and_cache_flash, triton_reshape_and_cache_flash_diffkv, unified_attention_diffkv
from .base import QuantKVBackend
from .modes import (
    KVQuantMode,
    get_kv_quant_mode,
    is_quantized_kv_cache,
    kv_cache_uses_per_token_head_scales,
    mode_key,
)

_single_rht = single_rht

#: Where the backend of a mode comes from: a module that registers it when it is imported. Add to it freely.
_MODULES: dict[Any, str] = {
    KVQuantMode.INT8_PER_TOKEN_HEAD: f"{__name__}.int8_fp8_per_token_head",
    KVQuantMode.FP8_PER_TOKEN_HEAD: f"{__name__}.int8_fp8_per_token_head",
    KVQuantMode.INT4_PER_TOKEN_HEAD: f"{__name__}.packed_per_token_head",
    KVQuantMode.INT2_PER_TOKEN_HEAD: f"{__name__}.packed_per_token_head",
}
_REGISTRY: dict[Any, QuantKVBackend] = {}


def register(backend: QuantKVBackend) -> None:
    """Makes an instance the backend of its ``mode``.

    A second instance of a class of the same name is ignored: the first stays. RuntimeError where a class of another
    name serves the mode already; but one that is registered before quire's own was asked for takes its place.
    """
    mode = mode_key(backend.mode)
    present = _REGISTRY.setdefault(mode, backend)
    if type(present).__name__ != type(backend).__name__:
        raise RuntimeError(
            f"{mode.name} has a backend of class {type(present).__name__} already; {type(backend).__name__} "
            f"cannot be registered too"
        )


def _register_own(backend: QuantKVBackend) -> None:
    """Registers one of quire's, unless there is one of the user's."""
    _REGISTRY.setdefault(mode_key(backend.mode), backend)


def get_backend(mode: Any) -> QuantKVBackend:
    """The backend of a mode, imported at the first call that asks for it.

    ValueError for NONE, which stores what it is given, and for a mode without an entry in ``_MODULES``; RuntimeError
    where the module of that entry does not register one.
    """
    mode = mode_key(mode)
    if mode is KVQuantMode.NONE:
        raise ValueError("KVQuantMode.NONE quantizes nothing and has no backend")
    if mode not in _REGISTRY:
        module = _MODULES.get(mode)
        if module is None:
            raise ValueError(
                f"{mode.name} has no backend: add its module to quire.compat.vllm_quant_kv._MODULES, or "
                f"register an instance"
            )
        importlib.import_module(module)
        if mode not in _REGISTRY:
            raise RuntimeError(
                f"module {module} registers no backend of {mode.name}; it should call register(...) when it is imported"
            )
    return _REGISTRY[mode]


def has_backend(mode: Any) -> bool:
    """Whether ``get_backend`` would find an entry of a mode. Imports nothing and constructs nothing."""
    mode = mode_key(mode)
    return mode in _REGISTRY or mode in _MODULES


# Below the registry, which they import.
from .dispatch import triton_reshape_and_cache_flash_per_token_head_quant, unified_attention  # noqa: E402
from .attention import (  # noqa: E402
    AttentionType,
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from .diffkv import (  # noqa: E402
    TritonAttentionDiffKVBackend,
    TritonAttentionDiffKVImpl,
    TritonAttentionDiffKVMetadataBuilder,
)
from .spec import AttentionSpec, FullAttentionSpec  # noqa: E402

__all__ = [
    "AttentionSpec",
    "AttentionType",
    "FullAttentionSpec",
    "KVQuantMode",
    "QuantKVBackend",
    "TQ_PRESETS",
    "TritonAttentionBackend",
    "TritonAttentionDiffKVBackend",
    "TritonAttentionDiffKVImpl",
    "TritonAttentionDiffKVMetadataBuilder",
    "TritonAttentionImpl",
    "TritonAttentionMetadata",
    "TritonAttentionMetadataBuilder",
    "TurboQuantConfig",
    "fast_hadamard_transform",
    "get_backend",
    "get_kv_quant_mode",
    "has_backend",
    "is_quantized_kv_cache",
    "kv_cache_uses_per_token_head_scales",
    "register",
    "single_rht",
    "triton_reshape_and_cache_flash",
    "triton_reshape_and_cache_flash_diffkv",
    "triton_reshape_and_cache_flash_per_token_head_quant",
    "triton_turboquant_decode_attention",
    "triton_turboquant_store",
    "unified_attention",
    "unified_attention_diffkv",
]
