"""Which kind of sound or video file some bytes are, and whether all of it is there.

FFmpeg would guess the kind, and its guesses include playlists that open other files; it also plays
what there is of a truncated file. So the kind is told here from the first bytes, and the lengths
that a file declares are held against its size before anything is decoded.
"""

import struct
import zlib
from collections.abc import Callable

from deepseek_jax.core.errors import InputError

SEGMENT = b"\x18\x53\x80\x67"  # Matroska's element that holds all but the header
END_OF_STREAM = 4  # among an Ogg page's flags
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def container_of(data: bytes, what: str = "sound") -> str:
    """FFmpeg's name for the kind of file: wav, aiff, flac, ogg, mp3, mov (MP4 too), matroska, avi.

    `what` is wanted, sound or video. InputError, which names no file: empty, none of these kinds,
    or truncated. MP3 files without a length in their first frame, FLAC and AIFF are not held
    against their sizes: they show when decoded, MP3 excepted, of which any stretch is as good a
    file.
    """
    if not data:
        raise InputError("an empty file")
    for place, marks, kind, check in KINDS:
        if data.startswith(marks, place) and (kind not in INNER or data[8:12] in INNER[kind]):
            check(data)
            return kind
    if _is_mp3(data):
        _check_mp3(data)
        return "mp3"
    raise InputError(f"not a {what} file: give {GIVE[what]}")


def _check_wav(data: bytes) -> None:
    place = 12
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, place)
        place += 8
        _hold(data, place, size)
        if kind == b"data":
            if size == 0:
                raise InputError("no samples")
            return
        place += size + size % 2
    raise InputError("truncated: it ends before its samples")


def _check_avi(data: bytes) -> None:
    _hold(data, 0, 12)
    _hold(data, 8, struct.unpack_from("<I", data, 4)[0])


def _check_ogg(data: bytes) -> None:
    place, flags = 0, 0
    while (start := place) < len(data):
        if not data.startswith(b"OggS", place):
            raise InputError(f"corrupt: no Ogg page begins at byte {place}")
        _hold(data, place, 27)
        flags, segments = data[place + 5], data[place + 26]
        place += 27
        _hold(data, place, segments)
        size = sum(data[place : place + segments])
        place += segments
        _hold(data, place, size)
        place += size
        page = data[start : start + 22] + bytes(4) + data[start + 26 : place]
        if _ogg_checksum(page) != data[start + 22 : start + 26]:  # FFmpeg would leave it out
            raise InputError(f"corrupt: the Ogg page at byte {start} is not as it was written")
    if not flags & END_OF_STREAM:
        raise InputError("truncated: its last Ogg page is not marked as the end")


def _ogg_checksum(page: bytes) -> bytes:
    """A page's checksum: zlib's polynomial from the other end, of 0, without its complements."""
    found = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return found.to_bytes(4, "big").translate(REVERSED)


def _check_mp4(data: bytes) -> None:
    place = 0
    while place + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, place)
        if size == 1 and place + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, place + 8)
        if size == 0:  # to the end of the file
            return
        if size < 8:
            raise InputError(f"corrupt: a box of {size} bytes at byte {place}")
        _hold(data, place, size)
        place += size
    if place != len(data):
        raise InputError("truncated: it ends within a box")


def _check_matroska(data: bytes) -> None:
    size, place = _matroska_size(data, 4)
    if size is None or not data.startswith(SEGMENT, place + size):
        raise InputError("truncated or corrupt: no Matroska segment follows the header")
    size, place = _matroska_size(data, place + size + 4)
    if size is not None:
        _hold(data, place, size)


def _matroska_size(data: bytes, place: int) -> tuple[int | None, int]:
    """A size of 1 to 8 bytes, as many as its leading zeros say, and the place after it.

    None where all its bits are ones: unknown, as in a recording that was streamed.
    """
    _hold(data, place, 1)
    width = 9 - data[place].bit_length()
    if width > 8:
        raise InputError(f"corrupt: no Matroska size at byte {place}")
    _hold(data, place, width)
    ones = (1 << 7 * width) - 1
    size = int.from_bytes(data[place : place + width], "big") & ones
    return None if size == ones else size, place + width


def _check_mp3(data: bytes) -> None:
    start = _mp3_start(data)
    tag = max(data.find(mark, start, start + 64) for mark in (b"Xing", b"Info"))
    if tag < 0 or tag + 16 > len(data):
        return
    _, flags, first, second = struct.unpack_from(">4s3I", data, tag)
    if flags & 2:  # the size in bytes, after the number of frames if that is there
        _hold(data, start, second if flags & 1 else first)


def _mp3_start(data: bytes) -> int:
    """Where the first frame of an MP3 file stands: after its tags."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    return 10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(data[6:10]))


def _is_mp3(data: bytes) -> bool:
    """Whether an MPEG audio frame begins here: 11 ones, and a layer (AAC has none)."""
    return data[0] == 0xFF and len(data) > 1 and data[1] & 0xE0 == 0xE0 and data[1] & 0x06 != 0


def _hold(data: bytes, place: int, size: int) -> None:
    if size > len(data) - place:
        raise InputError(
            f"truncated: {size} bytes should follow byte {place}, but {len(data) - place} do"
        )


def _whole(data: bytes) -> None:
    """Kinds that only decoding shows to be whole."""


KINDS: list[tuple[int, bytes | tuple[bytes, ...], str, Callable[[bytes], None]]] = [
    (0, b"RIFF", "wav", _check_wav),
    (0, b"RIFF", "avi", _check_avi),
    (0, b"OggS", "ogg", _check_ogg),
    (0, b"fLaC", "flac", _whole),
    (0, b"FORM", "aiff", _whole),
    (4, b"ftyp", "mov", _check_mp4),
    (0, b"\x1a\x45\xdf\xa3", "matroska", _check_matroska),
    (0, b"ID3", "mp3", _check_mp3),
]
INNER = {  # other RIFF and FORM files hold neither
    "wav": (b"WAVE",), "avi": (b"AVI ",), "aiff": (b"AIFF", b"AIFC"),
}  # fmt: skip
GIVE = {
    "sound": "WAV, AIFF, FLAC, Ogg, MP3, MP4 or Matroska",
    "video": "MP4, MOV, WebM, Matroska or AVI",
}
