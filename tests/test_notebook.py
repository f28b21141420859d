"""The notebook of the documentation runs on a run that is shipped, and keeps what it printed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK = DOCS / "run-to-plot.ipynb"


def printed(notebook: Any) -> list[list[object]]:
    """What each cell of code shows: texts as they are, and of a picture that there is one."""
    return [[_shown(output) for output in cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]


def _shown(output: Any) -> object:
    if output.output_type == "stream":
        return output.text
    return "a picture" if "image/png" in output.data else output.data["text/plain"]


def test_the_notebook_goes_from_a_run_to_a_plot_in_ten_lines_and_prints_what_it_keeps() -> None:
    kept = nbformat.read(NOTEBOOK, as_version=4)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(DOCS)}}
    NotebookClient(fresh, timeout=120, kernel_name="python3", resources=where, record_timing=False).execute()
    if os.environ.get("RENEW"):
        nbformat.write(fresh, NOTEBOOK)
        return
    assert printed(kept) == printed(fresh), "RENEW=1 pytest tests/test_notebook.py renews it"
    cells = [cell for cell in kept.cells if cell.cell_type == "code"]
    plots = [cell for cell, outputs in zip(cells, printed(kept), strict=True) if "a picture" in outputs]
    assert plots and all(len([*filter(None, cell.source.splitlines())]) <= 10 for cell in plots)
