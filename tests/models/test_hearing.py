"""Reference: sounds, patches of any shape and resampled features in a decoder that sees.

The resampler is torch's own attention, the ear transformers' Whisper, flexible images its SigLIP2.
Invariance: what no token stands for. Sharded = one device; cached decoding = the whole forward.
"""

import dataclasses
import functools
import itertools

import cases
import encoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import deepseek_jax
from deepseek_jax.core import tree
from deepseek_jax.core.config import from_dict, to_dict
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.tiles import laid_out
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.audio import Whisper
from deepseek_jax.models.build import dtypes_of
from deepseek_jax.models.ear import HOP, RATE, Ear
from deepseek_jax.models.naflex import NaFlex
from deepseek_jax.models.projectors import Aligner, DownsampleProjector, MLPProjector, Resampler
from deepseek_jax.models.vision_language import TEXT, VisionLanguage, build_vision_language
from deepseek_jax.models.vit import ViT
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.sharding import place_batch, tree_shardings

FLOAT32 = Precision(compute="float32")
SMALL = Transformer(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24)
VIEW = ViT(transformer=SMALL, image_size=(8, 8), patch_size=4, class_token=False, pooling="none")
FLEXIBLE = NaFlex(transformer=SMALL, grid_size=3, patch_size=2, pooling="none")
WHISPER = Whisper(transformer=SMALL, num_mels=5, num_positions=6)  # a window of 1920 samples


def torch_resampler(config, width, embed_dim):
    """Torch's own parts of a `Resampler`, and a function that runs them."""
    parts = torch.nn.ModuleDict()
    for i in range(1, config.num_layers + 1):
        for name, size in (("query", embed_dim), ("feature", width), ("mlp", embed_dim)):
            parts[f"{i}_{name}_norm"] = torch.nn.LayerNorm(size, eps=config.norm_eps)
        parts[f"{i}_attention"] = torch.nn.MultiheadAttention(
            embed_dim, config.num_heads, kdim=width, vdim=width, batch_first=True
        )
        parts[f"{i}_up"] = torch.nn.Linear(embed_dim, embed_dim * config.ratio)
        parts[f"{i}_down"] = torch.nn.Linear(embed_dim * config.ratio, embed_dim)
    parts["norm"] = torch.nn.LayerNorm(embed_dim, eps=config.norm_eps)
    parts["queries"] = torch.nn.Embedding(config.num_tokens, embed_dim)
    encoder_cases.randomized(parts)
    activation = {"gelu": torch.nn.functional.gelu, "relu": torch.nn.functional.relu}

    def run(x, mask):
        q = parts["queries"].weight.expand(len(x), -1, -1)
        for i in range(1, config.num_layers + 1):
            seen = parts[f"{i}_feature_norm"](x)
            unreal = None if mask is None else ~mask
            q = (
                q
                + parts[f"{i}_attention"](
                    parts[f"{i}_query_norm"](q), seen, seen, key_padding_mask=unreal
                )[0]
            )
            inner = activation[config.activation](parts[f"{i}_up"](parts[f"{i}_mlp_norm"](q)))
            q = q + parts[f"{i}_down"](inner)
        return parts["norm"](q)

    return parts, run


def ours_of(parts, config, embed_dim, read):
    """The module's parameters out of `read(weight)` of torch's."""
    heads = (config.num_heads, embed_dim // config.num_heads)

    def norm(module):
        return {"scale": read(module.weight), "bias": read(module.bias)}

    def linear(module):
        return {"weight": read(module.weight).T, "bias": read(module.bias)}

    found = {"queries": read(parts["queries"].weight), "norm": norm(parts["norm"])}
    for i in range(1, config.num_layers + 1):
        attention = parts[f"{i}_attention"]
        weights = [read(getattr(attention, f"{name}_proj_weight")) for name in "qkv"]
        biases = np.split(read(attention.in_proj_bias), 3)
        block = {
            name: {"weight": w.T.reshape(-1, *heads), "bias": b.reshape(heads)}
            for name, w, b in zip("qkv", weights, biases, strict=True)
        }
        out = linear(attention.out_proj)
        block["o"] = out | {"weight": out["weight"].reshape(*heads, embed_dim)}
        block["mlp"] = {name: linear(parts[f"{i}_{name}"]) for name in ("up", "down")}
        block |= {
            f"{name}_norm": norm(parts[f"{i}_{name}_norm"]) for name in ("query", "feature", "mlp")
        }
        found[f"layer_{i}"] = block
    return found


@pytest.mark.parametrize(
    "config, masked",
    [
        (Resampler(num_tokens=3, num_heads=4, ratio=2), False),
        (Resampler(num_tokens=5, num_layers=2, num_heads=2, ratio=1, activation="relu"), True),
    ],
    ids=["one", "two-masked"],
)
def test_the_resampler_is_torchs_attention(config, masked):
    width, embed_dim, rng = 6, 8, np.random.default_rng(0)
    parts, run = torch_resampler(config, width, embed_dim)
    x = rng.normal(size=(2, 7, width)).astype(np.float32)
    mask = np.arange(7)[None] < np.array([[7], [4]]) if masked else None
    given = torch.tensor(x, requires_grad=True)
    theirs = run(given, None if mask is None else torch.from_numpy(mask))
    slopes = rng.normal(size=theirs.shape).astype(np.float32)
    (theirs * torch.from_numpy(slopes)).sum().backward()

    module = Aligner(config, None, embed_dim, dtypes_of(FLOAT32))
    params = ours_of(parts, config, embed_dim, lambda weight: weight.detach().numpy())

    def total(params, x):
        found = module.apply({"params": params}, x, None if mask is None else jnp.asarray(mask))
        return jnp.vdot(found, slopes), found

    both = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (grads, back), mine = both(jax.tree.map(jnp.asarray, params), jnp.asarray(x))
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(mine, theirs, atol=1e-4 * abs(theirs).max(), rtol=0)
    np.testing.assert_allclose(back, given.grad, atol=1e-3 * abs(given.grad).max(), rtol=0)
    wanted = tree.flatten(ours_of(parts, config, embed_dim, lambda weight: weight.grad.numpy()))
    noise = 1e-5 * max(abs(slope).max() for slope in wanted.values())
    for path, slope in tree.flatten(grads).items():
        atol = max(1e-3 * abs(wanted[path]).max(), noise)
        np.testing.assert_allclose(slope, wanted[path], atol=atol, rtol=0, err_msg=path)


def waves(*shape):
    return np.random.default_rng(4).normal(0, 0.1, shape).astype(np.float32)


def test_the_ear_is_transformers_whisper(tmp_path):
    fields = {
        "num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "d_model": 32, "max_source_positions": 50,
    }  # fmt: skip
    theirs = encoder_cases.randomized(WhisperEncoder(transformers.WhisperConfig(**fields)))
    theirs.save_pretrained(tmp_path)
    encoder = deepseek_jax.load(tmp_path)
    ear = Ear(encoder=encoder.config, join=2)
    assert ear.window == RATE  # a second
    config = VisionLanguage(language=cases.decoder("gqa", None), vision=VIEW, audio=ear)
    model = build_vision_language(config, FLOAT32)
    params = cases.random_params(model.shapes, 3)
    params["audio"]["encoder"] = encoder.params
    sound = waves(9_000)
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    mel = extractor(sound, sampling_rate=RATE, return_tensors="pt")["input_features"]
    hidden = theirs(mel).last_hidden_state.detach().numpy()
    x = hidden.reshape(1, 25, 64)
    for number in (1, 2):
        layer = params["audio"]["projector"][f"linear_{number}"]
        x = x @ layer["weight"] + layer["bias"]
        x = torch.nn.functional.gelu(torch.from_numpy(x)).numpy() if number == 1 else x
    whole = np.zeros((1, 1, ear.window), np.float32)
    whole[0, 0, : len(sound)] = sound
    found = jax.jit(model.features)(params, sounds=whole)
    np.testing.assert_allclose(found, x, atol=1e-4 * abs(x).max(), rtol=0)
    # 9,000 samples reach 57 frames of mel, 29 of the encoder's, 15 pairs of them.
    assert ear.layout(9_000).tolist() == list(range(15))
    assert len(ear.layout(RATE)) == 25 and len(ear.layout(RATE + 1)) == 26


def test_images_of_any_shape_are_transformers_siglip2(tmp_path):
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "patch_size": 2,
        "num_attention_heads": 4, "num_patches": 9, "vision_use_head": False,
    }  # fmt: skip
    config = transformers.Siglip2VisionConfig(**shape)
    theirs = encoder_cases.randomized(transformers.Siglip2VisionModel(config))
    theirs.save_pretrained(tmp_path)
    encoder = deepseek_jax.load(tmp_path)
    projector = MLPProjector(depth=1)
    config = VisionLanguage(
        language=cases.decoder("gqa", None), vision=encoder.config, projector=projector,
        max_patches=10,
    )  # fmt: skip
    model = build_vision_language(config, FLOAT32)
    params = cases.random_params(model.shapes, 3)
    params["vision"] = encoder.params
    grids = np.array([[2, 4], [3, 3], [5, 2]])
    patches = np.random.default_rng(0).normal(size=(3, 10, 12)).astype(np.float32)
    mask = (np.arange(10)[None] < grids.prod(1)[:, None]).astype(np.int64)
    hidden = theirs(*map(torch.from_numpy, (patches, mask, grids))).last_hidden_state
    layer = params["projector"]["linear_1"]
    wanted = hidden.detach().numpy() @ layer["weight"] + layer["bias"]
    found = jax.jit(model.features)(params, patches[None], shapes=grids[None].astype(np.int32))
    sources = laid_out(config.sight, [(wide, high) for high, wide in grids.tolist()])
    there = mask.ravel() > 0
    assert sources.tolist() == np.flatnonzero(there).tolist()
    np.testing.assert_allclose(
        found[0, sources], wanted.reshape(30, -1)[there], atol=1e-4 * abs(wanted).max(), rtol=0
    )


KINDS = {
    "flexible": (
        FLEXIBLE,
        MLPProjector(),
        Ear(encoder=WHISPER, projector=Resampler(num_tokens=3, num_heads=4, ratio=1)),
    ),
    "resampled": (
        VIEW,
        Resampler(num_tokens=3, num_layers=2, num_heads=4, ratio=1),
        Ear(encoder=WHISPER, projector=MLPProjector(), join=3),
    ),
    "lines": (VIEW, DownsampleProjector(), Ear(encoder=WHISPER)),
}


def tiny(kind, attention="mla", router="sigmoid", **fields):
    """A model, its weights, and rows: an image and a sound; a video and two sounds; none; a sound.

    The rows have three views and two windows each.
    """
    vision, projector, ear = KINDS[kind]
    decoder = cases.decoder(attention, router)
    config = VisionLanguage(
        language=decoder, vision=vision, projector=projector, audio=ear, max_patches=6, **fields
    )
    model = build_vision_language(config, FLOAT32)
    params = jax.tree.map(jnp.asarray, cases.random_params(model.shapes, 3))
    grid = {"flexible": (2, 3), "resampled": (1, 1), "lines": (0, 0)}[kind]
    image, video = laid_out(config.sight, [grid]), laid_out(config.sight, [grid] * 3)
    sound, long = ear.layout(700), ear.layout(ear.window + 700)
    sources = np.full((4, len(video) + len(long) + 6), TEXT, np.int32)
    first = 3 * config.view_tokens
    sources[0, 1 : 1 + len(image)] = image
    sources[0, 3 + len(image) : 3 + len(image) + len(sound)] = first + sound
    sources[1, 2 : 2 + len(video)] = video
    sources[1, 3 + len(video) : 3 + len(video) + len(long)] = first + long
    sources[3, 4 : 4 + len(sound)] = first + sound
    rng = np.random.default_rng(5)
    batch = {
        "tokens": rng.integers(1, 61, sources.shape).astype(np.int32),
        "images": rng.normal(size=(4, 3, *config.view_shape)).astype(np.float32),
        "sounds": waves(4, 2, ear.window),
        "sources": sources,
    }
    batch["sounds"][:, :, 700:] *= np.array([1, 0])[None, :, None]
    if kind == "flexible":
        batch["shapes"] = np.tile(np.array([3, 2], np.int32), (4, 3, 1))
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


def test_unused_views_and_sounds_change_nothing():
    model, params, batch = tiny("flexible", "gqa", None)
    alone, slopes = slopes_of(model, params, jax.tree.map(jnp.asarray, batch))
    noise = 1e-6 * max(abs(slope).max() for slope in slopes.values())
    still = {path for path, slope in slopes.items() if not slope.any()}
    assert still == {"audio/encoder/positions", "language/head/weight"}

    other = {name: array.copy() for name, array in batch.items()}
    other["images"][0, 1:] = 1e3
    other["images"][2:] = -7
    other["sounds"][0, 1] = 3
    other["sounds"][2] = 0
    other["shapes"][2] = 0
    found, others = slopes_of(model, params, jax.tree.map(jnp.asarray, other))
    np.testing.assert_allclose(found, alone, atol=1e-6 * abs(alone).max(), rtol=0)
    for path, slope in slopes.items():
        atol = max(1e-6 * abs(slope).max(), noise)
        np.testing.assert_allclose(others[path], slope, atol=atol, rtol=0, err_msg=path)
    other["sounds"][3, 0] *= 2  # one that a row does stand for
    assert abs(slopes_of(model, params, jax.tree.map(jnp.asarray, other))[0] - alone).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flexible", "resampled"])
def test_on_a_mesh(kind):
    model, params, batch = tiny(kind)
    alone, slopes = slopes_of(model, params, jax.tree.map(jnp.asarray, batch))
    noise = 1e-6 * max(abs(slope).max() for slope in slopes.values())
    axes = {"data": 2, "fsdp": 1, "tensor": 2, "expert": 2}
    axes |= {"fsdp": 2, "data": 1} if kind == "resampled" else {}
    mesh = make_mesh(MeshShape(**axes), jax.devices())
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(mesh, model.specs, model.shapes))
        found, others = slopes_of(model, placed, place_batch(mesh, batch))
    np.testing.assert_allclose(found, alone, atol=1e-5 * abs(alone).max(), rtol=0)
    for path, slope in slopes.items():
        atol = max(1e-5 * abs(slope).max(), noise)
        np.testing.assert_allclose(others[path], slope, atol=atol, rtol=0, err_msg=path)


@pytest.mark.parametrize(
    "kind, whole", [("lines", False), pytest.param("flexible", True, marks=pytest.mark.slow)]
)
def test_cached_decode_is_the_whole_forward(kind, whole):
    model, params, batch = tiny(kind, "gqa", None, prefix="images" if whole else "causal")
    batch = jax.tree.map(jnp.asarray, batch)
    tokens, sources = batch["tokens"], batch["sources"]
    rows, length = tokens.shape
    whole_rows = jax.jit(
        lambda params, batch: model.logits(params, model.apply(params, **batch).hidden)
    )(params, batch)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length))
    given = {name: batch[name] for name in ("shapes", "sounds") if name in batch}
    features = jax.jit(model.features)(params, batch["images"], **given)
    cache, found = model.init_cache(rows, length), []
    first = length - 2 if whole else 5
    decode = jax.jit(model.decode)
    for start, end in itertools.pairwise([0, first, length - 1, length]):
        part = slice(start, end)
        seen = {"features": features, "sources": sources[:, part]}
        logits, cache = decode(params, tokens[:, part], cache, positions[:, part], **seen)
        found.append(logits)
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found, whole_rows, atol=1e-4 * abs(found).max(), rtol=0)


def test_layouts_and_configs_that_are_written():
    for kind in KINDS:
        model, _, _ = tiny(kind, "gqa", None)
        config = model.config
        assert from_dict(VisionLanguage, to_dict(config), "model") == config
        assert config.num_layers == 3
        assert {*model.layers} == {
            f"{part}/segment_0/block" for part in ("language", "vision", "audio/encoder")
        }
    assert config.sight.layout((0, 0)).tolist() == [0, -1, -2]  # a frame: a line, then a separator
    assert laid_out(config.sight, [(0, 0), (2, 1)]).tolist() == [0, -1, -2, 1, -1, -2, 2, 3, -1]
    ear = config.audio
    assert ear.layout(2 * HOP).tolist() == [0] and ear.layout(2 * HOP + 1).tolist() == [0, 1]
    old = to_dict(config)
    del old["audio"], old["max_patches"]  # as runs wrote it that came before
    assert from_dict(VisionLanguage, old, "model").audio is None


def test_what_cannot_be_is_refused():
    model, params, batch = tiny("flexible", "gqa", None)
    given = jax.tree.map(jnp.asarray, batch)
    deaf = build_vision_language(dataclasses.replace(model.config, audio=None), FLOAT32)
    stiff = dataclasses.replace(model.config, vision=VIEW)
    stiff = build_vision_language(stiff, FLOAT32)
    short = given | {"sounds": given["sounds"][..., 1:]}
    views = jnp.zeros((4, 3, 8, 8, 3))
    for one, inputs, why in (
        (deaf, given, "takes no audio"),
        (model, short, "1919 samples, and a window 1920"),
        (model, given | {"images": given["images"][:, :, 1:]}, r"\(5, 12\), and this model's"),
        (model, {k: v for k, v in given.items() if k != "shapes"}, "come with shapes"),
        (stiff, given | {"images": views}, "come with shapes"),
        (model, {k: v for k, v in given.items() if k != "sources"}, "come together"),
    ):
        with pytest.raises(ValueError, match=why):
            jax.eval_shape(one.apply, params, **inputs)
    decoder = cases.decoder("gqa", None)
    for fields, why in (
        ({"projector": DownsampleProjector(), "vision": FLEXIBLE}, "takes a ViT's square views"),
        ({"projector": Resampler(num_heads=5)}, "multiple of the Resampler's num_heads"),
        ({"audio": Ear(encoder=WHISPER, audio_id=61)}, "audio.audio_id is 61"),
        ({"audio": Ear(encoder=WHISPER, audio_id=7), "image_id": 7}, "are both 7"),
        ({"max_patches": 0}, "max_patches is 0"),
    ):
        with pytest.raises(ValueError, match=why):
            VisionLanguage(**({"language": decoder, "vision": VIEW} | fields))
    for make, why in (
        (lambda: Ear(encoder=WHISPER, join=4), "must divide the encoder's 6 frames"),
        (lambda: Resampler(num_tokens=0), "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=why):
            make()
