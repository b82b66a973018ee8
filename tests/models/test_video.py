"""Reference: VideoMAE and ViViT against transformers' own; factorized attention against NumPy.

Also sharded = single-device, bfloat16, and what is refused.
"""

import cases
import encoder_cases
import encoder_meshes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
import transformers

from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.encoder import build_encoder
from deepseek_jax.models.video import Factorized, Video
from deepseek_jax.serving.encoder import INPUTS, load_encoder

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def hidden(model, x, **more):
    return model(x, **{k: torch.from_numpy(v) for k, v in more.items()}).last_hidden_state, None


def both(model, x):
    out = model(x)
    return out.last_hidden_state, out.pooler_output


def test_videomae(tmp_path):
    config = transformers.VideoMAEConfig(
        **SHAPE, image_size=[12, 20], patch_size=4, num_frames=6, tubelet_size=3, qv_bias=False,
        num_channels=1, hidden_act="relu",
    )  # fmt: skip
    model = encoder_cases.randomized(transformers.VideoMAEModel(config))
    encoder_cases.agrees(model, tmp_path, noise(2, 6, 1, 12, 20), hidden)


def test_videomae_sees_what_is_not_masked(tmp_path):
    config = transformers.VideoMAEConfig(
        **SHAPE, image_size=16, patch_size=8, num_frames=4, use_mean_pooling=False
    )
    model = encoder_cases.randomized(transformers.VideoMAEModel(config))
    masked = np.array([[1, 0, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1, 0]], bool)
    x = noise(2, 4, 3, 16, 16)
    ours = encoder_cases.agrees(model, tmp_path, x, hidden, bool_masked_pos=masked)
    for wrong in (masked[:1], masked[:, :7], ~masked & [[True], [False]], masked | True):
        with pytest.raises(InputError, match=r"it must be \(2, 8\) and leave as many"):
            ours.encode(x, bool_masked_pos=wrong)


def test_vivit(tmp_path):
    config = transformers.VivitConfig(
        **SHAPE, image_size=[12, 20], tubelet_size=[2, 6, 4], num_frames=4
    )
    model = encoder_cases.randomized(transformers.VivitModel(config))
    encoder_cases.agrees(model, tmp_path, noise(2, 4, 3, 12, 20), both)


def test_other_sizes_and_lengths_are_refused_as_transformers_refuses_them(tmp_path):
    """Also where ViViT's positions are to be interpolated: it takes frames for rows."""
    shape = {"image_size": 16, "num_frames": 4}
    vivit = transformers.VivitConfig(**SHAPE, **shape, tubelet_size=[1, 8, 8])
    mae = transformers.VideoMAEConfig(**SHAPE, **shape, patch_size=8)
    for model, more in (
        (transformers.VivitModel(vivit), {}),
        (transformers.VivitModel(vivit), {"interpolate_pos_encoding": True}),
        (transformers.VideoMAEModel(mae), {}),
    ):
        encoder_cases.randomized(model).save_pretrained(tmp_path)
        ours = load_encoder(tmp_path)
        for wrong in ((4, 24, 24), (4, 16, 24), (8, 16, 16)):
            x = noise(1, wrong[0], 3, *wrong[1:])
            with pytest.raises((ValueError, RuntimeError)):
                model(torch.from_numpy(x), **more)
            with pytest.raises(InputError, match="this encoder takes"):
                ours.encode(x, **more)


def test_published_names(tmp_path):
    """A classifier's and a pretraining model's folders: prefixes, and what is left out."""
    shape = {"image_size": 16, "num_frames": 4}
    vivit = transformers.VivitConfig(
        **SHAPE, **shape, tubelet_size=[1, 8, 8], qkv_bias=False, hidden_act="gelu"
    )
    decoder = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2}
    decoder |= {"decoder_num_hidden_layers": 1, "decoder_intermediate_size": 16}
    mae = transformers.VideoMAEConfig(**SHAPE, **shape, **decoder, patch_size=8)
    models = {
        "vivit": transformers.VivitForVideoClassification(vivit),
        "videomae": transformers.VideoMAEForPreTraining(mae),
    }
    x = noise(1, 4, 3, 16, 16)
    for name, model in models.items():
        encoder_cases.randomized(model).save_pretrained(tmp_path / name)
        other = getattr(model, name)(torch.from_numpy(x)).last_hidden_state.detach().numpy()
        found = load_encoder(tmp_path / name).encoded(x)
        np.testing.assert_allclose(found.hidden, other, atol=1e-4 * abs(other).max())
        if name == "vivit":
            np.testing.assert_array_equal(found.pooled, found.hidden[:, 0])


def normed(w, name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return x * w[f"{name}/scale"] + w[f"{name}/bias"]


def block(w, at, x):
    """A block of a transformer over x [B, T, D], in float64."""
    y = normed(w, f"{at}/attention_norm", x)
    q, k, v = (
        np.einsum("btd,dnh->bnth", y, w[f"{at}/attention/{n}/weight"])
        + w[f"{at}/attention/{n}/bias"][:, None]
        for n in "qkv"
    )
    seen = scipy.special.softmax(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]), axis=-1)
    y = np.einsum("bnth,nhd->btd", seen @ v, w[f"{at}/attention/o/weight"])
    x = x + y + w[f"{at}/attention/o/bias"]
    y = normed(w, f"{at}/mlp_norm", x) @ w[f"{at}/mlp/up/weight"] + w[f"{at}/mlp/up/bias"]
    y = y * scipy.special.ndtr(y)
    return x + y @ w[f"{at}/mlp/down/weight"] + w[f"{at}/mlp/down/bias"]


def factorized(config, w, clips):
    """Hidden states of a factorized model: frame by frame, then over the frames."""
    (t, p, q), (frames, rows, columns) = config.tubelet, config.grid
    made = []
    for frame in range(frames):
        cut = clips[:, frame * t : frame * t + t]
        tokens = [
            np.einsum(
                "bfijc,fijcd->bd",
                cut[:, :, y * p : y * p + p, x * q : x * q + q],
                w["patch/weight"],
            )
            + w["patch/bias"]
            for y in range(rows)
            for x in range(columns)
        ]
        if config.class_token:
            tokens = [np.broadcast_to(w["class_token"], tokens[0].shape), *tokens]
        x = np.stack(tokens, 1) + w["positions"]
        for i in range(config.transformer.num_layers):
            x = block(w, f"layer_{i}", x)
        x = normed(w, "frame_norm", x)
        made.append(x[:, 0] if config.class_token else x.mean(1))
    if config.class_token:
        made = [np.broadcast_to(w["frame_class_token"], made[0].shape), *made]
    x = np.stack(made, 1) + w["frame_positions"]
    for i in range(config.attention.num_layers):
        x = block(w, f"layer_{config.transformer.num_layers + i}", x)
    return normed(w, "final_norm", x)


SMALL = Transformer(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24)


@pytest.mark.parametrize(
    "fields",
    [
        {"class_token": True, "pooling": "class", "tubelet": (2, 4, 4), "num_frames": 6},
        {"pooling": "mean", "tubelet": (1, 4, 3), "num_frames": 4, "num_channels": 1},
    ],
    ids=["class", "mean"],
)
def test_factorized_attention_is_that_of_a_float64_model(fields):
    """Values, and every weight's slope along a random direction."""
    config = Video(
        transformer=SMALL, attention=Factorized(num_layers=1), image_size=(8, 12), **fields
    )
    encoder = build_encoder(config)
    params = cases.random_params(encoder.shapes, 1)
    clips = noise(2, config.num_frames, *config.image_size, config.num_channels)

    def both(w):
        hidden = factorized(config, w, clips.astype(np.float64))
        return hidden, hidden[:, 0] if config.class_token else hidden.mean(1)

    found = jax.jit(encoder.apply)(params, clips=jnp.asarray(clips))
    wide = {
        k: x.astype(np.float64) for k, x in encoder_cases.on_disk(params, encoder.layers).items()
    }
    other = both(wide)
    slopes = [noise(*x.shape, seed=5) for x in other]
    for mine, one in zip(found[:2], other, strict=True):
        np.testing.assert_allclose(mine, one, atol=1e-4 * abs(one).max())

    def total(params):
        made = encoder.apply(params, clips=jnp.asarray(clips))[:2]
        return sum(jnp.vdot(x, s) for x, s in zip(made, slopes, strict=True))

    grads = encoder_cases.on_disk(jax.jit(jax.grad(total))(params), encoder.layers)
    largest = max(np.linalg.norm(g) for g in grads.values())
    for name, grad in grads.items():
        # Along the gradient's own direction: a wrong one has another slope, or is not as steep.
        way = grad.astype(np.float64) / max(np.linalg.norm(grad), 1e-12)
        way += 0.3 * noise(*grad.shape, seed=7) / np.sqrt(grad.size)
        ends = []
        for step in (1e-5, -1e-5):
            moved = wide | {name: wide[name] + step * way}
            ends.append(sum((x * s).sum() for x, s in zip(both(moved), slopes, strict=True)))
        slope = (ends[0] - ends[1]) / 2e-5
        atol = max(1e-3 * np.linalg.norm(grad), 1e-6 * largest)
        assert abs((grad * way).sum() - slope) < atol, name


def test_sharded_is_single_device_and_bfloat16_is_near():
    config = Video(
        transformer=SMALL, attention=Factorized(num_layers=1), image_size=(8, 8),
        tubelet=(2, 4, 4), num_frames=4, class_token=True,
    )  # fmt: skip
    encoder_meshes.same_on_a_mesh(config, {"clips": noise(4, 4, 8, 8, 3)})


def test_what_does_not_fit_is_refused():
    fields = {"transformer": SMALL, "image_size": (8, 12), "tubelet": (2, 4, 4), "num_frames": 6}
    config = Video(**fields, attention=Factorized(num_layers=1))
    with pytest.raises(InputError, match=r"\(1, 5, 3, 8, 12\); .* takes \[B, 6, 3, 8, 12\]"):
        INPUTS[Video](config, noise(1, 5, 3, 8, 12))
    with pytest.raises(InputError, match=r"frames have shape \(6, 3, 8, 12\)"):
        INPUTS[Video](config, noise(6, 3, 8, 12))
    with pytest.raises(InputError, match=r"a video's positions are not interpolated"):
        INPUTS[Video](config, noise(1, 6, 3, 8, 16), interpolate_pos_encoding=True)
    encoder = build_encoder(config)
    with pytest.raises(ValueError, match=r"clips are \(6, 8, 8, 3\), and .* \(6, 8, 12, 3\)"):
        encoder.apply({}, clips=jnp.zeros((1, 6, 8, 8, 3)))
    with pytest.raises(ValueError, match="needs whole frames"):
        encoder.apply({}, clips=jnp.zeros((1, 6, 8, 12, 3)), visible=jnp.zeros((1, 2), int))
    with pytest.raises(ValueError, match="must be multiples of tubelet"):
        Video(**fields | {"num_frames": 5})
    with pytest.raises(ValueError, match="'class' needs class_token"):
        Video(**fields, pooling="class")
