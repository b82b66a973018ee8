"""Contract: a plan's text and picture hold what the plan says."""

import pytest

from deepseek_jax.core.errors import InputError
from deepseek_jax.monitoring.plans import draw, draw_scaling, memory_parts, ranking, table

FOUND = {
    "config": "mine", "topology": "v5p:2x2x2", "device": "TPU v5", "devices": 8, "estimate": False,
    "mesh": {"fsdp": 8}, "exchange": "padded", "params": 10**9, "active_params": 10**8,
    "params_dtype": "float32", "moments": ["float32", "bfloat16"], "tokens": 1024,
    "sequence_length": 128, "batch_size": 8,
    "model_flops": 1e15, "compute": "bfloat16", "remat": "full", "fits": True,
    "memory": {
        "arguments": 10**10, "outputs": 9 * 10**9, "aliased": 8 * 10**9, "temporaries": 10**10,
        "code": 10**8, "total": 211 * 10**8, "host": 0, "parameters": 3 * 10**9,
        "optimizer": 6 * 10**9, "batch": 10**6,
    },
    "memory_limit": 10**11, "host_limit": 10**11, "refusal": "", "refused_bytes": 0,
    "collectives": [{"kind": "all-gather", "axes": ["fsdp"], "count": 3, "bytes": 5e9}],
    "remarks": [], "compile_seconds": 5.0, "peak_flops": 459e12, "bandwidth": 2765e9,
    "bytes_moved": 4e10, "bound": "slow_network", "step_seconds": 2.0, "mfu": 0.25,
    "bound_seconds": {"compute": 0.3, "memory": 0.1, "network": 0.2, "slow_network": 2.0},
}  # fmt: skip
REFUSED = {
    name: value for name, value in FOUND.items()
    if name not in ("bytes_moved", "bound", "bound_seconds", "step_seconds", "mfu")
} | {"fits": False, "refusal": "it is too large", "refused_bytes": 3 * 10**11}  # fmt: skip


def test_parts_add_up_to_the_total():
    parts = memory_parts(FOUND)
    assert sum(parts.values()) == FOUND["memory"]["total"]
    assert parts["batch and padding"] == 10**9


def test_text():
    text = table(FOUND)
    assert "bound by slow network: 512 tokens/s, MFU 25.0%" in text
    assert "21.10 of 100.0 GB" in text
    assert "8 x TPU v5, fsdp 8, padded exchange\n" in text
    gathers = FOUND | {"exchange": "none", "mesh": {"fsdp": 2, "expert": 4}}
    assert "moe.exchange.kind padded" in table(gathers)
    dense = {"active_params": 10**9}
    for other in ({"exchange": "padded"}, {"mesh": {"fsdp": 8}}, {"bound": "compute"}, dense):
        assert "moe.exchange.kind" not in table(gathers | other)
    assert "ESTIMATE" not in text and "on its host" not in text
    assert "AN ESTIMATE" in table(FOUND | {"estimate": True})
    refused = table(REFUSED)
    assert "DOES NOT FIT: the compiler says: it is too large" in refused
    assert "needs           300.00 of 100.0 GB" in refused
    assert "1 more were compiled and do not fit" in ranking([FOUND, REFUSED])


@pytest.mark.parametrize("found", [FOUND, REFUSED, FOUND | {"estimate": True}])
def test_pictures_say_it(found, tmp_path):
    draw(found, tmp_path / "new" / "plan.svg")
    drawn = (tmp_path / "new" / "plan.svg").read_text()
    assert "<svg" in drawn
    assert ("an estimate" in drawn) == found["estimate"]
    assert ("there is no program" in drawn) == (found is REFUSED)
    assert "limit 100.0" in drawn
    draw(found, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[1:4] == b"PNG"


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"ends in .png or .svg"):
        draw(FOUND, tmp_path / "plan.pdf")


def test_efficiency_is_against_the_best_that_fits(tmp_path):
    twice = FOUND | {"devices": 16, "step_seconds": 1.25}
    assert draw_scaling([REFUSED | {"devices": 4}, FOUND, twice], tmp_path / "s.png") == [
        0.0, 1.0, pytest.approx(0.8),
    ]  # fmt: skip
    assert (tmp_path / "s.png").stat().st_size > 5000
