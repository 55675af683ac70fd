"""The notebooks run from top to bottom, and what is committed shows what they draw."""

import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"

# Figures that a reader must see.
FIGURES = {"low_precision.ipynb": 2, "performance.ipynb": 5, "schedules.ipynb": 4}


def figures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_every_notebook_is_here():
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == set(FIGURES)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_runs_from_top_to_bottom(name, monkeypatch):
    # As a reader's kernel: not in Triton's interpreter. One thread, since other tests use the other cores. A cell
    # compiles every kernel, where no other test has done so before: minutes on a busy machine.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOKS / name, nbformat.NO_CONVERT)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}
    )
    start = time.monotonic()
    client.execute()
    print(f"{name}: {time.monotonic() - start:.0f} s")
    assert figures(notebook) >= FIGURES[name]


@pytest.mark.parametrize("name", FIGURES)
def test_a_committed_notebook_shows_its_figures_and_nothing_private(name):
    notebook = nbformat.read(NOTEBOOKS / name, nbformat.NO_CONVERT)
    assert figures(notebook) >= FIGURES[name]
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", output["text"]
            for word in ("/root/", "/home/", "/tmp/", "Warning"):
                assert word not in str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
