"""The notebooks of the site run from top to bottom, and were saved as they ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gohgraph.graphs.baselines import BASELINES

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs/notebooks").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def test_there_are_four():
    assert len(NOTEBOOKS) == 4


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path, monkeypatch, capsys):
    """Every cell prints as many lines as it printed when it was saved."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    # Taken out again at the end, with whatever a notebook puts there.
    monkeypatch.setitem(BASELINES, "mean", None)
    names: dict = {}
    for cell in code_cells(notebook):
        # The lines of a notebook that are no Python.
        lines = [line for line in cell["source"] if not line.startswith("%")]
        exec(compile("".join(lines), notebook.name, "exec"), names)
        saved = "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")
        assert len(capsys.readouterr().out.splitlines()) == len(saved.splitlines())


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_as_it_ran_and_small(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert "image/png" in {kind for output in outputs for kind in output.get("data", {})}
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert notebook.stat().st_size < 400_000
