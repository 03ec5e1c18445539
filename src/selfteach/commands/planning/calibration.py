"""Fit efficiencies to measured steps: rows of a run's metrics.jsonl, or a few steps run here.

The seconds of a phase are those of a number of passes, each with a fixed cost, and of an amount of
work; runs of two sizes separate the two costs (least squares, both non-negative). With one size the
assumed cost per pass stays, and the rest is attributed to work. A run's first step warms up and is left
out; of the others the median counts, as a shared machine has slow moments.
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
from selfteach.commands.planning import costs
from selfteach.commands.planning.costs import Efficiency
from selfteach.commands.planning.devices import Device
from selfteach.commands.planning.layout import MAX_NUM_SEQS
from selfteach.commands.planning.lengths import LengthDistribution
from selfteach.commands.planning.workload import StepWork, with_lengths, work_of
from selfteach.config.migrations import run_subfolder
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CheckpointError, RecipeError
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.device_load import with_choices

STEPS_HERE = 4
"""Steps of each of the two runs that are made here; the first of each warms up."""
MIN_SIZE_RATIO = 1.25
"""Sizes whose ratio is smaller count as one size."""
PHASES = ("rollout", "critique", "train")


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """Holds the steps of one run: their work, and how long their phases took."""

    work: StepWork
    rollout_lengths: tuple[np.ndarray, ...]
    """Tokens of the rollouts of each step."""
    seconds: tuple[Mapping[str, float], ...]
    """Per step, by phase: rollout, critique, train."""
    critique_tokens: float | None
    """Mean length of the critic's replies; None if it wrote nothing."""


def calibrate(
    runs: Sequence[MeasuredRun],
    device: Device,
    assumed: Efficiency = Efficiency(),  # noqa: B008
) -> Efficiency:
    """Return the efficiencies of runs that each used one ``device``; ``assumed`` fills the rest."""
    fitted: dict[str, Any] = {
        **_fit_training(runs, device, assumed),
        **_fit_sampling(runs, device, assumed, runs[0].work.engine),
        **_fit_critique(runs),
    }
    return dataclasses.replace(assumed, **fitted, measured=tuple(fitted))


def with_lengths_of(runs: Sequence[MeasuredRun], work: StepWork) -> StepWork:
    """Return the work with the rollout and critique lengths of these runs."""
    rollouts = np.concatenate([lengths for run in runs for lengths in run.rollout_lengths])
    means = [run.critique_tokens for run in runs if run.critique_tokens]
    critiques = work.critic.critique_lengths
    if means and critiques is not None:
        critiques = LengthDistribution.with_mean(float(np.mean(means)), critiques.cap)
    cap = work.rollout_lengths.cap
    return with_lengths(work, LengthDistribution.fitted_to(rollouts.tolist(), cap), critiques)


def read_run(path: Path) -> MeasuredRun:
    """Read a run folder, or its metrics.jsonl. Raises `CheckpointError` with fewer than two steps."""
    folder = path.parent if path.name == "metrics.jsonl" else path
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row.get("kind") == "step"][1:]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--calibrate {path}: not a run folder: {error}") from None
    if not rows:
        raise CheckpointError(f"--calibrate {path}: at least two steps are needed")
    recipe = validate(Recipe, config, where=str(folder))
    if (folder / "environment.json").exists():
        recipe = with_choices(recipe, *RunFolder(folder).memory_choices())
    requests = sum(row.get("critic_requests", 0) for row in rows)
    completion_tokens = sum(row.get("critic_completion_tokens", 0) for row in rows)
    return MeasuredRun(
        work_of(recipe, measure_offline(recipe)),
        tuple(_rollout_lengths(folder, row) for row in rows),
        tuple({phase: float(row[f"time/{phase}"]) for phase in PHASES} for row in rows),
        completion_tokens / requests if requests else None,
    )


def measure_here(recipe: Recipe) -> list[MeasuredRun]:
    """Run a few steps of a recipe on this machine, at its size and with a quarter of its problems."""
    problems = recipe.train.problems_per_step
    if problems < 2:
        raise RecipeError(
            "--calibrate here: a second, smaller size is needed, but problems_per_step is 1; pass run "
            "folders instead"
        )
    measured = []
    for count in (problems, max(1, problems // 4)):
        changes = {
            "train": {"steps": STEPS_HERE, "problems_per_step": count},
            "evaluation": {"every": STEPS_HERE, "validation_k": 1, "test": False},
            "tracking": {"sinks": []},
        }
        values = merge(recipe.model_dump(mode="json"), changes)
        with tempfile.TemporaryDirectory() as folder:
            _run(validate(Recipe, values), Path(folder))
            measured.append(read_run(Path(folder)))
    return measured


def _run(recipe: Recipe, folder: Path) -> None:
    """Train until the last step's metrics are on disk; the evaluation after it is not needed."""
    from selfteach.trainer.loop import train

    for row in train(recipe, folder):
        if row["kind"] == "step" and row["step"] == recipe.train.steps:
            break


def _rollout_lengths(folder: Path, row: Mapping[str, Any]) -> np.ndarray:
    """Return the lengths of a step's rollouts; where their files are gone, the mean for each."""
    lengths: list[float] = []
    for path in sorted(run_subfolder(folder, "rollouts").glob(f"step_{row['step']:06d}.*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            lengths.append(float(len(json.loads(line)["token_ids"])))
    return np.array(lengths or [row["length"]] * int(row["rollouts_sampled"]), dtype=float)


def _median_steps(
    runs: Sequence[MeasuredRun], phase: str
) -> Iterator[tuple[StepWork, np.ndarray, float]]:
    """Yield of each run the step whose phase took the median time: work, lengths, seconds."""
    for run in runs:
        order = sorted(range(len(run.seconds)), key=lambda step: run.seconds[step][phase])
        middle = order[(len(order) - 1) // 2]
        yield run.work, run.rollout_lengths[middle], run.seconds[middle][phase]


def _fit_training(
    runs: Sequence[MeasuredRun], device: Device, assumed: Efficiency
) -> dict[str, float]:
    """Fit the share of peak operations, and the fixed cost of a micro-batch."""
    rows = []
    for work, lengths_R, seconds in _median_steps(runs, "train"):
        training = costs.training_cost(work, device, assumed, 1)
        dealt = training.deal(lengths_R)
        flops = work.updates * float(training.flops(lengths_R, dealt)[0])
        micro_batches = work.updates * float(dealt.micro_batches_T[0])
        optimizer = work.updates * costs.optimizer_seconds(work, device, 1)
        rows.append((micro_batches, flops / device.flops, max(seconds / 2, seconds - optimizer)))
    layers = runs[0].work.load.shape.layers
    fixed, slope = _fit_two_costs(rows, assumed.micro_batch_layer_s * layers)
    return {"train_mfu": 1 / slope, "micro_batch_layer_s": fixed / layers}


def _fit_sampling(
    runs: Sequence[MeasuredRun], device: Device, assumed: Efficiency, engine: str
) -> dict[str, Any]:
    """Fit the share of the roofline; with two sizes also the linear cost on this machine."""
    shape = runs[0].work.load.shape
    ideal = dataclasses.replace(assumed, decode_share=1.0, pass_s=0.0, layer_pass_s=0.0)
    roofline = costs.decoding_cost(shape, device, ideal, group=1, slots=MAX_NUM_SEQS, engine=engine)
    roofline_rows, linear_rows = [], []
    for work, lengths_R, seconds in _median_steps(runs, "rollout"):
        per_batch = max(1, work.batch_size // work.group_size) * work.group_size
        starts = range(0, len(lengths_R), per_batch)
        batches = [lengths_R[start : start + per_batch] for start in starts]
        passes = sum(float(batch.max()) for batch in batches)
        at_peak = sum(roofline.decode_seconds(batch, work.prompt) for batch in batches)
        roofline_rows.append((passes, at_peak, seconds))
        linear_rows.append((passes, float(lengths_R.sum()), seconds))
    name = "pass_s" if engine == "vllm" else "layer_pass_s"
    unit = 1 if engine == "vllm" else shape.layers
    fixed, slope = _fit_two_costs(roofline_rows, getattr(assumed, name) * unit)
    fitted: dict[str, Any] = {name: fixed / unit, "decode_share": 1 / slope}
    if _sizes_differ(linear_rows):
        fitted["sampling_fit"] = _least_squares(linear_rows)
    return fitted


def _fit_critique(runs: Sequence[MeasuredRun]) -> dict[str, float]:
    """Fit the seconds per rollout of a program's verdict and critique."""
    if runs[0].work.critic.kind not in ("program", "none"):
        return {}
    rows = list(_median_steps(runs, "critique"))
    seconds = sum(seconds for _, _, seconds in rows)
    return {"critique_s": seconds / sum(len(lengths_R) for _, lengths_R, _ in rows)}


def _fit_two_costs(
    rows: Sequence[tuple[float, float, float]], assumed: float
) -> tuple[float, float]:
    """Return seconds per pass and per unit of work, from (passes, work, seconds) of each run.

    With one size, or where a cost would be negative, a pass costs ``assumed``, and at most half of the
    measured time.
    """
    fixed, slope = _least_squares(rows) if _sizes_differ(rows) else (0.0, 0.0)
    if slope > 0:
        return fixed, slope
    passes, work, seconds = np.array(rows).T
    fixed = min(assumed, 0.5 * float(seconds.sum() / passes.sum()))
    return fixed, max(1e-12, float((seconds - fixed * passes).sum() / work.sum()))


def _least_squares(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Fit both costs by relative least squares, with neither below zero."""
    table = np.array(rows)
    scaled = table[:, :2] / table[:, 2:]
    ones = np.ones(len(scaled))
    both, *_ = np.linalg.lstsq(scaled, ones, rcond=None)
    only_fixed, only_slope = (float(column.sum() / (column**2).sum()) for column in scaled.T)
    candidates = [(float(both[0]), float(both[1])), (only_fixed, 0.0), (0.0, only_slope)]
    allowed = [pair for pair in candidates if min(pair) >= 0]
    return min(allowed, key=lambda pair: float(((scaled @ pair - 1) ** 2).sum()))


def _sizes_differ(rows: Sequence[tuple[float, float, float]]) -> bool:
    """Return True if work per pass differs enough to separate the two costs."""
    ratios = [work / passes for passes, work, _ in rows]
    return max(ratios) >= MIN_SIZE_RATIO * min(ratios)
