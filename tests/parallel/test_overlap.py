"""Contract: on TPUs products run while tokens travel, as the compiler schedules it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def scheduled(*flags):
    """What tests/overlap.py prints of a mixture of experts on 8 chips."""
    command = [sys.executable, str(ROOT / "tests" / "overlap.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=900, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shared"), [("padded", False), ("ragged", True)])
def test_the_next_chunks_tokens_travel_beside_products(kind, shared):
    rows = scheduled("--model.moe.exchange.kind", kind, "--model.moe.exchange.chunks", "2")
    tokens = [row for row in rows if row["sent"].startswith("bf16")]
    for backward in (False, True):
        beside = [name for row in tokens if row["backward"] == backward for name in row["beside"]]
        assert any("ragged_dot" in name for name in beside), rows
    if shared:
        assert any("shared/" in name for row in tokens for name in row["beside"]), rows
