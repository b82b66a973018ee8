"""Reference: wav2vec 2.0's heads against transformers' own: CTC, and the pretraining losses."""

import encoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from deepseek_jax.checkpoint import encoders, huggingface, tables
from deepseek_jax.core import tree
from deepseek_jax.models.speech import (
    WavePretraining,
    characters,
    hidden_frames,
    pretrained,
    transcribed,
    transcription_losses,
)
from deepseek_jax.ops.ctc import ctc_reduced
from deepseek_jax.ops.wav2vec import is_dead
from deepseek_jax.serving.encoder import load_encoder

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "conv_dim": [12, 16, 20], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 12,
    "num_codevectors_per_group": 6, "num_codevector_groups": 2, "codevector_dim": 8,
    "proj_codevector_dim": 10, "hidden_dropout": 0.0, "activation_dropout": 0.0,
    "attention_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
SAMPLES, COUNTS = 640, np.array([640, 400, 522])


def both(kind, folder, **fields):
    """transformers' model, and ours of its folder."""
    config = transformers.Wav2Vec2Config(**SHAPE | fields)
    model = encoder_cases.randomized(getattr(transformers, kind)(config))
    model.save_pretrained(folder)
    return model, load_encoder(folder)


def waves():
    wave = np.random.default_rng(0).normal(size=(3, SAMPLES)).astype(np.float32)
    return wave, (np.arange(SAMPLES) < COUNTS[:, None]).astype(np.int64)


def same_slopes(model, ours, grads):
    """Every weight's slope, transformers' (kept in the model) and ours, within 1e-3."""
    grads, leaves = encoder_cases.on_disk(grads, ours.encoder.layers), tables.leaves(ours.encoder)
    family, named = encoders.family_of(ours.original), dict(model.named_parameters())
    noise = 1e-6 * max(abs(w.grad).max().item() for w in named.values() if w.grad is not None)
    seen = set()
    for row in tables.table(family, ours.config, leaves):
        name = family.written(ours.config, row.theirs)
        mine = tables.joined(row, leaves, [grads[path] for path in row.ours])
        other = named[name].grad
        other = np.zeros_like(mine) if other is None else other.numpy()
        atol = max(1e-3 * abs(other).max(), noise)
        np.testing.assert_allclose(mine, other, atol=atol, rtol=0, err_msg=name)
        seen.add(name)
    assert seen == {*named}


def written_back(model, ours, folder):
    huggingface.write_encoder(folder, ours.encoder, ours.params, ours.original)
    other, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_ctc_is_that_of_transformers(tmp_path):
    reduction = "mean"
    model, ours = both(
        "Wav2Vec2ForCTC", tmp_path, **LARGE, ctc_loss_reduction=reduction, pad_token_id=3
    )
    wave, mask = waves()
    labels = np.array([[1, 5, 5, 2], [7, 1, -100, -100], [4, 9, 2, -100]])
    out = model(*map(torch.from_numpy, (wave, mask)), labels=torch.from_numpy(labels))
    out.loss.backward()
    given = (jnp.asarray(wave), jnp.asarray(COUNTS))

    @jax.jit
    def total(params):
        losses, possible = transcription_losses(ours.encoder, params, *given, jnp.asarray(labels))
        return ctc_reduced(losses, jnp.asarray(labels), 3, reduction), possible

    (loss, possible), grads = jax.value_and_grad(total, has_aux=True)(ours.params)
    assert possible.all()
    np.testing.assert_allclose(loss, out.loss.item(), rtol=1e-4)
    same_slopes(model, ours, grads)

    @jax.jit
    def said_by(params):
        return characters(ours.encoder, params, *given), transcribed(ours.encoder, params, *given)

    (logits, frames), (ids, lengths) = said_by(ours.params)
    other = out.logits.detach().numpy()
    np.testing.assert_allclose(logits, other, atol=1e-4 * abs(other).max())
    tokens = other.argmax(-1)
    for row, real, mine, length in zip(tokens, frames, ids, lengths, strict=True):
        row = row[:real]
        said = row[np.flatnonzero((row != np.append(-1, row[:-1])) & (row != 3))]
        np.testing.assert_array_equal(mine[:length], said)
    written_back(model, ours, tmp_path / "again")


@pytest.mark.parametrize("training", [False, True])
def test_pretraining_is_that_of_transformers(tmp_path, monkeypatch, training):
    """Evaluation: likeliest codes. Training: our Gumbel noise is fed to both."""
    model, ours = both("Wav2Vec2ForPreTraining", tmp_path, **({} if training else LARGE))
    model.train(training)
    wave, mask = waves()
    config = WavePretraining(mask_share=0.5, mask_span=4, num_distractors=12)
    frames = model._get_feat_extract_output_lengths(torch.from_numpy(COUNTS))
    length = ours.config.num_frames(SAMPLES)
    frames = jnp.asarray(frames.numpy())
    masked, others = hidden_frames(config, jax.random.key(5), frames, length)
    key = jax.random.key(6) if training else None
    if training:
        noise = np.array(jax.random.gumbel(key, (3, length, 2, 6), jnp.float32)).reshape(-1, 6)

        def gumbel_softmax(logits, tau, hard):
            assert hard
            soft = torch.softmax((logits + torch.from_numpy(noise)) / tau, dim=-1)
            largest = torch.nn.functional.one_hot(soft.argmax(-1), 6).float()
            return largest + (soft - soft.detach())

        monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", gumbel_softmax)
    flat = np.asarray(others) + np.arange(3)[:, None, None] * length
    out = model(
        *map(torch.from_numpy, (wave, mask)),
        mask_time_indices=torch.tensor(np.asarray(masked)),
        sampled_negative_indices=torch.from_numpy(flat),
    )
    out.loss.backward()

    @jax.jit
    def total(params):
        found = pretrained(
            ours.encoder,
            params,
            config,
            jnp.asarray(wave),
            jnp.asarray(COUNTS),
            masked,
            others,
            key,
        )
        return found.loss, found

    (loss, found), grads = jax.value_and_grad(total, has_aux=True)(ours.params)
    np.testing.assert_allclose(loss, out.loss.item(), rtol=1e-4)
    np.testing.assert_allclose(found.contrastive, out.contrastive_loss.item(), rtol=1e-4)
    np.testing.assert_allclose(found.diversity, out.diversity_loss.item(), rtol=1e-4)
    np.testing.assert_allclose(found.perplexity.sum(), out.codevector_perplexity.item(), rtol=1e-4)
    for mine, other in (
        (found.predicted, out.projected_states),
        (found.targets, out.projected_quantized_states),
    ):
        other = other.detach().numpy()
        np.testing.assert_allclose(mine, other, atol=1e-4 * abs(other).max(), rtol=0)
    same_slopes(model, ours, grads)
    if not training:
        written_back(model, ours, tmp_path / "again")


def test_a_dead_codebook_is_said_to_be_dead(tmp_path):
    _, ours = both("Wav2Vec2ForPreTraining", tmp_path, num_codevectors_per_group=40)
    wave, _ = waves()
    frames = jnp.full(3, ours.config.num_frames(SAMPLES))
    config = WavePretraining(mask_span=4, num_distractors=5)
    key = jax.random.key(0)
    masked, others = hidden_frames(config, key, frames, int(frames[0]))
    bias = ours.params["choice"]["bias"].at[7].set(50.0)  # one code of the first group wins

    @jax.jit
    def used(params):
        given = (jnp.asarray(wave), None, masked, others, key)
        return pretrained(ours.encoder, params, config, *given).perplexity

    for params, dead in ((ours.params, False), (tree_with(ours.params, bias), True)):
        assert bool(is_dead(used(params), 40)[0]) == dead


def tree_with(params, bias):
    put = {"choice/bias": bias}
    return tree.map_with_path(lambda path, leaf: put.get(path, leaf), params)
