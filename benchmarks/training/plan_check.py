"""Check the planner: calibrated on two settings of the lab's recipe, it predicts others, measured here.

    python benchmarks/training/plan_check.py [--rounds 12] [--out FILE]

All settings run their steps in alternation, so that load on this machine affects all alike; the median
of each phase counts. A critic of known latency sleeps that long per request, several at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from selfteach.commands.check.sizes import measure_offline
from selfteach.commands.planning.calibration import PHASES, MeasuredRun, calibrate, with_lengths_of
from selfteach.commands.planning.devices import HERE, measured_here
from selfteach.commands.planning.estimate import Hardware, forecast
from selfteach.commands.planning.layout import Layout
from selfteach.commands.planning.workload import StepWork, work_of
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import load_study
from selfteach.config.schema import merge, validate
from selfteach.protocols import Critic
from selfteach.runtime.atomic_files import write_json
from selfteach.runtime.run_folder import RunFolder
from selfteach.tasks.task import training_order
from selfteach.trainer.async_training import RolloutRequest, train_steps
from selfteach.trainer.build import build
from selfteach.trainer.step import Components
from selfteach.types import Critique, CritiqueFailure, Rollout, Verdict

RECIPE = Path(__file__).parents[2] / "src" / "selfteach" / "recipes" / "paper_in_miniature.toml"
CALIBRATED = ("as it is", "a quarter of the problems")
SETTINGS: dict[str, dict[str, dict[str, int]]] = {
    "as it is": {},
    "a quarter of the problems": {"train": {"problems_per_step": 1}},
    "twice the rollouts": {"train": {"group_size": 16}},
    "eight times the rollouts": {"train": {"group_size": 16, "problems_per_step": 16}},
    "rollouts of 20 tokens": {"sampling": {"max_tokens": 20}},
    "batches of 8": {"sampling": {"batch_size": 8}},
    "micro-batches of 1,024": {"train": {"micro_batch_tokens": 1024}},
    "two updates": {"train": {"num_iterations": 2}},
}
LATENCY_S, CONCURRENCY = 0.25, 8
SLOW = "a critic of 0.25 s, 8 at a time"


@dataclasses.dataclass(frozen=True)
class SlowCritic:
    """Delays a critic."""

    critic: Critic

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        """Return the critiques after the latency of all requests."""
        time.sleep(LATENCY_S * -(-len(judged) // CONCURRENCY))
        return self.critic(judged)


class Setting:
    """Runs the steps of one recipe and keeps their times."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        self.name, self.recipe, self.built = name, recipe, build(recipe)
        self.work: StepWork = work_of(recipe, measure_offline(recipe))
        self.components: Components = self.built.components
        if name == SLOW:
            assert self.components.critic is not None
            slow = SlowCritic(self.components.critic)
            self.components = dataclasses.replace(self.components, critic=slow)
            critic = dataclasses.replace(
                self.work.critic, kind="latency", latency=LATENCY_S, concurrency=CONCURRENCY
            )
            self.work = dataclasses.replace(self.work, critic=critic)
        self.rollout_lengths: list[np.ndarray] = []
        self.seconds: list[dict[str, float]] = []

    def steps(self, count: int) -> Iterator[None]:
        """Run steps one by one; the first warms up."""
        problems = self.built.task.problems("train")
        order = training_order(len(problems), 0, self.recipe.train.problems_per_step)
        batches = list(islice(order, count + 1))

        def request(step: int) -> RolloutRequest:
            batch = [problems[index] for index in batches[step - 1]]
            return RolloutRequest(step, batch, self.components.policy.version)

        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder(Path(folder))
            steps = range(1, count + 2)
            for step, (samples, metrics) in train_steps(self.components, request, steps, run):
                if step > 1:
                    lengths = [float(len(sample.rollout.token_ids)) for sample in samples]
                    self.rollout_lengths.append(np.array(lengths))
                    self.seconds.append({phase: metrics[f"time/{phase}"] for phase in PHASES})
                yield

    @property
    def measured(self) -> MeasuredRun:
        """Return the steps in the form of a calibration."""
        return MeasuredRun(self.work, tuple(self.rollout_lengths), tuple(self.seconds), None)

    def median(self, phase: str) -> float:
        """Return the median seconds of a phase, or of the sum of all (``step``)."""
        if phase == "step":
            return sum(self.median(name) for name in PHASES)
        return float(np.median([seconds[phase] for seconds in self.seconds]))


def all_settings() -> list[Setting]:
    """Build every setting."""
    base = load_study(RECIPE).recipe("step_aligned", seed=0).model_dump(mode="json")
    recipes = {name: validate(Recipe, merge(base, changes)) for name, changes in SETTINGS.items()}
    recipes[SLOW] = recipes["as it is"]
    return [Setting(name, recipe) for name, recipe in recipes.items()]


def main() -> None:
    """Measure, predict and print every setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = all_settings()
    for _ in zip(*(setting.steps(args.rounds) for setting in settings), strict=True):
        pass
    runs = [setting.measured for setting in settings if setting.name in CALIBRATED]
    device = measured_here()
    hardware = Hardware(HERE, device, calibrate(runs, device))
    rows: list[tuple[str, str, float, float]] = []
    for setting in settings:
        plan = forecast(with_lengths_of(runs, setting.work), hardware, Layout(1))
        for phase in (*PHASES, "step"):
            predicted = plan.period if phase == "step" else plan.phases[phase]
            rows.append((setting.name, phase, predicted, setting.median(phase)))
    for name, phase, predicted, measured in rows:
        error = 100 * (predicted / max(measured, 1e-9) - 1)
        print(f"{name:26s} {phase:9s} {predicted:8.3f} s {measured:8.3f} s {error:+6.0f} %")
    if args.out:
        efficiency = dataclasses.asdict(hardware.efficiency)
        write_json(args.out, {"rows": rows, "efficiency": efficiency, "rounds": args.rounds})


if __name__ == "__main__":
    main()
