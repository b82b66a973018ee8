"""Sharded = single-device at length: one row of up to 131,072 tokens on a context axis of 8."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "length"), [("mla", 2**17), ("gqa", 2**15)])
def test_a_step_on_a_long_row_is_finite_and_its_losses_are_one_devices(kind, length):
    command = [sys.executable, str(ROOT / "tests" / "long_row.py"), kind, str(length), "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    mesh, plain = found["mesh"], found["plain"]
    assert all(map(math.isfinite, mesh.values()))
    assert mesh["skipped"] == 0 < mesh["moved"]
    assert {"loss", "cross_entropy"} < plain.keys()
    for term, value in plain.items():
        assert mesh[term] == pytest.approx(value, rel=1e-5), term
