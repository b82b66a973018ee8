"""Reference: lines of progress, worked out by hand."""

import itertools

from deepseek_jax.core.progress import byte_progress


def test_rate_and_time_left_are_of_what_this_process_does(monkeypatch, capsys):
    clock = itertools.count(100, 2)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    show = byte_progress("x", every=3)
    show(4_000_000, 10_000_000)  # done by a process before
    show(4_500_000, 10_000_000)  # too soon
    show(5_000_000, 10_000_000)
    show(6_000_000, 10_000_000)
    show(10_000_000, 10_000_000)
    assert capsys.readouterr().err == (
        "x: 5.0 of 10.0 MB (50%), ETA 0:00:20, 0.2 MB/s\n"
        "x: 10.0 of 10.0 MB (100%), ETA 0:00:00, 0.8 MB/s\n"
    )
