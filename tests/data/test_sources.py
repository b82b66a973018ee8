"""Sources: the documents of each kind, streaming, and one message for each kind of bad input."""

import itertools
import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.core.errors import InputError
from deepseek_jax.data import sources
from deepseek_jax.data.sources import (
    JSONL,
    Parquet,
    Records,
    StandardLibrary,
    TextFiles,
    documents,
    fingerprint,
)


def _texts(source) -> list[str]:
    return [document.text for document in documents(source)]


def test_text_files_keep_their_bytes_and_are_keyed_below_the_glob(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    for name, content in {
        "a/x.txt": "x\r\ny\n",
        "a/deep/[b].txt": "深度\n",
        "a/none.txt": "",
    }.items():
        (tmp_path / name).write_bytes(content.encode())
    found = list(documents(TextFiles(paths=(f"{tmp_path}/**/*.txt",))))
    assert found == [("a/deep/[b].txt", "深度\n"), ("a/x.txt", "x\r\ny\n")]
    twice = TextFiles(paths=(f"{tmp_path}/a/deep/[b].txt", f"{tmp_path}/a/*/*", f"{tmp_path}/a/x*"))
    assert len(list(documents(twice))) == 2


@given(data=st.text(), limit=st.integers(4, 40))
def test_pieces_join_to_the_file(tmp_path_factory, data, limit):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(data.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MIB", limit)
        for alone in (False, True):
            pieces = list(sources._pieces(path, alone))
            assert "".join(pieces) == data
            assert all(len(piece.encode()) <= limit for piece in pieces)


def test_a_lone_file_is_many_documents_and_one_of_many_files_stays_together(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("a line of words\n" * 100_000)
    lone = list(documents(TextFiles(paths=(f"{tmp_path}/a",))))
    assert 60 < len(lone) < 70
    assert len({document.key for document in lone}) == len(lone)
    both = list(documents(TextFiles(paths=(f"{tmp_path}/*",))))
    assert len(both) == 4
    assert {document.key for document in both} == {"a", "b"}
    assert all(document.text.endswith("\n") for document in both)


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\nline"}, {"text": ""}, {"text": "深🦊\u2028", "more": [1]}]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    found = list(documents(JSONL(paths=(str(path),))))
    assert found == [("a.jsonl:1", "one\nline"), ("a.jsonl:5", "深🦊\u2028")]


def test_parquet(tmp_path):
    column = pyarrow.array(["one", None, "", "深"])
    table = pyarrow.table({"text": column, "body": column.dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("text", "body"):
        source = Parquet(paths=(f"{tmp_path}/a.parquet",), column=name)
        assert list(documents(source)) == [("a.parquet:0", "one"), ("a.parquet:3", "深")]


def test_long_reading_tells_how_far_it_is(tmp_path, monkeypatch, capsys):
    clock = itertools.count(0, 4)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text("12345678\n" * 1000)
    column = {"text": ["some words"] * 4}
    pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "a.parquet")
    _texts(TextFiles(paths=(f"{tmp_path}/*.txt",)))
    assert capsys.readouterr().err == (
        "documents: 0.0 of 0.1 MB (38%), ETA 0:00:20, 0.0 MB/s\n"
        "documents: 0.1 of 0.1 MB (75%), ETA 0:00:08, 0.0 MB/s\n"
    )
    _texts(Parquet(paths=(f"{tmp_path}/a.parquet",)))
    assert capsys.readouterr().err == "documents: 0.0 MB, 0.0 MB/s\n"


def test_standard_library_rules(tmp_path, monkeypatch):
    body = "".join(f"value_{i} = {i}\n" for i in range(20))
    names = {"a.py": body, "copy.py": body[: len(body) // 2], "b.py": "b = 1\n", "empty.py": ""}
    names |= {f"{name}/c.py": f"{name} = 2\n" for name in sorted(sources.SKIPPED)}
    names |= {"sub/d.py": "d = 1\n", "sub/test/e.py": "e = 1\n", "note.txt": "no\n"}
    for name, content in names.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "old.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert [document.key for document in documents(StandardLibrary())] == [
        "a.py",
        "b.py",
        "sub/d.py",
    ]


def test_this_machines_standard_library_is_there():
    files = sources.files(StandardLibrary())
    assert sum(file.path.stat().st_size for file in files) > 5e6
    assert {"ast.py", "json/decoder.py"} <= {file.key for file in files}


def test_fingerprints_follow_contents_and_settings_but_not_the_place(tmp_path):
    prints = set()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text("{}")
        prints.add(fingerprint(JSONL(paths=(f"{tmp_path}/{folder}/*",))))
    assert len(prints) == 1
    prints.add(fingerprint(JSONL(paths=(f"{tmp_path}/one/*",), field="body")))
    prints.add(fingerprint(TextFiles(paths=(f"{tmp_path}/one/*",))))
    (tmp_path / "one" / "a.jsonl").write_text("[]")
    prints.add(fingerprint(JSONL(paths=(f"{tmp_path}/one/*",))))
    assert len(prints) == 4


BAD_LINES = {
    "{": "not JSON",
    "[1]": r"not a JSON object but \[1\]",
    '{"body": 1}': "no field 'text' in",
    '{"text": 5}': "is not a string but 5",
    '{"text": null}': "is not a string but null",
    '{"text": "\\ud800"}': "half a surrogate",
    "[" * 100_000: "not JSON",
    '{"text": ' + "1" * 5000 + "}": "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_json_lines_name_file_and_line(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=rf"a\.jsonl:3: .*{BAD_LINES[line]}") as caught:
        _texts(JSONL(paths=(str(path),)))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", [TextFiles, JSONL])
def test_invalid_utf8_names_file_and_line(tmp_path, kind):
    (tmp_path / "a.txt").write_bytes(b'{"text": "x"}\n' * 16 + b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"a\.txt:17: not UTF-8 \(byte 0xff\)"):
        _texts(kind(paths=(f"{tmp_path}/*.txt",)))


def test_bad_files(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "not.parquet").write_text("text")
    pyarrow.parquet.write_table(pyarrow.table({"n": [0], "l": [["a"]]}), tmp_path / "n.parquet")
    root = str(tmp_path)
    cases = {
        "no such file": TextFiles(paths=(f"{root}/*.md",)),
        "a folder; give its files": TextFiles(paths=(root,)),
        "''.*no such file": TextFiles(paths=()),
        "s3://b/x: not a gs://bucket/name": TextFiles(paths=("s3://b/x",)),
        r"empty\.txt: no text here": TextFiles(paths=(f"{root}/*.txt",)),
        "not a Parquet file": Parquet(paths=(f"{root}/not.parquet",)),
        "no column 'text', only n, l": Parquet(paths=(f"{root}/n.parquet",)),
        "column 'n' holds int64": Parquet(paths=(f"{root}/n.parquet",), column="n"),
        "column 'l' holds list": Parquet(paths=(f"{root}/n.parquet",), column="l"),
        r"manifest\.json.*no such file": Records(path=root),
    }
    for message, source in cases.items():
        with pytest.raises(InputError, match=message):
            _texts(source)


def test_an_unreadable_file_is_reported(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)  # a superuser may read everything
    with pytest.raises(InputError, match=r"a\.txt: Permission denied"), sources.reported():
        fingerprint(TextFiles(paths=(f"{tmp_path}/a.txt",)))
