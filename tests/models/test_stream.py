"""Reference and invariance: a stream in pieces is the whole, causal, and torch's convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deepseek_jax.core import tree
from deepseek_jax.core.precision import Precision
from deepseek_jax.models.encoder import build_encoder
from deepseek_jax.models.stream import Stream, init_state

CONFIG = Stream(convolutions=((6, 7, 3), (8, 2, 2), (5, 4, 1)), embed_dim=4)
LENGTH = 100


def model(config=CONFIG, **precision):
    encoder = build_encoder(config, Precision(**precision))
    rng = np.random.default_rng(1)

    def drawn(path, leaf):
        return jnp.asarray(("scale" in path) + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

    return encoder, tree.map_with_path(drawn, encoder.shapes)


def wave(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, LENGTH)), jnp.float32)


def in_pieces(encoder, params, whole, lengths):
    state, frames, first = init_state(encoder.config, whole.shape[0], encoder.dtypes.compute), [], 0
    for length in lengths:
        piece = whole[:, first : first + length]
        found, state = encoder.module.apply({"params": params}, piece, state, method="step")
        frames.append(found)
        first += length
    assert first == whole.shape[1]
    return jnp.concatenate(frames, axis=1)


@pytest.mark.parametrize(
    "lengths",
    [[1] * 7 + [93], [7, 0, 29, 64], [6] * 16 + [4]],
    ids=["singly", "odd", "hops"],
)
def test_pieces_are_the_whole(lengths):
    encoder, params = model()
    whole = encoder.apply(params, wave=wave()).hidden
    assert whole.shape == (2, LENGTH // CONFIG.hop, 4)
    pieces = in_pieces(encoder, params, wave(), lengths)
    np.testing.assert_allclose(pieces, whole, atol=2e-6)


def test_slopes_of_pieces_are_those_of_the_whole():
    encoder, params = model()
    slope = np.random.default_rng(2).normal(size=(2, LENGTH // CONFIG.hop, 4)).astype(np.float32)

    def of_whole(params, wave):
        return jnp.vdot(encoder.apply(params, wave=wave).hidden, slope)

    def of_pieces(params, wave):
        return jnp.vdot(in_pieces(encoder, params, wave, [31, 5, 64]), slope)

    found = [jax.jit(jax.grad(f, (0, 1)))(params, wave()) for f in (of_whole, of_pieces)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *found)


def test_a_frame_hears_its_reach_and_nothing_later():
    encoder, params = model()
    one, frame = encoder.apply(params, wave=wave()).hidden, 9
    end = (frame + 1) * CONFIG.hop
    for start, stop, changes in (
        (end, LENGTH, False),
        (0, end - CONFIG.reach, False),
        (end - 1, end, True),
        (end - CONFIG.reach, end - CONFIG.reach + 1, True),
    ):
        other = wave().at[:, start:stop].set(wave(1)[:, start:stop])
        same = np.array_equal(encoder.apply(params, wave=other).hidden[:, frame], one[:, frame])
        assert same != changes, (start, stop)


def test_it_is_torchs_convolutions():
    encoder, params = model()
    leaves = {path: torch.from_numpy(np.array(x)) for path, x in tree.flatten(params).items()}
    weights = {path: x.requires_grad_() for path, x in leaves.items()}
    x = torch.from_numpy(np.array(wave()))[:, None]
    for i, (width, size, stride) in enumerate(CONFIG.convolutions):
        own = {
            p.split("/", 1)[1]: w for p, w in weights.items() if p.startswith(f"convolution_{i}")
        }
        x = torch.nn.functional.pad(x, (size - stride, 0))
        kernel = own["conv/weight"].permute(2, 1, 0)
        x = torch.nn.functional.conv1d(x, kernel, own["conv/bias"], stride).transpose(1, 2)
        x = torch.nn.functional.layer_norm(x, (width,), own["norm/scale"], own["norm/bias"])
        x = torch.nn.functional.gelu(x).transpose(1, 2)
    theirs = x.transpose(1, 2) @ weights["out/weight"] + weights["out/bias"]
    slope = np.random.default_rng(2).normal(size=theirs.shape).astype(np.float32)
    (theirs * torch.from_numpy(slope)).sum().backward()

    def total(params):
        hidden = encoder.apply(params, wave=wave()).hidden
        return jnp.vdot(hidden, slope), hidden

    grads, mine = jax.jit(jax.grad(total, has_aux=True))(params)
    np.testing.assert_allclose(mine, theirs.detach().numpy(), atol=1e-5)
    for path, grad in tree.flatten(grads).items():
        other = weights[path].grad.numpy()
        np.testing.assert_allclose(grad, other, atol=1e-4 * abs(other).max(), err_msg=path)


def test_bfloat16():
    encoder, params = model()
    narrow, _ = model(compute="bfloat16")
    one = np.asarray(encoder.apply(params, wave=wave()).hidden).ravel()
    other = np.asarray(narrow.apply(params, wave=wave()).hidden.astype(jnp.float32)).ravel()
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) >= 0.999


def test_a_size_below_its_stride_is_refused():
    with pytest.raises(ValueError, match="size below their stride"):
        Stream(convolutions=((4, 2, 3),))
