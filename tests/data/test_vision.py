"""Images: every mode and container, what is refused and how, and Hugging Face's own pixels."""

import contextlib
import io
import logging
import struct
import zlib

import numpy as np
import pytest
import transformers
from PIL import Image, ImageOps

from deepseek_jax.core.errors import InputError
from deepseek_jax.data import vision
from deepseek_jax.data.vision import (
    ImageTransform,
    Limits,
    center_crop,
    decode_frames,
    decode_image,
    letterbox,
    mean_color,
    prepared,
    read_image,
    resized,
)


def _photo(height: int = 23, width: int = 37, channels: int = 3) -> np.ndarray:
    """Smooth, so that lossy formats keep it, and different at every corner."""
    y, x = np.mgrid[0:height, 0:width] / [[[max(height, 2) - 1]], [[max(width, 2) - 1]]]
    planes = [y, x, (y + x) / 2, 1 - y * x][:channels]
    return (np.stack(planes, -1) * 255).round().astype(np.uint8)


def _bytes(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000", "GIF", "JPEG"])
def test_containers(kind):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
    data = _bytes(_photo(), kind, **options.get(kind, {}))
    found = decode_image(data, "a")
    assert found.shape == (23, 37, 3) and found.dtype == np.uint8
    slack = {"GIF": 40, "JPEG": 8}.get(kind, 0)
    assert np.abs(found.astype(int) - _photo()).max() <= slack


def test_transparency_lies_over_the_background():
    layers = _photo(600, 5, channels=4)
    color, alpha = layers[..., :3].astype(np.float64), layers[..., 3:] / 255
    for background in [(255, 255, 255), (10, 200, 0)]:
        expected = np.round(color * alpha + np.array(background).reshape(1, 1, 3) * (1 - alpha))
        for kind in ("PNG", "TIFF"):
            found = decode_image(_bytes(layers, kind), "a", background=background)
            np.testing.assert_array_equal(found, expected)
    gray = Image.new("LA", (2, 1))
    gray.putpixel((0, 0), (100, 255))
    found = decode_image(_bytes(gray), "a", background=(9, 8, 7))
    assert found.tolist() == [[[100, 100, 100], [9, 8, 7]]]


def test_palettes_grays_bits_and_inks():
    palette = Image.new("P", (3, 1))
    palette.putpalette([1, 2, 3, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2])
    assert decode_image(_bytes(palette), "a")[0].tolist() == [[1, 2, 3], [40, 50, 60], [70, 80, 90]]
    for transparency in (1, bytes([255, 0, 255])):
        found = decode_image(_bytes(palette, transparency=transparency), "a")
        assert found[0].tolist() == [[1, 2, 3], [255, 255, 255], [70, 80, 90]]
    keyed = decode_image(_bytes(_photo(2, 2), transparency=(0, 0, 0)), "a", background=(7, 7, 7))
    assert keyed[0, 0].tolist() == [7, 7, 7] and keyed[1, 1].tolist() == [255, 255, 255]
    bits = Image.fromarray(np.eye(4, dtype=bool))
    np.testing.assert_array_equal(decode_image(_bytes(bits), "a")[..., 1], np.eye(4) * 255)
    inks = Image.fromarray(_photo(channels=3)).convert("CMYK")
    for kind in ("TIFF", "JPEG"):
        found = decode_image(_bytes(inks, kind), "a").astype(int)
        assert np.abs(found - _photo()).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_the_high_byte(kind):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    found = decode_image(_bytes(values, kind), "a")
    np.testing.assert_array_equal(found, np.repeat((values >> 8)[..., None], 3, -1))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(9))
def test_photographs_stand_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _bytes(_photo(), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data, "a"), expected)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations(kind):
    frames = [Image.new("RGB", (4, 3), (40 * number, 0, 0)) for number in range(5)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = _bytes(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data, "a").tolist() == [[[0, 0, 0]] * 4] * 3
    for count, expected in {
        1: [0],
        2: [0, 4],
        3: [0, 2, 4],
        9: [0, 0, 1, 2, 2, 2, 3, 4, 4],
    }.items():
        found = decode_frames(data, "a", count)
        assert found.shape == (count, 3, 4, 3)
        assert found[:, 0, 0, 0].tolist() == [40 * number for number in expected]
    still = decode_frames(_bytes(_photo()), "a", 2)
    np.testing.assert_array_equal(still, np.stack([_photo(), _photo()]))
    turned = Image.Exif()
    turned[0x0112] = 6
    options |= {"save_all": True, "append_images": frames[1:], "exif": turned}
    found = decode_frames(_bytes(frames[0], kind, **options), "a", 9)
    assert found.shape == ((9, 3, 4, 3) if kind == "GIF" else (9, 4, 3, 3))
    with pytest.raises(InputError, match=r"a.x: 5 frames of 4 x 3 are 60 pixels, more than max_fr"):
        decode_frames(data, "a.x", 2, limits=Limits(max_frame_pixels=59))


def _png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    body = b"IDAT" + zlib.compress(b"\0" * 50)
    return head + struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", len(body) - 4) + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b"not an image at all", "not an image that can be read (PNG, JPEG,"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (_png_header(0, 5), "an image of 0 x 5 pixels"),
        (_png_header(20_000, 20_000), "400000000 pixels"),
        (_png_header(9_000, 9_000), "9000 x 9000 = 81,000,000 pixels, more than max_pixels = 67"),
        (_png_header(10_000, 10_000), "100,000,000 pixels, more than"),  # here Pillow would warn
        (_png_header(2_000_000_000, 2_000_000_000), "pixels"),
        (_png_header(20_000, 1), "20000 x 1 pixels, more than max_aspect = 200"),
        (_png_header(100, 100), "a broken or truncated image (image file is truncated"),
        (b"GIF89a\0\0\0\0", "an image of 0 x 0 pixels"),
        (b"x" * 3000, "a file of too many bytes, more than max_bytes = 2,999"),
    ],
)
def test_refusals_name_the_file_and_the_reason(data, message):
    limits = Limits(max_bytes=2999) if len(data) == 3000 else Limits()
    for decode in (decode_image, lambda *a, **k: decode_frames(*a, 2, **k)):
        with pytest.raises(InputError) as raised:
            decode(data, "some/file.png", limits=limits)
        assert str(raised.value).startswith("some/file.png: ")
        assert message in str(raised.value)


def test_pillow_says_nothing(capfd, monkeypatch):
    """Of damage that it logs: a TIFF that claims 44,292 samples a pixel."""
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's
    data = bytearray(_bytes(_photo(), "TIFF"))
    tag = data.index(struct.pack("<HHI", 277, 3, 1))
    data[tag + 8 : tag + 10] = struct.pack("<H", 44292)
    with pytest.raises(InputError, match="a: not an image"):
        decode_image(bytes(data), "a")
    assert capfd.readouterr() == ("", "")


def test_a_bomb_is_refused_without_its_memory(monkeypatch):
    def loads(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", loads)
    with pytest.raises(InputError, match="max_pixels"):
        decode_image(_png_header(9_000, 9_000), "a")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000", "GIF", "JPEG"])
def test_damage_is_an_input_error_or_an_image(kind):
    rng = np.random.default_rng(0)
    whole = _bytes(rng.integers(0, 256, (40, 40, 3), np.uint8), kind)
    with pytest.raises(InputError, match="a: "):
        decode_image(whole[: len(whole) // 2], "a")
    for _ in range(150):  # bytes changed anywhere, mostly in the header
        broken = bytearray(whole)
        limit = rng.choice([60, len(whole)])
        for place in rng.integers(0, limit, 4):
            broken[place] = rng.integers(256)
        with contextlib.suppress(InputError):
            assert decode_image(bytes(broken), "a").ndim == 3


def test_pages_of_other_sizes_are_refused_before_they_are_decoded(monkeypatch):
    pages = [Image.new("RGB", (4, 3)), Image.new("RGB", (900, 900))]
    data = _bytes(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    sizes, load = [], vision._pixels
    monkeypatch.setattr(
        vision, "_pixels", lambda image, *a: sizes.append(image.size) or load(image, *a)
    )
    with pytest.raises(InputError, match="a: frame 1 has another size than the first"):
        decode_frames(data, "a", 2)
    assert sizes == [(4, 3)]


def test_files_and_tiny_images(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(_bytes(_photo(1, 1)))
    one = read_image(path)
    assert one.tolist() == [[[0, 0, 0]]]
    for fit in vision.FITS:
        batch = prepared([one, _photo()], ImageTransform(size=28, fit=fit))
        assert batch.shape == (2, 3, 28, 28) and batch.dtype == np.float32
        for bad in (one[..., 0], one / 255, np.concatenate([one, one], -1)):
            with pytest.raises(InputError, match=r"an image of .* give uint8 \[H, W, 3\]"):
                prepared([one, bad], ImageTransform(size=28, fit=fit))
    with pytest.raises(InputError, match="none.png: No such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="Is a directory"):
        read_image(tmp_path)
    with pytest.raises(InputError, match="max_bytes"):
        read_image(path, limits=Limits(max_bytes=10))


PROCESSORS = [
    (transformers.CLIPImageProcessorPil, ImageTransform(fit="crop", normalization="clip")),
    (transformers.SiglipImageProcessorPil, ImageTransform()),
    (transformers.ViTImageProcessorPil, ImageTransform(method="bilinear")),
    (transformers.DeepseekVLImageProcessorPil, ImageTransform(fit="pad", normalization="clip")),
    (transformers.JanusImageProcessorPil, ImageTransform(fit="pad", normalization="clip")),
]


@pytest.mark.parametrize(("processor", "config"), PROCESSORS)
@pytest.mark.parametrize("size", [32, 51])
def test_prepared_images_are_those_of_transformers(processor, config, size):
    rng = np.random.default_rng(size)
    shapes = [(48, 64), (91, 30), (20, 20), (7, 200), (33, 34)]
    images = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    side = {"height": size, "width": size}
    sizes = {"size": {"shortest_edge": size} if config.fit == "crop" else side}
    sizes |= {"crop_size": side} if config.fit == "crop" else {}
    theirs = processor(**sizes)([Image.fromarray(image) for image in images])["pixel_values"]
    ours = prepared(images, vision.dataclasses.replace(config, size=size))
    assert ours.shape == (5, 3, size, size) and ours.dtype == np.float32
    # Two roundings of numbers up to 1 on either side, over a deviation of 0.26.
    np.testing.assert_allclose(ours, np.stack(theirs), rtol=0, atol=4 * 2**-24 / 0.26)


@pytest.mark.parametrize("shape", [(30, 50), (50, 31), (40, 40), (3, 97), (97, 4)])
@pytest.mark.parametrize("size", [(40, 40), (25, 60)])
def test_letterbox_is_pillows_pad(shape, size):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    padded = ImageOps.pad(Image.fromarray(image), size[::-1], Image.Resampling.BICUBIC, (127, 1, 2))
    np.testing.assert_array_equal(letterbox(image, *size, (127, 1, 2)), np.asarray(padded))


def test_normalizations_are_those_of_transformers():
    theirs = transformers.image_utils
    expected = {
        "clip": (tuple(theirs.OPENAI_CLIP_MEAN), tuple(theirs.OPENAI_CLIP_STD)),
        "half": (tuple(theirs.IMAGENET_STANDARD_MEAN), tuple(theirs.IMAGENET_STANDARD_STD)),
        "imagenet": (tuple(theirs.IMAGENET_DEFAULT_MEAN), tuple(theirs.IMAGENET_DEFAULT_STD)),
    }
    assert expected == vision.NORMALIZATIONS


def test_small_print():
    assert letterbox(_photo(1, 200), 10, 10, (0, 0, 0)).shape == (10, 10, 3)
    assert mean_color("half") == (127, 127, 127) and mean_color("clip") == (122, 116, 104)
    board = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (32, 32))[..., None].repeat(3, -1)
    for method in ("bilinear", "bicubic", "lanczos"):  # shrinking averages: no moire
        small = resized(board, 16, 16, method)
        assert np.abs(small.astype(int) - 128).max() < 20
    with pytest.raises(InputError, match="resize first"):
        center_crop(_photo(4, 9), 5, 5)
    with pytest.raises(InputError, match="no normalization 'x'; choose from clip, half, imagenet"):
        vision.normalized(_photo(), "x")
