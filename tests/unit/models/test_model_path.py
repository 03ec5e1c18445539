"""A model that is named like a folder and is none is refused at once, in one line, by every command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from selfteach.config.recipe import ModelConfig, Recipe
from selfteach.errors import EngineError
from selfteach.models.loading import load_tokenizer
from selfteach.models.model_path import require_folders, resolve

RECIPE = '[context]\ntype = "reference"\n[train]\nsteps = 1\n'
COMMANDS = [
    ["check", "r.toml"], ["check", "--offline", "r.toml"], ["train", "r.toml", "--out", "out"],
    ["study", "r.toml", "--out", "out"], ["select", "r.toml", "--out", "out"],
    ["forecast", "r.toml", "--out", "out"], ["evaluate", "models/nowhere"],
    ["inspect", "models/nowhere", "--contexts", "all", "--out", "out"],
]  # fmt: skip
IN_ONE_PROCESS = """
import contextlib, io, json, sys
from selfteach.cli import main

for words in json.loads(sys.argv[1]):
    sys.argv = ["selfteach", *words]
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code
    print(json.dumps([words, status, out.getvalue(), errors.getvalue(), "torch" in sys.modules]))
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "local").mkdir()


@pytest.mark.parametrize(
    "path",
    [
        "./nowhere", "../nowhere", "/abs/nowhere", "~/x", "~nobody-of-this-name/x", "models/nowhere",
        "local/nowhere", "a/b/c", "nowhere/", "with space/x", "", "x" * 5000 + "/", "file\0",
    ],
)  # fmt: skip
def test_no_such_folder(path: str) -> None:
    with pytest.raises(EngineError, match=r"model\.path = .*: no such folder"):
        resolve(path)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("lab:nope", "no such base model; shipped: lab:easy"),
        ("lab:", "no such base model"),
        ("package:", "is not installed"),
        ("package:nosuch.inner", "is not installed"),
        ("package:pytest/nowhere", "no such folder in the package 'pytest'"),
        ("local/model.safetensors", "is a file: name its folder, 'local'"),
        ("local/q4.gguf", r'is a file: name its folder, and the file as model\.gguf_file = "q4'),
        ("./locl", r"no such folder; did you mean '\./local'\?"),
        ("~/locl", r"no such folder; did you mean '~/local'\?"),
    ],
)
def test_other_slips(path: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "local" / "model.safetensors").touch()
    (tmp_path / "local" / "q4.gguf").touch()
    with pytest.raises(EngineError, match=line):
        resolve(path)


def test_names_that_may_be_right() -> None:
    assert resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert resolve("local") == "local"
    assert resolve("gpt2") == "gpt2"


def test_a_hub_id_that_does_not_load_says_that_it_is_no_folder_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        EngineError, match="no such folder here, and it was not loaded from the hub"
    ):
        load_tokenizer(ModelConfig(path="nobody-of-this-name/nowhere"))


def test_the_critic_is_checked_too() -> None:
    critic = {"type": "local", "path": "./nowhere"}
    recipe = Recipe.model_validate({"critic": critic, "context": {"type": "step_aligned"}})
    with pytest.raises(EngineError, match=r"critic\.path = './nowhere': no such folder"):
        require_folders([recipe])


def test_every_command_says_so_before_torch_is_imported_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE + '[model]\npath = "models/nowhere"\n')
    words = [sys.executable, "-c", IN_ONE_PROCESS, json.dumps(COMMANDS)]
    done = subprocess.run(words, text=True, capture_output=True, cwd=tmp_path, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [command for command, *_ in lines] == COMMANDS
    for command, status, out, errors, torch_imported in lines:
        assert status == 2 and "no such folder" in errors, (command, errors)
        assert errors.count("\n") == 1 and out == "" and not torch_imported, command
    assert not (tmp_path / "out").exists()
