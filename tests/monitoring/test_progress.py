"""What a person sees while a run goes on."""

import io
import re

import pytest

from deepseek_jax.monitoring import progress
from deepseek_jax.monitoring.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_a_log_interval_where_there_is_no_terminal(clock):
    stream = io.StringIO()
    shown = Progress(25, log_every=10, stream=stream)
    for step in range(1, 26):
        clock[0] += 2
        shown.step(step, {"loss": 5.0, "tokens_per_second": 8130.4, "mfu": 0.312})
        if step == 20:
            shown.evaluation({"bits_per_byte": 2.1})
    shown.close()
    assert stream.getvalue().splitlines() == [
        "step 10/25  loss 5.0000  8,130 tok/s  MFU 31.2%  ETA 0:00:30",
        "step 20/25  loss 5.0000  8,130 tok/s  MFU 31.2%  ETA 0:00:10",
        "step 25/25  loss 5.0000  8,130 tok/s  MFU 31.2%  ETA 0:00:00  2.100 bits/byte",
    ]


def test_one_live_line_on_a_terminal(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "68")
    stream = Terminal()
    shown = Progress(100_000, log_every=10, stream=stream)
    for step in (1, 2, 3):
        clock[0] += 1
        shown.step(step, {"loss": 5.0, "mfu": 0.3, "tokens_per_second": 10.0})
    assert "\n" not in stream.getvalue()
    drawn = re.findall(r"\r([^\r\x1b]*)\x1b\[K", stream.getvalue())
    assert len(drawn) == 3 and all(len(line) < 68 for line in drawn)
    assert "ETA 1 day, 3:46:" in stream.getvalue()  # 99,998 seconds, and a cut line's end
    shown.say("evaluated")
    shown.step(4, {})
    shown.close()
    shown.close()
    assert "\r\x1b[Kevaluated\n\rstep 4/" in stream.getvalue()
    assert stream.getvalue().count("\n") == 2 and stream.getvalue().endswith("\n")
    assert "loss 5.0000" in stream.getvalue().rsplit("\r", 1)[1]  # the last known


def test_nothing_known_yet(clock):
    stream = io.StringIO()
    Progress(10, stream=stream).step(1, {"loss": None, "grad_norm": 3.0})
    assert stream.getvalue() == "step 1/10\n"
