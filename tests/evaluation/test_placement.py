"""Reference and round trip: routes against the routers' own counts; a checkpoint is placed anew."""

import json

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import convert
from deepseek_jax.checkpoint.manager import Checkpoint, Manager
from deepseek_jax.core import tree
from deepseek_jax.core.config import to_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import Bytes, open_tokenizer
from deepseek_jax.evaluation.placement import halves, held_out_routes, mean_traffic, unmoved
from deepseek_jax.evaluation.suite import held_out, open_task
from deepseek_jax.models.build import build
from deepseek_jax.models.decoder import layer_table
from deepseek_jax.ops.placement import Devices
from deepseek_jax.serving.language import load

DECODER = cases.decoder(
    "gqa", "hierarchical", "capacity", num_layers=3, num_dense_layers=1, num_mtp_layers=1,
    vocab_size=260,
)  # fmt: skip
PRECISION = Precision(compute="float32")


def save(folder, decoder):
    """A run of random weights on random text."""
    rng, texts = np.random.default_rng(0), folder / "texts"
    texts.mkdir(parents=True)
    for i in range(24):
        (texts / f"{i}.txt").write_bytes(bytes(rng.integers(97, 123, 60 + i).tolist()))
    source = TextFiles(paths=(f"{texts}/*.txt",))
    data = Data(source=source, tokenizer=Bytes(), held_out=0.5, cache_dir=str(folder / "cache"))
    config = {
        "model": to_dict(decoder), "precision": to_dict(PRECISION), "data": to_dict(data),
        "sequence_length": 32, "stages": [{"data": None}],
    }  # fmt: skip
    config = json.loads(json.dumps(config))
    model = build(decoder, PRECISION)
    params = jax.tree.map(jnp.asarray, cases.random_params(model.shapes, 0))
    manager = Manager(folder / "run/checkpoints", Checkpoint(), layer_table(decoder))
    tokenizer = open_tokenizer(Bytes())
    manager.save(3, {"params": params}, position=0, config=config, files=tokenizer.files())
    manager.close()
    return model, params, open_task(config, tokenizer, None, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placement")
    return folder, *save(folder, DECODER)


def test_routes_are_what_the_routers_count(run):
    _, model, params, dataset = run
    routes = held_out_routes(model, params, dataset, 4)
    counts = dict.fromkeys(routes, 0)

    @jax.jit
    def counted(inputs, following):
        output = model.apply(params, **inputs, next_tokens=following, drop=False)
        return {path: block.counts for path, block in output.routing.items()}

    for batch in dataset.eval_batches(4):
        inputs = {name: batch[name] for name in ("tokens", "segments", "positions")}
        following = jnp.asarray(batch["targets"][..., :1])
        inputs = jax.tree.map(jnp.asarray, inputs)
        found = counted(inputs, following)
        counts = {path: counts[path] + found[path] for path in counts}
    assert {path: x.shape[0] for path, x in routes.items()} == {
        "segment_1/block": 2,
        "mtp_0/block": 1,
    }
    for path, layers in routes.items():
        found = [np.bincount(chosen.reshape(-1), minlength=8) for chosen in layers]
        np.testing.assert_array_equal(found, counts[path])
    some = held_out_routes(model, params, dataset, 1, 50)
    for path, layers in some.items():
        assert 50 <= layers.shape[1] < 50 + 32
        np.testing.assert_array_equal(layers, routes[path][:, : layers.shape[1]])
    first, last = halves(routes)
    both = np.concatenate([first["mtp_0/block"], last["mtp_0/block"]], axis=1)
    np.testing.assert_array_equal(both, routes["mtp_0/block"])


def test_traffic_is_the_mean_over_layers():
    routes = {"a": np.array([[[0, 1]], [[0, 3]]]), "b": np.array([[[2, 3]]])}
    cost = mean_traffic(routes, unmoved(routes, 4), Devices(num_devices=2))
    assert cost == pytest.approx((4 / 3, 1, 5 / 3))


def test_a_placed_checkpoint_scores_the_same_and_sends_less(run, capsys):
    folder, *_, dataset = run
    arguments = ["--devices", "4", "--nodes", "2", "--tokens", "400"]
    convert.main(["place", str(folder / "run"), str(folder / "placed"), *arguments])
    said = capsys.readouterr().out.splitlines()
    before, after = ([float(x) for x in row.split(" | ")[1:]] for row in said[1:3])
    assert said[1].startswith("before") and after[0] < before[0] and after[1] < before[1] + 0.01
    old, new = (load(folder / name) for name in ("run", "placed"))
    assert new.recorded == old.recorded
    assert new.tokenizer.files() == old.tokenizer.files()
    changed = {
        path.split("/block/")[1]
        for (path, one), other in zip(
            tree.flatten(old.params).items(), jax.tree.leaves(new.params), strict=True
        )
        if (one != other).any()
    }
    experts = {f"moe/experts/{name}" for name in ("gate", "up", "down")}
    assert (
        experts | {"moe/router/weight"}
        <= changed
        <= experts
        | {
            "moe/router/weight",
            "moe/router/groups",
        }
    )
    scores = [held_out(lm.model, lm.params, dataset, 4)["loss"] for lm in (old, new)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "3"], "8 experts are not shared out evenly over 3 devices"),
        (["--devices", "4", "--nodes", "3"], "4 devices are not shared out evenly over 3 nodes"),
        (["--devices", "4", "--data", "/nowhere.txt"], "nowhere"),
        (["--devices", "4", "--tokens", "0"], "--tokens is 0; at least 1, please"),
    ],
)
def test_what_cannot_be_placed_is_refused(run, arguments, message):
    with pytest.raises(InputError, match=message):
        convert.main(["place", str(run[0] / "run"), str(run[0] / "never"), *arguments])
    assert not list(run[0].glob("never*"))


def test_a_model_without_experts_is_refused(tmp_path):
    save(tmp_path, cases.decoder("gqa", None, vocab_size=260))
    with pytest.raises(InputError, match="has no experts to place"):
        convert.main(["place", str(tmp_path / "run"), str(tmp_path / "new"), "--devices", "4"])
    (tmp_path / "new").mkdir()
    with pytest.raises(InputError, match="exists; choose"):
        convert.main(["place", str(tmp_path / "run"), str(tmp_path / "new"), "--devices", "4"])
