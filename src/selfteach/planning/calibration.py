"""Efficiencies from measured steps: the rows of a run's metrics.jsonl, or a few steps made here.

Each phase's seconds are those of a number of passes, each with a cost of its own, and of an amount of
work; runs of two sizes tell the two costs apart (least squares, no cost below zero). With one size a
pass costs what is assumed, and all else counts as work. A run's first step warms up and is left out; of
the others the median counts, since a machine that is shared has moments.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfteach.commands.check.sizes import measure_offline
from selfteach.config.migrations import run_subfolder
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CheckpointError, RecipeError
from selfteach.planning import costs
from selfteach.planning.costs import Efficiency
from selfteach.planning.devices import Device
from selfteach.planning.layout import SEATS
from selfteach.planning.lengths import Spread
from selfteach.planning.workload import Work, with_answers, work_of

HERE_STEPS = 4
"""Steps of each of the two runs that are made here; the first of each warms up."""
DISTINCT = 1.25
"""Sizes that differ by less are one size."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Steps of one run: what each was made of, and how long its phases took."""

    work: Work
    answers: tuple[np.ndarray, ...]
    """Lengths of the answers of each step."""
    seconds: tuple[Mapping[str, float], ...]
    """By phase: sampling, marking, learning."""
    critique_tokens: float | None
    """Mean of what the critic wrote; None if it wrote nothing."""


def calibrate(
    runs: Sequence[Measured],
    device: Device,
    have: Efficiency = Efficiency(),  # noqa: B008
) -> Efficiency:
    """What these runs had of this device, which they are taken to have used one of."""
    engine = runs[0].work.engine
    learn = _fit_learning(runs, device, have)
    decode = _fit_sampling(runs, device, have, engine)
    mark = _fit_marking(runs)
    found = {**learn, **decode, **mark}
    return dataclasses.replace(have, **found, measured=tuple(found))


def lengths_of(runs: Sequence[Measured], work: Work) -> Work:
    """The work with answers and critiques as long as they were in these runs."""
    answers = np.concatenate([lengths for run in runs for lengths in run.answers])
    said = [run.critique_tokens for run in runs if run.critique_tokens]
    critique = None
    if said and work.asked.critique is not None:
        critique = Spread.around(float(np.mean(said)), work.asked.critique.cap)
    return with_answers(work, Spread.like(answers.tolist(), work.answer.cap), critique)


def read_run(path: Path) -> Measured:
    """A run's folder, or its metrics.jsonl. Raises `CheckpointError` where no step is."""
    folder = path.parent if path.name == "metrics.jsonl" else path
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row.get("kind") == "step"][1:]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--calibrate {path}: not a run's folder: {error}") from None
    if not rows:
        raise CheckpointError(f"--calibrate {path}: at least two steps are needed")
    recipe = validate(Recipe, config, where=str(folder))
    answers = tuple(_answers(folder, row) for row in rows)
    asked = sum(row.get("critic_requests", 0) for row in rows)
    said = sum(row.get("critic_completion_tokens", 0) for row in rows)
    phases = ("rollout", "critique", "train")
    return Measured(
        work_of(recipe, measure_offline(recipe)),
        answers,
        tuple({phase: float(row[f"time/{phase}"]) for phase in phases} for row in rows),
        said / asked if asked else None,
    )


def measure_here(recipe: Recipe) -> list[Measured]:
    """A few steps of a recipe on this machine, at its size and with a quarter of its problems."""
    problems = recipe.train.problems_per_step
    if problems < 2:
        raise RecipeError(
            "--calibrate here: problems_per_step is 1, and less is needed too; name runs instead"
        )
    measured = []
    for count in (problems, max(1, problems // 4)):
        small = {
            "train": {"steps": HERE_STEPS, "problems_per_step": count},
            "evaluation": {"every": HERE_STEPS, "validation_k": 1, "test": False},
            "tracking": {"sinks": []},
        }
        values = merge(recipe.model_dump(mode="json"), small)
        with tempfile.TemporaryDirectory() as folder:
            _run(validate(Recipe, values), Path(folder))
            measured.append(read_run(Path(folder)))
    return measured


def _run(recipe: Recipe, folder: Path) -> None:
    """Until the last step is on disk: what comes after it is not needed."""
    from selfteach.trainer.loop import train

    for row in train(recipe, folder):
        if row["kind"] == "step" and row["step"] == recipe.train.steps:
            break


def _answers(folder: Path, row: Mapping[str, Any]) -> np.ndarray:
    """Lengths of a step's answers, from its files; where these are gone, all are the mean."""
    lengths: list[float] = []
    for path in sorted(run_subfolder(folder, "rollouts").glob(f"step_{row['step']:06d}.*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            lengths.append(float(len(json.loads(line)["token_ids"])))
    return np.array(lengths or [row["length"]] * int(row["rollouts_sampled"]), dtype=float)


def _typical(runs: Sequence[Measured], phase: str) -> Iterator[tuple[Work, np.ndarray, float]]:
    """Of each run the step whose phase took the median time."""
    for run in runs:
        order = sorted(range(len(run.seconds)), key=lambda step: run.seconds[step][phase])
        middle = order[(len(order) - 1) // 2]
        yield run.work, run.answers[middle], run.seconds[middle][phase]


def _fit_learning(runs: Sequence[Measured], device: Device, have: Efficiency) -> dict[str, float]:
    """Share of the operations that are had, and what a micro-batch costs besides."""
    rows = []
    for work, answers, seconds in _typical(runs, "train"):
        flops = work.updates * float(costs.learn_flops(work, answers).sum())
        tokens = float(costs.micro_tokens(work, answers).sum())
        micro = work.updates * float(np.ceil(tokens / work.load.learn_tokens))
        moving = work.updates * costs.optimizer_seconds(work, device, 1)
        rows.append((micro, flops / device.flops, max(seconds / 2, seconds - moving)))
    layers = runs[0].work.load.shape.layers
    fixed, slope = _two_costs(rows, have.layer_micro_s * layers)
    return {"train_mfu": 1 / slope, "layer_micro_s": fixed / layers}


def _fit_sampling(
    runs: Sequence[Measured], device: Device, have: Efficiency, engine: str
) -> dict[str, Any]:
    """Share of the roofline that is had; with two sizes also the line that holds here and now."""
    shape = runs[0].work.load.shape
    ideal = dataclasses.replace(have, decode_share=1.0, pass_s=0.0, layer_pass_s=0.0)
    bare = costs.decoding(shape, device, ideal, group=1, slots=SEATS, engine=engine)
    roofline, line = [], []
    for work, answers, seconds in _typical(runs, "rollout"):
        per_batch = max(1, work.batch_size // work.samples) * work.samples
        batches = [answers[at : at + per_batch] for at in range(0, len(answers), per_batch)]
        passes = sum(float(batch.max()) for batch in batches)
        busy = sum(bare.drain(batch, work.prompt) for batch in batches)
        roofline.append((passes, busy, seconds))
        line.append((passes, float(answers.sum()), seconds))
    name = "pass_s" if engine == "vllm" else "layer_pass_s"
    unit = 1 if engine == "vllm" else shape.layers
    fixed, slope = _two_costs(roofline, getattr(have, name) * unit)
    found: dict[str, Any] = {name: fixed / unit, "decode_share": 1 / slope}
    if _distinct(line):
        found["line"] = _fitted(line)
    return found


def _fit_marking(runs: Sequence[Measured]) -> dict[str, float]:
    """Seconds of an answer, where a program marks."""
    if runs[0].work.asked.marker not in ("program", "nobody"):
        return {}
    rows = list(_typical(runs, "critique"))
    return {"mark_s": sum(s for _, _, s in rows) / sum(len(answers) for _, answers, _ in rows)}


def _two_costs(rows: Sequence[tuple[float, float, float]], assumed: float) -> tuple[float, float]:
    """Seconds per pass and per unit of work, from (passes, work, seconds) of each run.

    With one size, or where the fit would make one of them negative, a pass costs what is assumed, and
    at most half of what was measured.
    """
    fixed, slope = _fitted(rows) if _distinct(rows) else (0.0, 0.0)
    if slope > 0:
        return fixed, slope
    passes, work, seconds = np.array(rows).T
    fixed = min(assumed, 0.5 * float(seconds.sum() / passes.sum()))
    return fixed, max(1e-12, float((seconds - fixed * passes).sum() / work.sum()))


def _fitted(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Least squares in units of each row's seconds, with neither cost below zero."""
    table = np.array(rows)
    scaled = table[:, :2] / table[:, 2:]
    ones = np.ones(len(scaled))
    both, *_ = np.linalg.lstsq(scaled, ones, rcond=None)
    first, second = (float(own.sum() / (own**2).sum()) for own in scaled.T)
    tried = [(float(both[0]), float(both[1])), (first, 0.0), (0.0, second)]
    allowed = [costs for costs in tried if min(costs) >= 0]
    return min(allowed, key=lambda costs: float(((scaled @ costs - 1) ** 2).sum()))


def _distinct(rows: Sequence[tuple[float, float, float]]) -> bool:
    """True if work per pass differs enough to tell the two costs apart."""
    each = [work / passes for passes, work, _ in rows]
    return max(each) >= DISTINCT * min(each)
