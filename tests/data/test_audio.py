"""Reference: decoding against the wave module and known samples; refusals: every hostile file."""

import io
import struct
import sys
import wave

import av
import numpy as np
import pytest
import scipy.io.wavfile
import scipy.signal

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.audio import centered_crop, decoded_wave, random_crop, resampled

RATE = 16_000
TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE // 2) / RATE)


def wav(samples: np.ndarray, bits: int = 16, rate: int = RATE) -> bytes:
    """`samples` [T, channels] of whole numbers, as the wave module writes them."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(bits // 8)
        file.setframerate(rate)
        whole = samples + (128 if bits == 8 else 0)  # 8 bits are unsigned
        little = whole.astype("<i8").reshape(-1, 1).view(np.uint8)[:, : bits // 8]
        file.writeframes(little.tobytes())
    return stream.getvalue()


def encoded(codec: str, container: str, wave=TONE, layout="mono", rate=RATE) -> bytes:
    """`wave` [T] in every channel."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as file:
        track = file.add_stream(codec, rate=rate, layout=layout)
        planes = np.tile(wave.astype(np.float32), (track.channels, 1))
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        form = track.codec_context.codec.audio_formats[0].name
        for part in av.AudioResampler(form, layout, rate).resample(frame):
            file.mux(track.encode(part))
        file.mux(track.encode(None))
    return stream.getvalue()


def one_video() -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as file:
        track = file.add_stream("mpeg4", rate=5)
        track.width = track.height = 16
        file.mux(track.encode(av.VideoFrame(16, 16, "yuv420p")))
        file.mux(track.encode(None))
    return stream.getvalue()


LOSSLESS = {"wav": "pcm_s16le", "aiff": "pcm_s16be", "flac": "flac", "matroska": "pcm_s16le"}
LOSSY = {"mp3": ("libmp3lame", RATE), "mp4": ("aac", RATE), "ogg": ("libopus", 48_000),
         "webm": ("libopus", 48_000)}  # fmt: skip


def file_of(container: str, layout: str = "mono") -> bytes:
    if container in LOSSLESS:
        return encoded(LOSSLESS[container], container, layout=layout)
    codec, rate = LOSSY[container]
    return encoded(codec, container, resampled(TONE, RATE, rate), layout, rate)


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("bits", [8, 16, 24, 32])
def test_every_width_of_wav_is_exact(bits, channels, capfd):
    samples = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (99, channels))
    ours = decoded_wave(wav(samples, bits), "a.wav", RATE)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, (samples / 2 ** (bits - 1)).mean(1).astype(np.float32))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_wav_files_of_floats_keep_what_passes_full_scale(dtype):
    stream = io.BytesIO()
    scipy.io.wavfile.write(stream, RATE, (4 * TONE).astype(dtype))
    ours = decoded_wave(stream.getvalue(), "a.wav", RATE)
    np.testing.assert_array_equal(ours, (4 * TONE).astype(np.float32))


@pytest.mark.parametrize("layout", ["mono", "stereo"])
@pytest.mark.parametrize("container", LOSSLESS)
def test_lossless_files_are_exact(container, layout):
    ours = decoded_wave(file_of(container, layout), "a", RATE)
    np.testing.assert_array_equal(ours, np.rint(TONE.astype(np.float32) * 2**15) / 2**15)


@pytest.mark.parametrize("layout", ["mono", "stereo"])
@pytest.mark.parametrize("container", LOSSY)
def test_lossy_files_sound_alike(container, layout):
    ours = decoded_wave(file_of(container, layout), "a", RATE)
    assert len(TONE) <= len(ours) <= 1.05 * len(TONE)  # AAC pads its last frame
    middle = slice(1000, 7000)
    assert np.corrcoef(ours[middle], TONE[middle])[0, 1] > 0.99  # in time too


HEARD = 2**-20  # of full scale: soxr's "HQ" promises 20 bits


@pytest.mark.parametrize("native", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_tones_in_their_place(native):
    time = np.arange(native) / native
    slow = np.sin(2 * np.pi * 1000 * time)
    file = wav(np.round(2**30 * slow)[:, None], 32, native)
    ours = decoded_wave(file, "a.wav", RATE)
    assert len(ours) == RATE
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    np.testing.assert_allclose(ours[500:-500], expected[500:-500], rtol=0, atol=HEARD)
    outside = scipy.signal.resample(slow, RATE) / 2  # by Fourier: exact for whole periods
    np.testing.assert_allclose(ours[500:-500], outside[500:-500], rtol=0, atol=HEARD)


def test_resampling_removes_what_the_lower_rate_cannot_hold():
    high = np.sin(2 * np.pi * 9000 * np.arange(44_100) / 44_100).astype(np.float32)
    assert np.abs(resampled(high, 44_100, RATE)[500:-500]).max() < HEARD


def test_crops():
    sound = np.arange(1000, dtype=np.float32)
    assert centered_crop(sound, 10).tolist() == list(range(495, 505))
    rows = [random_crop(sound, 10, 3, row) for row in range(200)]
    for row, crop in enumerate(rows):
        assert (np.diff(crop) == 1).all() and len(crop) == 10
        np.testing.assert_array_equal(crop, random_crop(sound, 10, 3, row))
    starts = [crop[0] for crop in rows]
    assert len(set(starts)) > 150 and min(starts) < 50 and max(starts) > 940
    assert any(random_crop(sound, 10, 4, row)[0] != start for row, start in enumerate(starts[:5]))
    for crop in (centered_crop(sound, 1000), centered_crop(sound, 2000)):
        np.testing.assert_array_equal(crop, sound)
    np.testing.assert_array_equal(random_crop(sound, 2000, 3, 0), sound)
    assert {random_crop(sound, 999, 3, row)[0] for row in range(20)} == {0, 1}


@pytest.mark.parametrize("container", [*LOSSLESS, *LOSSY])
def test_truncated_files_are_refused(container):
    whole = file_of(container)
    for size in (4, 30, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 200):
        with pytest.raises(InputError, match=r"^a\.b: (truncated|corrupt|not a sound)"):
            decoded_wave(whole[:size], "a.b", RATE)


def test_mp3_files_without_a_tag_are_refused_when_truncated():
    tagged = file_of("mp3")
    bare = tagged[tagged.index(b"\xff\xf3") :]  # MPEG-2, layer 3
    np.testing.assert_array_equal(decoded_wave(bare, "a", RATE), decoded_wave(tagged, "a", RATE))
    with pytest.raises(InputError, match="bytes should follow byte 0"):
        decoded_wave(bare[:-100], "a.mp3", RATE)


def test_truncated_mp4_with_its_table_in_front():
    whole = file_of("mp4")
    moov = whole.find(b"moov") - 4  # its table of places need not be right to be refused
    front = whole[:28] + whole[moov:] + whole[28:moov]
    with pytest.raises(InputError, match="bytes should follow byte"):
        decoded_wave(front[:-100], "a.mp4", RATE)


def patched(data: bytes, place: int, layout: str, *values) -> bytes:
    size = struct.calcsize(layout)
    return data[:place] + struct.pack(layout, *values) + data[place + size :]


WAV = wav(np.zeros((800, 1)))
FLAC = file_of("flac")
OPUS = file_of("ogg")  # FFmpeg plays what is left when a page is damaged
QUIET = encoded("flac", "flac", np.zeros(60 * RATE))  # a minute in a few kilobytes
NAN = io.BytesIO()
scipy.io.wavfile.write(NAN, RATE, np.array([0, np.nan], np.float32))
LOUD = io.BytesIO()
scipy.io.wavfile.write(LOUD, RATE, np.array([0, 1e30], np.float32))
HOSTILE = {
    "empty": (b"", "an empty file"),
    "noise": (np.random.default_rng(0).bytes(5000), "not a sound file"),
    "text": (b"once upon a time", "not a sound file"),
    "playlist": (b"#EXTM3U\n#EXTINF:1\nfile:///etc/passwd\n", "not a sound file"),
    "concat": (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a sound file"),
    "web page": (b"<html><body>404</body></html>", "not a sound file"),
    "a picture in RIFF": (b"RIFF\x20\0\0\0WEBPVP8 " + bytes(20), "not a sound file"),
    "MP3 by its first bytes": (b"\xff\xfb" + bytes(5000), "truncated or corrupt"),
    "only a tag": (b"ID3\x04\0\0\0\0\0\x0a" + bytes(10), "truncated or corrupt"),
    "no samples": (wav(np.zeros((0, 1))), "no samples"),
    "2^31 bytes": (patched(WAV, 40, "<I", 2**31), "2147483648 bytes should follow byte 44"),
    "unknown length": (patched(WAV, 40, "<I", 2**32 - 1), "truncated"),
    "no format": (WAV[:12] + WAV[36:], "truncated or corrupt"),
    "no rate": (patched(WAV, 24, "<I", 0), "0 samples a second|corrupt"),
    "low rate": (patched(WAV, 24, "<I", 7), "7 samples a second; from 1000"),
    "high rate": (patched(WAV, 24, "<I", 10**9), "1000000000 samples a second"),
    "no channels": (patched(WAV, 22, "<H", 0), "0 channels|corrupt"),
    "200 channels": (patched(WAV, 22, "<H", 200), "channels; from 1 to 8|corrupt"),
    "an unknown code": (patched(WAV, 20, "<H", 0x7777), "code that FFmpeg does not know"),
    "FLAC of 2^35 samples": (patched(FLAC, 21, ">B", FLAC[21] | 8), "seconds long, more than"),
    "FLAC with a flipped bit": (patched(FLAC, len(FLAC) - 99, ">B", FLAC[-99] ^ 4), "corrupt"),
    "Ogg with a flipped bit": (patched(OPUS, 999, ">B", OPUS[999] ^ 4), "corrupt: the Ogg page"),
    "a minute": (QUIET, "60.0 seconds long, more than 10"),
    "an unsaid minute": (patched(QUIET, 21, ">BI", QUIET[21] & 240, 0), "more than 10 seconds"),
    "a film without sound": (one_video(), "no sound in it"),
    "not numbers": (NAN.getvalue(), "infinite or not a number"),
    "far too loud": (LOUD.getvalue(), r"a sample of 1e\+30, where full scale is 1"),
    "one sample": (wav(np.zeros((1, 1)), rate=192_000), "too short"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_cannot_be_read_is_refused_in_a_sentence(what, capfd):
    data, message = HOSTILE[what]
    with pytest.raises(InputError, match=message) as refusal:
        decoded_wave(data, "sounds/a.wav", RATE, max_seconds=10)
    assert str(refusal.value).startswith("sounds/a.wav: ") and "\n" not in str(refusal.value)
    assert capfd.readouterr() == ("", "")


def test_the_limit_itself_is_allowed():
    assert len(decoded_wave(QUIET, "a.flac", RATE, max_seconds=60)) == 60 * RATE


@pytest.mark.parametrize("container", [*LOSSLESS, *LOSSY])
def test_damaged_files_give_a_wave_or_a_sentence(container):
    whole, rng = file_of(container), np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        data = np.frombuffer(whole, np.uint8).copy()
        span = len(data) if rng.random() < 0.5 else 128
        data[rng.integers(span, size=4)] = rng.choice([0, 127, 128, 255, rng.integers(256)], 4)
        try:
            ours = decoded_wave(data.tobytes(), "a", RATE, max_seconds=2)
        except InputError as refusal:
            assert "\n" not in str(refusal)
            outcomes.add("refused")
        else:
            assert np.isfinite(ours).all() and 0 < len(ours) <= 2 * RATE + 1
            outcomes.add("read")
    assert "refused" in outcomes


@pytest.mark.parametrize("package", ["av", "soxr"])
def test_a_missing_package_is_no_fault_of_the_file(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"^this needs .*deepseek_jax\[media\]"):
        decoded_wave(WAV, "a.wav", RATE)
