"""Reference: cached decoding, chunk by chunk, against the NumPy model that sees whole rows."""

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.moe import Capacity
from deepseek_jax.layers.sparse_attention import Indexer
from deepseek_jax.models.build import build

LENGTH = 16
LENGTHS = (16, 9, 13)  # each row's tokens
PROMPTS = (5, 2, 7)  # how many of them come with the prefill
ROUTERS = (*cases.ROUTERS, None, "softmax", "sigmoid")
CONFIGS = {
    attention: cases.decoder(
        attention, router, num_layers=2, num_dense_layers=int(router is not None),
        num_shared_experts=1,
    )
    for attention, router in zip(cases.ATTENTIONS, ROUTERS, strict=True)
}  # fmt: skip


@functools.cache
def decoder(config):
    """The case, one document a row, and its decode function, compiled."""
    case = cases.case(config, rows=tuple((n,) for n in LENGTHS), length=LENGTH)
    return case, jax.jit(case.model.decode)


def fed(case, decode, cache, chunks):
    """Logits [B, T, V] of every token, fed in chunks: (starts, width, stops) a row."""
    seen = np.full((len(LENGTHS), LENGTH, case.config.vocab_size), np.nan)
    tokens = np.asarray(case.batch["tokens"])
    for starts, width, stops in chunks:
        positions = np.asarray(starts)[:, None] + np.arange(width)
        positions = np.where(positions < np.asarray(stops)[:, None], positions, -1)
        chunk = np.where(positions < 0, 7, np.take_along_axis(tokens, positions.clip(0), 1))
        arrays = jnp.asarray(chunk, jnp.int32), cache, jnp.asarray(positions, jnp.int32)
        logits, cache = decode(case.params, *arrays)
        for b, t in zip(*np.nonzero(positions >= 0), strict=True):
            seen[b, positions[b, t]] = logits[b, t]
    return seen


@pytest.mark.parametrize("attention", CONFIGS)
def test_decoding_with_a_cache_is_the_whole_forward_pass(attention):
    """Prompts of other lengths, right-padded; then single tokens, each row at its own position,
    rows that are done idle. The cache starts full of garbage, which nothing may read."""
    case, decode = decoder(CONFIGS[attention])
    prefill = [((0, 0, 0), max(PROMPTS), PROMPTS)]
    steps = [(np.add(PROMPTS, i), 1, LENGTHS) for i in range(max(np.subtract(LENGTHS, PROMPTS)))]
    garbage = jax.tree.map(lambda leaf: leaf + 50, case.model.init_cache(3, LENGTH))
    logits = fed(case, decode, garbage, prefill + steps)
    for b, length in enumerate(LENGTHS):
        assert np.isfinite(logits[b, :length]).all()
        np.testing.assert_allclose(
            logits[b, :length], case.expected.logits[b, :length], atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("attention", ["gqa_window", "mla_yarn"])
def test_prefill_in_chunks_is_the_whole_forward_pass(attention):
    """Chunks of 7 that start anywhere, in a cache longer than the row."""
    case, decode = decoder(CONFIGS[attention])
    chunks = [((0, 0, 0), 7, (7, 3, 0)), ((7, 3, 0), 7, LENGTHS), ((14, 10, 7), 7, LENGTHS)]
    logits = fed(case, decode, case.model.init_cache(3, LENGTH + 5), chunks)
    for b, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            logits[b, :length], case.expected.logits[b, :length], atol=2e-5, rtol=0
        )


def test_a_capacity_does_not_hold_while_decoding():
    """Else what a token is answered would depend on how many came at once."""
    config = CONFIGS["mla"]
    tight = dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, dispatch=Capacity(factor=0.1))
    )
    case, _ = decoder(config)
    capped, decode = decoder(tight)
    prefill = [((0, 0, 0), LENGTH, LENGTHS)]
    logits = fed(capped, decode, case.model.init_cache(3, LENGTH), prefill)
    batch = capped.batch
    whole = capped.model.apply(
        capped.params, jnp.asarray(batch["tokens"]), segments=jnp.asarray(batch["segments"]),
        drop=False,
    )  # fmt: skip
    dropped = capped.apply(capped.params, batch)
    assert not any(routing.dropped.any() for routing in whole.routing.values())
    assert all(routing.dropped.any() for routing in dropped.routing.values())
    real = batch["segments"] > 0
    np.testing.assert_allclose(logits[real], capped.logits(whole.hidden)[real], atol=2e-5, rtol=0)


def test_a_cache_holds_what_its_attention_needs():
    """MLA keeps the latent and one rotary key a token, not keys and values a head."""
    shapes = {
        name: jax.tree.map(jnp.shape, decoder(CONFIGS[name])[0].model.init_cache(3, 10))
        for name in ("mla", "gqa")
    }
    latent = {"latent": (1, 3, 10, 16), "rope_key": (1, 3, 10, 4)}
    assert shapes["mla"] == (latent, latent)
    keys = {"k": (1, 3, 10, 2, 8), "v": (1, 3, 10, 2, 8)}
    assert shapes["gqa"] == (keys, keys)


@pytest.mark.parametrize("attention", ["mla", "mla_indexer", "gqa", "gqa_gate"])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_half_precision_decodes_in_batches_of_any_size(attention, rows):
    """At sizes for which XLA on CPU looks for a library's product, and may find none."""
    sizes = {"num_heads": 16, "kv_rank": 128, "nope_dim": 16, "rope_dim": 16, "value_dim": 16}
    wide = sizes if attention.startswith("mla") else {"num_heads": 8, "head_dim": 64}
    if attention == "mla_indexer":
        wide = wide | {"indexer": Indexer(num_heads=16, head_dim=32, top_k=64)}
    config = cases.decoder(attention, "sigmoid", embed_dim=64)
    config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, **wide))
    tokens, found = jnp.arange(40 * rows, dtype=jnp.int32).reshape(rows, 40) % 61, {}
    for dtype in ("bfloat16", "float32"):
        model = build(config, Precision(compute=dtype))
        params, logits = jax.tree.map(jnp.asarray, cases.random_params(model.shapes, 1)), []
        decode, cache = jax.jit(model.decode), model.init_cache(rows, 640)
        for first, end in ((0, 39), (39, 40)):
            places = jnp.broadcast_to(jnp.arange(first, end)[None], (rows, end - first))
            one, cache = decode(params, tokens[:, first:end], cache, places)
            logits.append(one)
        found[dtype] = np.asarray(jnp.concatenate(logits, 1), np.float64)
    half, whole = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in found.values())
    assert np.median((half * whole).sum(-1)) > 0.999
    assert (half[:, -1] * whole[:, -1]).sum(-1).max() > 0.999
