"""Contract: docs/families.md says what the tests show: a whole run's end checks that."""

import re

import family_table


def test_cases_belong_to_families():
    found = map(family_table.family, ("v2-lite-yarn", "v2-yarn", "llama-3", "v1", "v3.2-top", "v3"))
    assert [*found] == ["V2-Lite", "V2", "Llama", "DeepSeekMoE", "V3.2", "V3"]


def test_the_page_names_tests_that_there_are():
    named = re.findall(
        r"^\d+\. \[(\w+)\]\(\.\./(.+)\)$", family_table.PAGE.read_text(), re.MULTILINE
    )
    assert len(named) > 5
    for name, path in named:
        source = (family_table.TESTS.parent / path).read_text()
        assert f"def {name}(" in source, f"{path} has no {name}"


def test_a_page_that_says_more_is_found(monkeypatch, tmp_path, request):
    row = ("V3", "logits", "tests/x.py::test_x")
    monkeypatch.setattr(family_table, "SHOWN", {row})
    monkeypatch.setattr(family_table, "PAGE", tmp_path / "families.md")
    monkeypatch.setattr(family_table, "is_whole", lambda config: True)
    (tmp_path / "families.md").write_text(family_table.page({row, ("V2", *row[1:])}))
    assert "not what the tests show" in family_table.difference(request.config)
    (tmp_path / "families.md").write_text(family_table.page({row}))
    assert not family_table.difference(request.config)


def test_a_part_of_the_tests_writes_no_page(monkeypatch, tmp_path, request):
    monkeypatch.setattr(family_table, "PAGE", tmp_path / "families.md")
    monkeypatch.setattr(family_table, "is_whole", lambda config: False)
    assert not family_table.difference(request.config)
    monkeypatch.setattr(request.config.option, "write_families", True)
    assert "not written" in family_table.difference(request.config)
    assert not family_table.PAGE.exists()
