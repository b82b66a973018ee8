"""Reference: frames against those that were encoded; hostile and damaged files; media sources."""

import dataclasses
import io
import json
import struct
import tarfile
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from deepseek_jax.core.errors import InputError
from deepseek_jax.data import media
from deepseek_jax.data.augment import generator
from deepseek_jax.data.video import (
    ClipTransform,
    VideoLimits,
    clip_of,
    frame_numbers,
    sampled_frames,
)
from deepseek_jax.data.vision import ImageTransform

FILES = {
    "mp4": "mpeg4", "mov": "libx264", "webm": "libvpx-vp9", "matroska": "mpeg4", "avi": "mpeg4",
}  # fmt: skip


def film(container="mp4", codec="mpeg4", frames=30, size=(32, 48), rate=10) -> bytes:
    """Frame i is gray of brightness 8 i, its left half black."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as file:
        track = file.add_stream(codec, rate=rate)
        track.height, track.width = size
        track.pix_fmt, track.bit_rate = "yuv420p", 4_000_000
        for i in range(frames):
            pixels = np.full((*size, 3), 8 * i % 256, np.uint8)
            pixels[:, : size[1] // 2] = 0
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts = i
            file.mux(track.encode(frame))
        file.mux(track.encode(None))
    return stream.getvalue()


MP4, RAW = film(), film("mov", "rawvideo")


def numbers_of(frames: np.ndarray) -> list[int]:
    """Which frames of a film these are, by their brightness on the right."""
    height, width = frames.shape[1:3]
    bright = frames[:, height // 4 : -height // 4, -width // 4 :].mean((1, 2, 3))
    return np.round(bright / 8).astype(int).tolist()


@pytest.mark.parametrize("container", FILES)
def test_frames_are_those_that_were_encoded(container, capfd):
    whole = film(container, FILES[container])
    frames = sampled_frames(whole, "a", 5)
    assert frames.shape == (5, 32, 48, 3) and frames.dtype == np.uint8
    assert numbers_of(frames) == frame_numbers(30, 5).tolist() == [3, 9, 15, 21, 27]
    assert frames[:, 8:24, 2:16].max() < 24  # the left stays black
    assert numbers_of(sampled_frames(whole, "a", 30)) == list(range(30))
    for size in (4, 30, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 30):
        with pytest.raises(InputError, match=r"^b: (truncated|corrupt|not a video)"):
            sampled_frames(whole[:size], "b", 5)
    assert capfd.readouterr() == ("", "")


def test_which_frames_are_taken():
    assert frame_numbers(3, 7).tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert frame_numbers(1, 3).tolist() == [0, 0, 0]
    seen = set()
    for row in range(40):
        numbers = frame_numbers(30, 5, generator(0, row, "clip"))
        again = frame_numbers(30, 5, generator(0, row, "clip"))
        np.testing.assert_array_equal(numbers, again)
        assert set(np.diff(numbers)) == {6}
        seen.add(int(numbers[0]))
    assert seen == set(range(6))
    repeated = numbers_of(sampled_frames(film(frames=2), "a", 4))
    assert repeated == [0, 0, 1, 1]


def patched(mark: bytes, place: int, layout: str, *values, data: bytes = MP4) -> bytes:
    """A file with other numbers, `place` bytes behind the first `mark`."""
    data = bytearray(data)
    struct.pack_into(layout, data, data.index(mark) + place, *values)
    return bytes(data)


# By ISO/IEC 14496-12 a sample entry has its width and height 28 bytes behind its name.
HOSTILE = {
    "empty": (b"", "an empty file"),
    "noise": (np.random.default_rng(0).bytes(5000), "not a video file: give MP4"),
    "playlist": (b"#EXTM3U\n#EXTINF:1\nfile:///etc/passwd\n", "not a video file"),
    "a wave": (b"RIFF\x2c\0\0\0WAVEdata\x20\0\0\0" + bytes(32), "no video in it, for it is wav"),
    "8000 x 8000": (
        patched(b"raw ", 28, ">HH", 8000, 8000, data=RAW),
        "64,000,000 pixels, more",
    ),
    "no width": (patched(b"raw ", 28, ">HH", 0, 0, data=RAW), "frames of 0|corrupt"),
    "a frame in eight minutes": (
        film("mov", frames=2, rate=Fraction(1, 500)),
        "seconds long, more than 600",
    ),
    "lost frames": (patched(b"mdhd", 16, ">I", 1), "truncated: it holds 1 of 30 frames"),
    "a broken frame": (patched(b"mdat", 4, "8s", b"\xff" * 8), "truncated or corrupt"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_cannot_be_read_is_refused_in_a_sentence(what, capfd):
    data, message = HOSTILE[what]
    with pytest.raises(InputError, match=message) as refusal:
        sampled_frames(data, "films/a.mp4", 4)
    assert str(refusal.value).startswith("films/a.mp4: ") and "\n" not in str(refusal.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("matrix, shown", [
    ((0, 1, -1, 0), lambda frames: np.rot90(frames, -1, (1, 2))),  # a phone held upright
    ((0, -1, 1, 0), lambda frames: np.rot90(frames, 1, (1, 2))),
    ((-1, 0, 0, -1), lambda frames: frames[:, ::-1, ::-1]),
    ((-1, 0, 0, 1), lambda frames: frames[:, :, ::-1]),  # a mirror
    ((1, 0, 0, -1), lambda frames: frames[:, ::-1]),
    ((0, 1, 1, 0), lambda frames: frames.swapaxes(1, 2)),
])  # fmt: skip
def test_frames_stand_as_they_are_shown(matrix, shown):
    a, b, c, d = (one << 16 for one in matrix)
    turned = patched(b"tkhd", 44, ">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    np.testing.assert_array_equal(
        sampled_frames(turned, "a", 2), shown(sampled_frames(MP4, "a", 2))
    )
    askew = patched(b"tkhd", 44, ">9i", 52339, 39441, 0, -39441, 52339, 0, 0, 0, 1 << 30)
    with pytest.raises(InputError, match="a: its frames are shown turned by no right angle"):
        sampled_frames(askew, "a", 2)


@pytest.mark.parametrize("limit, message", [
    ({"max_bytes": 100}, "more than max_bytes = 100"),
    ({"max_pixels": 1000}, "32 = 1,536 pixels, more than max_pixels = 1,000"),
    ({"max_seconds": 2.0}, "3.0 seconds long, more than 2"),
    ({"max_frames": 29}, "30 frames of 1,536 pixels, more than the 29 read"),
    ({"max_frame_pixels": 29 * 1536}, "more than the 29"),
])  # fmt: skip
def test_limits_hold_before_a_frame_is_decoded(limit, message, monkeypatch):
    whole = VideoLimits(max_seconds=3.0, max_frames=30, max_frame_pixels=30 * 1536)
    assert len(sampled_frames(MP4, "a", 2, limits=whole)) == 2
    monkeypatch.setattr("deepseek_jax.data.video._frames", None)  # decoding would be an error
    for data in (MP4, film("webm", "libvpx-vp9")):  # whose frames nobody counted
        with pytest.raises(InputError, match="a: ") as refusal:
            sampled_frames(data, "a", 2, limits=dataclasses.replace(whole, **limit))
        if data is MP4:
            assert message in str(refusal.value)


def test_damaged_files_give_frames_or_a_sentence():
    rng, outcomes = np.random.default_rng(0), set()
    for _ in range(100):
        data = np.frombuffer(MP4, np.uint8).copy()
        data[rng.integers(len(data), size=3)] = rng.integers(256, size=3)
        try:
            frames = sampled_frames(data.tobytes(), "a", 4, limits=VideoLimits(max_pixels=1 << 20))
        except InputError as refusal:
            assert "\n" not in str(refusal)
            outcomes.add("refused")
        else:
            assert len(frames) == 4
            outcomes.add("read")
    assert outcomes == {"refused", "read"}


def test_video_stands_beside_images_and_damage_is_named(tmp_path, capsys):
    """A tar shard with pictures, films, a truncated film: those that are not films are skipped."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "PNG")
    members = {"a.mp4": MP4, "b.webm": film("webm", "libvpx-vp9"), "c.png": buffer.getvalue()}
    members |= {"d.mp4": MP4[:-100], "e.mov": film("mov", "libx264")}
    with tarfile.open(tmp_path / "shard.tar", "w") as file:
        for name, data in members.items():
            for ending, content in ((name, data), (name[0] + ".txt", f"film {name}".encode())):
                info = tarfile.TarInfo(ending)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    source = media.Media(media.MediaShards(paths=(str(tmp_path / "*.tar"),)))
    transform = ClipTransform(num_frames=3, image=ImageTransform(size=16, fit="crop"))
    skips = media.Skips(len(source), 0.5)

    def clips(rows, seed):
        numbers = np.arange(len(source))
        return [
            media.usable(
                numbers,
                row,
                lambda n, row=row: clip_of(
                    source.example(n), transform, generator(seed, row, "clip")
                ),
                skips,
            )
            for row in rows
        ]

    first = clips(range(8), 0)
    assert {clip.shape for clip in first} == {(3, 16, 16, 3)}
    assert all(np.array_equal(a, b) for a, b in zip(first[3:], clips(range(3, 8), 0), strict=True))
    assert any((a != b).any() for a, b in zip(first, clips(range(8), 1), strict=True))
    assert skips.reasons.keys() == {2, 3}
    assert "there is no video but image" in skips.reasons[2] and "truncated" in skips.reasons[3]
    said = capsys.readouterr().err
    assert "skipped (1 of 5)" in said and "c" in said and "d" in said


def test_a_folder_names_its_films(tmp_path):
    (tmp_path / "a.mp4").write_bytes(MP4)
    line = {"video": "a.mp4", "text": "it brightens"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line))
    source = media.Media(media.MediaFolder(path=str(tmp_path)))
    clip = clip_of(source.example(0), ClipTransform(num_frames=2, image=ImageTransform(size=8)))
    assert clip.shape == (2, 8, 8, 3) and source.example(0).captions == {"text": ("it brightens",)}
