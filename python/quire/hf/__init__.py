"""quire for Hugging Face transformers: a quantized KV cache that attention reads directly.

docs/hf.md begins with an example. Importing it registers the attention implementation "quire".
"""

try:
    import torch as _torch  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f"quire.hf needs PyTorch and transformers 5, and {error.name} is not installed") from error

from .attention import register
from .cache import QuireCache

__all__ = ["QuireCache", "register"]
register()
