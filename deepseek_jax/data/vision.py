"""Images: bytes of any kind become pixels, and pixels what an encoder was trained on.

Pixels are NumPy uint8 [H, W, 3], frames [T, H, W, 3], a batch for an encoder float32 [B, 3, H, W]
as Hugging Face's processors lay it out. Colour profiles are not applied. An image is refused from
its header where it can be: what claims too many pixels, or a shape that no photograph has, is never
decoded. Resizing is Pillow's (filtered when it shrinks), so that pixels are those of the published
processors, bit for bit.
"""

import dataclasses
import io
import logging
import pathlib
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.data.sources import one_line, reported

Color: TypeAlias = tuple[int, int, int]
Method: TypeAlias = Literal["bilinear", "bicubic", "lanczos"]
Normalization: TypeAlias = Literal["clip", "half", "imagenet", "clip+half"]

# What is read. EPS is not: Pillow would start Ghostscript on it.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
HEADERS = {  # of files that may say that they are 0 wide or high: where the two numbers stand
    b"\x89PNG\r\n\x1a\n": (struct.Struct(">II"), 16),
    b"GIF8": (struct.Struct("<HH"), 6),
    b"BM": (struct.Struct("<ii"), 18),
}
WHITE: Color = (255, 255, 255)
NORMALIZATIONS: dict[str, tuple] = {  # mean and deviation of each channel in 0..1
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # by EXIF orientation
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else it writes of damage to stderr
_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\b"), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused before it is decoded."""

    max_bytes: int = 1 << 28
    """A file's size."""
    max_pixels: int = 1 << 26
    """Width times height; Pillow itself stops at about 178 million."""
    max_aspect: float = 200.0
    """The longer side by the shorter one."""
    max_frame_pixels: int = 1 << 31
    """Width times height times frames, where frames are sampled from an animation."""


LIMITS = Limits()


def decode_image(
    data: bytes, name: str, *, background: Color = WHITE, limits: Limits = LIMITS
) -> np.ndarray:
    """The image as uint8 [H, W, 3], upright; of an animation the first frame.

    Transparent pixels are laid over `background`; 16-bit gray keeps its high byte. InputError names
    `name` and why: not an image, truncated, or outside the limits.
    """
    with _opened(data, name, limits) as image:
        return _pixels(image, name, background)


def decode_frames(
    data: bytes, name: str, count: int, *, background: Color = WHITE, limits: Limits = LIMITS
) -> np.ndarray:
    """`count` frames of an animation, evenly spaced from its first to its last, [T, H, W, 3].

    A still image, or an animation of fewer frames, repeats frames. InputError as `decode_image`,
    and where a frame has another size than the first: pages of a TIFF may claim any.
    """
    if count < 1:
        raise InputError(f"{name}: {count} frames asked for; take at least 1")
    with _opened(data, name, limits) as image:
        total = getattr(image, "n_frames", 1)
        if (all_pixels := image.width * image.height * total) > limits.max_frame_pixels:
            size = f"{total} frames of {image.width} x {image.height}"
            raise _refused(name, f"{size} are {all_pixels:,} pixels", "max_frame_pixels", limits)
        numbers, size, frames = np.linspace(0, total - 1, count).round().astype(int), image.size, {}
        for number in np.unique(numbers).tolist():
            if number:
                image.seek(number)
            if image.size != size:
                raise InputError(f"{name}: frame {number} has another size than the first")
            frames[number] = _pixels(image, name, background)
        return np.stack([frames[number] for number in numbers.tolist()])


def read_image(path: str | pathlib.Path, **options: Any) -> np.ndarray:
    """`decode_image` of a file; InputError where it cannot be read."""
    with reported(str(path)), open(path, "rb") as stream:
        limits: Limits = options.get("limits", LIMITS)
        return decode_image(stream.read(limits.max_bytes + 1), str(path), **options)


def _refused(name: str, what: str, field: str, limits: Limits) -> InputError:
    return InputError(f"{name}: {what}, more than {field} = {getattr(limits, field):,}")


@contextmanager
def _opened(data: bytes, name: str, limits: Limits) -> Iterator[Any]:
    """A Pillow image of which only the header was read; whatever it raises is an InputError."""
    pillow = require("PIL.Image")
    if _PILLOW not in warnings.filters:  # not catch_warnings: decoding runs in many threads
        warnings.filterwarnings("ignore", category=Warning, module=r"PIL\b")
    if not data:
        raise InputError(f"{name}: an empty file")
    if len(data) > limits.max_bytes:
        raise _refused(name, "a file of too many bytes", "max_bytes", limits)
    pillow.init()
    kinds = [kind for kind in FORMATS if kind in pillow.OPEN]
    try:
        with pillow.open(io.BytesIO(data), formats=kinds) as image:
            width, height = image.size
            if width * height > limits.max_pixels:
                size = f"{width} x {height} = {width * height:,} pixels"
                raise _refused(name, size, "max_pixels", limits)
            if max(width, height) > limits.max_aspect * min(width, height):
                raise _refused(name, f"{width} x {height} pixels", "max_aspect", limits)
            yield image
    except (InputError, MemoryError):
        raise
    except pillow.DecompressionBombError as error:
        raise InputError(f"{name}: {one_line(error)}") from None
    except pillow.UnidentifiedImageError:
        raise InputError(f"{name}: {_unknown(data, kinds)}") from None
    except Exception as error:  # broken files make Pillow's readers raise nearly anything
        reason = one_line(error) or type(error).__name__
        raise InputError(f"{name}: a broken or truncated image ({reason})") from None


def _unknown(data: bytes, kinds: list[str]) -> str:
    for magic, (numbers, place) in HEADERS.items():
        if data.startswith(magic) and len(data) >= place + numbers.size:
            width, height = numbers.unpack_from(data, place)
            if not width or not height:
                return f"an image of {width} x {height} pixels"
    return f"not an image that can be read ({', '.join(kinds)})"


def _pixels(image: Any, name: str, background: Color) -> np.ndarray:
    """The current frame, uint8 [H, W, 3]."""
    image.load()
    try:  # after loading: of a TIFF Pillow has turned the pixels itself by now
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # pixels are fine where their metadata is broken
        orientation = 1
    upright = UPRIGHT.get(orientation, lambda pixels: pixels)
    return np.ascontiguousarray(upright(_rgb(image, name, background)))


def _rgb(image: Any, name: str, background: Color) -> np.ndarray:
    mode = image.mode
    if mode.startswith("I"):  # gray of 16 bits, also where Pillow keeps it in 32
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"{name}: gray values outside 16 bits; store it with 8 or 16")
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if mode == "F":
        raise InputError(
            f"{name}: floating-point pixels, whose range is unknown; store 8 or 16 bits"
        )
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return _composited(np.asarray(image.convert("RGBA")), background)
    return np.asarray(image.convert("RGB"))


def _composited(layers: np.ndarray, background: Color) -> np.ndarray:
    """uint8 [H, W, 4] over a color, rounded to the nearest, uint8 [H, W, 3]."""
    out = np.empty((*layers.shape[:2], 3), np.uint8)
    under = np.array(background, np.uint16).reshape(1, 1, 3)
    for top in range(0, len(layers), 256):  # bands: large images would take many times their size
        band = layers[top : top + 256].astype(np.uint16)
        alpha = band[..., 3:]  # the sum stays below 2**16
        out[top : top + 256] = (band[..., :3] * alpha + under * (255 - alpha) + 127) // 255
    return out


def checked(pixels: np.ndarray) -> np.ndarray:
    """The image as it is; InputError where it is not uint8 [H, W, 3]."""
    if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
        raise InputError(f"an image of {pixels.dtype} {pixels.shape}: give uint8 [H, W, 3]")
    return pixels


def resized(pixels: np.ndarray, height: int, width: int, method: Method = "bicubic") -> np.ndarray:
    """The image in another size, uint8 [height, width, 3]; filtered, so that shrinking averages."""
    pillow = require("PIL.Image")
    image = pillow.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), pillow.Resampling[method.upper()]))


def resized_shorter(pixels: np.ndarray, size: int, method: Method = "bicubic") -> np.ndarray:
    """The image with its shorter side `size`, the longer one in proportion, rounded down."""
    height, width = pixels.shape[:2]
    longer = int(size * max(height, width) / min(height, width))
    new = (size, longer) if height <= width else (longer, size)
    return resized(pixels, *new, method)


def center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle [height, width, 3]; InputError when the image is smaller."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    if top < 0 or left < 0:
        raise InputError(f"a crop of {height} x {width} from pixels {pixels.shape}: resize first")
    return pixels[top : top + height, left : left + width]


def pad_to_square(pixels: np.ndarray, color: Color) -> np.ndarray:
    """The image in the middle of a square of `color`, [S, S, 3] with S its longer side."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    return _placed(pixels, (side - height) // 2, (side - width) // 2, (side, side), color)


def letterbox(
    pixels: np.ndarray, height: int, width: int, color: Color, method: Method = "bicubic"
) -> np.ndarray:
    """The whole image, in proportion, as large as fits into [height, width, 3], on `color`.

    Sizes and places round half to even, as in Pillow's ImageOps.pad.
    """
    old_height, old_width = pixels.shape[:2]
    new_height, new_width = height, width
    if old_width * height > width * old_height:
        new_height = max(1, round(old_height / old_width * width))
    elif old_width * height < width * old_height:
        new_width = max(1, round(old_width / old_height * height))
    inner = resized(pixels, new_height, new_width, method)
    top, left = round((height - new_height) * 0.5), round((width - new_width) * 0.5)
    return _placed(inner, top, left, (height, width), color)


def _placed(
    pixels: np.ndarray, top: int, left: int, size: tuple[int, int], color: Color
) -> np.ndarray:
    canvas = np.empty((*size, 3), pixels.dtype)
    canvas[:] = np.array(color, pixels.dtype).reshape(1, 1, 3)
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return canvas


def normalized(pixels: np.ndarray, preset: Normalization) -> np.ndarray:
    """(pixels / 255 - mean) / deviation for uint8 [..., 3], float32.

    Two presets with a plus are a canvas's [..., H + S, H, 3] (`tiles.canvas`): the large square's,
    and the small one's below it.
    """
    names = preset.split("+")
    if not {*names} <= {*NORMALIZATIONS} or len(names) > 2:
        raise InputError(f"no normalization {preset!r}; choose from {', '.join(NORMALIZATIONS)}")
    mean, deviation = np.array([NORMALIZATIONS[name] for name in names], np.float32).swapaxes(0, 1)
    lines = [1] * (pixels.ndim - 1) + [3]
    if len(names) > 1:  # each row of pixels has its own
        height, width = pixels.shape[-3:-1]
        lines[-3], below = height, (np.arange(height) >= width).astype(int)
        mean, deviation = mean[below], deviation[below]
    scaled = pixels.astype(np.float32) * np.float32(1 / 255)
    return (scaled - mean.reshape(lines)) / deviation.reshape(lines)


def mean_color(preset: Normalization) -> Color:
    """The color that a normalization takes to about 0; DeepSeek's models pad with it."""
    own = NORMALIZATIONS[preset.split("+")[0]][0]
    red, green, blue = (int(value * 255) for value in own)
    return red, green, blue


def _stretch(pixels: np.ndarray, config: "ImageTransform") -> np.ndarray:
    return resized(pixels, config.size, config.size, config.method)


def _crop(pixels: np.ndarray, config: "ImageTransform") -> np.ndarray:
    shorter = resized_shorter(pixels, config.size, config.method)
    return center_crop(shorter, config.size, config.size)


def _pad(pixels: np.ndarray, config: "ImageTransform") -> np.ndarray:
    scale = config.size / max(pixels.shape[:2])
    height, width = (max(round(side * scale), min(14, config.size)) for side in pixels.shape[:2])
    inner = resized(pixels, height, width, config.method)
    return pad_to_square(inner, mean_color(config.normalization))


FITS = {"stretch": _stretch, "crop": _crop, "pad": _pad}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """How images of any size become an encoder's square input."""

    size: int = 224
    fit: Literal["stretch", "crop", "pad"] = "stretch"
    """Change the proportions (ViT, SigLIP); shorter side, then the middle (CLIP); longer side, at
    least 14 pixels for the other, then a frame of the mean color (DeepSeek-VL, Janus)."""
    method: Method = "bicubic"
    normalization: Normalization = "half"


def prepared(images: Sequence[np.ndarray], config: ImageTransform) -> np.ndarray:
    """Images uint8 [H, W, 3] of any sizes as an encoder's batch, float32 [B, 3, size, size]."""
    squares = np.stack([FITS[config.fit](pixels, config) for pixels in map(checked, images)])
    return channels_first(normalized(squares, config.normalization))


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """[..., H, W, 3] as [..., 3, H, W], where Hugging Face's models want the channels."""
    return np.ascontiguousarray(np.moveaxis(pixels, -1, -3))
