"""Reference: spectra against torch, scipy and transformers; invariance: what lies past a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import torch
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from deepseek_jax.core.errors import InputError
from deepseek_jax.ops import signal

RNG = np.random.default_rng(0)
WAVE = RNG.normal(size=(2, 97)).astype(np.float32)
# The samples, the window, the hop: the hop divides the window or not, or passes over samples.
SIZES = [(97, 16, 4), (97, 25, 10), (64, 12, 20), (64, 16, 16)]


def theirs(wave, size, hop, centered):
    window = torch.hann_window(size, dtype=wave.dtype)
    spectrum = torch.stft(wave, size, hop, window=window, center=centered, return_complex=True)
    return spectrum.transpose(1, 2)


@pytest.mark.parametrize("size", [2, 15, 400])
def test_window_is_scipys(size):
    np.testing.assert_allclose(signal.hann(size), scipy.signal.get_window("hann", size), atol=1e-15)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(("samples", "size", "hop"), SIZES)
def test_values_and_gradients_are_those_of_torch(samples, size, hop, centered):
    wave = torch.tensor(WAVE[:, :samples], dtype=torch.float64, requires_grad=True)
    expected = theirs(wave, size, hop, centered)
    weights = RNG.normal(size=expected.shape)
    (expected.abs() ** 2 * torch.tensor(weights)).sum().backward()

    window, weights = signal.hann(size), jnp.asarray(weights, jnp.float32)

    @jax.jit
    def ours(wave):
        def loss(wave):
            power = signal.power_spectrum(wave, window, hop, centered=centered)
            return (power * weights).sum(), power

        slope, power = jax.grad(loss, has_aux=True)(wave)
        return signal.stft(wave, window, hop, centered=centered), power, slope

    spectrum, power, slope = ours(jnp.asarray(WAVE[:, :samples]))
    assert spectrum.dtype == jnp.complex64 and power.dtype == jnp.float32
    np.testing.assert_allclose(spectrum, expected.detach(), atol=1e-5)
    np.testing.assert_allclose(power, (expected.abs() ** 2).detach(), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(slope, wave.grad, rtol=1e-4, atol=1e-4)
    lengths = jnp.full(2, samples)
    counts = signal.frame_counts(lengths, size, hop, centered)
    assert counts.tolist() == [spectrum.shape[1]] * 2


def test_values_are_those_of_scipy():
    window = signal.hann(16)
    _, _, expected = scipy.signal.stft(WAVE, 1, window, 16, 12, boundary="even", padded=False)
    ours = signal.stft(jnp.asarray(WAVE), window, 4)
    np.testing.assert_allclose(ours, expected.swapaxes(1, 2) * window.sum(), atol=1e-5)


@pytest.mark.parametrize("centered", [True, False])
def test_what_lies_past_a_row_changes_nothing(centered):
    size, hop, lengths = 16, 5, [97, 40, 15, 1, 0]  # the third is shorter than the window
    rows = [RNG.normal(size=n).astype(np.float32) for n in lengths]
    batch = np.full((5, 97), np.nan, np.float32)
    for row, wave in zip(batch, rows, strict=True):
        row[: len(wave)] = wave
    window = signal.hann(size)

    def ours(wave):
        spectrum = signal.stft(wave, window, hop, jnp.asarray(lengths), centered)
        return (abs(spectrum) ** 2).sum(), spectrum

    (_, spectrum), slope = jax.jit(jax.value_and_grad(ours, has_aux=True))(batch)
    assert np.isfinite(spectrum).all()
    counts = signal.frame_counts(jnp.asarray(lengths), size, hop, centered)
    for wave, count, mine, back in zip(rows, counts, spectrum, slope, strict=True):
        if len(wave):
            padded = np.pad(wave, size // 2, mode="reflect") if centered else wave
            frames = [padded[i : i + size] for i in range(0, len(padded) - size + 1, hop)]
            expected = np.fft.rfft(np.array(frames).reshape(-1, size) * window)
            assert count == len(expected)
            np.testing.assert_allclose(mine[:count], expected, atol=1e-5)
        assert not mine[count:].any() and not back[len(wave) :].any()
    whole = signal.stft(jnp.asarray(batch[:1]), window, hop, centered=centered)
    np.testing.assert_allclose(spectrum[:1], whole, atol=1e-5)


@pytest.mark.parametrize("scale", ["slaney", "htk"])
@pytest.mark.parametrize("area", [True, False])
@pytest.mark.parametrize(
    ("num_mels", "size", "rate", "low", "high"),
    [
        (80, 400, 16_000, 0.0, None),
        (128, 400, 16_000, 0.0, 8000.0),
        (20, 512, 22_050, 60.0, 7600.0),
    ],
)
@pytest.mark.filterwarnings("ignore")  # transformers': with htk some of 128 filters are empty
def test_filters_are_those_of_transformers(num_mels, size, rate, low, high, scale, area):
    expected = mel_filter_bank(
        size // 2 + 1,
        num_mels,
        low,
        high or rate / 2,
        rate,
        norm="slaney" if area else None,
        mel_scale=scale,
    )
    ours = signal.mel_filters(num_mels, size, rate, low, high, scale, area)
    np.testing.assert_allclose(ours, expected, atol=1e-9)


def sounds(samples: int) -> np.ndarray:
    """Noise, a tone, a burst before silence, silence."""
    time = np.arange(samples) / 16_000
    noise = RNG.normal(size=samples)
    burst = np.where(time < 0.1, np.sin(3000 * time), 0)
    return np.stack([0.1 * noise, 0.9 * np.sin(2764 * time), burst, 0 * time]).astype(np.float32)


@pytest.mark.parametrize("num_mels", [80, 128])
def test_log_mel_is_whispers(num_mels):
    extractor = WhisperFeatureExtractor(feature_size=num_mels, chunk_length=1)
    wave, filters = sounds(16_000), signal.mel_filters(num_mels, 400, 16_000)
    expected = extractor(list(wave), sampling_rate=16_000, return_tensors="np").input_features
    ours = jax.jit(lambda wave: signal.log_mel(wave, filters))(wave)
    np.testing.assert_allclose(ours, expected.swapaxes(1, 2), atol=1e-4)


def test_log_mels_gradients_are_those_of_torch():
    waves = sounds(4000) + 0.01 * RNG.normal(size=(4, 4000)).astype(np.float32)
    filters = signal.mel_filters(80, 400, 16_000)
    wave = torch.tensor(waves, dtype=torch.float64, requires_grad=True)
    mel = (theirs(wave, 400, 160, True)[:, :-1].abs() ** 2) @ torch.tensor(filters)
    logarithm = mel.clamp(min=1e-10).log10()
    features = (torch.maximum(logarithm, logarithm.amax((1, 2), keepdim=True) - 8) + 4) / 4
    weights = RNG.normal(size=features.shape)
    (features * torch.tensor(weights)).sum().backward()

    def loss(wave):
        return (signal.log_mel(wave, filters) * jnp.asarray(weights, jnp.float32)).sum()

    slope = jax.jit(jax.grad(loss))(waves)
    error = np.abs(slope - wave.grad.numpy()).max(1)
    assert (error < 1e-3 * wave.grad.abs().amax(1).numpy()).all()


def test_log_mels_of_a_batch_are_those_of_its_rows():
    filters, lengths = signal.mel_filters(80, 400, 16_000), np.array([3000, 1600, 1599, 0])
    wave = sounds(3000) + 0.01 * RNG.normal(size=(4, 3000)).astype(np.float32)
    ours = jax.jit(lambda wave: signal.log_mel(wave, filters, 160, jnp.asarray(lengths)))(wave)
    assert ours.shape == (4, 3000 // 160, 80)
    for row, length, mine in zip(wave, lengths, ours, strict=True):
        if length:
            alone = signal.log_mel(jnp.asarray(row[None, :length]), filters)[0]
            assert len(alone) == length // 160
            np.testing.assert_allclose(mine[: length // 160], alone, atol=1e-4)
        assert not mine[length // 160 :].any()


def test_normalization_is_that_of_wav2vec2():
    lengths = [97, 40, 1]
    rows = [3 + 5 * RNG.normal(size=n).astype(np.float32) for n in lengths]
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    expected = extractor(rows, sampling_rate=16_000, padding=True, return_tensors="np")
    batch = np.full((4, 97), np.nan, np.float32)  # the last row has no samples
    for row, wave in zip(batch, rows, strict=False):
        row[: len(wave)] = wave
    known = signal.valid(jnp.array([*lengths, 0]), 97)
    np.testing.assert_array_equal(known[:3], expected.attention_mask)

    def total(wave):
        ours = signal.normalized(wave, known)
        return (ours * jnp.sin(jnp.arange(97.0))[None, :]).sum(), ours

    slope, ours = jax.jit(jax.grad(total, has_aux=True))(batch)
    np.testing.assert_allclose(ours[:3], expected.input_values, atol=1e-5)
    assert not ours[3].any() and np.isfinite(slope).all()
    np.testing.assert_allclose(signal.normalized(jnp.asarray(batch[:1])), ours[:1], atol=1e-6)
    for wave, back in zip(rows[:2], slope, strict=False):
        x = torch.tensor(wave, dtype=torch.float64, requires_grad=True)
        y = (x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt()
        (y * torch.arange(len(wave)).double().sin()).sum().backward()
        np.testing.assert_allclose(back[: len(wave)], x.grad, rtol=1e-3, atol=1e-5)
        assert not back[len(wave) :].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: signal.stft(jnp.ones((1, 8)), signal.hann(16), 4, centered=False), "8 samples is"),
        (lambda: signal.stft(jnp.ones((1, 0)), signal.hann(16), 4), "no samples"),
        (lambda: signal.stft(jnp.ones((1, 8)), signal.hann(4), 0), "every 0"),
        (lambda: signal.mel_filters(80, 400, 16_000, high=9000.0), "0 <= low < high <= 8000"),
        (lambda: signal.mel_filters(0, 400, 16_000), "at least one mel"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
