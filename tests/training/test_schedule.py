"""Reference: learning-rate schedules against their formulas, step by step."""

import math

import numpy as np
import pytest
import torch

from deepseek_jax.training.optimizer import WSD, Constant, Cosine, Stairs, make_schedule


def cosine(step, warmup, steps, final):
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup - 1, 0)
    done = (step - start) / (steps - 1 - start)
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


def wsd(step, warmup, steps, fraction, final):
    decay = round(fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    into = step - (steps - 1 - decay)
    return 1.0 if into <= 0 else 1 - (1 - final) * into / decay


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_follows_its_formula(warmup, final):
    factor = make_schedule(Cosine(final_fraction=final), warmup, 50)
    expected = [cosine(step, warmup, 50, final) for step in range(50)]
    np.testing.assert_allclose(factor(np.arange(50)), expected, atol=1e-6)
    assert float(factor(max(warmup - 1, 0))) == 1.0
    assert float(factor(49)) == pytest.approx(final, abs=1e-6)


@pytest.mark.parametrize(("fraction", "final"), [(0.2, 0.0), (0.5, 0.1), (1.0, 0.0)])
def test_warmup_stable_decay_follows_its_formula(fraction, final):
    factor = make_schedule(WSD(decay_fraction=fraction, final_fraction=final), 5, 40)
    expected = [wsd(step, 5, 40, fraction, final) for step in range(5, 40)]
    np.testing.assert_allclose(factor(np.arange(5, 40)), expected, atol=1e-6)
    if fraction < 0.8:
        np.testing.assert_array_equal(factor(np.arange(4, 39 - round(fraction * 40))), 1.0)
    assert float(factor(39)) == pytest.approx(final, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Detected call")
def test_stairs_are_pytorchs_multi_step():
    """VL2's, arXiv 2412.10302, Table 2: divided by the root of 10 at half and three quarters."""
    theirs = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    steps = torch.optim.lr_scheduler.MultiStepLR(theirs, [20, 30], gamma=10**-0.5)
    expected = []
    for _ in range(40):
        expected.append(theirs.param_groups[0]["lr"])
        steps.step()
    np.testing.assert_allclose(make_schedule(Stairs(), 0, 40)(np.arange(40)), expected, rtol=1e-6)
    warm = make_schedule(Stairs(after=(0.5,), factor=0.25), 4, 10)(np.arange(12))
    np.testing.assert_allclose(warm, [0.25, 0.5, 0.75, 1, 1, *[0.25] * 7])
    with pytest.raises(ValueError, match=r"schedule.after \(1.0,\)"):
        Stairs(after=(1.0,))


def test_constant_warms_up_and_stays():
    factor = make_schedule(Constant(), 4, 20)
    np.testing.assert_allclose(factor(np.arange(6)), [0.25, 0.5, 0.75, 1, 1, 1])


@pytest.mark.parametrize("schedule", [Cosine(), WSD(), Stairs(), Constant()])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (10, 3), (0, 2)])
def test_short_runs_stay_between_zero_and_one(schedule, warmup, steps):
    values = np.asarray(make_schedule(schedule, warmup, steps)(np.arange(steps + 2)))
    assert np.isfinite(values).all()
    assert (values >= 0).all()
    assert (values <= 1).all()


def test_a_decay_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"decay_fraction \(0\.0\) must lie in"):
        WSD(decay_fraction=0.0)
