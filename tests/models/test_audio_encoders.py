"""Reference: encoders of sound against transformers' own, forward, slopes and written back."""

import encoder_cases
import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from deepseek_jax.checkpoint import huggingface
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.audio import Whisper
from deepseek_jax.models.encoder import build_encoder
from deepseek_jax.serving.encoder import load_encoder

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


def wave_model(fields, kind="Wav2Vec2Model"):
    config = transformers.Wav2Vec2Config(**WAVE | fields)
    return encoder_cases.randomized(getattr(transformers, kind)(config))


def masked_hidden(model, x, attention_mask=None):
    mask = None if attention_mask is None else torch.from_numpy(attention_mask)
    return model(x, attention_mask=mask).last_hidden_state, None


def real(length, *counts):
    return (np.arange(length) < np.array(counts)[:, None]).astype(np.int64)


@pytest.mark.parametrize("fields", WAVES)
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
