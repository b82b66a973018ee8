"""Two towers in training: the loss of transformers' CLIP, any mesh, resumed runs, refusals."""

import dataclasses
import functools
import json
import pathlib
import shutil
from itertools import pairwise

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from encoder_cases import on_disk, randomized
from launched import Runs
from PIL import Image

import deepseek_jax
from deepseek_jax import convert, evaluate
from deepseek_jax.checkpoint import tables
from deepseek_jax.checkpoint.encoders import FAMILIES, config_of
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.media import MediaFolder
from deepseek_jax.data.pairs import Pairs, open_pairs
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.data.vision import ImageTransform
from deepseek_jax.evaluation.queries import queries
from deepseek_jax.evaluation.retrieval import retrieval
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.build import Network
from deepseek_jax.models.captioner import Captioner
from deepseek_jax.models.text_tower import TextTower
from deepseek_jax.models.two_tower import TwoTower, build_towers
from deepseek_jax.models.vit import ViT
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.sharding import place_batch, tree_shardings
from deepseek_jax.serving.encoder import load_encoder
from deepseek_jax.training.contrastive import (
    Contrastive,
    collapse,
    inputs_of,
    make_contrastive,
)
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.optimizer import AdamW, Constant
from deepseek_jax.training.recipe import Stage, TrainConfig
from deepseek_jax.training.stages import stage_optimizer, stage_state, stage_step
from deepseek_jax.training.state import carried, initial_state
from deepseek_jax.training.step import make_gradients

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TOWER = Transformer(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48)
MODEL = TwoTower(
    image=ViT(transformer=TOWER, image_size=(16, 16), patch_size=8),
    text=TextTower(transformer=TOWER, vocab_size=258, max_length=12),
    shared_dim=24,
)

NORM = {"scale": "weight", "bias": "bias"}
WRITER = Captioner(transformer=dataclasses.replace(TOWER, causal=True, activation="gelu_tanh"))
WRITING = dataclasses.replace(MODEL, captioner=WRITER, learned_weights=True)


def make_batch(rows, seed=0, vocab=50, size=16):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, vocab - 1, (rows, 12)).astype(np.int32)
    for row, end in enumerate(rng.integers(3, 12, rows)):
        tokens[row, end] = vocab - 1
        tokens[row, end + 1 :] = -1
    images = rng.integers(0, 256, (rows, size, size, 3)).astype(np.uint8)
    return {"images": images, "tokens": tokens, "groups": np.arange(rows, dtype=np.int32)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    config = transformers.CLIPConfig(
        text_config=SHAPE | {"vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 49},
        vision_config=SHAPE | {"image_size": 16, "patch_size": 8},
        projection_dim=24,
    )
    model = randomized(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path_factory.mktemp("clip"))
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, load_encoder(folder)


def test_the_loss_and_its_slopes_are_clips(clip):
    """Of images that the positions are resized for, as transformers interpolates them."""
    model, ours = clip
    batch = make_batch(6, size=24)
    objective = make_contrastive(Contrastive(chunk=4), ours.towers, "clip")
    grads, means, _ = jax.jit(make_gradients(objective))(
        ours.params, batch, jax.random.key(0), np.float32(1)
    )
    given = inputs_of(batch, "clip")
    theirs = model(
        input_ids=torch.from_numpy(np.array(given["tokens"])).long(),
        attention_mask=torch.from_numpy(np.array(given["mask"])).long(),
        pixel_values=torch.from_numpy(np.array(given["images"]).transpose(0, 3, 1, 2)),
        return_loss=True,
        interpolate_pos_encoding=True,
    )
    np.testing.assert_allclose(means["loss"], theirs.loss.item(), rtol=1e-5)
    np.testing.assert_allclose(means["guessing_loss"], np.log(6), rtol=1e-6)
    theirs.loss.backward()
    named, found = dict(model.named_parameters()), on_disk(grads, ours.towers.layers)
    noise = 1e-6 * max(abs(w.grad).max().item() for w in named.values())
    leaves = tables.leaves(ours.towers)
    for row in tables.table(FAMILIES["clip"], ours.config, leaves):
        mine = tables.joined(row, leaves, [found[path] for path in row.ours])
        other = named[row.theirs].grad.numpy()
        atol = max(1e-3 * abs(other).max(), noise)
        np.testing.assert_allclose(mine, other, atol=atol, rtol=0, err_msg=row.theirs)


@pytest.mark.parametrize("model, objective", [
    (MODEL, Contrastive()),
    (dataclasses.replace(MODEL, loss="sigmoid"), Contrastive()),
    (WRITING, Contrastive(caption_weight=2.0, alignment_weight=0.5, token_dropout=0.2)),
], ids=["softmax", "sigmoid", "all three"])  # fmt: skip
@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"fsdp": 2, "tensor": 2, "data": 2}, {"expert": 4, "tensor": 2}], ids=str
)
def test_a_mesh_changes_nothing(sizes, model, objective):
    model = build_towers(model, Precision(compute="float32"))
    params = model.init(jax.random.key(1))
    params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)  # logits of some size
    batch = make_batch(16, vocab=258)
    gradients = make_gradients(make_contrastive(objective, model, "half"))
    alone = jax.jit(gradients)(params, batch, jax.random.key(0), np.float32(1))
    mesh = make_mesh(MeshShape(**sizes))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(mesh, model.specs, model.shapes))
        batch = place_batch(mesh, batch)
        found = jax.jit(gradients)(placed, batch, jax.random.key(0), np.float32(1))
    for name, mean in alone[1].items():
        np.testing.assert_allclose(found[1][name], mean, rtol=1e-5, atol=1e-6, err_msg=name)
    largest = max(float(abs(g).max()) for g in jax.tree.leaves(alone[0]))
    other = tree.flatten(found[0])
    for path, grad in tree.flatten(alone[0]).items():
        atol = 1e-5 * largest
        np.testing.assert_allclose(other[path], grad, rtol=1e-4, atol=atol, err_msg=path)


def test_the_caption_loss_and_its_slopes_are_gpt2s():
    """Of GPT-2's blocks behind the image's projected tokens; and the other two losses beside it."""
    towers = build_towers(WRITING, Precision(compute="float32"))
    params = jax.tree.map(jnp.asarray, cases.random_params(towers.shapes, 5))
    params["log_variances"] = jnp.array([0.3, -0.4, 0.2])
    batch = make_batch(6, vocab=258, size=24)  # more of an image's tokens than the model's own
    objective = make_contrastive(
        Contrastive(caption_weight=2.0, alignment_weight=0.5), towers, "clip"
    )
    grads, means, _ = jax.jit(make_gradients(objective))(
        params, batch, jax.random.key(0), np.float32(1)
    )
    given = jax.tree.map(jnp.asarray, inputs_of(batch, "clip"))
    pair = jax.jit(towers.apply)(params, **given)
    seen = jax.jit(lambda p, x: towers.module.apply({"params": p}, x, method="seen"))

    model = transformers.GPT2Model(transformers.GPT2Config(
        vocab_size=1, n_positions=24, bos_token_id=0, eos_token_id=0, n_embd=32, n_layer=2,
        n_head=4, n_inner=48,
        layer_norm_epsilon=1e-6, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0,
    ))  # fmt: skip
    ours = {
        path: torch.from_numpy(np.array(x)) for path, x in tree.flatten(params["captioner"]).items()
    }
    block = {p.removeprefix("segment_0/block/"): x for p, x in ours.items() if "block" in p}
    state = {"wpe.weight": torch.zeros(24, 32)} | {
        f"ln_f.{b}": ours[f"final_norm/{a}"] for a, b in NORM.items()
    }
    for n in range(2):
        for a, b in {"attention_norm": "ln_1", "mlp_norm": "ln_2"}.items():
            state |= {f"h.{n}.{b}.{y}": block[f"{a}/{x}"][n] for x, y in NORM.items()}
        qkv = [block[f"attention/{x}/weight"][n].reshape(32, 32) for x in "qkv"]
        state[f"h.{n}.attn.c_attn.weight"] = torch.cat(qkv, 1)
        state[f"h.{n}.attn.c_attn.bias"] = torch.cat(
            [block[f"attention/{x}/bias"][n].reshape(32) for x in "qkv"]
        )
        state[f"h.{n}.attn.c_proj.weight"] = block["attention/o/weight"][n].reshape(32, 32)
        state[f"h.{n}.attn.c_proj.bias"] = block["attention/o/bias"][n]
        for a, b in {"up": "c_fc", "down": "c_proj"}.items():
            state |= {f"h.{n}.mlp.{b}.{x}": block[f"mlp/{a}/{x}"][n] for x in ("weight", "bias")}
    model.load_state_dict(state | {"wte.weight": torch.zeros(1, 32)})
    table = ours["embedding/weight"].requires_grad_()
    tokens = torch.from_numpy(np.array(given["tokens"])).long()
    image = (
        torch.from_numpy(np.array(seen(params, given["images"]))) @ ours["image_projection/weight"]
    )
    words = table[tokens] + ours["positions"][: tokens.shape[1]]
    x = torch.cat([image + ours["image_projection/bias"], words], 1)
    logits = model(inputs_embeds=x).last_hidden_state[:, image.shape[1] :] @ table.T
    follow = torch.from_numpy(np.array(given["mask"]))[:, 1:]
    theirs = torch.nn.functional.cross_entropy(logits[:, :-1][follow], tokens[:, 1:][follow])
    np.testing.assert_allclose(means["caption_loss"], theirs.item(), rtol=1e-5)

    word, part = (np.array(x, np.float64) for x in (pair.text_tokens, pair.image_tokens))
    likeness = np.exp(word @ part.swapaxes(1, 2) / 0.1)
    mixed = likeness / likeness.sum(-1, keepdims=True) @ part
    cosine = (word * mixed).sum(-1) / np.linalg.norm(word, axis=-1) / np.linalg.norm(mixed, axis=-1)
    apart = (1 - cosine)[np.array(given["mask"])].mean()
    np.testing.assert_allclose(means["alignment_loss"], apart, rtol=1e-5)

    losses = [float(means[name]) for name in ("loss", "caption_loss", "alignment_loss")]
    s = np.array([0.3, -0.4, 0.2])
    scale, lambdas = np.exp(-s), np.array([1.0, 2.0, 0.5])
    np.testing.assert_allclose(grads["log_variances"], lambdas * (0.5 - scale * losses), rtol=1e-4)
    theirs.backward()
    slope = scale[1] * lambdas[1] * table.grad.numpy()
    found = grads["captioner"]["embedding"]["weight"]
    np.testing.assert_allclose(found, slope, atol=1e-3 * abs(slope).max(), rtol=0)
    found = grads["captioner"]["segment_0"]["block"]["attention"]["v"]["weight"]
    slope = [layer.attn.c_attn.weight.grad[:, 64:].numpy() for layer in model.h]
    slope = scale[1] * lambdas[1] * np.stack(slope).reshape(found.shape)
    np.testing.assert_allclose(found, slope, atol=1e-3 * abs(slope).max(), rtol=0)


def test_captions_are_drawn_among_what_is_allowed():
    towers = build_towers(WRITING, Precision(compute="float32"))
    params = jax.tree.map(jnp.asarray, cases.random_params(towers.shapes, 6))
    images = jnp.asarray(inputs_of(make_batch(8), "clip")["images"])
    allowed = jnp.zeros(258, bool).at[jnp.array([2, 7, 9, 30])].set(True)
    options = {"begin": 1, "end": 2, "length": 12, "allowed": allowed}
    greedy, drawn, other = (
        np.asarray(jax.jit(functools.partial(towers.captions, **options, temperature=t))(
            params, images, jax.random.key(seed)
        ))
        for t, seed in ((0.0, 0), (1.0, 0), (1.0, 1))
    )  # fmt: skip
    for rows in (greedy, drawn):
        assert (rows[:, 0] == 1).all() and np.isin(rows[:, 1:], [2, 7, 9, 30]).all()
        for row in rows.tolist():
            assert set(row[row.index(2) :] if 2 in row else [2]) == {2}, "nothing follows an end"
    assert not np.array_equal(drawn, other) and not np.array_equal(drawn, greedy)
    hidden = towers.module.apply(
        {"params": params}, towers.module.apply({"params": params}, images, method="seen"),
        jnp.asarray(greedy), method="write",
    )  # fmt: skip
    logits = np.where(allowed, hidden @ towers.caption_head(params), -np.inf)[:, :-1].argmax(-1)
    going = (greedy[:, :-1] != 2).cumprod(1).astype(bool)
    np.testing.assert_array_equal(logits[going], greedy[:, 1:][going])


@pytest.mark.parametrize("model, objective, why", [
    (MODEL, Contrastive(caption_weight=1), "it needs model.captioner"),
    (WRITING, Contrastive(), "model.captioner learns nothing"),
    (dataclasses.replace(MODEL, shared_dim=None), Contrastive(alignment_weight=1), "shared_dim"),
])  # fmt: skip
def test_a_loss_without_what_it_needs_is_refused(model, objective, why):
    with pytest.raises(InputError, match=why):
        make_contrastive(objective, build_towers(model), "clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("pictures"), []
    for i in range(40):
        color = [(37 * i) % 256, (91 * i) % 256, (53 * i) % 256]
        Image.new("RGB", (20, 20), tuple(color)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "text": f"r{color[0]} g{color[1]}"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


def recipe(folder, run_dir, **fields):
    data = Pairs(
        source=MediaFolder(path=str(folder)), tokenizer=Bytes(),
        image=ImageTransform(size=16), cache_dir=str(folder / "cache"),
    )  # fmt: skip
    base = {"steps": 6, "batch_size": 16, "sequence_length": 12, "log_every": 1, "save_every": 3}
    base |= {"precision": Precision(compute="float32"), "objective": Contrastive()}
    base |= {"optimizer": AdamW(learning_rate=3e-3, warmup_steps=1, schedule=Constant())}
    return TrainConfig(model=MODEL, data=data, run_dir=str(run_dir), **(base | fields))


LENT = Lent(retrieval, queries)


def lines(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_second", "mfu", "time")}
        for row in rows
    ]


def staged(folder, run_dir, *steps):
    """Stages of so many steps: images as the model has them, then larger ones."""
    config = recipe(folder, run_dir)
    larger = dataclasses.replace(config.data, image=ImageTransform(size=24))
    stages = Stage(name="small"), Stage(name="large", data=larger)
    stages = (dataclasses.replace(s, steps=n) for s, n in zip(stages, steps, strict=False))
    return dataclasses.replace(config, stages=tuple(stages))


@pytest.mark.slow
def test_two_processes_train_and_end_as_one_does(folder, tmp_path):
    """What captions find, at the end, is computed by the first process alone."""
    chosen = recipe(folder, "", steps=2, save_every=0)
    names = "model", "data", "objective", "optimizer", "steps", "batch_size", "sequence_length"
    runs = Runs(tmp_path, **{name: getattr(chosen, name) for name in names})
    for name, processes in (("two", 2), ("one", 1)):
        assert runs.start(name, processes=processes).wait(timeout=300) == 0, runs.output()
        assert "captions and the images that they find" in runs.output()
    two, one = ([row["loss"] for row in runs.rows(name)] for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_run_of_published_shape_goes_to_transformers(folder, tmp_path, loss):
    """What it trained is transformers' CLIP or SigLIP: images as files, tokens, vectors."""
    kind, own = {
        "softmax": (transformers.CLIPConfig, {"eos_token_id": 257}),
        "sigmoid": (transformers.SiglipConfig, {}),
    }[loss]
    original = kind(
        text_config=SHAPE | own | {"vocab_size": 258, "max_position_embeddings": 12},
        vision_config=SHAPE | {"image_size": 16, "patch_size": 8},
        **({"projection_dim": 24} if own else {}),
    )
    model = config_of(original.to_dict())
    image = ImageTransform(size=16, fit="crop", normalization="clip", method="bilinear")
    config = recipe(folder, tmp_path / "run", steps=1)
    config = dataclasses.replace(
        config, model=model, data=dataclasses.replace(config.data, image=image)
    )
    assert train(config, LENT) == 0
    convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "hf")])
    ours = deepseek_jax.load(tmp_path / "run")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)
    pixels = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "hf")(
        picture, return_tensors="pt"
    )["pixel_values"]
    tokens = torch.tensor([[256, 10, 20, 257], [256, 30, 40, 257]])
    with torch.no_grad():
        vectors = (
            theirs.get_image_features(pixels).pooler_output,
            theirs.get_text_features(tokens).pooler_output,
        )
    for mine, other in zip(
        (ours.embed_pictures([picture]), ours.embed_text(tokens.numpy())), vectors, strict=True
    ):
        other = torch.nn.functional.normalize(other, dim=-1).numpy()
        np.testing.assert_allclose(mine, other, atol=2e-6)


def test_what_transformers_would_compute_otherwise_is_not_written(folder, tmp_path):
    assert train(recipe(folder, tmp_path / "run", steps=1), LENT) == 0
    with pytest.raises(InputError, match=r"as transformers' clip it would be another model.*mean"):
        convert.towers_to_hf(tmp_path / "run", tmp_path / "hf")
    for flag in (["--dtype", "bfloat16"], ["--part", "1/2"], ["--format", "torch"]):
        with pytest.raises(InputError, match=f"written whole: leave out {flag[0]}"):
            convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "hf"), *flag])
    assert not (tmp_path / "hf").exists()


def test_a_run_learns_resumes_to_the_bit_and_loads(folder, tmp_path, capsys):
    """Killed at a boundary behind which the images are larger."""
    assert train(staged(folder, tmp_path / "whole", 3, 3), LENT) == 0
    said = capsys.readouterr().out
    assert "held-out after 6 steps: recall@10" in said and "captions and the images" in said
    assert train(staged(folder, tmp_path / "parts", 3), LENT) == 0
    assert train(staged(folder, tmp_path / "parts", 3, 3), LENT) == 0
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert [row["loss"] for row in whole] == [row["loss"] for row in parts]
    assert whole[2]["loss"] < whole[0]["loss"]
    assert {"guessing_loss", "temperature", "recall_at_1", "effective_rank"} <= whole[0].keys()
    scores = json.loads((tmp_path / "whole" / "eval.jsonl").read_text().splitlines()[-1])
    assert 0 < scores["chance_at_10"] <= 1 and "image_to_text/recall@1" in scores
    assert (tmp_path / "whole" / "report" / "report.html").exists()

    capsys.readouterr()
    evaluate.main(["--checkpoint", str(tmp_path / "whole"), "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["recall_at_10"] == pytest.approx(scores["recall_at_10"], abs=1e-6)
    evaluate.main(["--checkpoint", str(tmp_path / "whole")])
    assert "text to image/recall@10" in capsys.readouterr().out
    model = deepseek_jax.load(tmp_path / "whole")
    picture = model.embed_pictures([np.full((30, 20, 3), 200, np.uint8)])
    assert picture.shape == (1, 24)
    pixels = np.random.default_rng(0).normal(size=(3, 3, 24, 24)).astype(np.float32)
    with pytest.raises(InputError, match=r"this encoder takes \[B, \(3, 24, 24\)\]"):
        model.embed_image(pixels[..., :16, :16])
    texts = model.embed_texts(["r1 g2", "a"])
    np.testing.assert_allclose((np.asarray(texts) ** 2).sum(-1), 1, rtol=1e-5)
    assert model.embed_image(pixels).shape == (3, 24)
    again = model.embed_text([[256, *b"a", 257]])
    np.testing.assert_allclose(again[0], texts[1], atol=1e-6)


def test_a_run_ends_with_captions_though_held_out_images_are_damaged(folder, tmp_path, capsys):
    there = tmp_path / "pictures"
    shutil.copytree(folder, there)
    data = dataclasses.replace(recipe(there, tmp_path).data, max_skipped=0.2)
    held = open_pairs(data, sequence_length=12, seed=0).held
    first, last = (held.examples.media.example(int(held.numbers[n])).name for n in (0, -1))
    for name in (first, last):
        (there / pathlib.Path(name).name).write_bytes(b"no image")
    fields = {"model": WRITING, "objective": Contrastive(caption_weight=1.0), "steps": 1}
    config = dataclasses.replace(recipe(there, tmp_path / "run"), data=data, **fields)
    assert train(config, LENT) == 0
    said = capsys.readouterr()
    assert "skipped (2 of 40)" in said.err and "captions written of held-out images:" in said.out
    assert said.out.count(" -> ") >= len(held.numbers) - 2
    assert (tmp_path / "run" / "pictures" / "written_of_held_out_images.png").exists()


@pytest.mark.parametrize("cosine, loss, step, why", [
    (0.999, 5.0, 1, "embeddings collapse"),
    (0.1, 5.5, 101, "is that of guessing"),
    (0.1, 5.5, 100, None),  # it has just begun
    (0.1, 3.0, 500, None),
])  # fmt: skip
def test_collapse_is_said(cosine, loss, step, why):
    values = {"mean_cosine": cosine, "loss": loss, "guessing_loss": 5.55}
    found = collapse(step, values)
    assert found is None if why is None else why in found
    assert collapse(step, {"loss": loss}) is None, "a language model has no such pairs"


def test_a_run_whose_towers_collapse_says_so(folder, tmp_path, capsys, monkeypatch):
    def alike(self, key):
        """Nothing of an input gets past the blocks, so all vectors are the same."""

        def leaf(path, x):
            return jnp.full(x.shape, float(x.ndim < 2 or "projection" in path), x.dtype)

        return tree.map_with_path(leaf, self.shapes)

    monkeypatch.setattr(Network, "init", alike)
    assert train(recipe(folder, tmp_path / "run", steps=1), LENT) == 0
    said = capsys.readouterr().err
    assert "step 1: embeddings collapse" in said and "(guessing 2.77)" in said


def test_a_locked_tower_waits_for_its_stage(folder, tmp_path):
    """As in LiT (arXiv 2111.07991): the texts learn first; the next stage has its own objective."""
    texts = ("text/*", "text_projection/*", "logit_scale")
    stages = (Stage(trainable=texts), Stage(objective=Contrastive(chunk=4)))
    config = recipe(folder, tmp_path, stages=stages)
    towers = build_towers(MODEL, Precision(compute="float32"))
    mesh = make_mesh(MeshShape(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = initial_state(towers.init(jax.random.key(0)), stage_optimizer(config, towers), 1.0)
        seen = [tree.flatten(jax.device_get(state.params))]
        for number, stage in enumerate(config.filled_stages()):
            if number:
                state = carried(state, stage_state(config, towers, mesh, number))
            step = jax.jit(stage_step(config, towers, stage, stage.batch_at(0), 0, number))
            state, _ = step(state, make_batch(6, vocab=258))
            seen.append(tree.flatten(jax.device_get(state.params)))
    for path in seen[0]:
        locked, free = [
            np.array_equal(before[path], after[path]) for before, after in pairwise(seen)
        ]
        assert locked == path.startswith("image") and not free, path
    assert [int(state.opt_state[name]) for name in ("count", "count_1")] == [2, 1]


def test_what_does_not_belong_together_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="objective is Language"):
        dataclasses.replace(recipe(folder, tmp_path), objective=TrainConfig.objective)
    config = recipe(folder, tmp_path)
    for size, own, why in ((20, (16, 16), "multiple of patch_size"), (16, (16, 8), "square")):
        image = dataclasses.replace(MODEL.image, image_size=own)
        data = dataclasses.replace(config.data, image=ImageTransform(size=size))
        changes = {"model": dataclasses.replace(MODEL, image=image), "stages": (Stage(data=data),)}
        with pytest.raises(ValueError, match=f"data: images of size {size}: .*{why}"):
            dataclasses.replace(config, **changes)
    with pytest.raises(ValueError, match="more than model.text.max_length"):
        recipe(folder, tmp_path, sequence_length=13)
    with pytest.raises(ValueError, match="no pipeline"):
        recipe(folder, tmp_path, mesh=MeshShape(stage=2))
    small = dataclasses.replace(MODEL.text, vocab_size=100)
    config = dataclasses.replace(
        recipe(folder, tmp_path), model=dataclasses.replace(MODEL, text=small)
    )
    with pytest.raises(InputError, match="the tokenizer has 258 tokens"):
        train(config, LENT)
    gray = dataclasses.replace(MODEL.image, num_channels=1)
    with pytest.raises(ValueError, match="model.image.num_channels is 1; data has 3"):
        dataclasses.replace(config, model=dataclasses.replace(MODEL, image=gray))
    with pytest.raises(ValueError, match="shared_dim is 0"):
        dataclasses.replace(MODEL, shared_dim=0)
    with pytest.raises(ValueError, match="norm_eps is nan"):
        dataclasses.replace(TOWER, norm_eps=float("nan"))
    # Where nothing is found a tower would silently take each text's first token.
    elsewhere = dataclasses.replace(MODEL.text, pooling="first_end", end_id=2)
    config = dataclasses.replace(config, model=dataclasses.replace(MODEL, text=elsewhere))
    with pytest.raises(
        InputError, match="looks for token 2, but the tokenizer ends texts with 257"
    ):
        train(config, LENT)
