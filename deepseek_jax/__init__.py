"""Train, align, compress and serve DeepSeek-style Mixture-of-Experts models in JAX."""

import importlib
from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`deepseek_jax.load`, imported when first asked for: `import deepseek_jax` stays light."""
    if name == "load":
        return importlib.import_module("deepseek_jax.serving.encoder").load
    raise AttributeError(f"module 'deepseek_jax' has no attribute {name!r}")
