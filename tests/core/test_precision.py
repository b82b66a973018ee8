"""Contract: what automatic precision picks, and that it says why."""

import jax.numpy as jnp
import pytest

from deepseek_jax.core import precision
from deepseek_jax.core.precision import Precision, compute_dtype


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({"avx2"}, "float32"), ({"amx_bf16"}, "bfloat16"), ({"avx512_bf16", "avx2"}, "bfloat16")],
)
def test_auto_takes_bfloat16_where_the_processor_multiplies_it(monkeypatch, flags, dtype):
    monkeypatch.setattr(precision, "_cpu_flags", lambda: flags)
    found, why = compute_dtype(Precision())
    assert found == jnp.dtype(dtype)
    assert why.startswith("auto: this CPU")
    assert dtype == "float32" or max(flags & {"amx_bf16", "avx512_bf16"}) in why


def test_a_configured_precision_is_taken_as_it_is():
    assert compute_dtype(Precision(compute="float16")) == (jnp.float16, "as configured")


@pytest.mark.parametrize("wrong", [{"loss_scale": 0.5}, {"loss_scale_growth": 0}])
def test_impossible_loss_scales_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        Precision(**wrong)
