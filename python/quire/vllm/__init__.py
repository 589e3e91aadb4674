"""The vLLM plugin: quire serves vLLM's attention layers. docs/vllm_plugin.md says how it is used and how it is built.

vLLM finds ``register`` by its entry point (group ``vllm.general_plugins``, name ``quire``) and calls it in every
process.
``VLLM_PLUGINS`` without ``quire``, or ``QUIRE_VLLM=off``, leaves vLLM as it was.
"""

from __future__ import annotations

import os
from typing import Any

# The releases whose interfaces quire.vllm was tested with, by their first two numbers, as in docs/vllm_plugin.md.
SUPPORTED_VERSIONS = ("0.33",)
# vLLM's backends whose place quire takes under their own names, so that no flag is needed, and the one it adds.
OVERRIDDEN = {"TRITON_ATTN": "TritonAttention", "TURBOQUANT": "TurboQuant", "CPU_ATTN": "CPUAttention"}
OWN_NAME = "QUIRE"


def register() -> None:
    """Registers quire's backends and its kv_cache_dtypes with vLLM. May be called any number of times."""
    if os.environ.get("QUIRE_VLLM", "on").lower() in ("off", "0", "false"):
        return
    import vllm
    from vllm.logger import init_logger

    logger = init_logger("vllm.quire")
    version = ".".join(vllm.__version__.split(".")[:2])
    if version not in SUPPORTED_VERSIONS:
        logger.warning("quire %s knows vLLM %s and this is %s, so vLLM's own attention backends stay in place.",
                       _version(), ", ".join(f"{known}.*" for known in SUPPORTED_VERSIONS), vllm.__version__)
        return

    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from . import modes

    modes.register_kv_cache_dtypes()
    for name, backend in OVERRIDDEN.items():
        register_backend(AttentionBackendEnum[name], f"quire.vllm.backend.Quire{backend}Backend")
    if OWN_NAME not in AttentionBackendEnum.__members__:
        register_backend(OWN_NAME, "quire.vllm.backend.QuireBackend")
        # A spawned worker reads its configuration before it loads plugins, and its enum has no such member yet.
        AttentionBackendEnum[OWN_NAME].__reduce_ex__ = lambda protocol: (own_backend, ())


def own_backend() -> Any:
    """vLLM's enum member of OWN_NAME, registered first where it is not yet."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum[OWN_NAME]


def _version() -> str:
    from .. import __version__

    return __version__
