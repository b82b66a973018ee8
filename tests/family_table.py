"""docs/families.md, made of marked tests that passed: what they show of each family of models.

A test marked `shows("logits", "gradients")` fills these columns for the family of its case: of the
parameter `name` ("v2-lite-yarn" is of V2-Lite), or as the mark says (`family="V3"`). conftest.py
calls these functions; a whole run that passed holds the page against what it showed, or writes it.
"""

import pathlib
import re

import pytest

TESTS = pathlib.Path(__file__).parent
PAGE = TESTS.parent / "docs" / "families.md"
COLUMNS = ("load", "logits", "gradients", "generate", "train", "export", "FP8", "chat")
LABELS = {"v1": "DeepSeekMoE", "v32": "V3.2"}
SHOWN: set[tuple[str, str, str]] = set()  # family, column, test
INTRODUCTION = """# What the tests show of each family

Tiny random models of transformers, in its own files, against this package in float32. A number is a
test below that passed: **load** opens the folder; **logits** are within 2e-5 at every position;
**gradients** of the loss within 1e-4 for every weight; **generate** gives the same greedy tokens,
from prompts of unequal length; **train** lowers the loss; **export** is a folder that transformers
opens, with the same tensors or logits; **FP8** reads and writes float8 blocks; **chat** encodes
messages as the checkpoint does. An empty cell: no test shows it.

Written by `pytest -m shows --write-families`; a run of all tests fails if it shows anything else.
"""


def family(case: str) -> str:
    """The family of a case of hf_cases: its name up to what varies in it."""
    kind = re.match(r"v2-lite|[a-z]+[\d.]*", case)[0]
    return LABELS.get(kind, kind.title())


def shows(item: pytest.Item) -> list[tuple[str, str, str]]:
    """What a test shows when it passes, for `note`, which may be another process's."""
    test, found = item.nodeid.partition("[")[0], []
    for mark in item.iter_markers("shows"):
        of = mark.kwargs.get("family") or (mark.args and family(item.callspec.params["name"]))
        found += [(of, column, test) for column in mark.args]
    return found


def note(report: pytest.TestReport) -> None:
    """Take down what a report says that its test showed."""
    for name, rows in report.user_properties:
        if name == "shown":
            SHOWN.update(map(tuple, rows))


def takes_all_files(config: pytest.Config) -> bool:
    """Whether this run collects from all files of tests."""
    asked = {pathlib.Path(config.invocation_params.dir, name).resolve() for name in config.args}
    return bool(asked & {TESTS, TESTS.parent})


def is_whole(config: pytest.Config) -> bool:
    """Whether this run holds every marked test."""
    chosen = config.option.keyword or config.option.deselect or config.option.lf
    of_all = config.option.markexpr in ("", "shows")
    return of_all and not chosen and takes_all_files(config)


def difference(config: pytest.Config) -> str:
    """What is wrong with the page after a run that passed; writes it where that is asked for."""
    writes = config.getoption("--write-families")
    if not is_whole(config):
        return f"{PAGE}: not written, as this run leaves tests out" if writes else ""
    if writes:
        PAGE.write_text(page(SHOWN))
    same = PAGE.read_text() == page(SHOWN)
    return "" if same else f"{PAGE}: not what the tests show; pytest -m shows --write-families"


def page(shown: set[tuple[str, str, str]]) -> str:
    """docs/families.md."""
    tests = sorted({test for _, _, test in shown})

    def cell(of: str, column: str) -> str:
        return ", ".join(str(i) for i, t in enumerate(tests, 1) if (of, column, t) in shown)

    rows = [["family", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    rows += [[of, *(cell(of, c) for c in COLUMNS)] for of in sorted({row[0] for row in shown})]
    table = ["| " + " | ".join(row) + " |" for row in rows]
    places = [test.split("::") for test in tests]
    legend = [f"{i}. [{name}](../{path})" for i, (path, name) in enumerate(places, 1)]
    return "\n".join([INTRODUCTION, *table, "", *legend, ""])
