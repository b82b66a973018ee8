"""Reference and invariance: stages train what they should, as optax would, and resume to the bit.

Outside references: optax.multi_transform with adamw and set_to_zero; plain runs of adamw.
"""

import dataclasses
import json
import math
import pathlib
import re
import shutil

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint.experimental import v1 as ocp

from deepseek_jax.core import tree
from deepseek_jax.core.axes import Spec
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import BPE, Bytes
from deepseek_jax.models.build import build
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.training.faults import Faults
from deepseek_jax.training.language import Language
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.optimizer import AdamW, Constant, Muon, applied, make_optimizer
from deepseek_jax.training.planning import abstract_batch
from deepseek_jax.training.recipe import BatchStep, Gate, Stage, TrainConfig
from deepseek_jax.training.stages import (
    learning,
    shut,
    spans,
    stage_at,
    stage_data,
    stage_objective,
    stage_optimizer,
    stage_state,
    stage_step,
)
from deepseek_jax.training.state import carried, initial_state, memory_table
from deepseek_jax.training.step import make_gradients

MODEL = cases.decoder("gqa", "sigmoid", num_layers=2)
MODEL = dataclasses.replace(MODEL, vocab_size=260, init_scale=0.05)
PATTERNS = ("*/attention/*", "embedding/*")
ADAMW = AdamW(learning_rate=3e-3, weight_decay=0.2, clip_norm=None, schedule=Constant())


def recipe(run_dir=".", folder=".", **fields):
    source = TextFiles(paths=(f"{folder}/*.txt",))
    data = Data(source=source, tokenizer=Bytes(), held_out=0.2, cache_dir=f"{folder}/cache")
    base = {"steps": 5, "batch_size": 8, "sequence_length": 16, "log_every": 1, "save_every": 1}
    base |= {"precision": Precision(compute="float32"), "optimizer": ADAMW, "model": MODEL}
    return TrainConfig(run_dir=str(run_dir), **({"data": data} | base | fields))


@pytest.mark.parametrize(
    ("tokens", "ramp", "steps"),
    [
        (1, (), 1),
        (8 * 16 * 3, (), 3),
        (8 * 16 * 3 + 1, (), 4),
        (8 * 16 * 2, ((2, 16),), 2),
        (8 * 16 * 2 + 1, ((2, 16),), 3),
        (8 * 16 * 2 + 16 * 16 * 3 + 32 * 16, ((2, 16), (5, 32)), 6),
        (8 * 16 * 2 + 16 * 16 * 3 + 32 * 16 + 1, ((2, 16), (5, 32)), 7),
    ],
)
def test_tokens_are_counted_along_the_ramp(tokens, ramp, steps):
    sizes = tuple(BatchStep(step=step, batch_size=rows) for step, rows in ramp)
    (stage,) = recipe(stages=(Stage(tokens=tokens, batch_ramp=sizes),)).filled_stages()
    assert stage.steps == steps
    seen = np.cumsum([16 * stage.batch_at(step).batch_size for step in range(steps)])
    assert seen[-1] >= tokens > (seen[-2] if steps > 1 else 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipe(stages=(Stage(tokens=9, steps=1),)), r"tokens \(9\).* no steps \(1\)"),
        (lambda: recipe(stages=(Stage(tokens=0),)), r"stages\[0\] has tokens \(0\)"),
        (lambda: Gate(metric="loss"), "one of below"),
        (lambda: Gate(metric="loss", below=1.0, above=2.0), r"below \(1.0\) and above \(2.0\)"),
        (lambda: Gate(metric="loss", below=1.0, every=0), r"every \(0\)"),
    ],
)
def test_impossible_stages_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gates_hold_by_their_side_and_never_for_what_is_not_finite():
    below, above = Gate(metric="loss", below=2.0), Gate(metric="recall", above=0.5)
    assert [below.holds(x) for x in (1.9, 2.0, math.nan, -math.inf)] == [True, False, False, False]
    assert [above.holds(x) for x in (0.6, 0.5, math.nan, math.inf)] == [True, False, False, False]
    assert (str(below), str(above)) == ("loss below 2", "recall above 0.5")


def test_where_stages_begin_and_what_a_checkpoint_holds():
    gate = Gate(metric="loss", below=1.0, required=True)
    stages = (Stage(steps=10, gate=gate), Stage(steps=5), Stage(steps=4, gate=gate))
    assert spans(stages, {}) == [(0, 10), (10, 15), (15, 19)]
    assert spans(stages, {0: 6, 2: 12}) == [(0, 6), (6, 11), (11, 12)]
    assert [stage_at(stages, {0: 6}, step) for step in (0, 6, 7, 11, 12, 15, 99)] == [
        0, 0, 1, 1, 2, 2, 2,
    ]  # fmt: skip
    assert shut(stages, {}, 10) is stages[0]
    assert shut(stages, {0: 6}, 15) is stages[2]
    assert not any(shut(stages, opened, step) for opened, step in (({0: 10}, 10), ({}, 9)))


def test_patterns_choose_paths_and_near_ones_are_named():
    paths = ["text/embedding/weight", "text/norm/scale", "image/norm/scale", "projector/weight"]
    assert tree.matching((), paths, "here") == set(paths)
    assert tree.matching(("text/*", "projector/weight"), paths, "") == set(paths) - {paths[2]}
    assert tree.matching(("*/norm/*",), paths, "") == {paths[1], paths[2]}
    assert tree.matching(("!*/norm/*", "text/*"), paths, "") == {paths[0]}
    assert tree.matching(("!text/*",), paths, "") == {paths[2], paths[3]}
    with pytest.raises(InputError, match=r"here: 'projecter/\*' .*are projector/\*"):
        tree.matching(("text/*", "projecter/*"), paths, "here")
    with pytest.raises(InputError, match="there are image, projector, text"):
        tree.matching(("?",), paths, "here")


def test_a_run_has_one_bpe_that_of_its_first_stage(tmp_path):
    for name, word in (("one", "attention "), ("two", "mixture ")):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i}.txt").write_text(word * (20 + i))
    one, two = (
        Data(
            source=TextFiles(paths=(f"{tmp_path}/{name}/*.txt",)),
            tokenizer=BPE(vocab_size=260),
            cache_dir=f"{tmp_path}/cache",
        )
        for name in ("one", "two")
    )
    config = recipe(data=one, stages=(Stage(), Stage(data=two)))
    first, second = (stage_data(config, stage) for stage in config.filled_stages())
    alone = stage_data(recipe(data=two), recipe(data=two).filled_stages()[0])
    assert first.tokenizer.files() == second.tokenizer.files() != alone.tokenizer.files()
    text = "mixture attention "
    assert second.tokenizer.decode(second.tokenizer.encode(text)) == text


MATRIX = {"reduced": (0,), "outputs": (1,)}
SPECS = {name: {"weight": Spec(axes=("embed", "mlp"), **MATRIX)} for name in "abc"}


@pytest.mark.parametrize("config", [ADAMW, Muon(weight_decay=0.2)], ids=["adamw", "muon"])
def test_memory_across_a_boundary_is_optaxs(config):
    """a learns throughout, b in the first stage, c in the second: with a count of its own."""
    rng = np.random.default_rng(0)
    params = {n: {"weight": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)} for n in "abc"}
    start, rates = jax.tree.map(np.asarray, params), (0.01, 0.02, 0.005, 0.01, 0.03)
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape), params) for _ in rates]
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
    since = [{"a/weight": 0, "b/weight": 0}, {"a/weight": 0, "c/weight": 1}]
    optimizers = [make_optimizer(config, SPECS, learns) for learns in since]
    here = jax.tree.leaves(params)[0].sharding
    state = initial_state(params, optimizers[0], 1.0)
    for number, (optimizer, steps) in enumerate(zip(optimizers, ((0, 3), (3, 5)), strict=True)):
        if number:
            shapes = jax.eval_shape(lambda p: initial_state(p, optimizers[1], 1.0), params)
            abstract = jax.tree.map(lambda x: x.update(sharding=here), shapes)
            state = carried(state, abstract)
            assert "b/weight" not in tree.flatten(state.opt_state["mu"])
        for step in range(*steps):
            learns = tree.split(grads[step], lambda path, n=number: path in since[n])[0]
            updates, memory = optimizer.update(
                learns, state.opt_state, state.params, learning_rate=rates[step]
            )
            params = applied(state.params, updates)
            state = state.replace(params=params, opt_state=memory)
    names = {"count", "count_1", "mu"} | ({"nu"} if config is ADAMW else set())
    assert {path.split("/")[0] for path in tree.flatten(state.opt_state)} == names
    assert [int(state.opt_state[n]) for n in ("count", "count_1")] == [5, 2]
    for name, span in (("a", (0, 5)), ("b", (0, 3)), ("c", (3, 5))):
        theirs, memory = start[name]["weight"], None
        for step in range(*span):
            if config is ADAMW:
                adamw = optax.adamw(
                    rates[step], b1=0.9, b2=0.95, eps=1e-8, weight_decay=config.weight_decay
                )
            else:  # what one weight alone would get
                adamw = make_optimizer(config, SPECS["a"])
            memory = memory or adamw.init(jax.tree.map(jnp.asarray, {"weight": theirs}))
            more = {} if config is ADAMW else {"learning_rate": rates[step]}
            updates, memory = adamw.update(grads[step][name], memory, {"weight": theirs}, **more)
            theirs = optax.apply_updates({"weight": theirs}, updates)["weight"]
        np.testing.assert_allclose(state.params[name]["weight"], theirs, atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def model():
    return build(MODEL, Precision(compute="float32"))


def test_steps_are_those_of_optaxs_multi_transform_and_the_rest_stays(model):
    """-0.0 too; router biases of what is frozen; and gradients are the whole model's."""
    config = recipe(stages=(Stage(trainable=PATTERNS),))
    (stage,), (learns,) = config.filled_stages(), learning(config, model)
    params = jax.tree.map(jnp.asarray, cases.random_params(model.shapes, 0))
    params = jax.tree.map(lambda x: x.at[..., 0].set(-0.0) if x.ndim > 1 else x, params)
    before = jax.tree.map(np.array, params)
    objective = stage_objective(dataclasses.replace(stage, trainable=()), model)
    batch = cases.make_batch(((9, 5), (16,)) * 4, 16, 1, 0, MODEL.vocab_size)
    key, one = jax.random.key(0), jnp.float32(1)
    whole, part = (make_gradients(x) for x in (objective, stage_objective(stage, model)))
    lowered = [jax.jit(f).lower(params, batch, key, one) for f in (whole, part)]
    flops = [x.compile().cost_analysis()["flops"] for x in lowered]
    assert flops[1] < 0.95 * flops[0]
    whole, part = (x.compile() for x in lowered)
    all_grads = tree.flatten(whole(params, batch, key, one)[0])
    some = tree.flatten(part(params, batch, key, one)[0])
    assert some.keys() == learns.keys() and 0 < len(learns) < len(all_grads)
    for path, grad in some.items():
        scale = float(jnp.abs(grad).max())
        np.testing.assert_allclose(grad, all_grads[path], atol=1e-5 * scale, err_msg=path)

    labels = tree.map_with_path(lambda p, _: "learn" if p in learns else "stay", params)
    decays = jax.tree.map(lambda s: bool(s.reduced or "vocab" in s.axes), model.specs)
    adamw = optax.adamw(
        ADAMW.learning_rate, b2=ADAMW.b2, weight_decay=ADAMW.weight_decay, mask=decays
    )
    theirs = optax.multi_transform({"learn": adamw, "stay": optax.set_to_zero()}, labels)
    reference, memory = params, theirs.init(params)
    state = initial_state(params, stage_optimizer(config, model), 1.0)
    step = jax.jit(stage_step(config, model, stage, stage.batch_at(0), 0))

    @jax.jit
    def update(grads, memory, params):
        updates, memory = theirs.update(grads, memory, params)
        return optax.apply_updates(params, updates), memory

    for _ in range(3):
        grads, _, _ = whole(reference, batch, key, one)
        reference, memory = update(grads, memory, reference)
        state, _ = step(state, batch)
    expected, found = tree.flatten(reference), tree.flatten(state.params)
    for path, leaf in tree.flatten(before).items():
        if path in learns:
            np.testing.assert_allclose(found[path], expected[path], atol=2e-5, err_msg=path)
            assert (np.asarray(found[path]) != leaf).any(), path
        else:
            assert np.asarray(found[path]).tobytes() == leaf.tobytes(), path


def test_what_does_not_learn_has_no_memory_and_the_table_says_so(model):
    stages = (Stage(trainable=PATTERNS), Stage(trainable=("embedding/*", "head/*")), Stage())
    config, mesh = recipe(stages=stages), make_mesh(MeshShape(data=8))
    found = learning(config, model)
    assert {found[2][path] for path in found[1]} == {0, 1}
    assert found[2]["embedding/weight"] == 0 and found[2]["head/weight"] == 1
    assert found[2]["segment_0/block/attention/q/weight"] == 2  # it paused
    tables = [memory_table(stage_state(config, model, mesh, number)) for number in range(3)]
    sizes = [int(re.search(r"optimizer ([\d,]+\d)", table)[1].replace(",", "")) for table in tables]
    leaves = tree.flatten(model.shapes)
    for size, learns in zip(sizes, found, strict=True):
        held = sum(leaves[path].size for path in learns if not path.endswith("router/bias"))
        counts = len(set(learns.values()))
        assert size == 8 * held + 4 * counts
    assert "head/weight" in tables[0] and tables[0].count("no optimizer memory") > 5
    assert tables[2].count("no optimizer memory") == 1  # the router's bias
    with pytest.raises(InputError, match=r"stages\[1\].trainable: 'heads/\*' .* head/\*"):
        learning(recipe(stages=(Stage(), Stage(trainable=("heads/*",)))), model)


@pytest.mark.parametrize(
    "shape",
    [MeshShape(slice=2, data=1, slice_gradients="int4"), MeshShape(stage=2, data=1)],
    ids=["int4", "pipeline"],
)
def test_slices_and_pipelines_have_nothing_of_what_does_not_learn(shape, model):
    config = recipe(mesh=shape, stages=(Stage(trainable=PATTERNS),), accumulation_steps=2)
    (stage,), mesh = config.filled_stages(), make_mesh(shape, jax.devices()[:2])
    with jax.set_mesh(mesh):
        state = stage_state(config, model, mesh)
        step = stage_step(config, model, stage, stage.batch_at(0), 0)
        after, _ = jax.eval_shape(step, state, abstract_batch(mesh, 8, 16, config))
    before, after = tree.flatten(state), tree.flatten(after)
    assert {p: x.shape for p, x in before.items()} == {p: x.shape for p, x in after.items()}
    assert state.left_out.keys() <= learning(config, model)[0].keys()
    assert bool(state.left_out) == config.mesh.by_slice


def held_out(model, params, dataset, batch_size):
    return {"loss": sum(float(np.abs(x).sum()) for x in jax.tree.leaves(params))}


LENT = Lent(held_out, lambda *_: "the end")
OPENS = Gate(metric="loss", above=0.0, every=3)
STAGES = (
    Stage(name="low", steps=9, trainable=PATTERNS, gate=OPENS),
    Stage(
        name="high", steps=3, trainable=("segment_*", "final_norm/*"), objective=Language(chunk=64)
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(f"{i} and {n} in all\n" for n in range(60)))
    return folder


def staged(run_dir, folder, **fields):
    config = recipe(run_dir, folder, **({"stages": STAGES} | fields))
    keep = dataclasses.replace(config.checkpoint, keep_last=9)
    return dataclasses.replace(config, checkpoint=keep)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    assert train(staged(run_dir, folder), LENT) == 0
    return run_dir


def lines(run_dir, name="metrics.jsonl"):
    found = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return [{k: x for k, x in row.items() if k not in ("tokens_per_second", "mfu")}
            for row in found]  # fmt: skip


def saved(run_dir, step):
    """A checkpoint's leaves by their names on disk, as bytes, and its files."""
    path = run_dir / "checkpoints" / str(step)
    leaves = tree.flatten(ocp.load(path.absolute()))
    return {name: np.asarray(leaf).tobytes() for name, leaf in leaves.items()}, path


def test_a_gate_ends_its_stage_and_memory_follows_what_learns(whole):
    assert [row["step"] for row in lines(whole)] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in lines(whole, "eval.jsonl")] == [3, 6]
    (low, path), (high, _), (last, _) = (saved(whole, step) for step in (3, 4, 6))
    assert json.loads((path / "gates.json").read_text()) == {"gates": [[0, 3]]}
    assert not (whole / "checkpoints" / "2" / "gates.json").exists()
    mu = [{n.removeprefix("opt_state/mu/") for n in x if "/mu/" in n} for x in (low, last)]
    assert "embedding/weight" in mu[0] - mu[1] and "final_norm/scale" in mu[1] - mu[0]
    assert "layer_0/attention/q/weight" in mu[0] & mu[1] and "head/weight" not in mu[0] | mu[1]
    counts = {name: np.frombuffer(last[f"opt_state/{name}"], np.int32)[0]
              for name in ("count", "count_1")}  # fmt: skip
    assert counts == {"count": 6, "count_1": 3} and "opt_state/count_1" not in low
    for path in ("head/weight", "embedding/weight", "layer_1/moe/router/bias"):
        name = f"params/{path}"
        assert (low[name] == last[name]) == (path != "layer_1/moe/router/bias"), path
    first, _ = saved(whole, 1)
    assert first["params/layer_1/moe/router/bias"] == low["params/layer_1/moe/router/bias"]
    assert high["params/layer_1/moe/router/bias"] != low["params/layer_1/moe/router/bias"]


@pytest.mark.parametrize("step", [2, 3, 4], ids=["inside", "at the end", "behind"])
def test_killed_at_a_boundary_it_goes_on_to_the_bit(whole, folder, tmp_path, step):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for later in range(step + 1, 7):
        shutil.rmtree(run_dir / "checkpoints" / str(later))
    assert train(staged(run_dir, folder), LENT) == 0
    for name in ("metrics.jsonl", "eval.jsonl", "expert_load.jsonl"):
        assert lines(run_dir, name) == lines(whole, name), name
    for later in range(step, 7):
        assert saved(run_dir, later)[0] == saved(whole, later)[0], later


def test_local_checkpoints_know_their_stage(whole, folder, tmp_path, capfd):
    def killed(model, params, dataset, batch_size):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return held_out(model, params, dataset, batch_size)

    calls, run_dir = [], tmp_path / "run"
    faults = Faults(local_save_every=2, local_dir=str(tmp_path / "local"))
    config = staged(run_dir, folder, faults=faults, save_every=0)
    with pytest.raises(KeyboardInterrupt):
        train(config, LENT._replace(held_out=killed))
    assert train(config, LENT) == 0
    assert "after step 4, from" in capfd.readouterr().err
    assert lines(run_dir) == lines(whole)
    assert saved(run_dir, 6)[0] == saved(whole, 6)[0]


def test_a_gate_that_stays_shut_stops_the_run_or_warns(folder, tmp_path, capfd):
    never = Gate(metric="loss", below=0.0, required=True)  # log_every divides none of these steps
    stages = (Stage(name="low", steps=1, trainable=PATTERNS, gate=never), Stage(steps=1))
    small = dataclasses.replace(cases.decoder("gqa", None), vocab_size=260)
    config = staged(tmp_path, folder, stages=stages, save_every=0, model=small, log_every=9)
    assert train(config, LENT) == 3
    assert train(config, LENT) == 3  # it is not passed by starting again
    said = capfd.readouterr().err
    assert said.count("stopped after step 1: stage 'low' is at its end, and loss below 0") == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    bad = dataclasses.replace(stages[0], gate=Gate(metric="bits", below=0.0), steps=2)
    with pytest.raises(InputError, match=r"stages\[0\].gate.metric is 'bits'; there are loss"):
        train(dataclasses.replace(config, stages=(bad, stages[1])), LENT)
    free = dataclasses.replace(stages[0], gate=dataclasses.replace(never, required=False), steps=2)
    assert train(dataclasses.replace(config, stages=(free, stages[1])), LENT) == 0
    said = capfd.readouterr().err
    assert "warning: stage 'low' is at its end after step 2 and its gate has not opened" in said
    assert [row["step"] for row in lines(pathlib.Path(tmp_path))] == [1, 2, 3]
