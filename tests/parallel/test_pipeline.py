"""Contract: a compiled pipeline's devices wait as long as `Pipeline.bubble` says."""

import pytest

from benchmarks.pipeline import counted
from deepseek_jax.parallel.pipeline import Pipeline


@pytest.mark.parametrize("sizes", [(2, 2, 4), (4, 1, 2), (4, 1, 6), (4, 2, 4), (8, 1, 3)])
def test_idle_passes_are_those_of_theory(sizes):
    pipeline = Pipeline(*sizes)
    runs, forward, backward = counted(pipeline)
    assert {*forward} == {*backward} == {pipeline.turns}
    assert 1 - 2 * pipeline.turns / runs == pytest.approx(pipeline.bubble)
