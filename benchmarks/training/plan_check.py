"""Is a plan right? Calibrated on two settings of the lab's recipe, it predicts others: measured here.

    python benchmarks/plan_check.py [--rounds 12] [--out FILE]

All settings take their steps in turn, so that whatever else this machine does disturbs all alike; of
each phase the median counts. A critic of known latency sleeps so long for each answer, some at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from selfteach.commands.check.sizes import look
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import load_study
from selfteach.config.schema import merge, validate
from selfteach.planning.calibration import Measured, calibrate, lengths_of
from selfteach.planning.devices import HERE, measured_here
from selfteach.planning.estimate import Where, forecast
from selfteach.planning.layout import Layout
from selfteach.planning.workload import Work, work_of
from selfteach.protocols import Critic
from selfteach.runtime.run_folder import write_json
from selfteach.tasks.task import training_order
from selfteach.trainer.build import build
from selfteach.trainer.step import Components, train_step
from selfteach.types import Critique, CritiqueFailure, Rollout, Verdict

RECIPE = Path(__file__).parents[1] / "recipes" / "paper_in_miniature.toml"
PHASES = ("rollout", "critique", "train")
CALIBRATED = ("as it is", "a quarter of the problems")
SETTINGS: dict[str, dict[str, dict[str, int]]] = {
    "as it is": {},
    "a quarter of the problems": {"train": {"problems_per_step": 1}},
    "twice the answers": {"train": {"group_size": 16}},
    "eight times the answers": {"train": {"group_size": 16, "problems_per_step": 16}},
    "answers of 20 tokens": {"sampling": {"max_tokens": 20}},
    "batches of 8": {"sampling": {"batch_size": 8}},
    "micro-batches of 1,024": {"train": {"micro_batch_tokens": 1024}},
    "two updates": {"train": {"num_iterations": 2}},
}
LATENCY_S, AT_A_TIME = 0.25, 8
SLOW = "a critic of 0.25 s, 8 at a time"


@dataclasses.dataclass(frozen=True)
class Slow:
    """A critic that takes its time."""

    critic: Critic

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        """As the critic within, after so long."""
        time.sleep(LATENCY_S * -(-len(judged) // AT_A_TIME))
        return self.critic(judged)


class Setting:
    """A recipe with its parts, and what its steps took."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        self.name, self.recipe, self.built = name, recipe, build(recipe)
        self.work: Work = work_of(recipe, look(recipe))
        self.components: Components = self.built.components
        if name == SLOW:
            assert self.components.critic is not None
            self.parts = dataclasses.replace(self.parts, critic=Slow(self.components.critic))
            asked = dataclasses.replace(
                self.work.asked, marker="latency", latency=LATENCY_S, concurrency=AT_A_TIME
            )
            self.work = dataclasses.replace(self.work, asked=asked)
        self.problems = self.built.task.problems("train")
        self.answers: list[np.ndarray] = []
        self.seconds: list[dict[str, float]] = []

    def steps(self, count: int) -> Iterator[None]:
        """Take steps one by one; the first warms up."""
        order = training_order(len(self.problems), 0, self.recipe.train.problems_per_step)
        for step, indices in enumerate(islice(order, count + 1)):
            samples, said = train_step(self.parts, [self.problems[i] for i in indices], step=step)
            if step > 0:
                lengths = [float(len(sample.rollout.token_ids)) for sample in samples]
                self.answers.append(np.array(lengths))
                self.seconds.append({phase: said[f"time/{phase}"] for phase in PHASES})
            yield

    @property
    def measured(self) -> Measured:
        """As a calibration takes it."""
        return Measured(self.work, tuple(self.answers), tuple(self.seconds), None)

    def median(self, phase: str) -> float:
        """Seconds."""
        return float(np.median([seconds[phase] for seconds in self.seconds]))


def settings() -> list[Setting]:
    """Every setting, built."""
    plain = load_study(RECIPE).recipe("step_aligned", seed=0).model_dump(mode="json")
    recipes = {name: validate(Recipe, merge(plain, own)) for name, own in SETTINGS.items()}
    recipes[SLOW] = recipes["as it is"]
    return [Setting(name, recipe) for name, recipe in recipes.items()]


def main() -> None:
    """Measure, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    known = settings()
    for _ in zip(*(setting.steps(asked.rounds) for setting in known), strict=True):
        pass
    runs = [setting.measured for setting in known if setting.name in CALIBRATED]
    device = measured_here()
    where = Where(HERE, device, calibrate(runs, device))
    rows: list[tuple[str, str, float, float]] = []
    for setting in known:
        work = lengths_of(runs, setting.work)
        told = forecast(work, where, Layout(1))
        for phase in (*PHASES, "step"):
            found = sum(map(setting.median, PHASES)) if phase == "step" else setting.median(phase)
            predicted = told.period if phase == "step" else told.phases[phase]
            rows.append((setting.name, phase, predicted, found))
    for name, phase, predicted, found in rows:
        error = 100 * (predicted / max(found, 1e-9) - 1)
        print(f"{name:26s} {phase:9s} {predicted:8.3f} s {found:8.3f} s {error:+6.0f} %")
    if asked.out:
        have = dataclasses.asdict(where.have)
        write_json(asked.out, {"rows": rows, "efficiency": have, "rounds": asked.rounds})


if __name__ == "__main__":
    main()
