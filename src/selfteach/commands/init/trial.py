"""Samples a few problems with the untrained model, and says what its answers are like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from selfteach.commands.init.recipe_draft import trained_alike
from selfteach.config.recipe import Recipe
from selfteach.tasks.verifiers import verdicts_of
from selfteach.trainer.build import build, set_threads
from selfteach.types import Rollout, Sampling, Verdict

PROBLEMS = 8
"""Training problems that are tried; problems of the test are never used."""
FEW_IN_FORM, MANY_CUT, TOO_EASY = 0.7, 0.1, 0.9
"""Shares from which on a line of advice is printed."""
LONGEST_SHOWN = 1200
"""Characters of an answer that are printed."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Holds the untrained model's answers to a few training problems, with their verdicts."""

    rollouts: Sequence[Rollout]
    verdicts: Sequence[Verdict]
    max_tokens: int

    @property
    def solved(self) -> float:
        """Return the share of correct answers."""
        return fmean(verdict.correct for verdict in self.verdicts)

    @property
    def in_form(self) -> float:
        """Return the share of answers whose final answer could be read."""
        return fmean(verdict.formatted for verdict in self.verdicts)

    @property
    def cut(self) -> float:
        """Return the share of answers that were cut at ``sampling.max_tokens``."""
        return fmean(not rollout.finished for rollout in self.rollouts)

    @property
    def problems(self) -> int:
        """Return the number of problems."""
        return len({rollout.problem.id for rollout in self.rollouts})

    @property
    def mixed(self) -> int:
        """Return the number of problems with a correct and a wrong answer: what GRPO learns from."""
        by_problem: dict[str, set[bool]] = {}
        for rollout, verdict in zip(self.rollouts, self.verdicts, strict=True):
            by_problem.setdefault(rollout.problem.id, set()).add(verdict.correct)
        return sum(len(outcomes) == 2 for outcomes in by_problem.values())


def try_model(recipe: Recipe, samples: int) -> Trial:
    """Sample ``samples`` answers to each of the first training problems. Raises what a build raises."""
    set_threads(recipe.train.threads)
    built = build(trained_alike(recipe))
    sampling = Sampling(
        samples, recipe.sampling.temperature, recipe.sampling.max_tokens, recipe.seed
    )
    rollouts = built.components.engine.generate(built.task.train[:PROBLEMS], sampling)
    verdicts = verdicts_of(rollouts, built.components.verify, None)
    return Trial(rollouts, verdicts, recipe.sampling.max_tokens)


def describe_trial(trial: Trial) -> Iterator[str]:
    """Yield lines for a person: one answer in full, form, lengths and solve rate, and advice."""
    shown = next(
        (
            i
            for i, verdict in enumerate(trial.verdicts)
            if verdict.formatted and not verdict.correct
        ),
        0,
    )
    rollout, verdict = trial.rollouts[shown], trial.verdicts[shown]
    yield f"# an answer to {rollout.problem.label}"
    text = rollout.text
    yield text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
    gold = f", the correct one is {rollout.problem.answer!r}" if rollout.problem.answer else ""
    read = "no final answer was read" if verdict.parsed is None else f"read: {verdict.parsed!r}"
    yield f"({read}{gold})"
    lengths = [rollout.length for rollout in trial.rollouts]
    yield f"# {len(lengths)} answers of the untrained model to {trial.problems} training problems"
    yield f"form:   {trial.in_form:.0%} have a final answer that could be read"
    yield (
        f"length: {fmean(lengths):.0f} tokens on average, {max(lengths)} the longest; {trial.cut:.0%} "
        f"were cut at {trial.max_tokens}"
    )
    yield (
        f"solved: {trial.solved:.0%}; {trial.mixed} of {trial.problems} problems have right and wrong "
        "answers"
    )
    yield from advice(trial)


def advice(trial: Trial) -> Iterator[str]:
    """Yield what to change before training, a line each; nothing where all looks well."""
    if trial.cut >= MANY_CUT:
        yield (
            f"note: {trial.cut:.0%} of the answers were cut: raise sampling.max_tokens, or ask for "
            "shorter ones (model.templates)"
        )
    if trial.in_form < FEW_IN_FORM and trial.cut < 1 - trial.in_form:
        yield (
            "note: many answers are not in the form that the prompt asks for: try model.templates = "
            '"steps_few_shot" or "free_few_shot", or data.answer_in = "tag_or_boxed", and '
            "selfteach check --show-prompts"
        )
    if trial.solved >= TOO_EASY:
        yield (
            "note: the model solves nearly all of them: there is little to learn; selfteach select "
            "keeps the problems that are hard for it"
        )
    elif trial.solved == 0:
        yield (
            "note: none is solved: rewards alone (grpo) teach nothing until some are; use easier "
            "problems, more answers each (train.group_size), or feedback"
        )
