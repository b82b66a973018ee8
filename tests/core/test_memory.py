"""Contract: a command starts itself anew with huge pages, once, and only where they can be had."""

import os
import pathlib
import subprocess
import sys

import pytest

from deepseek_jax.core import memory

PROBE = """
import os, sys
from deepseek_jax.core.memory import restart_with_huge_pages
print(os.getpid(), flush=True)
restart_with_huge_pages("probe")
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""


def run(folder: pathlib.Path, **environment: str) -> list[str]:
    (folder / "probe.py").write_text(PROBE)
    kept = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    root = str(pathlib.Path(memory.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "probe", "one", "two words"],
        cwd=folder, env=kept | {"PYTHONPATH": root} | environment,
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.skipif(
    not memory.PAGES.exists() or "[never]" in memory.PAGES.read_text(),
    reason="this kernel offers no huge pages",
)
def test_a_command_restarts_once_with_its_own_id_and_arguments(tmp_path):
    first, second, last = run(tmp_path)
    assert first == second
    assert last == f"{memory.TUNABLES} ['one', 'two words']"


def test_the_variable_switches_it_off(tmp_path):
    assert run(tmp_path, GLIBC_TUNABLES="")[1:] == [" ['one', 'two words']"]


def test_nothing_happens_in_another_process_or_without_the_pages(monkeypatch, tmp_path):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    restarted = []
    monkeypatch.setattr(os, "execve", lambda *arguments: restarted.append(arguments))
    memory.restart_with_huge_pages("deepseek_jax.train")  # this is pytest
    spec = type("Spec", (), {"name": "deepseek_jax.train"})
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    for text in (None, "always madvise [never]"):
        monkeypatch.setattr(memory, "PAGES", tmp_path / "enabled")
        if text:
            memory.PAGES.write_text(text)
        memory.restart_with_huge_pages("deepseek_jax.train")
    assert restarted == []
    memory.PAGES.write_text("always [madvise] never")
    memory.restart_with_huge_pages("deepseek_jax.train")
    ((_, arguments, environment),) = restarted
    assert arguments[1:] == sys.orig_argv[1:]
    assert environment["GLIBC_TUNABLES"] == memory.TUNABLES
