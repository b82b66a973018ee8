"""Reference: encoders of sound against transformers' own, forward, slopes and written back."""

import encoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from deepseek_jax.checkpoint import huggingface
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.audio import CTC, Wav2Vec2, Whisper
from deepseek_jax.models.encoder import build_encoder
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.parallel.sharding import place_batch, tree_shardings
from deepseek_jax.serving.encoder import load_encoder
from deepseek_jax.serving.inputs import INPUTS

WHISPER = {
    "num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "d_model": 32, "max_source_positions": 10, "decoder_layers": 1, "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16, "vocab_size": 50, "max_target_positions": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def hidden(model, x, **more):
    return model(x, **more).last_hidden_state, None


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_mel_bins": 5, "max_source_positions": 7, "d_model": 24, "encoder_layers": 3}],
    ids=["even", "odd"],
)
def test_whisper(tmp_path, fields):
    config = transformers.WhisperConfig(**WHISPER | fields)
    model = WhisperEncoder(config)
    mel = noise(2, config.num_mel_bins, 2 * config.max_source_positions)
    encoder_cases.agrees(encoder_cases.randomized(model), tmp_path, mel, hidden)


@pytest.mark.parametrize("kind", ["WhisperModel", "WhisperForConditionalGeneration"])
def test_the_encoder_of_a_whole_whisper(tmp_path, kind):
    whole = getattr(transformers, kind)(transformers.WhisperConfig(**WHISPER))
    encoder = encoder_cases.randomized(whole).get_encoder()
    whole.save_pretrained(tmp_path)
    ours, mel = load_encoder(tmp_path), noise(3, 8, 20)
    theirs = encoder(torch.from_numpy(mel)).last_hidden_state.detach().numpy()
    np.testing.assert_allclose(ours.encode(mel), theirs, atol=1e-4 * abs(theirs).max(), rtol=0)
    # Written back it is a WhisperEncoder, which transformers opens by that class.
    huggingface.write_encoder(tmp_path / "again", ours.encoder, ours.params, ours.original)
    again, info = WhisperEncoder.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_whispers_positions_start_as_its_sinusoids():
    theirs = WhisperEncoder(transformers.WhisperConfig(**WHISPER)).embed_positions.weight
    transformer = Transformer(num_layers=1, embed_dim=32, num_heads=4, mlp_dim=8)
    config = Whisper(transformer=transformer, num_mels=8, num_positions=10)
    positions = build_encoder(config).init(jax.random.key(0))["positions"]
    np.testing.assert_allclose(positions, theirs.detach().numpy(), atol=1e-6)


WAVE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "conv_dim": [12, 16, 20], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 12,
    "num_codevectors_per_group": 6, "num_codevector_groups": 2, "codevector_dim": 8,
    "proj_codevector_dim": 10,
}  # fmt: skip
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
WAVES = {
    "base": {},
    "large": LARGE,
    "odd": LARGE | {"num_conv_pos_embeddings": 9, "num_conv_pos_embedding_groups": 2,
                    "hidden_act": "relu", "feat_extract_activation": "gelu_new",
                    "mask_time_prob": 0.0},
}  # fmt: skip


def wave_model(fields):
    config = transformers.Wav2Vec2Config(**WAVE | fields)
    return encoder_cases.randomized(transformers.Wav2Vec2Model(config))


def masked_hidden(model, x, attention_mask=None):
    mask = None if attention_mask is None else torch.from_numpy(attention_mask)
    return model(x, attention_mask=mask).last_hidden_state, None


def real(length, *counts):
    return (np.arange(length) < np.array(counts)[:, None]).astype(np.int64)


@pytest.mark.parametrize("fields", ["base", "odd"])
def test_wav2vec2(tmp_path, fields):
    model = wave_model(WAVES[fields])
    encoder_cases.agrees(model, tmp_path, noise(2, 173), masked_hidden)


@pytest.mark.parametrize("fields", ["base", "large"])
def test_wav2vec2_with_padded_rows(tmp_path, fields):
    model = wave_model(WAVES[fields])
    mask = real(301, 301, 60, 122)
    found = encoder_cases.agrees(model, tmp_path, noise(3, 301), masked_hidden, attention_mask=mask)
    counts = model._get_feat_extract_output_lengths(torch.from_numpy(mask).sum(1))
    mine = found.encoded(noise(3, 301), attention_mask=mask).mask
    np.testing.assert_array_equal(mine.sum(1), counts)


def test_weight_norm_under_its_older_names(tmp_path):
    model = wave_model({})
    model.save_pretrained(tmp_path)
    file, wave = tmp_path / "model.safetensors", noise(1, 90)
    new, before = load_file(file), load_encoder(tmp_path).encode(wave)
    renamed = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in new.items()
    }
    assert "encoder.pos_conv_embed.conv.weight_g" in renamed
    save_file({f"wav2vec2.{name}": x for name, x in renamed.items()}, file, {"format": "pt"})
    np.testing.assert_array_equal(load_encoder(tmp_path).encode(wave), before)


def test_garbage_in_padding_changes_nothing(tmp_path):
    wave_model(LARGE).save_pretrained(tmp_path)
    ours, mask = load_encoder(tmp_path), real(200, 200, 90)
    given = INPUTS[Wav2Vec2](ours.config, noise(2, 200), attention_mask=mask)
    kept = ours.encoded(noise(2, 200), attention_mask=mask).mask

    @jax.jit
    def total(params, wave):
        hidden = ours.encoder.apply(params, wave=wave, counts=counts).hidden
        return jnp.sum(jnp.where(kept[..., None], hidden, 0) ** 2)

    counts, wave = (jnp.asarray(given[name]) for name in ("counts", "wave"))
    other = jnp.where(mask == 1, wave, 1e3 * noise(2, 200, seed=1))
    values = [jax.value_and_grad(total, (0, 1))(ours.params, x) for x in (wave, other)]
    jax.tree.map(np.testing.assert_array_equal, *values)
    assert not np.asarray(values[1][1][1])[mask == 0].any()


@pytest.mark.parametrize("kind", ["whisper", "wave"])
def test_sharded_equals_single_device(tmp_path, kind):
    transformer = Transformer(num_layers=2, embed_dim=16, num_heads=4, mlp_dim=32)
    if kind == "whisper":
        encoder = build_encoder(Whisper(transformer=transformer, num_mels=4, num_positions=8))
        inputs = {"mel": noise(4, 16, 4)}
    else:
        shapes = {"convolutions": ((8, 5, 2), (8, 3, 2)), "position_size": 6, "position_groups": 2}
        encoder = build_encoder(Wav2Vec2(transformer=transformer, head=CTC(), **shapes))
        inputs = {"wave": noise(4, 60), "counts": np.array([60, 50, 30, 20])}
    params = encoder.init(jax.random.key(0))
    inputs = jax.tree.map(jnp.asarray, inputs)
    shape = jax.eval_shape(encoder.apply, params, **inputs).hidden.shape
    slope = noise(*shape)

    def total(params, inputs):
        hidden = encoder.apply(params, **inputs).hidden
        return jnp.vdot(hidden, slope), hidden

    found = []
    for shape, count in ((MeshShape(), 1), (MeshShape(data=2, fsdp=2, tensor=2), 8)):
        mesh = make_mesh(shape, jax.devices()[:count])
        with jax.set_mesh(mesh):
            lies = tree_shardings(mesh, encoder.specs, encoder.shapes)
            step = jax.jit(jax.value_and_grad(total, has_aux=True))
            (_, hidden), grads = step(jax.device_put(params, lies), place_batch(mesh, inputs))
            found.append(jax.device_get((hidden, grads)))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * max(abs(one).max(), 1e-2))


@pytest.mark.parametrize("kind", ["whisper", "base", "large"])
def test_bfloat16(tmp_path, kind):
    if kind == "whisper":
        model = WhisperEncoder(transformers.WhisperConfig(**WHISPER))
        inputs = noise(2, 8, 20)
    else:
        model, inputs = wave_model(WAVES[kind]), noise(2, 173)
    encoder_cases.randomized(model, scale=0.1).save_pretrained(tmp_path)
    ours = load_encoder(tmp_path)
    narrow = build_encoder(ours.config, Precision(compute="bfloat16"))
    given = INPUTS[type(ours.config)](ours.config, inputs)
    hidden = jax.jit(narrow.apply)(ours.params, **given).hidden.astype(jnp.float32)
    wide = np.asarray(ours.encode(inputs)).reshape(2, -1)
    hidden = np.asarray(hidden).reshape(2, -1)
    cosine = (hidden * wide).sum(1) / np.linalg.norm(hidden, axis=1) / np.linalg.norm(wide, axis=1)
    assert cosine.min() >= 0.999


def test_what_does_not_fit_is_refused(tmp_path):
    wave_model({}).save_pretrained(tmp_path)
    encoder, wave = load_encoder(tmp_path), noise(2, 60)
    with pytest.raises(InputError, match=r"waves have shape \(60,\)"):
        encoder.encode(wave[0])
    with pytest.raises(InputError, match="waves are int16"):
        encoder.encode(wave.astype(np.int16))
    with pytest.raises(InputError, match="a row has 20 samples; a frame takes 30"):
        encoder.encode(wave, attention_mask=real(60, 60, 20))
    with pytest.raises(InputError, match="1 on each row's samples, then 0"):
        encoder.encode(wave, attention_mask=real(60, 60, 40)[:, ::-1])
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"add_adapter": false', '"add_adapter": 1'))
    with pytest.raises(InputError, match="add_adapter is 1"):
        load_encoder(tmp_path)


def test_mel_frames_that_do_not_fit_are_refused(tmp_path):
    WhisperEncoder(transformers.WhisperConfig(**WHISPER)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"mel has shape \(1, 8, 19\).*pad or cut"):
        load_encoder(tmp_path).encode(noise(1, 8, 19))
