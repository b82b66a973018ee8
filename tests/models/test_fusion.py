"""Several modalities in one classifier.

Reference: attention under a mask of pairs is torch's. Invariance: what is absent, and in which
order modalities stand, changes nothing. Sharded = single device.
"""

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deepseek_jax.core import tree
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.encoder import Transformer, Whole, WholeAttention
from deepseek_jax.models.any_modality import AnyModality, Boxes, Spectrum, Words
from deepseek_jax.models.audio import Wav2Vec2, Whisper
from deepseek_jax.models.build import dtypes_of
from deepseek_jax.models.counts import token_counts, train_flops_per_token
from deepseek_jax.models.encoder import build_encoder
from deepseek_jax.models.fusion import (
    Bottleneck,
    CrossModal,
    Fused,
    Modality,
    Progressive,
    Weighted,
    build_fused,
)
from deepseek_jax.models.raw_inputs import inputs_of
from deepseek_jax.models.text_tower import TextTower
from deepseek_jax.models.vit import ViT
from deepseek_jax.ops.fusion import bottleneck_mask, progressive_mask, token_streams
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.sharding import place_batch, tree_shardings

SMALL = Transformer(num_layers=1, embed_dim=8, num_heads=2, mlp_dim=12)
JOINT = Transformer(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24)
MODALITIES = (
    Modality(
        name="image",
        encoder=ViT(transformer=SMALL, image_size=(8, 8), patch_size=4, pooling="mean"),
    ),
    Modality(name="sound", encoder=Whisper(transformer=SMALL, num_mels=4, num_positions=3)),
    Modality(
        name="question", encoder=TextTower(transformer=SMALL, vocab_size=20, max_length=5)
    ),
)  # fmt: skip
FUSIONS = {
    "crossmodal": CrossModal(transformer=JOINT),
    "progressive": Progressive(transformer=JOINT, first_joint_layer=1),
    "bottleneck": Bottleneck(transformer=JOINT, num_tokens=2, first_joint_layer=1),
    **{k: Weighted(kind=k, embed_dim=16) for k in ("gate", "confidence", "attention")},
}
ABSENT = jnp.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]], bool)


def config(fusion, **fields):
    return Fused(modalities=MODALITIES, num_classes=4, fusion=FUSIONS[fusion], **fields)


def made(rows=6, seed=0):
    rng = np.random.default_rng(seed)
    found = {
        "image": {"images": rng.normal(size=(rows, 8, 8, 3)).astype(np.float32)},
        "sound": {"mel": rng.normal(size=(rows, 6, 4)).astype(np.float32)},
        "question": {
            "tokens": rng.integers(0, 20, (rows, 5)).astype(np.int32),
            "mask": np.arange(5)[None] < rng.integers(1, 6, rows)[:, None],
        },
    }
    return jax.tree.map(jnp.asarray, found)


@functools.cache
def network(fusion, **fields):
    return build_fused(config(fusion, **fields), Precision(compute="float32"))


def total(model, params, inputs, present):
    """A number in which every output counts, and the outputs."""
    found = model.apply(params, inputs, present)
    each = [found.logits, found.alone, found.weights]
    signs = (jnp.cos(jnp.arange(x[0].size, dtype=x.dtype)).reshape(1, *x.shape[1:]) for x in each)
    return sum((x * sign).sum() for x, sign in zip(each, signs, strict=True)), found


def ran(model):
    return jax.jit(jax.value_and_grad(functools.partial(total, model), has_aux=True))


def spoilt(inputs, present):
    """The inputs with NaN, or other tokens, in what is absent."""
    other = {name: {k: np.array(x) for k, x in parts.items()} for name, parts in inputs.items()}
    for i, modality in enumerate(MODALITIES):
        for x in other[modality.name].values():
            if x.dtype == np.float32:
                x[~present[:, i]] = np.nan
            elif x.dtype == np.int32:
                x[~present[:, i]] = 1
    return other


@pytest.mark.parametrize("fusion", ["progressive", "bottleneck", "gate", "attention"])
def test_what_is_absent_changes_nothing_and_the_rest_does(fusion):
    model = network(fusion)
    params, inputs, run = cases.random_params(model.shapes, 1), made(), ran(network(fusion))
    (_, found), slopes = run(params, inputs, ABSENT)
    (_, other), others = run(params, spoilt(inputs, ABSENT), ABSENT)
    for one, two in zip((found, slopes), (other, others), strict=True):
        for path, x in tree.flatten(two._asdict() if two is other else two).items():
            same = tree.flatten(one._asdict() if one is found else one)[path]
            if x is not None:
                np.testing.assert_array_equal(x, same, err_msg=path)
    weights = np.asarray(found.weights)
    assert (weights >= 0).all() and (weights[~ABSENT] == 0).all()
    np.testing.assert_allclose(weights.sum(1), ABSENT.any(1), atol=1e-6)
    assert (np.asarray(found.alone)[~ABSENT] == 0).all()
    # A modality that is nowhere gets no slope; where it is somewhere, all of its weights do.
    nowhere = ABSENT & np.array([[True, False, True]])
    _, slopes = run(params, inputs, nowhere)
    flat = tree.flatten(jax.device_get(slopes))
    for path, slope in flat.items():
        gone = path.startswith(("sound/", "fusion/sound"))
        assert (abs(slope).max() == 0) == gone or path.endswith("k/bias"), path
    # Whoever is there counts: other pixels change the answers of rows with an image alone.
    moved = {**inputs, "image": {"images": inputs["image"]["images"] + 1}}
    (_, after), _ = run(params, moved, ABSENT)
    changed = np.abs(np.asarray(after.logits - found.logits)).max(1) > 1e-6
    np.testing.assert_array_equal(changed, ABSENT[:, 0])


@pytest.mark.parametrize("fusion", ["bottleneck", "gate"])
def test_the_order_of_modalities_orders_their_weights(fusion):
    order = np.array([2, 0, 1])
    turned = dataclasses.replace(config(fusion), modalities=tuple(MODALITIES[i] for i in order))
    model, other = network(fusion), build_fused(turned, Precision(compute="float32"))
    params, inputs = cases.random_params(model.shapes, 1), made()
    one = jax.jit(model.apply)(params, inputs, ABSENT)
    two = jax.jit(other.apply)(params, inputs, ABSENT[:, order])
    np.testing.assert_allclose(two.logits, one.logits, atol=1e-5)
    np.testing.assert_allclose(two.weights, one.weights[:, order], atol=1e-6)
    np.testing.assert_allclose(two.alone, one.alone[:, order], atol=1e-5)


def test_confidence_weighs_by_the_entropy_of_each_heads_answer():
    for labels in (False, True):
        model = network("confidence", multi_label=labels)
        params = cases.random_params(model.shapes, 2)
        found = jax.device_get(jax.jit(model.apply)(params, made(), ABSENT))
        logits = torch.from_numpy(np.array(found.alone)).double()
        if labels:
            kinds = torch.distributions.Bernoulli(logits=logits)
            entropy = kinds.entropy().mean(-1)
        else:
            entropy = torch.distributions.Categorical(logits=logits).entropy()
        scores = (-entropy).masked_fill(~torch.from_numpy(np.array(ABSENT)), -torch.inf)
        weights = torch.nan_to_num(scores.softmax(-1))
        np.testing.assert_allclose(found.weights, weights.numpy(), atol=1e-6)
        mean = (weights[:, :, None] * logits).sum(1).numpy()
        scale = np.exp(params["fusion"]["log_scale"])
        np.testing.assert_allclose(found.logits, scale * mean, atol=1e-5)


def test_one_head_answers_where_one_modality_is_present():
    model = network("gate")
    params = cases.random_params(model.shapes, 3)
    params["fusion"]["log_scale"] = np.float32(0)
    apply = jax.jit(model.apply)
    for i in range(3):
        found = apply(params, made(), jnp.arange(3)[None].repeat(6, 0) == i)
        np.testing.assert_allclose(found.logits, found.alone[:, i], atol=1e-6)


def test_dropout_hides_from_the_fusion_and_never_from_the_heads():
    model = network("gate", modality_dropout=0.6)
    params, inputs = cases.random_params(model.shapes, 4), made()
    apply = jax.jit(model.apply)
    whole = apply(params, inputs, ABSENT)
    rows = [apply(params, inputs, ABSENT, jax.random.key(i)) for i in range(8)]
    kept = np.stack([np.asarray(row.weights) > 0 for row in rows])
    assert not (kept & ~ABSENT[None]).any() and (kept.any(2) == ABSENT.any(1)[None]).all()
    assert 0.2 < kept[:, 0].mean() < 0.8 and not (kept == kept[:1]).all()
    for row in rows:
        np.testing.assert_array_equal(row.alone, whole.alone)


@pytest.mark.parametrize("kind", ["crossmodal", "progressive", "bottleneck"])
def test_attention_between_modalities_is_torchs(kind):
    """Values and slopes of every weight and token, an absent modality among them."""
    lengths, narrow = (3, 4), 2 if kind == "bottleneck" else 0
    valid = np.ones((3, 7 + narrow), bool)
    valid[1, :3] = valid[2, 3:7] = False
    mask = bottleneck_mask if narrow else progressive_mask
    seen = mask(token_streams(lengths, narrow), kind != "progressive", jnp.asarray(valid))
    rng, size = np.random.default_rng(5), JOINT.embed_dim
    x = np.where(valid[:, :, None], rng.normal(size=(*valid.shape, size)), 0).astype(np.float32)
    slope = np.where(valid[:, :, None], rng.normal(size=x.shape), 0).astype(np.float32)
    module = WholeAttention(JOINT, dtypes_of(Precision(compute="float32")))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, Whole(seen))["params"]
    params = cases.random_params(
        jax.tree.map(lambda d: d.value, shapes, is_leaf=lambda d: hasattr(d, "spec")), 6
    )

    def run(params, x):
        y = module.apply({"params": params}, x, Whole(seen))
        return (y * slope).sum(), y

    (_, found), (slopes, of_x) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(params, x)
    theirs = torch.nn.MultiheadAttention(size, JOINT.num_heads, batch_first=True)
    flat = {name: params[name]["weight"].reshape(size, size) for name in "qkvo"}
    with torch.no_grad():
        joined = np.concatenate([flat[n].T for n in "qkv"])
        theirs.in_proj_weight.copy_(torch.from_numpy(joined))
        joined = np.concatenate([params[n]["bias"].ravel() for n in "qkv"])
        theirs.in_proj_bias.copy_(torch.from_numpy(joined))
        theirs.out_proj.weight.copy_(torch.from_numpy(flat["o"].T))
        theirs.out_proj.bias.copy_(torch.from_numpy(params["o"]["bias"]))
    tokens = torch.from_numpy(x).requires_grad_()
    # Who attends to nobody would be NaN in torch: there everybody, and no slope comes back.
    blocked = ~np.array(seen) & np.array(seen).any(-1, keepdims=True)
    blocked = torch.from_numpy(blocked.repeat(JOINT.num_heads, 0))
    out, _ = theirs(tokens, tokens, tokens, attn_mask=blocked, need_weights=False)
    (out * torch.from_numpy(slope)).sum().backward()
    np.testing.assert_allclose(
        np.where(valid[:, :, None], found, 0),
        np.where(valid[:, :, None], out.detach().numpy(), 0), atol=1e-5,
    )  # fmt: skip
    np.testing.assert_allclose(of_x, tokens.grad.numpy(), atol=1e-4)
    weights = theirs.in_proj_weight.grad.numpy().reshape(3, size, size)
    for name, grad in zip("qkv", weights, strict=True):
        mine = np.asarray(slopes[name]["weight"]).reshape(size, size).T
        np.testing.assert_allclose(mine, grad, atol=1e-3 * abs(grad).max(), err_msg=name)
    grad = theirs.out_proj.weight.grad.numpy()
    mine = np.asarray(slopes["o"]["weight"]).reshape(size, size).T
    np.testing.assert_allclose(mine, grad, atol=1e-3 * abs(grad).max())


@pytest.mark.parametrize("fusion", ["bottleneck", "gate"])
def test_a_mesh_changes_nothing(fusion):
    model = network(fusion)
    params = cases.random_params(model.shapes, 7)
    present = np.concatenate([ABSENT, ABSENT[:2]])
    given = {"inputs": made(8), "present": present}
    (_, alone), slopes = ran(model)(params, *given.values())
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(mesh, model.specs, model.shapes))
        split = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed)]
        assert sum(split) > len(split) / 2
        (_, found), others = ran(model)(placed, *place_batch(mesh, given).values())
    for name in ("logits", "alone", "weights"):
        one = getattr(alone, name)
        np.testing.assert_allclose(getattr(found, name), one, atol=1e-5 * abs(one).max())
    noise = 1e-6 * max(float(abs(slope).max()) for slope in jax.tree.leaves(slopes))
    for path, slope in tree.flatten(slopes).items():
        atol = max(1e-5 * float(abs(slope).max()), noise)
        np.testing.assert_allclose(tree.flatten(others)[path], slope, atol=atol, err_msg=path)


ANY = AnyModality(
    transformer=SMALL,
    image=Boxes(image_size=(8, 8), box=(1, 4, 4)),
    text=Words(vocab_size=20, max_length=5),
    audio=Spectrum(window=20, hop=10, max_length=9),
)


def test_modalities_share_a_trunk():
    """What each makes alone is the encoder's own of its input; on a mesh too."""
    named = [Modality(name=name, encoder=ANY) for name in ("sound", "image", "text")]
    config = Fused(modalities=tuple(named), num_classes=3, fusion=FUSIONS["gate"])
    model = build_fused(config, Precision(compute="float32"))
    encoder = build_encoder(ANY, Precision(compute="float32"))
    params = jax.tree.map(jnp.asarray, cases.random_params(model.shapes, 2))
    rng = np.random.default_rng(3)
    same = jax.tree.map(lambda x: x.shape, params["trunk_0"])
    assert same == jax.tree.map(lambda x: x.shape, encoder.shapes)
    batch = {
        "inputs": {
            "sound": rng.normal(size=(4, 60)).astype(np.float32),
            "image": rng.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8),
            "text": np.where(np.arange(5) < 3, rng.integers(0, 20, (4, 5)), -1).astype(np.int32),
        },
        "present": {name: np.array([1, 1, 0, 1], bool) for name in ("sound", "image", "text")},
    }
    given = inputs_of(config, jax.tree.map(jnp.asarray, batch), "half")
    (_, found), slopes = ran(model)(params, *given.values())
    for i, name in enumerate(("sound", "image", "text")):
        pooled = encoder.apply(params["trunk_0"], **given["inputs"][name]).pooled
        head = params[name]["head"]
        alone = np.asarray(pooled) @ np.asarray(head["weight"]) + np.asarray(head["bias"])
        alone[2] = 0
        np.testing.assert_allclose(found.alone[:, i], alone, atol=1e-5)
    assert all(np.any(slope) for slope in jax.tree.leaves(slopes))
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(mesh, model.specs, model.shapes))
        (_, split), others = ran(model)(placed, *place_batch(mesh, given).values())
    np.testing.assert_allclose(split.alone, found.alone, atol=1e-5)
    for path, slope in tree.flatten(slopes).items():
        atol = 1e-5 * float(abs(slope).max()) + 1e-6
        np.testing.assert_allclose(tree.flatten(others)[path], slope, atol=atol, err_msg=path)
    tokens = token_counts(config, 60)
    assert tokens == {"sound": 7, "image": 4, "text": 1}
    apart = [dataclasses.replace(ANY, init_scale=0.02 + i / 100) for i in range(3)]
    apart = [Modality(name=m.name, encoder=e) for m, e in zip(named, apart, strict=True)]
    apart = build_fused(
        dataclasses.replace(config, modalities=tuple(apart)), Precision(compute="float32")
    )
    assert train_flops_per_token(model, 60) == train_flops_per_token(apart, 60)
    silent = dataclasses.replace(ANY, audio=None)
    with pytest.raises(ValueError, match="the AnyModality of sound takes image, text"):
        dataclasses.replace(config, modalities=(Modality(name="sound", encoder=silent), named[1]))


def test_tokens_of_a_row_are_counted():
    wave = Wav2Vec2(
        transformer=SMALL, convolutions=((8, 10, 5),), position_size=4, position_groups=2
    )
    modalities = (*MODALITIES, Modality(name="wave", encoder=wave))
    counts = token_counts(Fused(modalities=modalities, num_classes=3), 50)
    assert counts == {"image": 5, "sound": 3, "question": 5, "wave": 9}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"modalities": MODALITIES[:1]}, "two or more different names"),
        ({"modalities": (*MODALITIES[:1], *MODALITIES[:1])}, "two or more different names"),
        ({"num_classes": 1}, "leaves nothing to tell apart"),
        ({"modality_dropout": 1.0}, "must lie in"),
    ],
)
def test_what_cannot_be_is_refused(change, why):
    with pytest.raises(ValueError, match=why):
        dataclasses.replace(config("gate"), **change)
    with pytest.raises(ValueError, match="one of the 2 layers"):
        Progressive(transformer=JOINT, first_joint_layer=2)
    with pytest.raises(ValueError, match="stand on one side alone"):
        network("gate").apply({}, {"image": {}, "sound": {}})
