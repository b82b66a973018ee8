"""Reference: decoders that see, against transformers' DeepSeek-VL and Janus and a NumPy VL2."""

import dataclasses
import functools
import itertools
import json

import cases
import encoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import vision_language_cases as seeing

import deepseek_jax
from deepseek_jax.checkpoint import vision_language
from deepseek_jax.checkpoint.safetensors import Source, open_tensors
from deepseek_jax.core import tree
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.hybrid import Hybrid
from deepseek_jax.models.prefix import asked, ends
from deepseek_jax.models.projectors import (
    DownsampleProjector,
    MLPProjector,
    SplitProjector,
    joined,
)
from deepseek_jax.models.sam import SAM
from deepseek_jax.models.vision_language import TEXT, VisionLanguage, build_vision_language
from deepseek_jax.models.vit import ViT
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.sharding import place_batch, tree_shardings


@pytest.mark.parametrize("kind", ["deepseek_vl", "deepseek_vl_hybrid", "janus"])
def test_converted(tmp_path, kind):
    model = seeing.converted(kind)
    model.save_pretrained(tmp_path)
    ours = deepseek_jax.load(tmp_path)
    tokens, mask, pixels = seeing.rows()
    shown = seeing.shown(kind, pixels)
    theirs = model(
        input_ids=torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask),
        **{name: torch.from_numpy(views) for name, views in shown.items()},
    ).logits
    slopes = np.random.default_rng(1).normal(size=theirs.shape).astype(np.float32)
    slopes *= mask[..., None]
    images = shown if len(shown) > 1 else pixels
    given = jax.tree.map(jnp.asarray, ours.inputs(tokens, images))

    def total(params):
        out = ours.model.apply(params, jnp.asarray(tokens), **given, segments=jnp.asarray(mask))
        logits = ours.model.logits(params, out.hidden)
        return jnp.vdot(logits, slopes), logits

    grads, mine = jax.jit(jax.grad(total, has_aux=True))(ours.params)
    real = mask > 0
    theirs_there = theirs.detach().numpy()[real]
    scale = abs(theirs_there).max()
    np.testing.assert_allclose(np.asarray(mine)[real], theirs_there, atol=1e-4 * scale, rtol=0)

    (theirs * torch.from_numpy(slopes)).sum().backward()
    named = encoder_cases.slopes_on_disk(model, tmp_path / "slopes")
    drawn = {name for name in named if name.split(".")[1].startswith(("vq", "generation"))}
    assert compared(ours.model, kind, grads, named) == drawn

    original = json.loads((tmp_path / "config.json").read_text())
    vision_language.write(tmp_path / "again", ours.model, ours.params, original)
    other, info = type(model).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert {*info["missing_keys"]} <= drawn
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, weight in model.state_dict().items():
        if name not in drawn:
            assert torch.equal(weight, other.state_dict()[name]), name
    assert deepseek_jax.load(tmp_path / "again").config == ours.config


@pytest.mark.parametrize("size", seeing.VL2)
def test_vl2(tmp_path, size):
    decoder, weights = seeing.vl2_folder(size, tmp_path)
    ours = deepseek_jax.load(tmp_path)
    tokens, views, embedded = seeing.vl2_rows(weights)
    given = ours.inputs(tokens, views, seeing.GRIDS)
    features = jax.jit(ours.model.features)(ours.params, given["images"])
    found = np.take_along_axis(
        np.asarray(features), given["sources"][..., None] % features.shape[1], axis=1
    )
    image = tokens == seeing.IMAGE
    assert (given["sources"] > TEXT).tolist() == image.tolist()
    np.testing.assert_allclose(found[image], embedded[image], atol=1e-5 * abs(embedded).max())
    theirs = seeing.torch_logits(decoder, embedded)
    mine = ours.logits(tokens, images=views, grids=seeing.GRIDS)
    np.testing.assert_allclose(mine, theirs, atol=1e-4 * abs(theirs).max(), rtol=0)

    original = json.loads((tmp_path / "config.json").read_text())
    vision_language.write(tmp_path / "again", ours.model, ours.params, original)
    again = {name: tensor.read() for name, tensor in open_tensors(tmp_path / "again").items()}
    unused = {name for name in weights if "attn_pool" in name}
    assert again.keys() == weights.keys() - unused
    for name, array in again.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    assert deepseek_jax.load(tmp_path / "again").config == ours.config


def test_vl2s_slopes(tmp_path):
    decoder, weights = seeing.vl2_folder("small", tmp_path)
    ours = deepseek_jax.load(tmp_path)
    tokens, views, _ = seeing.vl2_rows(weights)
    given = jax.tree.map(jnp.asarray, ours.inputs(tokens, views, seeing.GRIDS))
    torches = {name: torch.tensor(array, requires_grad=True) for name, array in weights.items()}
    theirs = seeing.torch_vl2(decoder, torches, tokens, views)
    slopes = np.random.default_rng(1).normal(size=theirs.shape).astype(np.float32)
    (theirs * torch.from_numpy(slopes)).sum().backward()

    def total(params):
        hidden = ours.model.apply(params, jnp.asarray(tokens), **given).hidden
        return jnp.vdot(ours.model.logits(params, hidden), slopes)

    grads = jax.jit(jax.grad(total))(ours.params)
    named = encoder_cases.slopes_on_disk(decoder, tmp_path / "slopes")
    named = {f"language.{name}": slope for name, slope in named.items()}
    named |= {name: x.grad.numpy() for name, x in torches.items() if x.grad is not None}
    compared(ours.model, "deepseek_vl_v2", grads, named)


def compared(model, kind, grads, named):
    """Slopes of ours are those of a folder's tensors, `named`; which of these had no equal."""
    noise = 1e-6 * max(abs(slope).max() for slope in named.values())
    grads = {
        path: Source(x.shape, x.dtype, lambda index, x=x: x[index])
        for path, x in encoder_cases.on_disk(grads, model.layers).items()
    }
    made = vision_language.entries(vision_language.FAMILIES[kind], model, grads)
    for entry in made:
        theirs = named[entry.name]
        atol = max(1e-3 * abs(theirs).max(), noise)
        np.testing.assert_allclose(entry.read(), theirs, atol=atol, rtol=0, err_msg=entry.name)
    return named.keys() - {entry.name for entry in made}


def test_squares_are_torchs():
    x = np.random.default_rng(0).normal(size=(2, 4 * 6, 5)).astype(np.float32)
    pixels = torch.from_numpy(x).reshape(2, 4, 6, 5).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.unfold(pixels, kernel_size=2, stride=2).permute(0, 2, 1)
    np.testing.assert_array_equal(joined(jnp.asarray(x), (4, 6), 2), theirs.numpy())


VIEW = ViT(
    transformer=Transformer(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24),
    image_size=(12, 12), patch_size=4, class_token=False, pooling="none",
)  # fmt: skip


TWO = Hybrid(
    low=VIEW,
    high=SAM(
        transformer=Transformer(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24),
        image_size=24, patch_size=4, window=4, whole_layers=(1,), output_dim=8,
    ),
)  # fmt: skip


def tiny(attention, projector, vision=VIEW, **fields):
    """A model, its weights, and rows: two images, one image and an unused view, none."""
    decoder = cases.decoder(attention, None)
    config = VisionLanguage(language=decoder, vision=vision, projector=projector, **fields)
    model = build_vision_language(config, Precision(compute="float32"))
    params = jax.tree.map(jnp.asarray, cases.random_params(model.shapes, 3))
    rng = np.random.default_rng(5)
    layout, views, own = config.sight.layout(), config.sight.num_views(), config.view_tokens
    after = np.where(layout >= 0, layout + views * own, layout)
    sources = np.full((4, 2 * len(layout) + 7), TEXT, np.int32)
    sources[0, 2 : 2 + len(layout)] = layout
    sources[0, 4 + len(layout) : 4 + 2 * len(layout)] = after
    sources[1, 1 : 1 + len(layout)] = layout
    sources[3, 3 : 3 + len(layout)] = layout
    batch = {
        "tokens": rng.integers(1, 61, sources.shape).astype(np.int32),
        "images": rng.normal(size=(4, 2 * views, *config.view_shape)).astype(np.float32),
        "sources": sources,
    }
    return model, params, batch


@functools.partial(jax.jit, static_argnums=0)
def _slopes(model, params, batch):
    def total(params):
        hidden = model.apply(params, **batch).hidden.astype(jnp.float32)
        sign = jnp.cos(jnp.arange(hidden[0].size, dtype=jnp.float32)).reshape(1, *hidden.shape[1:])
        return (hidden * sign).sum(), hidden

    (_, hidden), grads = jax.value_and_grad(total, has_aux=True)(params)
    return hidden, grads


def slopes_of(model, params, batch):
    """Final hidden states, and every weight's slope of a sum of them with signs."""
    hidden, grads = _slopes(model, params, batch)
    return np.asarray(hidden), tree.flatten(jax.device_get(grads))


@pytest.mark.parametrize(
    "attention, projector, prefix",
    [
        ("mla", DownsampleProjector(depth=3), "causal"),
        ("gqa", MLPProjector(depth=1), "question"),
        ("mla", MLPProjector(), "images"),
    ],
    ids=["mla", "gqa-question", "mla-images"],
)
def test_cached_decode_is_the_whole_forward(attention, projector, prefix):
    model, params, batch = tiny(attention, projector, prefix=prefix)
    batch = jax.tree.map(jnp.asarray, batch)
    tokens, sources = batch["tokens"], batch["sources"]
    rows, length = tokens.shape
    first = 7 if prefix == "causal" else length - 3  # the others' come in one call, else are cut
    batch["learned"] = jnp.broadcast_to(jnp.arange(length)[None] >= first - 1, tokens.shape)
    whole_rows = jax.jit(
        lambda params, batch: model.logits(params, model.apply(params, **batch).hidden)
    )(params, batch)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length))
    features, cache = model.features(params, batch["images"]), model.init_cache(rows, length)
    found, decode = [], jax.jit(model.decode)
    for start, end in itertools.pairwise([0, first, length - 1, length]):
        part = slice(start, end)
        seen = {"features": features, "sources": sources[:, part]}
        logits, cache = decode(params, tokens[:, part], cache, positions[:, part], **seen)
        found.append(logits)
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found, whole_rows, atol=1e-4 * abs(found).max(), rtol=0)


@pytest.mark.parametrize("prefix, size", [("images", 16), ("question", 24)])
def test_what_comes_at_once_sees_itself_both_ways(tmp_path, prefix, size):
    """DeepSeek-VL under a dense mask, values and slopes; of views that its positions do not fit."""
    torch_model = seeing.converted("deepseek_vl")
    torch_model.save_pretrained(tmp_path)
    ours = deepseek_jax.load(tmp_path)
    config = dataclasses.replace(ours.config, prefix=prefix).at_size(size)
    model = build_vision_language(config, Precision(compute="float32"))
    ours = dataclasses.replace(ours, model=model, config=config)
    rng, own = np.random.default_rng(1), (size // 8) ** 2
    tokens = rng.integers(1, seeing.IMAGE, (3, 2 * own + 7))
    tokens[0, 1 : 1 + 2 * own] = seeing.IMAGE  # two images that touch
    tokens[2, 6 : 6 + own] = seeing.IMAGE
    mask = np.ones_like(tokens)
    mask[2, :4] = 0  # filled up on its left
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    pixels = rng.normal(size=(3, 3, size, size)).astype(np.float32)
    given = ours.inputs(tokens, pixels) | {"segments": mask, "positions": positions}
    whole = {0: (1, 1 + 2 * own), 2: (6, 6 + own)}
    how = {}
    if prefix == "question":
        how["asked"] = [2 * own + 3, 4, own + 5]
        whole = {0: (0, 2 * own + 3), 2: (4, own + 9)}
        given["learned"] = positions >= np.array(how["asked"])[:, None] - 1
    sees = np.tril(np.ones((3, *tokens.shape[1:] * 2), bool))
    for row, (first, end) in whole.items():
        sees[row, first:end, first:end] = True
    sees &= mask[:, None] > 0

    inner = torch_model.model
    embedded = inner.get_input_embeddings()(torch.from_numpy(tokens))
    seen = inner.vision_model(torch.from_numpy(pixels), interpolate_pos_encoding=True)
    features = inner.aligner(seen.last_hidden_state)
    image = torch.from_numpy(tokens == seeing.IMAGE)[..., None]
    hidden = inner.language_model(
        inputs_embeds=embedded.masked_scatter(image, features),
        attention_mask=torch.where(torch.from_numpy(sees), 0.0, -1e30)[:, None],
        position_ids=torch.from_numpy(positions),
    )
    theirs = torch_model.lm_head(hidden.last_hidden_state)
    slopes = rng.normal(size=theirs.shape).astype(np.float32) * mask[..., None]
    (theirs * torch.from_numpy(slopes)).sum().backward()
    theirs, there = theirs.detach().numpy(), mask > 0
    scale = abs(theirs[there]).max()

    def total(params, given):
        output = model.apply(params, jnp.asarray(tokens), **given)
        logits = model.logits(params, output.hidden)
        return jnp.vdot(logits, slopes), logits

    grads, mine = jax.jit(jax.grad(total, has_aux=True))(ours.params, given)
    made = [mine, ours.logits(tokens, mask, images=pixels, **how)] if how else [mine]
    for found in map(np.asarray, made):
        np.testing.assert_allclose(found[there], theirs[there], atol=1e-4 * scale, rtol=0)
    named = encoder_cases.slopes_on_disk(torch_model, tmp_path / "slopes")
    assert not compared(model, "deepseek_vl", grads, named)


def test_packed_rows_are_rows_of_their_own():
    model, params, batch = tiny("gqa", MLPProjector(), prefix="question")
    apply = jax.jit(model.apply)
    batch["sources"][1] = np.roll(batch["sources"][1], -1)  # begins with its image
    batch["sources"][0] = np.roll(batch["sources"][0], 3)  # ends with its image
    batch["learned"] = np.zeros(batch["tokens"].shape, bool)
    batch["learned"][1, 12:] = True  # the first is a question alone
    alone = apply(params, **{k: v[:2] for k, v in batch.items()}).hidden
    length, own = batch["tokens"].shape[1], 2 * model.config.view_tokens
    second = np.where(batch["sources"][1] >= 0, batch["sources"][1] + own, batch["sources"][1])
    packed = {
        "tokens": batch["tokens"][:2].reshape(1, -1),
        "images": batch["images"][:2].reshape(1, 4, 12, 12, 3),
        "sources": np.concatenate([batch["sources"][0], second])[None],
        "learned": batch["learned"][:2].reshape(1, -1),
        "segments": np.repeat([1, 2], length)[None],
        "positions": np.tile(np.arange(length), 2)[None],
    }
    found = apply(params, **packed).hidden
    found = found.reshape(alone.shape)
    np.testing.assert_allclose(found, alone, atol=1e-5 * abs(alone).max(), rtol=0)


def test_ends_of_images_and_questions():
    sources = jnp.array([[TEXT, 0, 1, TEXT, 2, 3, -1, -2, TEXT], [0, 1, 2, 3, TEXT, 0, 1, 2, 3]])
    segments = jnp.array([[1] * 9, [1, 1, 2, 2, 2, 3, 3, 3, 3]])
    last = [[0, 2, 2, 3, 7, 7, 7, 7, 8], [1, 1, 3, 3, 4, 8, 8, 8, 8]]
    assert ends(sources > TEXT, segments).tolist() == last
    segments = jnp.array([[1, 1, 2, 2, 2, 2, 2, 2, 3], [1, 1, 2, 2, 2, 3, 3, 3, 3]])
    learned = jnp.array([[0, 0, 0, 0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 1, 0, 1]]) > 0
    last = [[1, 1, 5, 5, 5, 5, 6, 7, 8], [1, 1, 2, 3, 4, 6, 6, 7, 8]]
    assert ends(asked(sources, segments, learned), segments).tolist() == last
    last = [[1, 1, 7, 7, 7, 7, 7, 7, 8], [1, 1, 4, 4, 4, 8, 8, 8, 8]]
    assert ends(asked(sources, segments, None), segments).tolist() == last
    assert not asked(jnp.full((1, 4), TEXT), None, None).any()


def test_unused_views_change_nothing():
    model, params, batch = tiny("gqa", DownsampleProjector())
    other = {name: array.copy() for name, array in batch.items()}
    other["images"][1, 2:] = 1e3
    other["images"][2] = -7
    found = [slopes_of(model, params, jax.tree.map(jnp.asarray, b)) for b in (batch, other)]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    for path, slope in found[0][1].items():
        np.testing.assert_array_equal(slope, found[1][1][path], err_msg=path)


@pytest.mark.parametrize(
    "attention, projector, vision, prefix, axes",
    [
        ("mla", DownsampleProjector(), VIEW, "question", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("gqa", MLPProjector(), VIEW, "causal", {"fsdp": 2, "context": 2, "expert": 2}),
        ("gqa", SplitProjector(), TWO, "causal", {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
    ids=["tensor", "context", "two-encoders"],
)
def test_on_a_mesh(attention, projector, vision, prefix, axes):
    model, params, batch = tiny(attention, projector, vision, prefix=prefix)
    spare = -batch["tokens"].shape[1] % 4  # rows in two chunks for each device of the context axis
    batch["tokens"] = np.pad(batch["tokens"], ((0, 0), (0, spare)))
    batch["sources"] = np.pad(batch["sources"], ((0, 0), (0, spare)), constant_values=TEXT)
    batch["learned"] = np.arange(batch["tokens"].shape[1])[None] >= np.array([[9], [6], [0], [15]])
    alone, slopes = slopes_of(model, params, jax.tree.map(jnp.asarray, batch))
    mesh = make_mesh(MeshShape(**axes), jax.devices())
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(mesh, model.specs, model.shapes))
        found, others = slopes_of(model, placed, place_batch(mesh, batch))
    np.testing.assert_allclose(found, alone, atol=1e-5 * abs(alone).max(), rtol=0)
    noise = 1e-6 * max(abs(slope).max() for slope in slopes.values())
    for path, slope in slopes.items():
        atol = max(1e-5 * abs(slope).max(), noise)
        np.testing.assert_allclose(others[path], slope, atol=atol, rtol=0, err_msg=path)

    if "tensor" not in axes:
        return
    narrow = build_vision_language(model.config, Precision(compute="bfloat16"))
    rounded = jax.jit(narrow.apply)(params, **batch).hidden
    assert rounded.dtype == jnp.bfloat16
    a, b = alone.astype(np.float64).ravel(), np.asarray(rounded, np.float64).ravel()
    assert a @ b / np.sqrt((a @ a) * (b @ b)) >= 0.999


def test_images_say_where_they_stand():
    model, params, batch = tiny("gqa", MLPProjector())
    for missing in ("images", "sources"):
        given = {name: jnp.asarray(array) for name, array in batch.items() if name != missing}
        with pytest.raises(ValueError, match="come together"):
            jax.eval_shape(model.apply, params, **given)


def test_fresh_weights_and_layers():
    model, _, _ = tiny("mla", DownsampleProjector())
    assert model.layers == {"language/segment_0/block": (0,), "vision/segment_0/block": (0,)}
    params = model.init(jax.random.key(0))
    assert 0.01 < np.std(params["image_newline"]) < 0.03


def test_what_cannot_be_is_refused():
    decoder = cases.decoder("gqa", None)
    for changed, why in (
        ({"language": dataclasses.replace(decoder, num_mtp_layers=1)}, "num_mtp_layers must be 0"),
        ({"image_id": 61}, "image_id is 61"),
        ({"language": cases.decoder("gqa_window", None), "prefix": "images"}, "leaves out"),
        ({"vision": dataclasses.replace(VIEW, image_size=(12, 8))}, "square views"),
        ({"vision": TWO}, "takes a ViT's square views"),
        ({"projector": SplitProjector()}, "needs a Hybrid"),
    ):
        given = {"language": decoder, "vision": VIEW, "projector": DownsampleProjector()}
        with pytest.raises(ValueError, match=why):
            VisionLanguage(**(given | changed))
    for changed, why in (
        ({"low": dataclasses.replace(VIEW, class_token=True)}, "no tokens but patches"),
        ({"low": dataclasses.replace(VIEW, image_size=(32, 32))}, "no larger than vision.high's"),
        ({"high": dataclasses.replace(TWO.high, whole_layers=())}, "must have whole_layers"),
    ):
        with pytest.raises(ValueError, match=why):
            dataclasses.replace(TWO, **changed)
