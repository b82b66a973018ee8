"""By hand: the bounds that a plan makes of a compiled program's figures."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.parallel.chips import chip
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.pipeline import Pipeline
from deepseek_jax.training.planning import forecast, held

KNOWN = {"model_flops": 600.0, "devices": 2, "bubble": 0.0, "empty": 0.0, "remat": "none"}
PLACE = SimpleNamespace(peak=100.0, chip=chip("TPU v5 lite")._replace(bandwidth=50.0))


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({}, 3.0),
        ({"remat": "full"}, 4.0),  # a third of the products once more
        ({"bubble": 0.2}, 5.0),  # stages make theirs again, and wait a fifth of the step
        ({"bubble": 0.2, "empty": 0.5}, 10.0),  # for others that have twice the layers, too
    ],
)
def test_products_again_and_waits_take_time(fields, seconds):
    found = forecast(KNOWN | fields, PLACE, 100.0, {"network": 1.0, "slow_network": 0.0})
    assert found["bound_seconds"] == pytest.approx(
        {"compute": seconds, "memory": 2.0, "network": 1.0, "slow_network": 0.0}
    )
    assert (found["bound"], found["step_seconds"]) == ("compute", pytest.approx(seconds))
    assert found["mfu"] == pytest.approx(3.0 / seconds)


def test_layers_that_do_not_split_evenly_leave_slots_empty():
    assert Pipeline(1, 1, 1).empty(61) == 0
    assert Pipeline(4, 1, 8).empty(61) == pytest.approx(3 / 64)
    assert Pipeline(2, 2, 8).empty(8) == 0


def test_the_slowest_bound_binds():
    found = forecast(KNOWN, PLACE, 100.0, {"network": 1.0, "slow_network": 6.0})
    assert (found["bound"], found["mfu"]) == ("slow_network", pytest.approx(0.5))


def test_a_device_holds_its_part_and_not_its_hosts():
    mesh = make_mesh(MeshShape(data=2, fsdp=4))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    far = rows.with_memory_kind("pinned_host")
    leaves = [jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=s) for s in (rows, far)]
    assert held(leaves) == 2 * 3 * 2
