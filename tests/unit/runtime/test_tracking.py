"""Sinks: what they are given, that nothing is given twice, and what happens when one is not there."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest

from selfteach.config.recipe import Recipe
from selfteach.errors import RecipeError
from selfteach.runtime import tracking
from selfteach.runtime.tracking import Tracked, identify, run_name, sending, values_of
from selfteach.trainer.preflight import preflight

ROWS = [
    {"step": 0, "kind": "validation", "k": 4, "avg": 12.5},
    {"step": 1, "kind": "step", "correct": 0.25, "dropped/refused": 0.5},
    {"step": 2, "kind": "step", "correct": 0.5},
    {"step": 2, "kind": "validation", "k": 4, "avg": 50.0},
]


class Memory:
    """A sink that remembers, and fails when it is told to."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, dict[str, float]]] = []
        self.open = 0
        self.broken = False

    @contextmanager
    def __call__(self):
        self.open += 1
        try:
            yield self.take
        finally:
            self.open -= 1

    def take(self, step, values):
        if self.broken:
            raise OSError("no space left")
        self.taken.append((step, dict(values)))


def steps(memory: Memory) -> list[int]:
    return [step for step, _ in memory.taken]


def test_names_are_those_of_metrics_behind_the_kind():
    assert values_of(ROWS[1]) == {"step/correct": 0.25, "step/dropped/refused": 0.5}
    assert values_of({**ROWS[0], "note": "x"}) == {"validation/k": 4, "validation/avg": 12.5}


def test_every_row_reaches_every_sink_and_all_are_closed(tmp_path: Path):
    a, b = Memory(), Memory()
    with sending({"a": a(), "b": b()}, tmp_path, []) as send:
        for row in ROWS:
            send(row)
        assert a.open == b.open == 1
    assert a.open == b.open == 0
    assert a.taken == b.taken == [(row["step"], values_of(row)) for row in ROWS]


def test_a_resume_sends_no_row_twice(tmp_path: Path):
    memory = Memory()
    with sending({"m": memory()}, tmp_path, []) as send:
        for row in ROWS[:3]:
            send(row)
    # The checkpoint was at step 0: rows 1 and 2 are made again.
    with sending({"m": memory()}, tmp_path, ROWS[:1]) as send:
        for row in ROWS[1:]:
            send(row)
    assert steps(memory) == [0, 1, 2, 2]


def test_a_sink_that_is_named_later_gets_what_it_missed(tmp_path: Path):
    early, late = Memory(), Memory()
    with sending({"early": early()}, tmp_path, []) as send:
        send(ROWS[0])
        send(ROWS[1])
    with sending({"early": early(), "late": late()}, tmp_path, ROWS[:2]) as send:
        send(ROWS[2])
    assert steps(early) == steps(late) == [0, 1, 2]


def test_a_sink_that_fails_is_left_out_and_caught_up_on_the_next_resume(tmp_path, caplog):
    good, bad = Memory(), Memory()
    with (
        caplog.at_level(logging.WARNING),
        sending({"bad": bad(), "good": good()}, tmp_path, []) as send,
    ):
        send(ROWS[0])
        bad.broken = True
        send(ROWS[1])
        bad.broken = False
        send(ROWS[2])
    assert steps(good) == [0, 1, 2] and steps(bad) == [0]
    assert [record.getMessage() for record in caplog.records] == [
        "tracking: bad is left out from now on: no space left"
    ]
    with sending({"bad": bad()}, tmp_path, ROWS[:3]) as send:
        send(ROWS[3])
    assert steps(bad) == [0, 1, 2, 2]


def test_a_sink_that_cannot_be_opened_is_one_line(tmp_path: Path):
    @contextmanager
    def shut():
        raise PermissionError("not logged in")
        yield

    memory = Memory()
    with (
        pytest.raises(RecipeError, match=r"tracking\.sinks: wandb cannot be opened: not logged in"),
        sending({"m": memory(), "wandb": shut()}, tmp_path, []),
    ):
        pass
    assert memory.open == 0


def test_without_sinks_nothing_is_written(tmp_path: Path):
    with sending({}, tmp_path, ROWS) as send:
        send(ROWS[0])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_line_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = Recipe.model_validate(
        {
            "model": {"path": "nowhere/at-all"},
            "tracking": {"sinks": ["trackio"]},
            "train": {"steps": 0},
        }
    )
    with pytest.raises(RecipeError, match='"trackio" needs the package trackio: pip install'):
        preflight([recipe])


def test_a_run_keeps_its_id_and_is_named_after_its_study(tmp_path: Path):
    run = tmp_path / "mine" / "runs" / "grpo" / "seed_0"
    run.mkdir(parents=True)
    (tmp_path / "mine" / "study.json").write_text("{}")
    first = identify(run, "p", {"seed": 0})
    assert first.name == run_name(run) == "mine/grpo/seed_0"
    assert identify(run, "p", {"seed": 0}).id == first.id
    assert run_name(tmp_path / "other") == "other"


class Calls:
    """A package of another maker, as far as it is used: remembers every call."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def log(self, values, step=None):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))


RUN = Tracked(Path("runs/x"), "project", "study/arm/seed_0", {"seed": 0}, "ab12cd34")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_adapters_call_their_packages_as_documented(name, monkeypatch):
    package = Calls()
    monkeypatch.setitem(sys.modules, name, package)
    with getattr(tracking, name)(RUN) as send:
        send(3, {"step/loss": 0.5})
    (_, options), *rest = package.calls
    assert rest == [("log", {"step/loss": 0.5}, 3), ("finish",)]
    assert options["project"] == "project" and options["config"] == {"seed": 0}
    assert options["resume"] == "allow"
    if name == "wandb":
        assert options["id"] == "ab12cd34" and options["dir"] == "runs/x"
        assert "mode" not in options  # WANDB_MODE is the user's to set
    else:
        assert options["name"] == "study/arm/seed_0 ab12cd34"
        assert options["auto_log_gpu"] is options["auto_log_cpu"] is options["embed"] is False


def test_the_tensorboard_adapter_writes_scalars_and_flushes(monkeypatch):
    said = []

    class Writer:
        def __init__(self, log_dir):
            said.append(("open", log_dir))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            said.append(("close",))

        def add_scalar(self, name, value, step):
            said.append((name, value, step))

        def flush(self):
            said.append(("flush",))

    fake = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    with tracking.tensorboard(RUN) as send:
        send(7, {"step/loss": 0.5})
    assert said == [("open", "runs/x/tensorboard"), ("step/loss", 0.5, 7), ("flush",), ("close",)]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_real_tensorboard_reads_back_what_was_sent(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Tracked(tmp_path, "p", "n", {}, "id")
    with sending({"tensorboard": tracking.tensorboard(run)}, tmp_path, []) as send:
        for row in ROWS:
            send(row)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/correct")] == [(1, 0.25), (2, 0.5)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_real_packages_still_have_what_is_called(name):
    package = pytest.importorskip(name, reason=f"{name} is not installed")
    assert callable(package.init) and callable(package.finish)


def test_state_is_readable(tmp_path: Path):
    memory = Memory()
    with sending({"m": memory()}, tmp_path, []) as send:
        send(ROWS[0])
    assert json.loads((tmp_path / "tracking.json").read_text())["sent"] == {"m": 1}
