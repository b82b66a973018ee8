"""Media sources: four formats with the same examples, sides by group, damage and hostile files."""

import io
import json
import os
import pathlib
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.corpus import key_hash, side
from deepseek_jax.data.media import (
    Media,
    MediaFolder,
    MediaParquet,
    MediaRecords,
    MediaShards,
    Skips,
    usable,
)
from deepseek_jax.data.shards import Example, write_media
from deepseek_jax.data.vision import decode_image

TEXTS = ("text", "zh")


def _png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (2, 2), (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


ROWS = [(f"d/{number:02}.png", _png(number), f"number {number}", f"数 {number}", f"g{number // 2}")
        for number in range(10)]  # fmt: skip


def _folder(root: pathlib.Path) -> MediaFolder:
    (root / "d").mkdir(parents=True)
    lines = []
    for name, content, text, chinese, group in ROWS:
        (root / name).write_bytes(content)
        lines.append({"image": name, "text": text, "zh": [chinese], "group": group})
    (root / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return MediaFolder(path=str(root), texts=TEXTS)


def _tar(path: pathlib.Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _shards(root: pathlib.Path, form: int = tarfile.PAX_FORMAT) -> MediaShards:
    root.mkdir(parents=True)
    for shard in (0, 1):
        members = {}
        for name, content, text, chinese, group in ROWS[shard * 5 : shard * 5 + 5]:
            stem = name.removesuffix(".png")
            members[f"{stem}.PNG"] = content
            members[f"{stem}.txt"] = f"{text}\n".encode()
            members[f"{stem}.json"] = json.dumps({"zh": chinese, "group": group}).encode()
        _tar(root / f"{shard}.tar", members, form)
    return MediaShards(paths=(f"{root}/*.tar",), texts=TEXTS)


def _parquet(root: pathlib.Path, nested: bool = False) -> MediaParquet:
    root.mkdir(parents=True)
    names, contents, texts, chinese, groups = zip(*ROWS, strict=True)
    if nested:
        pairs = zip(contents, names, strict=True)
        contents = [{"bytes": content, "path": name} for content, name in pairs]
    columns = {"image": contents, "text": texts, "zh": [[each] for each in chinese]}
    table = pa.table({**columns, "group": groups, "other": range(10)})
    pyarrow.parquet.write_table(table.slice(0, 7), root / "a.parquet", row_group_size=3)
    pyarrow.parquet.write_table(table.slice(7), root / "b.parquet")
    return MediaParquet(paths=(f"{root}/*.parquet",), texts=TEXTS)


def _records(root: pathlib.Path) -> MediaRecords:
    folder = Media(_folder(root / "from"))
    assert write_media((folder.example(number) for number in range(10)), root / "to") == 10
    return MediaRecords(path=str(root / "to"), texts=TEXTS)


FORMS = {
    "folder": _folder,
    "pax": _shards,
    "gnu": lambda root: _shards(root, tarfile.GNU_FORMAT),
    "ustar": lambda root: _shards(root, tarfile.USTAR_FORMAT),
    "parquet": _parquet,
    "nested": lambda root: _parquet(root, nested=True),
    "records": _records,
}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_every_format_has_the_same_examples(tmp_path, make):
    media = Media(make(tmp_path / "here"))
    assert len(media) == 10
    for number in (3, 9, 0, 6, 5, 4, 1, 2, 8, 7, 3):  # by number, in any order
        _, content, text, chinese, group = ROWS[number]
        found = media.example(number)
        assert found.media == {"image": content} and found.group == group
        assert found.captions == {"text": (text,), "zh": (chinese,)}
        assert decode_image(found.media["image"], found.name)[0, 0, 0] == number
    train, out = (side(media.hashes, 0.4, training) for training in (True, False))
    assert sorted([*train, *out]) == list(range(10)) and len(out)
    assert media.hashes[out].max() < media.hashes[train].min()  # small ones are held out
    assert not {number // 2 for number in train} & {number // 2 for number in out}
    again = pickle.loads(pickle.dumps(media))
    assert again.fingerprint == media.fingerprint and again.example(4) == media.example(4)
    moved = Media(make(tmp_path / "there"))
    if make is not _records:  # ArrayRecord's files hold when they were written
        assert moved.fingerprint == media.fingerprint
    with pytest.raises(IndexError):
        media.example(10)


def test_fingerprints_know_the_contents(tmp_path):
    source = _folder(tmp_path)
    before = Media(source).fingerprint
    (tmp_path / "d/03.png").write_bytes(_png(99))
    assert Media(source).fingerprint != before
    other = MediaFolder(path=source.path, texts=("text",))
    assert Media(other).fingerprint != Media(source).fingerprint


def test_what_is_missing_is_left_out_and_captions_share_their_image(tmp_path):
    lines = [{"text": "alone"}, {"image": "a.png"}, {"image": "a.png", "text": None},
             {"image": "a.png", "audio": "b.wav", "text": ["x", " ", "y"]},
             {"image": "a.png", "text": []}, {"image": "a.png", "text": ""}]  # fmt: skip
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "a.png").write_bytes(_png(1))
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    media = Media(MediaFolder(path=str(tmp_path)))
    assert media.example(0) == Example("line 1", "line 1", {}, {"text": ("alone",)})
    assert media.example(1) == Example("a.png", "a.png", {"image": _png(1)}, {})
    assert media.example(3).media.keys() == {"image", "audio"}
    assert media.example(3).captions == {"text": ("x", "y")}
    assert media.example(4).captions == {"text": ()} and media.example(5).captions == {}
    assert len(set(media.hashes[1:])) == 1


def test_damage_is_skipped_counted_and_named_until_it_is_too_much(tmp_path, capsys):
    media = Media(_folder(tmp_path))
    everything = np.arange(10)

    def use(number: int) -> int:
        example = media.example(number)
        return int(decode_image(example.media["image"], example.name)[0, 0, 0])

    (tmp_path / "d/03.png").write_bytes(_png(3)[:-22])
    (tmp_path / "d/04.png").unlink()
    for order in (range(10), reversed(range(10))):
        skips = Skips(len(media), 0.2)
        found = {row: usable(everything, row, use, skips) for row in order}
        assert found == {row: 5 if row in (3, 4) else row for row in range(10)}
        assert usable(everything, 23, use, skips) == 5
        assert sorted(skips.reasons) == [3, 4]
        assert "d/03.png: a broken or truncated image" in skips.reasons[3]
        assert "d/04.png: No such file" in skips.reasons[4]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and said[0].startswith("skipped (1 of 10): d/03.png: a broken")
    with pytest.raises(InputError, match=r"2 of 10 examples cannot be used, more than 19.00% .*04"):
        usable(everything, 3, use, Skips(len(media), 0.19))
    with pytest.raises(InputError, match=r"1 of 10 .*more than 1.00%"):
        usable(everything, 3, use, Skips(len(media)))
    with pytest.raises(InputError, match="none of 2 examples can be used"):
        usable(np.array([3, 4]), 0, use, Skips(len(media), 1))
    capsys.readouterr()
    Skips(9, 1).add(0, "new\nline\x1b[2J: \u56fe")  # as a file may be called
    assert capsys.readouterr().err == "skipped (1 of 9): new\\nline\\x1b[2J: \u56fe\n"


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a.png", "d/../../a.png", "", "a\\b.png", "a\0"]
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"image": name}))
    with pytest.raises(InputError, match=r"manifest.jsonl:1: refused: .* below its folder"):
        Media(MediaFolder(path=str(tmp_path)))
    if name.strip("\0"):
        _tar(tmp_path / "a.tar", {"x.png": b"x", name.rstrip("\0") + "/.": b"x"})
    if name.startswith(("/", "..", "d/")):
        with pytest.raises(InputError, match=r"a.tar: refused: "):
            Media(MediaShards(paths=(f"{tmp_path}/a.tar",)))


def test_links_and_pipes_are_refused(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("x")
    (root / "a.png").symlink_to(tmp_path / "secret")
    os.mkfifo(root / "b.png")
    (root / "c.png").write_bytes(_png(1))
    (root / "d.png").symlink_to("c.png")
    (root / "e.png").symlink_to("e.png")
    lines = [{"image": f"{name}.png"} for name in "abcde"]
    (root / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    media = Media(MediaFolder(path=str(root)))
    for number, message in {0: "a link that leaves the folder", 1: "no plain file"}.items():
        with pytest.raises(InputError, match=f"{'ab'[number]}.png: refused: {message}"):
            media.example(number)
    assert media.example(3).media == media.example(2).media
    with pytest.raises(InputError, match=r"e.png: Too many levels of symbolic links"):
        media.example(4)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            member = tarfile.TarInfo("x.png")
            member.type, member.linkname = kind, "secret"
            tar.addfile(member)
        with pytest.raises(InputError, match=r"a.tar: refused: x.png is no plain file"):
            Media(MediaShards(paths=(f"{tmp_path}/a.tar",)))


def test_damaged_shards_are_refused_by_name(tmp_path):
    path = tmp_path / "a.tar"
    members = {f"{number}.png": bytes([number]) * 700 for number in range(20)}
    _tar(path, members)
    whole, source = path.read_bytes(), MediaShards(paths=(str(path),))
    for end in (0, 100, 512, 1000, 5000, 5120, 20 * 1536 - 600, 20 * 1536):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match="a.tar: "):
            Media(source)
    rng = np.random.default_rng(0)
    for _ in range(400):  # broken headers, sizes among them
        broken = bytearray(whole)
        header = 1536 * int(rng.integers(20))
        for place in rng.choice([*range(100), *range(124, 136), 156], 3):
            broken[header + place] = rng.choice([0x80, 0xFF, 0x37, 0x30, *range(256)])
        if rng.random() < 0.8:  # with a right sum
            broken[header + 148 : header + 156] = b" " * 8
            total = sum(broken[header : header + 512])
            broken[header + 148 : header + 156] = b"%06o\0 " % total
        path.write_bytes(broken)
        try:
            found = Media(source)
        except InputError as error:
            assert str(path) in str(error)
        else:
            for number in range(len(found)):
                for content in found.example(number).media.values():
                    assert len(content) <= len(whole)
    path.write_bytes(b"")
    for name in ("a.tar.gz", "a.tgz"):
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.png"))
        with pytest.raises(InputError, match="compressed shard"):
            Media(MediaShards(paths=(f"{tmp_path}/{name}",)))


def _header(kind: bytes, size: bytes) -> bytes:
    """A tar header that claims anything."""
    head = bytearray(b"a.png".ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2)
    head += size + b"00000000000\0" + b" " * 8 + kind
    head = head.ljust(257, b"\0") + b"ustar\00000"
    head = head.ljust(512, b"\0")
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def test_shards_that_would_never_end_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    sizes = [b"\xff" * 10 + b"\xfc\x00", b"\xff" * 10 + b"\xfe\x00", b"\x80\xff" + b"\0" * 10]
    nothing = b"00000000000\0"
    cases = [_header(b"0", nothing) + _header(kind, size) for kind in (b"0", b"x", b"L")
             for size in sizes]  # fmt: skip
    for content in [*cases, _header(b"x", nothing) * 5000]:
        path.write_bytes(content + bytes(1024))
        with pytest.raises(InputError, match="a.tar: "):
            Media(MediaShards(paths=(str(path),)))


def test_shards_made_of_a_folder(tmp_path):
    """`tar cf a.tar .` has the folder itself as a member."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"1")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "in", ".")
    media = Media(MediaShards(paths=(f"{tmp_path}/a.tar",)))
    assert len(media) == 1 and media.example(0).media == {"image": b"1"}


def test_shards_hold_groups_in_texts_and_files_that_are_no_examples(tmp_path):
    path, odd = tmp_path / "a.tar", ("README", ".DS_Store", "d/._a.png", "d/._b.png", "__")
    members = {f"d/{name}.{end}": b"x" for name in "abc" for end in ("png", "base.txt")}
    _tar(path, dict.fromkeys(odd, b"?") | members | {"d/c.base.txt": b"y", "d/a.txt": b" \n"})
    media = Media(MediaShards(paths=(str(path),), group="base"))
    assert [media.example(number).group for number in range(len(media))] == ["x", "x", "y"]
    assert media.hashes[0] == media.hashes[1] != media.hashes[2]
    assert media.example(0).captions == {}
    by_text = Media(MediaShards(paths=(str(path),), group="text"))
    assert by_text.hashes.tolist() == [
        key_hash(by_text.example(number).group) for number in range(3)
    ]


def test_examples_that_cannot_be_told_apart_or_read(tmp_path):
    path = tmp_path / "a.tar"
    source = MediaShards(paths=(str(path),))
    _tar(path, {"a.png": b"1", "a.jpg": b"2"})
    with pytest.raises(InputError, match=r"a.jpg: a second image of this example"):
        Media(source)
    _tar(path, {"a.txt": b"1", "a.TXT": b"2"})
    with pytest.raises(InputError, match=r"a.TXT: a second txt of this example"):
        Media(source)
    _tar(path, {"a.png": b"1", "a.json": b"{", "b.png": b"2", "b.txt": b"\xff", "c.v1.png": b"3"})
    media = Media(source)
    with pytest.raises(InputError, match=r"a.tar: a.json: not JSON"):
        media.example(0)
    with pytest.raises(InputError, match=r"a.tar: b.txt: not UTF-8"):
        media.example(1)
    assert media.example(2).media == {"image": b"3"}
    path.write_bytes(path.read_bytes()[:512])
    with pytest.raises(InputError, match="shorter than when it was opened"):
        media.example(2)


def _parquet_of(path: pathlib.Path, **columns) -> Media:
    pyarrow.parquet.write_table(pa.table(columns), path)
    return Media(MediaParquet(paths=(str(path),)))


def test_other_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(InputError, match=r"no column of image, audio, video, text; it has \['x'\]"):
        _parquet_of(path, x=[1])
    media = _parquet_of(path, image=[None, b"1"], text=["a", None])
    assert media.example(0) == Example("a.parquet:0", "a.parquet:0", {}, {"text": ("a",)})
    assert media.example(1) == Example("a.parquet:1", "a.parquet:1", {"image": b"1"}, {})
    media = _parquet_of(path, image=["a.png"], group=[7])
    with pytest.raises(
        InputError, match=r"a.parquet: row 0: column 'image' holds no bytes but str"
    ):
        media.example(0)
    media = _parquet_of(path, text=[b"a"])
    with pytest.raises(InputError, match=r"row 0: field 'text' is not a string but .b'a'"):
        media.example(0)
    media = _parquet_of(path, text=[{"content": b"a"}])
    with pytest.raises(InputError, match=r"row 0: field 'text': cannot stand in JSON .*bytes"):
        media.example(0)
    whole = path.read_bytes()
    for broken in (whole[:50], whole[50:], b"PAR1PAR1", whole[:4] + b"\xff" * 60 + whole[64:]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="a.parquet: "):
            Media(MediaParquet(paths=(str(path),))).example(0)


def test_damaged_records(tmp_path):
    source = _records(tmp_path)
    folder = pathlib.Path(source.path)
    with pytest.raises(InputError, match=r"none.*No such file"):
        Media(MediaRecords(path=str(tmp_path / "none")))
    whole = (folder / "media.array_record").read_bytes()
    np.save(folder / "hashes.npy", np.zeros(3, np.uint64))
    with pytest.raises(InputError, match="10 records, hashes of"):
        Media(source)
    np.save(folder / "hashes.npy", np.zeros(10, np.uint64))
    place = whole.index(b"number 4")
    (folder / "media.array_record").write_bytes(whole[:place] + b"\xff" * 9 + whole[place + 9 :])
    media = Media(source)
    with pytest.raises(InputError, match="media.array_record: record 4: damaged"):
        media.example(4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": 3}', "manifest.jsonl:1: 'image' is not a file's name but 3"),
        ("{", "manifest.jsonl:1: not JSON"),
        ('{"image": "\\ud800"}', "manifest.jsonl:1: refused: .* is not UTF-8"),
        ('{"group": "\\ud800"}', "manifest.jsonl:1: field 'group' has half a surrogate"),
        ("", "no examples here"),
        ('{"text": 5}', "manifest.jsonl:1: field 'text' is not a string but 5"),
    ],
)
def test_bad_manifests(tmp_path, line, message):
    (tmp_path / "manifest.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        Media(MediaFolder(path=str(tmp_path))).example(0)
    with pytest.raises(InputError, match="No such file"):
        Media(MediaFolder(path=str(tmp_path / "none")))
    with pytest.raises(InputError, match="copy or mount"):
        Media(MediaFolder(path="gs://bucket/folder"))
