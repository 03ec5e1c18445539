"""vLLM loads what `selfteach export` writes, and gives its tokens the same log-probabilities."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from exported_models import export_each, token_logps, write_base

import vllm_server

SCORES = Path(__file__).with_name("exported_scores.py")
IDS = [3, 17, 40, 9, 66, 12, 5]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, width=64)  # heads of 32, the narrowest of vLLM's attention on a CPU
    return folder


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return export_each(base, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("kind", ["all", "merged", "adapter"])
def test_scores_are_those_of_transformers(
    exported: dict[str, Path], base: Path, kind: str, no_shared_server: None
) -> None:
    words = [str(base), json.dumps(IDS), str(exported[kind])]
    if kind != "adapter":
        words = [str(exported[kind]), json.dumps(IDS)]
    process = subprocess.run(
        [vllm_server.PYTHON, SCORES, *words],
        env={**os.environ, **vllm_server.ENVIRONMENT}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    (line,) = [row for row in process.stdout.splitlines() if row.startswith("scores ")]
    theirs = json.loads(line.removeprefix("scores "))
    ours = token_logps(exported[kind], base, IDS)
    assert theirs == pytest.approx(ours, abs=1e-3)
    if kind == "adapter":  # and not those of the model without the adapter
        assert theirs != pytest.approx(token_logps(base, base, IDS), abs=1e-3)
