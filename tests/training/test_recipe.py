"""Round trip and a table of what is refused: the training config."""

import dataclasses
import json

import cases
import pytest

from deepseek_jax.core.config import from_dict, override, to_dict
from deepseek_jax.data.loader import Data
from deepseek_jax.parallel.mesh import MeshShape
from deepseek_jax.training.language import Language
from deepseek_jax.training.optimizer import WSD, AdamW, Constant, Muon
from deepseek_jax.training.recipe import BatchStep, Gate, Stage, TrainConfig


def recipe(**fields):
    base = {"steps": 10, "batch_size": 8, "sequence_length": 16}
    return TrainConfig(model=cases.decoder(), data=Data(), **(base | fields))


FULL = recipe(
    optimizer=Muon(schedule=WSD(decay_fraction=0.5), clip_norm=None, momentum_dtype="bfloat16"),
    init_from="elsewhere",
    mesh=MeshShape(fsdp=2),
    stages=(
        Stage(name="first", batch_ramp=(BatchStep(step=2, batch_size=16, accumulation_steps=4),)),
        Stage(
            name="long",
            steps=3,
            sequence_length=64,
            data=Data(held_out=0.1),
            optimizer=Muon(schedule=Constant(), momentum_dtype="bfloat16"),
            objective=Language(z_weight=1e-4),
        ),
    ),
)


GATED = Stage(tokens=999, trainable=("text/*",), gate=Gate(metric="loss", below=2.0))


@pytest.mark.parametrize("config", [recipe(), FULL, recipe(stages=(GATED, Stage()))])
def test_json_and_back_is_exact(config):
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_stages_take_the_runs_values_for_what_they_leave_open():
    first, second = FULL.filled_stages()
    assert (first.steps, first.sequence_length, first.data) == (10, 16, FULL.data)
    assert (second.steps, second.sequence_length, second.batch_size) == (3, 64, 8)
    assert second.optimizer.schedule == Constant()
    assert first.objective == Language()


def test_batches_grow_along_the_ramp():
    ramp = (BatchStep(step=2, batch_size=16), BatchStep(step=5, batch_size=32))
    (stage,) = recipe(accumulation_steps=2, stages=(Stage(batch_ramp=ramp),)).filled_stages()
    sizes = [(stage.batch_at(i).batch_size, stage.batch_at(i).accumulation_steps) for i in range(7)]
    assert sizes == [(8, 2)] * 2 + [(16, 1)] * 3 + [(32, 1)] * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0; there must be at least 1"),
        ({"sequence_length": 1}, "sequence_length is 1; it must be at least 2"),
        ({"batch_size": 0}, r"batch_size \(0\)"),
        ({"batch_size": 9, "accumulation_steps": 2}, r"batch_size \(9\) and .* \(2\).* multiple"),
        ({"accumulation_steps": 0}, r"accumulation_steps \(0\)"),
        ({"log_every": 0}, r"log_every \(0\) must be at least 1"),
        ({"save_every": -1}, r"save_every \(-1\)"),
        ({"seed": -1}, r"seed \(-1\) must lie in"),
        ({"stages": ()}, "stages not be empty"),
        ({"run_dir": "s3://bucket/run"}, "run_dir: s3://bucket/run: not a gs://bucket/name"),
        ({"init_from": "hdfs://a/run"}, "init_from: hdfs://a/run: not a gs://bucket/name"),
        ({"stages": (Stage(), Stage(steps=0))}, r"stages\[1\]: steps is 0"),
        (
            {"stages": (Stage(batch_ramp=(BatchStep(step=0, batch_size=8),)),)},
            r"batch_ramp's steps \[0\] must ascend from above 0",
        ),
        (
            {
                "stages": (
                    Stage(batch_ramp=(BatchStep(step=2, batch_size=3, accumulation_steps=2),)),
                )
            },
            r"batch_size \(3\)",
        ),
        ({"stages": (Stage(), Stage(optimizer=Muon()))}, "optimizers must be of one kind"),
        (
            {"stages": (Stage(), Stage(optimizer=AdamW(variance_dtype="bfloat16")))},
            "one choice of dtypes",
        ),
    ],
)
def test_impossible_runs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        recipe(**fields)


def test_flags_reach_every_part():
    flags = "--steps 5 --model.num-layers 4 --optimizer.learning-rate 1e-3 --stages.0.steps 7"
    flags += " --precision.compute float32 --mesh.fsdp 2 --optimizer.clip-norm None --run-dir x"
    config = override(recipe(), flags.split(), prog="train")
    assert (config.steps, config.model.num_layers, config.stages[0].steps) == (5, 4, 7)
    assert (config.optimizer.learning_rate, config.optimizer.clip_norm) == (1e-3, None)
    assert (config.precision.compute, config.mesh.fsdp, config.run_dir) == ("float32", 2, "x")
    changed = override(FULL, ["--stages.0.batch-ramp.0.batch-size", "32"], prog="train")
    assert changed.stages[0].batch_ramp[0].batch_size == 32
    assert dataclasses.replace(changed, stages=FULL.stages) == FULL
    flags = "--stages.0.trainable text/* head/weight --stages.0.gate.below 1.5"
    changed = override(recipe(stages=(GATED,)), flags.split(), prog="train").stages[0]
    assert changed.trainable == ("text/*", "head/weight")
    assert changed.gate == Gate(metric="loss", below=1.5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--optimizer.leraning-rate 1e-3", "--optimizer.learning-rate"),
        ("--stepz 5", "--steps"),
        ("--steps many", "invalid literal"),
        ("--precision.compute float8", "float8"),
        ("--steps 0", "steps is 0"),
        ("--model.moe.router.num-active-experts 99", "num_active_experts is 99"),
    ],
)
def test_mistaken_flags_end_with_code_2_and_a_hint(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        override(recipe(), flags.split(), prog="train")
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
