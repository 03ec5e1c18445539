"""Ctrl-C ends a command with status 130 and one line that says what is kept; a second one at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import command_line, run_until
from scripted_server import serving

from selfteach.cli import app
from selfteach.errors import Terminated

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

RECIPE = """
[model]
path = "lab:two_styles"
[data]
type = "lab"
train = 8
validation = 3
test = 4
[sampling]
max_tokens = 40
batch_size = 8
[train]
steps = 4000
problems_per_step = 2
group_size = 3
checkpoint_every = 2
threads = 1
[evaluation]
every = 1000
validation_k = 1
test_k = 1
"""
SERVED = """
[critic]
type = "endpoint"
base_url = "{url}"
model = "m"
timeout_seconds = 600
healthcheck = false
reply_cache = "{cache}"
[context]
type = "step_aligned"
"""
GRPO = '[objective]\ntype = "grpo"\n'
STUBBORN = """
import sys, time
import typer
from selfteach.commands.console_script import run_console_script
from selfteach.runtime.signals import handle_termination

app = typer.Typer()
app.callback()(lambda: None)

@app.command()
def work() -> None:
    with handle_termination():
        print("ready", flush=True)
        time.sleep(60)
        time.sleep(60)

sys.argv = ["selfteach", "work"]
run_console_script(app)
"""


@contextmanager
def command(*words: object) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored under nohup
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def interrupt(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group


def ended(process: subprocess.Popen[str], within: float) -> list[str]:
    started = time.monotonic()
    _, errors = process.communicate(timeout=within + 60)
    assert time.monotonic() - started < within
    assert process.returncode == 130, errors
    return errors.splitlines()


def interrupted(
    tmp_path: Path, condition: Callable[[], object], *words: object, within_s: float = 10.0
) -> list[str]:
    """Return what a command says that is interrupted as soon as ``condition()`` is true."""
    errors = tmp_path / "errors.txt"
    process = run_until(condition, command_line, errors, *words)
    started = time.monotonic()
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(within_s + 60)
    process.kill()
    assert process.exitcode == 130, errors.read_text()
    assert time.monotonic() - started < within_s
    return errors.read_text().splitlines()


def test_behind_a_hung_critic(tmp_path: Path) -> None:
    with serving(lambda *_: time.sleep(600)) as server:
        cache = tmp_path / "cache.sqlite"
        text = RECIPE + SERVED.format(url=server.url, cache=cache)
        (tmp_path / "recipe.toml").write_text(text)
        out = tmp_path / "out"
        lines = interrupted(
            tmp_path, lambda: server.requests, "train", tmp_path / "recipe.toml", "--out", out
        )
    line = lines[-1]
    assert len([line for line in lines if line.startswith("selfteach:")]) == 1
    assert line.startswith("selfteach: interrupted; kept: ") and f"selfteach resume {out}" in line
    assert "Traceback" not in "\n".join(lines)
    assert list((out / "rollouts").glob("*.jsonl"))


def test_training_saves_a_checkpoint_first(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE + GRPO)
    out = tmp_path / "out"
    lines = interrupted(
        tmp_path, (out / "checkpoints" / "step_000002").exists, "train", tmp_path / "recipe.toml",
        "--out", out, within_s=20,
    )  # fmt: skip
    step = max(int(path.name[-6:]) for path in out.glob("checkpoints/step_*"))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == step
    assert f"the checkpoint after step {step}" in lines[-1]


@pytest.mark.slow
def test_a_study_ends_its_runs(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE + GRPO + "[study]\nworkers = 2\n")
    out = tmp_path / "out"
    with command("-m", "selfteach", "study", tmp_path / "recipe.toml", "--out", out) as process:
        wait_for(lambda: list(out.glob("runs/*/seed_0/samples/step_000001.jsonl")), process)
        interrupt(process)
        lines = ended(process, within=30)
    # A run that has ended before it is announced in a line of its own.
    (line,) = [line for line in lines if not line.startswith("base seed 0: ")]
    assert line.startswith("selfteach: interrupted; kept: ") and f"selfteach resume {out}" in line


def test_a_second_one_ends_at_once(tmp_path: Path) -> None:
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    with command(script) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        interrupt(process)
        time.sleep(0.5)
        assert process.poll() is None, "work that may not be interrupted goes on"
        interrupt(process)
        lines = ended(process, within=5)
    assert lines[-1].startswith("selfteach: interrupted")


def test_while_it_is_being_imported(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    )
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    script = f"{path}; from selfteach.__main__ import main; main()"
    with command("-c", script) as process:
        assert process.stdout is not None and process.stdout.readline() == "importing\n"
        interrupt(process)
        lines = ended(process, within=5)
    assert lines == ["selfteach: interrupted; nothing was begun: repeat the command"]


@pytest.mark.parametrize(
    ("function", "words", "line"),
    [
        ("selfteach.analysis.report.page.write_report", ["train", "r.toml", "--out", "out"],
         "kept: the run is complete; selfteach report out writes its report"),
        ("selfteach.commands.check.describe_recipe.notes", ["train", "r.toml", "--out", "out"],
         "nothing was begun in out: repeat the command"),
        ("selfteach.commands.inspect.folder._write_tokens",
         ["inspect", "lab:two_styles", "--contexts", "reference", "--limit", "1", "--out", "out"],
         "nothing is kept in out: repeat the command"),
        ("selfteach.analysis.terminal.watch.watch", ["watch", "out"], "the runs themselves go on"),
    ],
)  # fmt: skip
def test_wherever_it_comes_the_line_says_what_is_kept(
    function: str, words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise Terminated(130)

    monkeypatch.chdir(tmp_path)
    text = RECIPE.replace("steps = 4000", "steps = 1") + GRPO
    Path("r.toml").write_text(text + "[guard]\nidle_steps = 0\n")
    monkeypatch.setattr(function, interrupted)
    with pytest.raises(Terminated) as end:
        app(words, standalone_mode=False)
    assert end.value.progress == line
    if words[0] == "inspect":  # so that the command can be repeated
        assert not Path("out").exists() or not list(Path("out").iterdir())


def test_a_command_that_writes_no_folder(tmp_path: Path) -> None:
    with serving(lambda *_: time.sleep(600)) as server:
        text = RECIPE + SERVED.format(url=server.url, cache=tmp_path / "cache.sqlite")
        (tmp_path / "recipe.toml").write_text(text)
        row = {"question": "c a f f e d", "text": "<answer>k</answer>", "answer": "k"}
        (tmp_path / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
        words = ("critique", tmp_path / "rollouts.jsonl", "--recipe", tmp_path / "recipe.toml")
        lines = interrupted(tmp_path, lambda: server.requests, *words)
    assert len(lines) == 1 and lines[0].startswith("selfteach: interrupted")
