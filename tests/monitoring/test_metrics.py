"""Round trip: lines come back as written, a resumed log is that of one unbroken run."""

import json
import math
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from deepseek_jax.core.errors import InputError
from deepseek_jax.monitoring.metrics import RunLog, read_lines


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(directory):
    """(step, tag) of every scalar, and the steps that TensorBoard is told to forget from."""
    scalars, purged = [], []
    for path in sorted(directory.iterdir()):
        content, offset = path.read_bytes(), 0
        while offset < len(content):  # length, its checksum, the record, its checksum
            length = int.from_bytes(content[offset : offset + 8], "little")
            event = Event.FromString(content[offset + 12 : offset + 12 + length])
            offset += 16 + length
            scalars += [(event.step, value.tag) for value in event.summary.value]
            if event.HasField("session_log"):
                purged.append(event.step)
    return scalars, purged


def fill(log, first, last):
    for step in range(first, last + 1):
        log.metrics(step, {"loss": jnp.float32(1 / step), "router/entropy": np.float32(step)})
        log.expert_load(step, {"segment_1/block": jnp.full((2, 3), step, jnp.int32)})
        if step % 2 == 0:
            log.evaluation(step, {"loss": step / 3, "bits_per_byte": 2.0})


def test_lines_are_json_with_plain_numbers(tmp_path):
    log = RunLog(tmp_path / "run")
    log.metrics(3, {"loss": jnp.float32(0.1), "skipped": np.int32(2), "step": 7})
    log.evaluation(3, {"loss": 1, "bits_per_byte": 2.5})
    log.expert_load(3, {"segment_1/block": jnp.arange(6).reshape(2, 3)})
    text = (tmp_path / "run/metrics.jsonl").read_text()  # before close: every line is flushed
    assert text == '{"step": 3, "loss": 0.10000000149011612, "skipped": 2.0}\n'
    assert lines(tmp_path / "run/eval.jsonl") == [{"step": 3, "loss": 1.0, "bits_per_byte": 2.5}]
    load = {"segment_1/block": [[0, 1, 2], [3, 4, 5]]}
    assert lines(tmp_path / "run/expert_load.jsonl") == [{"step": 3, "load": load}]
    log.close()


def test_what_is_not_finite_is_null(tmp_path, caplog):
    log = RunLog(tmp_path)
    log.metrics(1, {"loss": jnp.nan, "grad_norm": np.inf, "a": -math.inf, "fine": 1e300})
    log.close()
    expected = {"step": 1, "loss": None, "grad_norm": None, "a": None, "fine": 1e300}
    assert lines(tmp_path / "metrics.jsonl") == [expected]
    assert events(tmp_path / "tensorboard")[0] == [(1, "train/fine")]
    assert not caplog.records


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "lo', b'{"step": 4}', b"\xff\n", b"[3]\n"])
def test_a_resumed_log_is_that_of_one_run(tmp_path, torn):
    log = RunLog(tmp_path / "whole")
    fill(log, 1, 10)
    log.close()
    log = RunLog(tmp_path / "killed")
    fill(log, 1, 8)
    log.close()
    names = ("metrics.jsonl", "eval.jsonl", "expert_load.jsonl")
    for name in names:
        with (tmp_path / "killed" / name).open("ab") as file:
            file.write(torn)
    log = RunLog(tmp_path / "killed")
    log.cut_back(5)
    assert [row["step"] for row in lines(tmp_path / "killed/metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in lines(tmp_path / "killed/eval.jsonl")] == [2, 4]
    fill(log, 6, 10)
    log.close()
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "killed").glob("*.tmp"))
    scalars, purged = events(tmp_path / "killed/tensorboard")
    assert purged == [6] and scalars.count((6, "train/loss")) == 2  # the first of them is forgotten
    assert (3, "router/entropy") in scalars and (4, "eval/bits_per_byte") in scalars


def test_cutting_back_to_nothing_and_without_files(tmp_path):
    log = RunLog(tmp_path / "new")
    log.cut_back(0)
    fill(log, 1, 2)
    log.cut_back(-1)
    fill(log, 1, 1)
    log.close()
    assert [row["step"] for row in lines(tmp_path / "new/metrics.jsonl")] == [1]


def test_reading_leaves_torn_lines_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_bytes(b'{"step": 1}\n{"step": 2, "x": null}\nnonsense\n{"loss": 3}\n{"step": 3')
    assert read_lines(path) == [{"step": 1}, {"step": 2, "x": None}]


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"metrics\.jsonl: not written"):
        RunLog(tmp_path).metrics(1, {"loss": 1.0})


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    log = RunLog(tmp_path / "run")
    fill(log, 1, 2)
    log.cut_back(1)
    log.close()
    assert not (tmp_path / "run").exists()


def test_the_reader_of_these_tests_knows_the_format(tmp_path):
    writer = RecordWriter(str(tmp_path / "events"))
    writer.write(Event(step=4).SerializeToString())
    writer.close()
    assert events(tmp_path) == ([], [])


def test_a_run_loads_neither_pytorch_nor_what_draws_before_it_draws(tmp_path):
    """Both take seconds of every start."""
    code = """
        import importlib.util, sys
        import deepseek_jax.train
        from deepseek_jax.monitoring.metrics import RunLog

        log = RunLog(sys.argv[1])
        log.metrics(1, {"loss": 1.0})
        log.close()
        assert "tensorboardX" in sys.modules and not {"torch", "matplotlib"} & {*sys.modules}
        assert importlib.util.find_spec("torch")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert events(tmp_path / "tensorboard")[0] == [(1, "train/loss")]
