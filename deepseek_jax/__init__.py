"""Train, align, compress and serve DeepSeek-style Mixture-of-Experts models in JAX."""

import importlib
from typing import Any

_LAZY = {"load": "deepseek_jax.serving.language"}  # public name -> the module that has it
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`deepseek_jax.load`, imported when first asked for: `import deepseek_jax` stays light."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'deepseek_jax' has no attribute {name!r}")
