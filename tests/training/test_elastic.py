"""Invariance: a run goes on with the same rows and losses on other meshes and process counts.

Sums then add up in another order: losses agree to 1e-5. A routing choice close to a tie could fall
otherwise, so the steps that are compared are shown to have none.
"""

import dataclasses
import json
import os
import signal

import cases
import jax
import numpy as np
import pytest
from launched import Runs

from deepseek_jax.checkpoint.manager import load_params
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.loader import Data, batches, open_data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.models.build import build
from deepseek_jax.models.decoder import layer_table
from deepseek_jax.parallel.mesh import MeshShape, make_mesh, rows_share
from deepseek_jax.training import loop
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.recipe import TrainConfig

MODEL = dataclasses.replace(cases.decoder("gqa", "sigmoid"), vocab_size=260, init_scale=0.3)
STEPS = 20
SEED = 0  # one whose routing keeps its margin


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        lines = (f"line {i * j} of file {i} says {(i + j) ** 3}\n" for j in range(40))
        (folder / f"{i}.txt").write_text("".join(lines))
    source = TextFiles(paths=(str(folder / "*.txt"),))
    return TrainConfig(
        model=MODEL,
        data=Data(source=source, tokenizer=Bytes(), held_out=0.2, cache_dir=str(folder / "cache")),
        steps=STEPS, batch_size=8, sequence_length=8, log_every=1, eval_every=5, seed=SEED,
        precision=Precision(compute="float32"), run_dir=str(folder / "whole"),
    )  # fmt: skip


def losses(run_dir):
    with open(f"{run_dir}/metrics.jsonl") as file:
        return {row["step"]: row["loss"] for row in map(json.loads, file)}


def on(monkeypatch, count):
    """Let runs see the first `count` devices only."""
    few = jax.devices()[:count]
    monkeypatch.setattr(loop, "make_mesh", lambda shape: make_mesh(shape, few))


def margins(config):
    """The least margin of every step's routing, by NumPy, from the run's own checkpoints."""
    dataset = open_data(
        config.data, sequence_length=config.sequence_length, num_targets=1, seed=config.seed
    )
    rows = batches(dataset, start=0, batch_size=config.batch_size)
    model, found = build(config.model, config.precision), []
    next(rows)  # step 1 starts from no checkpoint
    for step in range(1, config.steps):
        path = f"{config.run_dir}/checkpoints/{step}"
        params = load_params(path, model.shapes, layer_table(config.model))
        numpy = jax.tree.map(np.asarray, params)
        found.append(cases.reference_forward(numpy, config.model, next(rows)).margin)
    rows.close()
    return found


@pytest.mark.slow
def test_a_run_continues_on_fewer_devices_and_along_other_axes(config, monkeypatch, tmp_path):
    def stopping(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0, "bits_per_byte": 1.0}

    plain = Lent(lambda *_: {"loss": 1.0, "bits_per_byte": 1.0}, lambda *_: "")
    keep = dataclasses.replace(config.checkpoint, keep_last=99, asynchronous=False)
    whole = dataclasses.replace(config, save_every=1, checkpoint=keep, mesh=MeshShape(data=8))
    assert train(whole, plain) == 0
    assert min(margins(whole)) > 1e-4
    meshes = [
        (8, MeshShape(data=1, fsdp=8)),
        (4, MeshShape(data=1, expert=2, tensor=2)),
        (2, MeshShape(data=1, fsdp=2)),
        (8, MeshShape(data=2, expert=4)),
    ]
    for count, mesh in meshes:
        on(monkeypatch, count)
        last = mesh is meshes[-1][1]
        moved = dataclasses.replace(config, mesh=mesh, run_dir=str(tmp_path))
        assert train(moved, plain if last else Lent(stopping, plain.closing)) == 143 * (not last)
    expected, found = losses(whole.run_dir), losses(tmp_path)
    assert sorted(found) == list(range(1, STEPS + 1))
    for step, loss in found.items():
        np.testing.assert_allclose(loss, expected[step], rtol=1e-5, err_msg=str(step))


@pytest.mark.slow
def test_a_run_continues_with_other_numbers_of_processes(config, tmp_path):
    """4, then 2 that hold the same rows (their devices share a tensor axis), then 1."""
    fields = {"model": MODEL, "steps": STEPS, "sequence_length": 8, "seed": SEED}
    runs = Runs(tmp_path, **fields)
    shapes = [
        (4, ["--mesh.data", "2", "--mesh.fsdp", "2"]),
        (2, ["--mesh.data", "1", "--mesh.tensor", "2"]),
        (1, []),
    ]
    for count, flags in shapes:
        stops = {"ODD": str(count - 1), "STOP": "5"} if count > 1 else {}
        code = runs.start("moved", *flags, processes=count, **stops).wait()
        assert code == (143 if count > 1 else 0), runs.output()
    assert runs.start("alone", processes=1).wait() == 0
    found, expected = losses(tmp_path / "moved"), losses(tmp_path / "alone")
    assert sorted(found) == list(range(1, STEPS + 1))
    for step, loss in found.items():
        np.testing.assert_allclose(loss, expected[step], rtol=1e-5, err_msg=str(step))


class Sharding:
    """Stands for a sharding, of which this process's devices hold these rows."""

    def __init__(self, *spans):
        self.parts = {i: (slice(*span),) for i, span in enumerate(spans)}

    def addressable_devices_indices_map(self, shape):
        assert shape == (8,)
        return self.parts


def test_processes_read_the_rows_that_their_devices_hold():
    assert rows_share(Sharding((None, None)), 8) == (0, 1)
    assert rows_share(Sharding((4, 6), (6, 8)), 8) == (1, 2)
    assert rows_share(Sharding((2, 4), (2, 4)), 8) == (1, 4)  # as another process, perhaps
    for spans in [((0, 2), (4, 6)), ((1, 2), (2, 3))]:
        with pytest.raises(InputError, match="process 0 would hold rows .* of 8, not one block"):
            rows_share(Sharding(*spans), 8)
