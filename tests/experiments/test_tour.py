"""The notebook is committed without outputs, and runs from its first cell to its last."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "notebooks" / "tour.ipynb"


def test_it_is_committed_without_outputs_and_in_a_form_that_diffs_well():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.notebook
def test_it_runs_and_shows_what_it_says(monkeypatch, tmp_path):
    import nbclient  # of the extra `notebook`
    import nbformat

    monkeypatch.delenv("XLA_FLAGS", raising=False)  # as a user has it: one device
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the run's folder is made
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()

    cells = {cell.id: cell.get("outputs", []) for cell in notebook.cells}
    printed = {
        name: "".join(output.text for output in outputs if output.get("name") == "stdout")
        for name, outputs in cells.items()
    }
    plots = [o for outputs in cells.values() for o in outputs if "image/png" in o.get("data", {})]
    assert len(plots) == 4
    nats = float(re.search(r"held out: (\S+) nats", printed["losses"])[1])
    assert nats < 4.5  # a uniform guess is log(1024) = 6.9
    assert printed["sample"].count("⟶") == 2
    assert "7B: 7,505,973,248" in printed["tree"] and "13B: 13,896,668,160" in printed["tree"]
    assert "used: 1.0000 to 1.0000" in printed["head"]
