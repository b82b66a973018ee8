"""Contract: docs/families.md says what the tests show, neither more nor less. It runs last."""

import re

import family_table
import pytest


def test_cases_belong_to_families():
    found = map(family_table.family, ("v2-lite-yarn", "v2-yarn", "llama-3", "v1", "v3.2-top", "v3"))
    assert [*found] == ["V2-Lite", "V2", "Llama", "DeepSeekMoE", "V3.2", "V3"]


@pytest.mark.shows()
def test_the_page_says_what_this_run_showed(request):
    """All of it after a run that held every marked test; only that its tests exist after others."""
    whole = family_table.is_whole(request.config)
    if request.config.getoption("--write-families"):
        assert whole, "write it with `pytest -m shows --write-families`, from all tests"
        family_table.PAGE.write_text(family_table.page(family_table.SHOWN))
    text = family_table.PAGE.read_text()
    if whole:
        assert text == family_table.page(family_table.SHOWN), "run pytest -m shows --write-families"
    named = re.findall(r"^\d+\. \[(\w+)\]\(\.\./(.+)\)$", text, re.MULTILINE)
    assert len(named) > 5
    for name, path in named:
        source = (family_table.TESTS.parent / path).read_text()
        assert f"def {name}(" in source, f"{path} has no {name}"
