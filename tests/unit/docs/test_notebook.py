"""The notebook runs as it is, and is stored with the outputs of a run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from selfteach import api

NOTEBOOK = Path(__file__).parents[3] / "docs" / "notebook.ipynb"
LIMIT_S = 240
"""Longest time of one cell, on a machine that is busy."""


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def kinds(outputs: list[dict[str, Any]]) -> list[str]:
    """What a cell shows: its stream, or the richest form of its value."""
    return list(
        dict.fromkeys(output.get("name") or min(output.get("data", {"": 0})) for output in outputs)
    )


def test_every_cell_is_stored_with_its_output() -> None:
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert cell["outputs"], cell["source"]
        assert all(output["output_type"] != "error" for output in cell["outputs"])
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(?:home|root|tmp|work|Users)/", text), "a path of one machine"


def test_its_links_exist_and_its_api_is_public() -> None:
    text = "".join("".join(cell["source"]) for cell in cells())
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (NOTEBOOK.parent / link).exists(), link
    used = set(re.findall(r"\bapi\.(\w+)", text)) - {"md"}
    assert used <= set(api.__all__)


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    source = str(NOTEBOOK.parents[1] / "src")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    stored = [kinds(cell.get("outputs", [])) for cell in notebook.cells]
    where = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=LIMIT_S, kernel_name="python3", resources=where
    )
    client.execute()
    assert [kinds(cell.get("outputs", [])) for cell in notebook.cells] == stored
