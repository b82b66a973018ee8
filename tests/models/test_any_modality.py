"""Reference: stems and the shared trunk against torch, forward and slopes of every weight.

Also: padding changes nothing, sharded = single-device, bfloat16, and what is refused.
"""

import cases
import encoder_cases
import encoder_meshes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.any_modality import MODALITIES, AnyModality, Boxes, Spectrum, Words
from deepseek_jax.models.encoder import build_encoder
from deepseek_jax.serving.encoder import INPUTS, EncoderModel

CONFIG = AnyModality(
    transformer=Transformer(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24),
    image=Boxes(image_size=(8, 12), box=(1, 4, 4)),
    video=Boxes(image_size=(6, 6), num_frames=4, box=(2, 3, 2), num_channels=1),
    text=Words(vocab_size=11, taps=3, max_length=9),
    audio=Spectrum(window=16, hop=6, max_length=10),
)
LENGTHS = {"text": np.array([7, 4], np.int32), "audio": np.array([23, 40], np.int32)}


def made(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(2, 3, 8, 12)).astype(np.float32),
        "video": rng.normal(size=(2, 4, 1, 6, 6)).astype(np.float32),
        "text": rng.integers(0, 11, (2, 7)).astype(np.int32),
        "audio": rng.normal(size=(2, 40)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def model():
    encoder = build_encoder(CONFIG, Precision(compute="float32"))
    params = jax.tree.map(jnp.asarray, cases.random_params(encoder.shapes, 2))
    return EncoderModel(encoder, params, CONFIG)


def torch_stem(w, name, x, length):
    """Tokens [1, N, D] of one row, by torch's own convolutions and transform."""
    stem, bias = w[f"{name}/stem/weight"], w[f"{name}/stem/bias"]
    if name in ("image", "video"):
        clip = torch.tensor(x)[None]
        clip = clip[:, :, None] if name == "image" else clip.transpose(1, 2)
        tokens = F.conv3d(clip, stem.permute(4, 3, 0, 1, 2), bias, stride=stem.shape[:3])
        tokens = tokens.flatten(2).transpose(1, 2)
    elif name == "text":
        embedded = w["text/embedding/weight"][torch.tensor(x[:length], dtype=torch.long)]
        taps = stem.shape[0]
        tokens = F.conv1d(embedded.T[None], stem.permute(2, 1, 0), bias, padding=taps // 2)
        tokens = tokens.transpose(1, 2)
    else:
        c = CONFIG.audio
        wave, window = torch.tensor(x[None, :length]), torch.hann_window(c.window)
        spectrum = torch.stft(wave, c.window, c.hop, window=window, return_complex=True)
        tokens = spectrum.abs().transpose(1, 2) @ stem + bias
    return tokens + w[f"{name}/positions"][: tokens.shape[1]] + w[f"{name}/modality"]


def torch_trunk(w, x):
    d, n = x.shape[-1], CONFIG.transformer.num_heads

    def normed(name, x):
        return F.layer_norm(x, (d,), w[f"{name}/scale"], w[f"{name}/bias"], 1e-6)

    for at in ("layer_0", "layer_1"):
        y = normed(f"{at}/attention_norm", x)
        q, k, v = (
            (torch.einsum("btd,dnh->btnh", y, w[f"{at}/attention/{p}/weight"])
            + w[f"{at}/attention/{p}/bias"]).transpose(1, 2)
            for p in "qkv"
        )  # fmt: skip
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + y @ w[f"{at}/attention/o/weight"].reshape(d, d) + w[f"{at}/attention/o/bias"]
        y = F.gelu(normed(f"{at}/mlp_norm", x) @ w[f"{at}/mlp/up/weight"] + w[f"{at}/mlp/up/bias"])
        x = x + y @ w[f"{at}/mlp/down/weight"] + w[f"{at}/mlp/down/bias"]
    assert n == w["layer_0/attention/q/weight"].shape[1]
    return normed("final_norm", x)


@pytest.mark.parametrize("names", [("video",), ("text", "audio"), MODALITIES], ids="-".join)
def test_stems_and_trunk_are_those_of_torch(model, names):
    """Row by row without padding there, padded rows here; slopes on exactly the stems used."""
    inputs = {name: made()[name] for name in names}
    lengths = {f"{name}_lengths": LENGTHS[name] for name in names if name in LENGTHS}
    given = jax.tree.map(jnp.asarray, INPUTS[AnyModality](CONFIG, inputs, **lengths))
    rng = np.random.default_rng(4)

    def total(params, sign, mean_sign):
        found = model.encoder.apply(params, **given)
        real = found.mask[:, :, None]
        return (found.hidden * real * sign).sum() + (found.pooled * mean_sign).sum(), found

    shape = jax.eval_shape(lambda p: model.encoder.apply(p, **given).hidden, model.params).shape
    signs = [rng.normal(size=s).astype(np.float32) for s in (shape, (2, 16))]
    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, found), grads = run(model.params, *signs)

    layers = model.encoder.layers
    w = {
        path: torch.tensor(x, requires_grad=True)
        for path, x in encoder_cases.on_disk(model.params, layers).items()
    }
    other = 0
    for row in range(2):
        own = [torch_stem(w, n, inputs[n][row], LENGTHS.get(n, [0, 0])[row]) for n in names]
        hidden = torch_trunk(w, torch.cat(own, 1))[0]
        real = np.asarray(found.mask[row])
        assert real.sum() == len(hidden)
        np.testing.assert_allclose(found.hidden[row][real], hidden.detach(), atol=1e-4)
        np.testing.assert_allclose(found.pooled[row], hidden.mean(0).detach(), atol=1e-4)
        other = other + (hidden * torch.tensor(signs[0][row][real])).sum()
        other = other + (hidden.mean(0) * torch.tensor(signs[1][row])).sum()
    other.backward()
    grads = encoder_cases.on_disk(grads, layers)
    noise = 1e-6 * max(abs(g).max() for g in grads.values())
    for path, grad in grads.items():
        if w[path].grad is None:
            assert path.split("/")[0] in {*MODALITIES} - {*names} and not grad.any(), path
            continue
        slope = w[path].grad.numpy()
        atol = max(1e-3 * abs(slope).max(), noise)
        np.testing.assert_allclose(grad, slope, atol=atol, rtol=0, err_msg=path)


def test_the_trunk_is_one_set_of_leaves(model):
    """An encoder of one modality has the same trunk's leaves, and nothing of the others'."""
    whole = {*tree.flatten(model.encoder.shapes)}
    for name in MODALITIES:
        others = {other: None for other in MODALITIES if other != name}
        one = build_encoder(AnyModality(**vars(CONFIG) | others))
        own = {path for path in whole if path.split("/")[0] not in others}
        assert {*tree.flatten(one.shapes)} == own
        assert any(path.startswith("segment_0/block/") for path in own)


def test_what_lies_behind_a_rows_end_changes_nothing(model):
    names = ("text", "audio")
    lengths = {f"{name}_lengths": LENGTHS[name] for name in names}
    clean, dirty = made(), made()
    for name in names:
        for row, length in enumerate(LENGTHS[name]):
            clean[name][row, length:] = 0
            dirty[name][row, length:] = 10 if name == "text" else np.nan

    @jax.jit
    def run(params, given):
        def total(params):
            found = model.encoder.apply(params, **given)
            hidden = jnp.where(found.mask[:, :, None], found.hidden, 0)
            return (hidden**2).sum() + (found.pooled**3).sum(), (hidden, found.pooled)

        return jax.value_and_grad(total, has_aux=True)(params)

    results = [
        run(model.params, INPUTS[AnyModality](CONFIG, {n: x[n] for n in names}, **lengths))
        for x in (clean, dirty)
    ]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_sharded_is_single_device_and_bfloat16_is_near():
    rows = {name: np.concatenate([x, made(1)[name]]) for name, x in made().items()}
    lengths = {f"{name}_lengths": np.tile(x, 2) for name, x in LENGTHS.items()}
    given = INPUTS[AnyModality](CONFIG, rows, **lengths)
    encoder_meshes.same_on_a_mesh(CONFIG, given)


def test_what_does_not_fit_is_refused(model):
    good = made()
    for given, says in (
        ({}, "given nothing; this encoder takes a dict of image, video, text, audio"),
        (good["image"], "given ndarray; this encoder takes a dict"),
        ({"smell": good["text"]}, "given smell; this"),
        (
            {"image": good["image"][:, :, :6]},
            r"\(2, 3, 6, 12\); this encoder takes \[B, 3, 8, 12\]",
        ),
        ({"video": good["image"]}, r"the video has shape .* takes \[B, T, C, H, W\]"),
        ({"video": good["video"][:, :3]}, r"\(2, 3, 1, 6, 6\); .* takes \[B, 4, 1, 6, 6\]"),
        ({"text": good["text"] + 4}, r"ids lie in .*\d, outside the vocabulary 0..10"),
        ({"text": good["audio"]}, "must be integers, not float32"),
        ({"text": np.tile(good["text"], 2)}, "14 long, which makes 14 tokens; .* for 9"),
        ({"audio": np.tile(good["audio"], 2)}, "80 long, which makes 14 tokens; .* for 10"),
        ({"audio": good["audio"][:, :0]}, r"audio has shape \(2, 0\)"),
        (good | {"text": good["text"][:1]}, "as many rows, not .*'text': 1"),
    ):
        with pytest.raises(InputError, match=says):
            model.encode(given)
    for lengths in ([8, 1], [0, 1], [1]):
        with pytest.raises(
            InputError, match="text_lengths are .* each row of the text, from 1 to 7"
        ):
            model.encode({"text": good["text"]}, text_lengths=lengths)
    with pytest.raises(InputError, match="audio_lengths"):
        model.encode({"text": good["text"]}, audio_lengths=[1, 1])
    with pytest.raises(ValueError, match="needs at least one of image"):
        AnyModality(transformer=CONFIG.transformer)
    with pytest.raises(ValueError, match="an image has 1"):
        AnyModality(transformer=CONFIG.transformer, image=CONFIG.video)
    with pytest.raises(ValueError, match="taps .2. odd"):
        Words(vocab_size=3, taps=2)
    with pytest.raises(ValueError, match="must be multiples of box"):
        Boxes(box=(1, 16, 15))
    image = AnyModality(transformer=CONFIG.transformer, image=CONFIG.image)
    with pytest.raises(ValueError, match="given text; it takes image"):
        build_encoder(image).apply({}, text=jnp.zeros((1, 2), int))
