"""Contract: what is asked of described devices, and what an installed libtpu may not do."""

import os
import subprocess
import sys
import types

import jax
import pytest

from deepseek_jax.core import target
from deepseek_jax.parallel.mesh import MeshShape, make_mesh

TRACE = """
import sys
from deepseek_jax.core.target import leave_absent_tpus
leave_absent_tpus()
import jax
jax.profiler.start_trace(sys.argv[1])
jax.numpy.ones(3).sum().block_until_ready()
jax.profiler.stop_trace()
print(jax.default_backend())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libtpu is for Linux")
def test_a_libtpu_without_chips_is_left_alone(tmp_path):
    """Else it prints its complaints, and JAX's profiler crashes in it."""
    environment = {name: x for name, x in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-c", TRACE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")


@pytest.mark.parametrize("there", ["chips", "plugin", "choice", "neither"])
def test_where_an_accelerator_may_be_jax_chooses(there, tmp_path, monkeypatch):
    said, chosen = [], "tpu,cpu" if there == "choice" else None
    given = types.SimpleNamespace(jax_platforms=chosen, update=lambda *pair: said.append(pair))
    monkeypatch.setattr(target.jax, "config", given)
    monkeypatch.setattr(target, "PCI", tmp_path)
    plugins = [object()] if there == "plugin" else []
    monkeypatch.setattr(target.importlib.metadata, "entry_points", lambda group: plugins)
    (tmp_path / "0000:00:04.0").mkdir()
    vendor = "0x1ae0" if there == "chips" else "0x1af4"
    (tmp_path / "0000:00:04.0/vendor").write_text(f"{vendor}\n")
    target.leave_absent_tpus()
    assert said == ([("jax_platforms", "cpu")] if there == "neither" else [])


def test_described_devices_answer_in_place_of_this_process():
    described = [types.SimpleNamespace(platform="tpu")] * 4
    with target.compiling_for(described):
        assert (target.platform(), len(target.devices())) == ("tpu", 4)
    assert (target.platform(), target.devices()) == ("cpu", jax.devices())


@pytest.mark.parametrize(
    ("kind", "limited"), [("TPU v5 lite", True), ("TPU v5", False), ("TPU v6 lite", False)]
)
def test_what_a_chips_compiler_gives_up_on_is_not_asked_of_it(kind, limited):
    with target.compiling_for([types.SimpleNamespace(platform="tpu", device_kind=kind)]):
        assert target.limited() == limited
        assert target.travel_options() == ({} if limited else target.ASYNCHRONOUS)
    assert target.travel_options() == {}  # here


def test_a_program_is_partitioned_along_axes_that_are_not_manual():
    assert target.partitioned()  # 8 devices and no mesh: nobody knows
    with jax.set_mesh(make_mesh(MeshShape(), jax.devices()[:1])):
        assert not target.partitioned()
    seen = []

    def of_one(x):
        seen.append(target.partitioned())
        return x

    with jax.set_mesh(make_mesh(MeshShape())):
        assert target.partitioned()
        spec = jax.P("data")
        jax.shard_map(of_one, in_specs=spec, out_specs=spec)(jax.numpy.ones(8))
    assert seen == [False]


@pytest.mark.parametrize(
    ("flags", "address", "expected"),
    [
        ("", None, ""),
        ("", "host:1", target.IN_ORDER),
        ("--xla_force_host_platform_device_count=8", None, None),
        ("--xla_cpu_enable_concurrency_optimized_scheduler=true", "host:1", "as it was"),
    ],
)
def test_cpu_devices_that_work_together_keep_the_order(flags, address, expected, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    target.order_collectives()
    wanted = {None: f"{flags} {target.IN_ORDER}", "as it was": flags}.get(expected, expected)
    assert os.environ["XLA_FLAGS"] == wanted
