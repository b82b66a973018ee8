"""Every test runs on 8 CPU devices, with shape checks on and warnings as errors."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
_cache = pathlib.Path(tempfile.gettempdir()) / "deepseek_jax_test_compilation"
jax.config.update("jax_compilation_cache_dir", str(_cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Shapes in the signatures are checked while the tests run.
install_import_hook(
    ["deepseek_jax.ops", "deepseek_jax.layers", "deepseek_jax.models"], "beartype.beartype"
)
