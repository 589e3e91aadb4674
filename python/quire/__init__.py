"""quire: a paged KV cache in 2 to 16 bits, and attention that reads it directly, on CPUs and NVIDIA GPUs.

Arrays are those of your library (PyTorch, NumPy, CuPy, JAX), and are never copied. docs/python.md begins with an
example.
"""

from typing import Any

from ._quire import (
    KVCacheViews,
    Tensor,
    boundary_skip_layers,
    hadamard,
    make_views,
    merge_attn_states,
    num_threads,
    register_mode,
    reshape_and_cache,
    run_unified_attention,
    set_num_threads,
    turboquant_decode_attention,
    turboquant_mode,
    turboquant_store,
    turboquant_uses_e4b15,
    turboquant_views,
    unified_attention,
    version,
)
from .backend import QuantKVBackend, get_backend, has_backend, register_backend
from .errors import (
    AlreadyExistsError,
    Error,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    UnsupportedError,
)
from .layout import KVCacheBytes, KVCacheLayout, KVCacheSpec, allocate_cache, cache_bytes, make_layout
from .modes import KVQuantMode, ModeInfo, get_kv_quant_mode, mode_from_kv_quant_mode, mode_info, modes
from .plan import (
    Arch,
    AttentionPlan,
    AttentionProblem,
    AttentionSupport,
    device_arch,
    device_count,
    plan_unified_attention,
    problem_of,
    supports,
)

__version__ = version()
__all__ = [
    "AlreadyExistsError",
    "Arch",
    "AttentionPlan",
    "AttentionProblem",
    "AttentionSupport",
    "Error",
    "InternalError",
    "InvalidArgumentError",
    "KVCacheBytes",
    "KVCacheLayout",
    "KVCacheSpec",
    "KVCacheViews",
    "KVQuantMode",
    "ModeInfo",
    "NotFoundError",
    "OutOfRangeError",
    "QuantKVBackend",
    "Tensor",
    "UnsupportedError",
    "allocate_cache",
    "boundary_skip_layers",
    "cache_bytes",
    "device_arch",
    "device_count",
    "get_backend",
    "get_kv_quant_mode",
    "hadamard",
    "has_backend",
    "make_layout",
    "make_views",
    "merge_attn_states",
    "mode_from_kv_quant_mode",
    "mode_info",
    "modes",
    "num_threads",
    "plan_unified_attention",
    "problem_of",
    "register_backend",
    "register_mode",
    "reshape_and_cache",
    "run_unified_attention",
    "set_num_threads",
    "supports",
    "turboquant_decode_attention",
    "turboquant_mode",
    "turboquant_store",
    "turboquant_uses_e4b15",
    "turboquant_views",
    "unified_attention",
    "version",
]


def __getattr__(name: str) -> Any:
    """quire.hf and quire.torch_ops import PyTorch, so they are imported when they are first asked for."""
    if name in ("hf", "torch_ops"):
        import importlib

        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'quire' has no attribute '{name}'")
