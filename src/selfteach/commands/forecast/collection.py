"""Sample, critique and score the untrained model for arms that share it; all of it kept in a folder."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from selfteach.analysis.inspection.inspection_data import Inspection, read_inspection
from selfteach.commands.forecast.step_cost import (
    Meter,
    MeteredCritic,
    MeteredEngine,
    RateFile,
    measure_training,
)
from selfteach.commands.forecast.teacher_samples import sample_teacher
from selfteach.commands.inspect.answer_rows import (
    LocatedRollout,
    PreparedRollout,
    locate_errors,
    prepare,
)
from selfteach.commands.inspect.folder import Scorers, write_inspection
from selfteach.config.critic_section import CriticConfig, PolicyCriticConfig
from selfteach.config.engine_section import TransformersEngineConfig
from selfteach.config.objective_section import DistillationConfig
from selfteach.config.recipe import ContextConfig, DistributedConfig, Recipe
from selfteach.config.teacher_section import LiveTeacherConfig
from selfteach.feedback.critics.journaled_critic import JournaledCritic
from selfteach.prompts.template_set import Templates
from selfteach.protocols import Context, Critic
from selfteach.rollout.journaled_engine import BatchedEngine, JournaledEngine
from selfteach.rollout.prompt_request import CompletionEngine
from selfteach.rollout.sampling_settings import training_sampling
from selfteach.runtime.run_folder import RunFolder
from selfteach.runtime.stored_files import read_json
from selfteach.trainer.build import build, build_arm_context
from selfteach.trainer.build_critic import build_critic
from selfteach.trainer.evaluation_reward import stored_verdicts, with_stored_rewards
from selfteach.trainer.step import verify_and_critique
from selfteach.types import CritiquedRollout, CritiqueFailure, Rollout

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how many of how many are done."""


@dataclass(frozen=True, slots=True)
class ForecastRequest:
    """Describes how much is sampled: rollouts of validation problems, and the teacher's answers."""

    problems: int = 24
    k: int = 4
    """Rollouts per problem; at least 2."""
    seed: int = 0
    teacher_samples: int = 1
    """Answers that the teacher samples for each rollout and context."""


@dataclass(frozen=True, slots=True)
class ArmData:
    """Holds what was collected for one arm; rollouts in the order of `ModelData.rollouts`."""

    recipe: Recipe
    critiqued: Sequence[CritiquedRollout]
    view: str | None
    """Name of the first arm whose teacher is shown the same; None without distillation."""


@dataclass(frozen=True, slots=True)
class ModelData:
    """Holds what was collected for arms with the same model, problems and sampling."""

    k: int
    rollouts: Sequence[Rollout]
    correct_PK: np.ndarray
    located: Sequence[LocatedRollout]
    arms: Mapping[str, ArmData]
    prepared: Sequence[PreparedRollout]
    """Teacher prompts by view."""
    teacher_PK: Mapping[str, np.ndarray]
    """By view: share of the teacher's answers that are right; NaN without a context."""
    inspection: Inspection | None
    """Token scores by view; None if no rollout has a teacher prompt."""
    reverse_kl_N: np.ndarray
    rates: RateFile
    rates_name: str


class Collector:
    """Collects the data of one model's arms, reusing what is in the folder."""

    def __init__(
        self, recipes: Mapping[str, Recipe], request: ForecastRequest, run: RunFolder,
        rates: RateFile, name: str, progress: Progress,
    ) -> None:  # fmt: skip
        """Build the model; ``name`` begins the names of its files."""
        self._recipes, self._request, self._run = recipes, request, run
        self._rates, self._name, self._progress = rates, name, progress
        self._base = untrained(recipes)
        self._built = build(self._base).for_measuring()
        engine = self._built.components.engine
        assert isinstance(engine, BatchedEngine) and isinstance(engine.engine, CompletionEngine)
        self._engine = engine.engine
        self._sampling = training_sampling(self._base, request.k, request.seed)

    def collect(self) -> ModelData:
        """Sample, critique, score, sample the teacher, and measure a learning pass."""
        rollouts = self._sample()
        by_critic = self._critique(rollouts)
        located = self._locate(by_critic)
        arms, contexts = self._views(by_critic)
        prepared = self._prepare(located, arms, contexts)
        inspection, reverse_kl_N = self._score(prepared, list(contexts))
        teacher_PK = {name: self._teacher(name, rollouts, prepared) for name in contexts}
        training = f"{self._name}/training"
        if self._rates.get(training) is None:
            self._progress("measuring a learning pass", 0, 1)
            first = next(iter(by_critic.values()))
            self._rates.save(training, measure_training(self._built.components, first))
        correct = [one.critiqued.verdict.correct for one in located]
        return ModelData(
            self._request.k, rollouts, np.array(correct).reshape(-1, self._request.k), located,
            arms, prepared, teacher_PK, inspection, reverse_kl_N, self._rates, self._name,
        )  # fmt: skip

    def _sample(self) -> list[Rollout]:
        problems = self._built.task.problems("validation")[: self._request.problems]
        meter, rollouts = Meter(), list[Rollout]()
        size = self._base.sampling.batch_size
        engine = BatchedEngine(MeteredEngine(self._engine, meter), size)
        journaled = JournaledEngine(engine, self._run, self._name)
        for batch in journaled.batches(problems, self._sampling):
            rollouts += batch
            total = len(problems) * self._request.k
            self._progress("sampling rollouts", len(rollouts), total)
        self._rates.save(f"{self._name}/sampling", meter)
        return rollouts

    def _critique(self, rollouts: Sequence[Rollout]) -> dict[str, list[CritiquedRollout]]:
        """Return the critiqued rollouts by critic config (`critic_key`); "" without a critic."""
        configs = {critic_key(recipe): recipe for recipe in self._recipes.values()}
        critiqued = {}
        rewarded = with_stored_rewards(self._built, self._run, self._name, rollouts)
        for number, (key, recipe) in enumerate(configs.items()):
            name = f"{self._name}_critic_{number}"
            critic = self._critic(recipe, name) if recipe.critic else None
            self._progress("critiquing rollouts", number, len(configs))
            components = dataclasses.replace(rewarded.components, critic=critic)
            critiqued[key] = verify_and_critique(components, rollouts)
        return critiqued

    def _critic(self, recipe: Recipe, name: str) -> Critic:
        """Return a critic that keeps its critiques in the folder, and its rate."""
        config, meter = recipe.critic, Meter()
        assert config is not None
        critic = MeteredCritic(lambda: self._bare_critic(recipe, config), meter)

        def save(rollouts: Sequence[Rollout], critiques: Sequence[object]) -> None:
            self._run.save_critiques(f"{name}.000", rollouts, critiques)  # type: ignore[arg-type]
            self._rates.save(f"{self._name}/critique/{critic_key(recipe)}", meter)

        saved, journal = self._run.load_named_critiques(name), f"{self._run.identity}/{name}"
        return JournaledCritic(critic, saved, save, journal)

    def _bare_critic(self, recipe: Recipe, config: CriticConfig) -> Critic:
        if self._base.critic == config and self._built.components.critic is not None:
            return self._built.components.critic
        if isinstance(config, PolicyCriticConfig):  # a second one with other settings
            critic = build(self._base.model_copy(update={"critic": config})).components.critic
            assert critic is not None
            return critic
        return build_critic(config, self._built.task, self._templates, seed=recipe.seed)

    @property
    def _templates(self) -> Templates:
        return self._built.components.renderer.templates

    def _locate(self, by_critic: Mapping[str, list[CritiquedRollout]]) -> list[LocatedRollout]:
        """Locate first errors by the task's oracle, else by the first arm's critic that there is."""
        return locate_errors(self._built, by_critic[next((k for k in by_critic if k), "")])

    def _views(
        self, by_critic: Mapping[str, list[CritiquedRollout]]
    ) -> tuple[dict[str, ArmData], dict[str, Context]]:
        """Return each arm's data, and the distinct contexts by the first arm that has them."""
        arms, names, contexts = dict[str, ArmData](), dict[str, str](), dict[str, Context]()
        for arm, recipe in self._recipes.items():
            critic = critic_key(recipe)
            context = build_arm_context(recipe, self._built.task, self._templates)
            view = None
            if context is not None:
                view = names.setdefault(critic + recipe.context.model_dump_json(), arm)
                contexts.setdefault(view, context)
            arms[arm] = ArmData(recipe, by_critic[critic], view)
        return arms, contexts

    def _prepare(
        self, located: Sequence[LocatedRollout], arms: Mapping[str, ArmData],
        contexts: Mapping[str, Context],
    ) -> list[PreparedRollout]:  # fmt: skip
        """Build the contexts and teacher prompts of every view, each from its critic's critiques."""
        language = "lab" if self._base.data.type == "lab" else "english"
        merged = prepare(self._built, located, {}, language=language)
        for view, context in contexts.items():
            pairs = zip(located, arms[view].critiqued, strict=True)
            mine = [dataclasses.replace(one, critiqued=critiqued) for one, critiqued in pairs]
            added = prepare(self._built, mine, {view: context}, language=language)
            merged = [_with_view(*pair) for pair in zip(merged, added, strict=True)]
        return merged

    def _score(
        self, prepared: Sequence[PreparedRollout], views: Sequence[str]
    ) -> tuple[Inspection | None, np.ndarray]:
        """Score the rollouts under every view; None if there is nothing to score."""
        if not any(one.teacher_prompts for one in prepared):
            return None, np.zeros(0)
        folder = self._run.path / "inspection" / self._name
        if not (folder / "inspection.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
            score = self._built.components.policy.score
            write_inspection(
                self._built, prepared, Scorers(score, score), folder, {"contexts": list(views)},
                lambda done, total: self._progress("scoring rollouts", done, total),
            )  # fmt: skip
        seconds = read_json(folder / "inspection.json")["seconds_scoring"]
        self._rates.save(f"{self._name}/scoring", Meter(seconds, _tokens_scored(prepared)))
        kl = pq.read_table(folder / "tokens.parquet", columns=["kl_reverse"])
        return read_inspection(folder), kl.column(0).to_numpy()

    def _teacher(
        self, view: str, rollouts: Sequence[Rollout], prepared: Sequence[PreparedRollout]
    ) -> np.ndarray:
        """Return the share of the teacher's answers that are right, [P, K]; NaN without a context."""
        prompts = {
            rollout.key: one.teacher_prompts[view]
            for rollout, one in zip(rollouts, prepared, strict=True)
            if view in one.teacher_prompts
        }
        sampling = dataclasses.replace(self._sampling, samples=self._request.teacher_samples)
        completions = sample_teacher(
            self._engine, self._run, f"teacher_{view}", rollouts, prompts, sampling,
            batch_size=self._base.sampling.batch_size,
            progress=lambda done, total: self._progress(f"teacher of {view}", done, total),
        )  # fmt: skip
        written = [c for r in rollouts for c in completions.get(r.key, ())]
        verdicts = iter(stored_verdicts(self._built, self._run, f"teacher_{view}", written))
        right = [
            float(np.mean([next(verdicts).correct for _ in completions[rollout.key]]))
            if rollout.key in completions
            else float("nan")
            for rollout in rollouts
        ]
        return np.array(right).reshape(-1, self._request.k)


def untrained(recipes: Mapping[str, Recipe]) -> Recipe:
    """Return a recipe that builds the arms' model, untrained, with the policy's critic if one has it.

    Everything is sampled and scored in this process, whatever the engine of a run.
    """
    arms = list(recipes.values())
    model = next((r for r in arms if isinstance(r.critic, PolicyCriticConfig)), arms[0])
    is_policy = isinstance(model.critic, PolicyCriticConfig)
    return model.model_copy(
        update={
            "train": model.train.model_copy(update={"steps": 0, "staleness": 0}),
            "sampling": model.sampling.model_copy(update={"separate_copy": False}),
            "engine": TransformersEngineConfig(),
            "teacher": LiveTeacherConfig(type="live"),
            "context": ContextConfig(type="none"),
            "objective": DistillationConfig(),
            "distributed": DistributedConfig(),
            "critic": model.critic if is_policy else None,
        }
    )


def critic_key(recipe: Recipe) -> str:
    """Return what two arms with the same critic share; empty without a critic."""
    return "" if recipe.critic is None else recipe.critic.model_dump_json()


def failures(critiqued: Sequence[CritiquedRollout]) -> dict[str, int]:
    """Count the rollouts without a usable critique, by kind of failure."""
    reasons = (c.critique.reason for c in critiqued if isinstance(c.critique, CritiqueFailure))
    return dict(Counter(reasons).most_common())


def dropped(prepared: Sequence[PreparedRollout], view: str) -> dict[str, int]:
    """Count the rollouts without a context in a view, by reason."""
    reasons = (one.dropped[view] for one in prepared if view in one.dropped)
    return dict(Counter(reasons).most_common())


def _with_view(merged: PreparedRollout, added: PreparedRollout) -> PreparedRollout:
    return dataclasses.replace(
        merged,
        contexts={**merged.contexts, **added.contexts},
        dropped={**merged.dropped, **added.dropped},
        teacher_prompts={**merged.teacher_prompts, **added.teacher_prompts},
    )


def _tokens_scored(prepared: Sequence[PreparedRollout]) -> int:
    """Return the tokens of all passes: the student's, and the teacher's under each view."""
    total = 0
    for one in prepared:
        rollout = one.located.critiqued.rollout
        prompts = [rollout.prompt_ids, *one.teacher_prompts.values()]
        total += sum(len(prompt) + len(rollout.token_ids) for prompt in prompts)
    return total
