"""Contract: notebooks run from top to bottom, on a tiny step cap, and match their scripts."""

import pathlib

import jupytext
import nbclient
import pytest

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_paired_notebook_has_the_same_cells(script):
    paired = jupytext.read(script.with_suffix(".ipynb"))
    ours = jupytext.read(script)
    assert [cell.source for cell in paired.cells] == [cell.source for cell in ours.cells]
    assert all(not cell.get("outputs") for cell in paired.cells), "commit notebooks without output"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs(script, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_JAX_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("DEEPSEEK_JAX_STEPS", "2")
    monkeypatch.setenv("XLA_FLAGS", "")
    notebook = jupytext.read(script)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}
    )
    client.execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "bits per byte" in printed and "report:" in printed
