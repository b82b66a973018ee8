"""Contract: what an object in a bucket does of a path, and what not (see tests/bucket.py)."""

import glob
import os
import pathlib

import pytest

from deepseek_jax.core import storage
from deepseek_jax.core.errors import InputError, exit_code
from deepseek_jax.core.storage import Object, located, matched, nearby, on_disk, put

NAMES = [
    "a.txt", "b.txt", "b.md", ".hidden.txt", "x/a.txt", "x/.b/c.txt", "x/y/z/deep.txt", "x-y/a.txt",
    "q[1].txt", "x/1.jsonl", "x/2.jsonl", "x/10.jsonl",
]  # fmt: skip


def test_an_object_is_put_read_and_deleted(gs):
    one = located("gs://bucket/some/one.json")
    assert not one.exists() and not one.parent.is_dir()
    with pytest.raises(FileNotFoundError, match="No such object: 'gs://bucket/some/one.json'"):
        one.read_bytes()
    one.write_text("é")
    assert one.read_text() == "é" and one.exists() and one.parent.is_dir() and not one.is_dir()
    assert gs["bucket/some/one.json"] == "é".encode()
    put(one, b"2")
    assert one.read_bytes() == b"2"
    one.unlink()
    one.unlink()
    assert gs.names("bucket/some") == []


def test_its_names_are_a_paths(gs):
    one = Object("gs://bucket/some/one.json")
    assert (one.name, one.suffix, str(one.parent)) == ("one.json", ".json", "gs://bucket/some")
    assert one.parent / "one.json" == one == one.with_name("one.json") == one.absolute()
    assert located("gs://bucket/some/") == one.parent and located("a/b") == pathlib.Path("a/b")
    with pytest.raises(TypeError):
        os.fspath(one)  # nothing takes it for a file by mistake


def test_a_put_onto_an_older_generation_does_nothing(gs):
    one = Object("gs://bucket/generations")
    content, absent = one.read()
    assert content is None
    first = one.put_if(b"1", absent)
    assert first and one.put_if(b"2", absent) is None and one.read() == (b"1", first)
    second = one.put_if(b"3", first)
    assert second not in (None, first) and second == one.generation()
    assert one.put_if(None, first) is None and one.read_bytes() == b"3"
    one.put_if(None, second)
    assert not one.exists()


def test_names_come_from_all_pages(gs):
    for i in range(40):
        gs[f"bucket/many/{i:02}/x"] = b""
    gs["bucket/many-more/x"] = b""
    folder = Object("gs://bucket/many")
    assert folder.names() == [f"{i:02}/x" for i in range(40)]
    assert [each.name for each in folder.glob("3*")] == [f"3{i}" for i in range(10)]
    folder.delete_all(folder.names())
    assert gs.names("bucket/many") == ["bucket/many-more/x"]


@pytest.mark.parametrize(
    "pattern",
    ["*.txt", "**/*.txt", "x/*", "x/**", "**", "?.txt", "[ab].*", "[!a].txt", "q[[]1].txt",
     "q[[a]?[]1].txt", "[a-b].m?", "x*/a.txt", "a.txt",
     "x/**/*.txt", ".*", "nothing", "**/y/**/*.txt", "x/", "q[1].txt"],
)  # fmt: skip
def test_globs_match_what_they_match_among_files(gs, tmp_path, pattern):
    for name in NAMES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        gs[f"globs/in/{name}"] = b""
    names = glob.glob(f"{tmp_path}/{pattern}", recursive=True)
    if (tmp_path / pattern).is_file():
        names = [tmp_path / pattern]
    expected = sorted({pathlib.Path(n) for n in names if pathlib.Path(n).is_file()})
    found = [
        each.url.removeprefix("gs://globs/in/") for each in matched(f"gs://globs/in/{pattern}")
    ]
    assert sorted(found) == sorted(path.relative_to(tmp_path).as_posix() for path in expected)


def test_a_folder_is_fetched_and_a_file_lent(gs):
    gs["bucket/tree/a/b.txt"] = b"1"
    gs["bucket/tree/c.txt"] = b"2"
    copy = storage.fetched(Object("gs://bucket/tree"))
    assert copy.name == "tree" and (copy / "a/b.txt").read_bytes() == b"1"
    assert storage.fetched(copy) is copy
    with storage.as_file(Object("gs://bucket/tree/c.txt")) as file:
        assert file.suffix == ".txt" and file.read_bytes() == b"2"
    assert not file.exists()


def test_what_stays_on_a_hosts_disk(monkeypatch, tmp_path):
    assert nearby(tmp_path, "heartbeats") == tmp_path / "heartbeats"
    one, other = (nearby(Object(f"gs://bucket/{name}"), "heartbeats") for name in "ab")
    assert one.name == other.name == "heartbeats" and one != other


@pytest.mark.parametrize("url", ["s3://bucket/x", "gs://", "gs:///x", "file:///x", "http://a/b"])
def test_other_storage_is_refused(url):
    with pytest.raises(InputError, match=r"^[a-z0-9]+:.*: not a gs://bucket/name; other object st"):
        located(url)


def test_results_that_need_a_disk_are_refused():
    with pytest.raises(InputError, match=r"^--output gs://b/x: must be a folder on this machine"):
        on_disk("gs://b/x", "--output")


def test_a_server_that_does_not_answer_is_tried_again_later(monkeypatch, capsys):
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(storage.RETRIES, "max_retries", 0)
    with pytest.raises(OSError, match="gs://unreachable/x") as error:
        Object("gs://unreachable/x").read()
    assert exit_code(error.value) == 75
    said = capsys.readouterr().err
    assert said.startswith("error: gs://unreachable/x: ") and said.count("\n") == 1
