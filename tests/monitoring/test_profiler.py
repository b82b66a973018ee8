"""The peak that MFU is measured against, and the table of costly operations."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from deepseek_jax.monitoring import profiler
from deepseek_jax.monitoring.profiler import Profiler, matmul_peak, operation_table


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
    ],
)
def test_published_peaks(monkeypatch, kind, teraflops):
    device = types.SimpleNamespace(device_kind=kind)
    monkeypatch.setattr(profiler.jax, "devices", lambda: [device])
    monkeypatch.setattr(profiler.jax, "device_count", lambda: 4)
    peak = matmul_peak()
    assert peak.flops == pytest.approx(4 * teraflops * 1e12) and kind in peak.how


def test_a_cpu_is_measured_once_whatever_it_is_split_into():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):  # a mesh around must not spread the matmul
        peak = matmul_peak(seconds=0.01)
    assert 1e8 < peak.flops < 1e15
    assert peak.how.startswith("measured, ") and "float" in peak.how


def test_a_trace_becomes_a_table(tmp_path):
    @jax.jit
    def step(x):
        y, _ = jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ carry), None), x, length=4)
        return jnp.sum(y)

    x = jax.random.normal(jax.random.key(0), (256, 256))
    step(x).block_until_ready()
    traced = Profiler(tmp_path, 3, 4)
    tables = []
    for number in range(1, 7):
        traced.before(number)
        step(x).block_until_ready()
        tables.append(traced.after(number))
    assert [bool(table) for table in tables] == [False, False, False, True, False, False]
    assert traced.close() == ""
    table = (tmp_path / "profile/operations.txt").read_text()
    assert table == tables[3] == operation_table(tmp_path / "profile")
    header, *rows = table.splitlines()
    assert header.split() == ["ms", "share", "calls", "operation"]
    times = [float(row.split()[0]) for row in rows]
    assert times == sorted(times, reverse=True) and 1 <= len(rows) <= 20
    shares = [float(row.split()[1].rstrip("%")) for row in rows]
    assert sum(shares) <= 101
    assert 8 in [int(row.split()[2]) for row in rows]  # two steps of four
    assert not any(row.split()[3].startswith("while") for row in rows)
    assert list((tmp_path / "profile/plugins/profile").iterdir())  # where xprof looks


def test_a_run_that_ends_inside_the_traced_steps(tmp_path):
    traced = Profiler(tmp_path, 1, 100)
    traced.before(1)
    jnp.ones(3).block_until_ready()
    assert traced.after(1) == ""
    assert traced.close().startswith(" ")
    assert (tmp_path / "profile/operations.txt").exists()


def test_no_trace(tmp_path):
    assert len(operation_table(tmp_path).splitlines()) == 1
