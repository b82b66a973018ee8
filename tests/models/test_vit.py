"""Reference: positions and poolings that no family here has, against plain float64 torch.

Sharded = single-device, and bfloat16 beside float32, of both kinds of image encoder.
"""

import dataclasses

import cases
import encoder_meshes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from deepseek_jax.core import tree
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.encoder import build_encoder
from deepseek_jax.models.naflex import NaFlex
from deepseek_jax.models.vit import Axial, Sines, ViT

SMALL = Transformer(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24)
PATCH, WIDTH, HEADS = 4, 16, 2
FLOAT32 = Precision(compute="float32")


def turned(x, positions, leading, size):
    """Queries or keys [B, N, T, H], tokens behind the leading ones turned by row and by column."""
    quarter = x.shape[-1] // 4
    for token in range(leading, x.shape[2]):
        place = divmod(token - leading, size[1])
        angles = [at / positions.theta ** (i / quarter) for at in place for i in range(quarter)]
        turn = torch.polar(torch.ones(2 * quarter).double(), torch.tensor(angles).double())
        pairs = torch.complex(*x[:, :, token].split(2 * quarter, -1)) * turn
        x = torch.cat([x[:, :, :token], torch.cat([pairs.real, pairs.imag], -1)[:, :, None],
                       x[:, :, token + 1 :]], 2)  # fmt: skip
    return x


def attended(w, x, to, turn=lambda y: y):
    heads = [torch.einsum("btd,dnh->bnth", y, w[n]["weight"]) + w[n]["bias"][:, None]
             for n, y in (("q", x), ("k", to), ("v", to))]  # fmt: skip
    made = F.scaled_dot_product_attention(turn(heads[0]), turn(heads[1]), heads[2])
    return torch.einsum("bnth,nhd->btd", made, w["o"]["weight"]) + w["o"]["bias"]


def fed(w, x):
    hidden = F.gelu(x @ w["up"]["weight"] + w["up"]["bias"])
    return hidden @ w["down"]["weight"] + w["down"]["bias"]


def normed(w, x):
    return F.layer_norm(x, (WIDTH,), w["scale"], w["bias"], 1e-6)


def reference(config, w, images):
    """(hidden, pooled) of the plain model, of nested dicts of torch tensors."""
    filters = w["patch"]["weight"].permute(3, 2, 0, 1)
    found = F.conv2d(images.permute(0, 3, 1, 2), filters, w["patch"]["bias"], stride=PATCH)
    size, x = found.shape[2:], found.flatten(2).transpose(1, 2)
    first = [w["class_token"][None]] if config.class_token else []
    first += [w["registers"]] if config.num_registers else []
    leading = config.class_token + config.num_registers
    turn = lambda y: y  # noqa: E731
    if isinstance(config.positions, Sines):
        vectors, quarter = [], WIDTH // 4
        for row, column in np.ndindex(*size):
            angles = np.array([[at / config.positions.theta ** (i / quarter)
                                for i in range(quarter)] for at in (column, row)])  # fmt: skip
            vectors.append(np.stack([np.sin(angles), np.cos(angles)], 1).reshape(-1))
        x = x + torch.from_numpy(np.stack(vectors))
    else:
        turn = lambda y: turned(y, config.positions, leading, size)  # noqa: E731
    x = torch.cat([*(y.expand(len(x), *y.shape) for y in first), x], 1)
    for i in range(config.transformer.num_layers):
        block = torch_tree(w["segment_0"]["block"], lambda leaf, i=i: leaf[i])
        y = normed(block["attention_norm"], x)
        x = x + attended(block["attention"], y, y, turn)
        x = x + fed(block["mlp"], normed(block["mlp_norm"], x))
    x = normed(w["final_norm"], x)
    if config.pooling == "mean":
        return x, x[:, leading:].mean(1)
    y = attended(w["head"], w["head"]["probe"].expand(len(x), 1, WIDTH), x)
    return x, (y + fed(w["head"]["mlp"], normed(w["head"]["norm"], y)))[:, 0]


def torch_tree(node, change):
    if isinstance(node, dict):
        return {name: torch_tree(part, change) for name, part in node.items()}
    return change(node)


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"positions": Sines(), "pooling": "mean", "num_registers": 2}, (12, 8)),
        ({"positions": Axial(theta=100.0), "pooling": "attention", "num_registers": 1}, (8, 18)),
        ({"positions": Axial(), "pooling": "mean", "class_token": False}, (16, 4)),
    ],
    ids=["sines", "axial", "axial-alone"],
)
def test_positions_and_poolings(fields, size):
    config = ViT(transformer=SMALL, image_size=(8, 8), patch_size=PATCH, **fields)
    encoder = build_encoder(config, FLOAT32)
    params = cases.random_params(encoder.shapes, 0)
    rng = np.random.default_rng(1)
    images = rng.normal(size=(2, *size, 3)).astype(np.float32)
    theirs = torch_tree(params, lambda leaf: torch.from_numpy(leaf).double().requires_grad_())
    wanted = reference(config, theirs, torch.from_numpy(images).double())
    slopes = [rng.normal(size=x.shape).astype(np.float32) for x in wanted]
    sum((x * torch.from_numpy(s)).sum() for x, s in zip(wanted, slopes, strict=True)).backward()

    def total(params):
        found = encoder.apply(params, images=jnp.asarray(images))
        outputs = found.hidden, found.pooled
        return sum(jnp.vdot(x, s) for x, s in zip(outputs, slopes, strict=True)), outputs

    (_, found), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    for mine, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, other.detach(), atol=1e-4, rtol=0)
    grads, theirs = tree.flatten(jax.device_get(grads)), tree.flatten(theirs)
    noise = 1e-6 * max(abs(leaf.grad).max().item() for leaf in theirs.values())
    for path, mine in grads.items():
        other = theirs[path].grad.numpy()
        atol = max(1e-3 * abs(other).max(), noise)
        np.testing.assert_allclose(mine, other, atol=atol, rtol=0, err_msg=path)


RICH = dataclasses.replace(SMALL, gated=True, layer_scale=0.5, activation="silu")
GRIDS = np.array([[2, 3], [1, 5], [4, 1], [2, 2]] * 2, np.int32)
BOTH_KINDS = {
    "vit": (
        ViT(transformer=RICH, image_size=(12, 8), patch_size=PATCH, num_registers=2,
            pooling="tanh", mask_token=True),
        lambda rng: {
            "images": rng.normal(size=(8, 8, 12, 3)).astype(np.float32),
            "hidden_patches": np.arange(48).reshape(8, 6) % 5 == 0,
        },
    ),
    "naflex": (
        NaFlex(transformer=SMALL, patch_size=PATCH, grid_size=4),
        lambda rng: {
            "patches": rng.normal(size=(8, 6, 48)).astype(np.float32),
            "mask": np.arange(6)[None] < GRIDS.prod(1)[:, None],
            "shapes": GRIDS,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_sharded_is_single_device_and_bfloat16_is_near(kind):
    config, make = BOTH_KINDS[kind]
    encoder_meshes.same_on_a_mesh(config, make(np.random.default_rng(0)))


def test_what_cannot_be_is_refused():
    for fields, message in [
        ({"patch_size": 0}, "at least patch_size"),
        ({"class_token": False}, "needs class_token"),
        ({"transformer": dataclasses.replace(SMALL, num_heads=8), "positions": Axial()}, "of 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            ViT(**({"transformer": SMALL} | fields))
    with pytest.raises(ValueError, match="NaFlex has none"):
        NaFlex(transformer=SMALL, pooling="class")
