"""Sinks: what they receive, that no row is sent twice, and what happens when one is missing."""

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
from selfteach.runtime.tracking import TrackedRun, open_sinks, run_name, tracked_run, values_of
from selfteach.trainer.preflight import preflight

ROWS = [
    {"step": 0, "kind": "validation", "k": 4, "avg": 12.5},
    {"step": 1, "kind": "step", "correct": 0.25, "dropped/refused": 0.5},
    {"step": 2, "kind": "step", "correct": 0.5},
    {"step": 2, "kind": "validation", "k": 4, "avg": 50.0},
]


class Memory:
    """A sink that records its calls, and fails on demand."""

    def __init__(self) -> None:
        self.received: list[tuple[int, dict[str, float]]] = []
        self.open = 0
        self.broken = False

    @contextmanager
    def __call__(self):
        self.open += 1
        try:
            yield self.record
        finally:
            self.open -= 1

    def record(self, step, values):
        if self.broken:
            raise OSError("no space left")
        self.received.append((step, dict(values)))


def steps(memory: Memory) -> list[int]:
    return [step for step, _ in memory.received]


def test_names_are_those_of_metrics_prefixed_with_the_kind():
    assert values_of(ROWS[1]) == {"step/correct": 0.25, "step/dropped/refused": 0.5}
    assert values_of({**ROWS[0], "note": "x"}) == {"validation/k": 4, "validation/avg": 12.5}


def test_every_row_reaches_every_sink_and_all_are_closed(tmp_path: Path):
    a, b = Memory(), Memory()
    with open_sinks({"a": a(), "b": b()}, tmp_path, []) as send:
        for row in ROWS:
            send(row)
        assert a.open == b.open == 1
    assert a.open == b.open == 0
    assert a.received == b.received == [(row["step"], values_of(row)) for row in ROWS]


def test_a_resume_sends_no_row_twice(tmp_path: Path):
    memory = Memory()
    with open_sinks({"m": memory()}, tmp_path, []) as send:
        for row in ROWS[:3]:
            send(row)
    # The checkpoint was at step 0: rows 1 and 2 are made again.
    with open_sinks({"m": memory()}, tmp_path, ROWS[:1]) as send:
        for row in ROWS[1:]:
            send(row)
    assert steps(memory) == [0, 1, 2, 2]


def test_a_sink_added_on_a_resume_gets_the_rows_it_missed(tmp_path: Path):
    first, second = Memory(), Memory()
    with open_sinks({"first": first()}, tmp_path, []) as send:
        send(ROWS[0])
        send(ROWS[1])
    with open_sinks({"first": first(), "second": second()}, tmp_path, ROWS[:2]) as send:
        send(ROWS[2])
    assert steps(first) == steps(second) == [0, 1, 2]


def test_a_failed_sink_is_left_out_until_the_next_resume(tmp_path, caplog):
    good, bad = Memory(), Memory()
    with (
        caplog.at_level(logging.WARNING),
        open_sinks({"bad": bad(), "good": good()}, tmp_path, []) as send,
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
    with open_sinks({"bad": bad()}, tmp_path, ROWS[:3]) as send:
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
        open_sinks({"m": memory(), "wandb": shut()}, tmp_path, []),
    ):
        pass
    assert memory.open == 0


def test_without_sinks_nothing_is_written(tmp_path: Path):
    with open_sinks({}, tmp_path, ROWS) as send:
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
    first = tracked_run(run, "p", {"seed": 0})
    assert first.name == run_name(run) == "mine/grpo/seed_0"
    assert tracked_run(run, "p", {"seed": 0}).id == first.id
    assert run_name(tmp_path / "other") == "other"


class Calls:
    """Stands in for a tracking package and records every call."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def log(self, values, step=None):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))


RUN = TrackedRun(Path("runs/x"), "project", "study/arm/seed_0", {"seed": 0}, "ab12cd34")


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
    calls = []

    class Writer:
        def __init__(self, log_dir):
            calls.append(("open", log_dir))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            calls.append(("close",))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def flush(self):
            calls.append(("flush",))

    fake = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    with tracking.tensorboard(RUN) as send:
        send(7, {"step/loss": 0.5})
    assert calls == [("open", "runs/x/tensorboard"), ("step/loss", 0.5, 7), ("flush",), ("close",)]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_real_tensorboard_reads_back_what_was_sent(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = TrackedRun(tmp_path, "p", "n", {}, "id")
    with open_sinks({"tensorboard": tracking.tensorboard(run)}, tmp_path, []) as send:
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
    with open_sinks({"m": memory()}, tmp_path, []) as send:
        send(ROWS[0])
    assert json.loads((tmp_path / "tracking.json").read_text())["sent"] == {"m": 1}
