"""Asynchronous training: sample and critique later steps while the policy trains on an earlier one.

With ``train.staleness = 2``, and each phase at its own speed::

    rollouts    1   2   3   4   5   6   ...      step t is sampled by the weights after
    critiques       1   2   3   4   5   ...      max(0, t - 1 - staleness) steps: a function
    training            1   2   3   4   ...      of t alone, so that a run is reproducible

Sampling is at most ``staleness`` steps ahead of training, which bounds every queue: a slow critic slows
sampling down. New weights are published when no step is being sampled, so all rollouts of a step are of
one policy version. The rollouts of the next ``staleness`` steps are then in the run folder, and a run
that is resumed there needs no old weights. With ``staleness = 0`` each step is one call of
`step.train_step`, finished before the next begins.

Every step is a call of `step.train_step`, whatever the staleness: its components get an engine that
returns the rollouts whose sampling was started earlier (`StartedEngine`), and a verifier and a critic
that return the results of work started batch by batch (`StartedCritiques`).

A step may sample in rounds (`RolloutRequest.rounds`, DAPO's dynamic sampling): while groups with mixed
verdicts are missing, as many further problems are sampled, by the same weights and in batches that
follow the others of the step. What is sampled next is a function of the verdicts on disk, so a resume
takes the same rounds; every rollout of every round is a sample of the step, and counts in its budget.
It needs ``staleness = 0``: a later round would be sampled by other weights than the first.

An engine that samples with the module that trains samples in this thread, between two updates; only
critiques run in the background. An engine with its own weights samples in the background, too.

All ranks take the same steps in the same order, and only the main thread of each communicates: a rank's
share is sampled and critiqued without the others, and an error of one rank is raised on all when its
result is awaited.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import TypeVar

from torch import Tensor

from selfteach.feedback.critics.journaled_critic import JournaledCritic
from selfteach.feedback.rewards.combined_reward import CombinedReward
from selfteach.feedback.rewards.reward_journal import RewardJournal
from selfteach.protocols import Engine
from selfteach.rollout.journaled_engine import JournaledEngine
from selfteach.runtime.futures import Submit, executor, submit_inline, timed_call
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.metrics import Metrics
from selfteach.trainer.nonfinite import save_nonfinite_batch
from selfteach.trainer.phase_clock import ActiveSpans, PhaseClock
from selfteach.trainer.step import Components, train_step, verify_and_critique
from selfteach.types import (
    Critique,
    CritiquedRollout,
    CritiqueFailure,
    Problem,
    Rollout,
    Sampling,
    TrainingSample,
    Verdict,
)

Started = TypeVar("Started")
Result = TypeVar("Result")
StepResult = tuple[list[TrainingSample], Metrics]
Interruptible = Callable[[], AbstractContextManager[None]]
"""Opens a block in which SIGTERM may end the process."""


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """Describes the rollouts to sample for one step."""

    step: int
    problems: Sequence[Problem]
    version: int
    """Optimizer updates of the weights that sample."""
    weights_lost: bool = False
    """True if these weights no longer exist: the rollouts must be in the resumed run's folder."""
    rounds: int = 0
    """Most further rounds of sampling, while groups with mixed verdicts are missing."""
    further: Sequence[Problem] = ()
    """Problems of the further rounds, in order; none of ``problems``."""


def train_steps(
    components: Components,
    requests: Callable[[int], RolloutRequest],
    steps: Iterable[int],
    run: RunFolder,
    *,
    staleness: int = 0,
    interruptible: Interruptible = nullcontext,
) -> Iterator[tuple[int, StepResult]]:
    """Yield each step with its samples and metrics, after its weights have been published.

    ``requests`` is called when the sampling of a step starts.
    """
    with ExitStack() as stack:
        submit_critique = stack.enter_context(executor(components.critic_threads))
        in_background = components.samples_in_background
        submit_rollouts = stack.enter_context(executor(1)) if in_background else submit_inline
        clock = PhaseClock()

        def start_sampling(step: int) -> StartedStep:
            return StartedStep(
                components, requests(step), run, submit_rollouts, submit_critique, clock,
                interruptible,
            )  # fmt: skip

        def train_on(started: StartedStep, wait_for_started: Callable[[], None]) -> StepResult:
            step = started.request.step
            with save_nonfinite_batch(run, step), clock.training():
                samples, metrics = train_step(
                    started.components(wait_for_started), started.request.problems
                )
                if components.ranks.is_main:
                    run.save_samples(step, samples, components.renderer.shown)
            return samples, {**metrics, **started.row(), **clock.row(started.active)}

        def wait_for_rollouts(started: StartedStep) -> None:
            started.rollouts()

        yield from pipelined(start_sampling, train_on, wait_for_rollouts, steps, staleness)


def pipelined(
    start_sampling: Callable[[int], Started],
    train_on: Callable[[Started, Callable[[], None]], Result],
    wait_for_rollouts: Callable[[Started], None],
    steps: Iterable[int],
    staleness: int,
) -> Iterator[tuple[int, Result]]:
    """Yield steps and their results in order, with sampling up to ``staleness`` steps ahead.

    ``train_on(started, wait_for_started)`` trains on a started step and publishes the new weights;
    before that it calls ``wait_for_started()``, which calls ``wait_for_rollouts`` for every step whose
    sampling has started. With ``staleness = 0`` each step ends before the next begins.
    """
    ahead: deque[Started] = deque()
    upcoming = iter(steps := list(steps))

    def wait_for_started() -> None:
        for started in ahead:
            wait_for_rollouts(started)

    for step in steps:
        for later_step in islice(upcoming, staleness + 1 - len(ahead)):
            ahead.append(start_sampling(later_step))
        yield step, train_on(ahead.popleft(), wait_for_started)


class StartedStep:
    """Samples one step's rollouts in the background and critiques batches as they arrive."""

    def __init__(
        self,
        components: Components,
        request: RolloutRequest,
        run: RunFolder,
        submit_rollouts: Submit,
        submit_critique: Submit,
        clock: PhaseClock,
        interruptible: Interruptible,
    ) -> None:
        self.request, self.active = request, ActiveSpans()
        self.clock, self.interruptible = clock, interruptible
        self._components, self._run, self._submit_rollouts = components, run, submit_rollouts
        self._critiques = StartedCritiques(components, run, request.step, submit_critique, self)
        self._next_batch = 0
        with interruptible():
            self._wait = self._start_sampling(request.problems)
        self._rollouts: list[Rollout] | None = None
        self._rounds, self._mixed = 1, 0

    def _start_sampling(self, problems: Sequence[Problem]) -> Callable[[], list[Rollout]]:
        """Start to sample problems; return what waits for this rank's rollouts."""
        sampling = self._components.sampling
        engine = JournaledEngine(
            self._components.engine, self._run, f"step_{self.request.step:06d}",
            first_batch=self._next_batch, version=self.request.version,
            weights_lost=self.request.weights_lost, on_batch=self._critiques.start,
        )  # fmt: skip
        self._next_batch = engine.next_batch(problems, sampling)
        with self.clock("rollout"):
            return self._components.ranks.all_or_raise(
                lambda: self._submit_rollouts(
                    timed_call, engine.generate, self.active.rollout, problems, sampling
                )
            )

    def rollouts(self) -> list[Rollout]:
        """Wait for this rank's rollouts."""
        if self._rollouts is None:
            waits = self._components.samples_in_background
            with self.clock("rollout", waits=waits):
                self._rollouts = self._components.ranks.all_or_raise(self._wait)
            self._rollouts += self._further_rollouts()
        return self._rollouts

    def _further_rollouts(self) -> list[Rollout]:
        """Sample further rounds while groups with mixed verdicts are missing; return their rollouts."""
        rollouts: list[Rollout] = []
        further = list(self.request.further)
        for _ in range(self.request.rounds):
            self._mixed = self._critiques.mixed_groups()
            missing = len(self.request.problems) - self._mixed
            problems, further = further[:missing], further[missing:]
            if not problems:
                return rollouts
            self._critiques.reopen()
            rollouts += self._components.ranks.all_or_raise(self._start_sampling(problems))
            self._rounds += 1
        if self.request.rounds:
            self._mixed = self._critiques.mixed_groups()
        return rollouts

    def row(self) -> Metrics:
        """Return the metrics of a step that samples in rounds; empty for another one."""
        if not self.request.rounds:
            return {}
        return {"sampling_rounds": self._rounds, "mixed_groups": self._mixed}

    def components(self, wait_for_started: Callable[[], None]) -> Components:
        """Return components for `train_step` that wait for this step's rollouts and critiques."""
        engine = StartedEngine(self, self._components.engine, wait_for_started)
        return dataclasses.replace(
            self._components,
            engine=engine,
            verify=self._critiques.verify,
            reward=None if self._components.reward is None else self._critiques.verdicts,
            critic=None if self._components.critic is None else self._critiques,
        )


class StartedEngine:
    """Implements `Engine` for a step whose sampling has started: `generate` waits for the rollouts."""

    def __init__(
        self, started: StartedStep, engine: Engine, wait_for_started: Callable[[], None]
    ) -> None:
        self._started, self._engine = started, engine
        self._wait_for_started = wait_for_started

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """Wait for the rollouts of the step's problems."""
        assert problems is self._started.request.problems
        with self._started.interruptible():
            return self._started.rollouts()

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights once no later step is being sampled with the old ones."""
        self._wait_for_started()
        self._engine.load_weights(named_weights, version)


class StartedCritiques:
    """Verifies and critiques a step's rollouts in the background, batch by batch.

    Replaces both the step's verifier and its critic. Critiques are journaled in the run folder.
    """

    def __init__(
        self, components: Components, run: RunFolder, step: int, submit: Submit,
        started: StartedStep,
    ) -> None:  # fmt: skip
        self._components, self._run, self._step = components, run, step
        self._submit, self._started = submit, started
        self._saved = run.load_critiques(step)
        self._batches: list[Callable[[], list[CritiquedRollout]]] = []
        self._results: Mapping[tuple[str, int], CritiquedRollout] | None = None
        self._verdicts: dict[tuple[str, str], Verdict] = {}

    def start(self, number: int, rollouts: Sequence[Rollout]) -> None:
        """Start to verify and critique one batch of rollouts."""
        spans = self._started.active.critique
        components = self._journaled(f"step_{self._step:06d}.{number:03d}")
        reward = self._components.reward
        waits = isinstance(reward, CombinedReward) and reward.in_main_thread
        submit = partial if waits else self._submit  # a call of `partial` is made by `_collect`
        submitted = submit(timed_call, verify_and_critique, spans, components, rollouts)
        self._batches.append(cache(submitted))

    def reopen(self) -> None:
        """Expect further batches of the step, on all ranks."""
        self._results = None

    def mixed_groups(self) -> int:
        """Return the number of groups, of all ranks, whose rollouts differ in reward."""
        rewards: defaultdict[str, set[float]] = defaultdict(set)
        for critiqued in self._collect().values():
            if (reward := critiqued.verdict.reward) is not None:
                rewards[critiqued.rollout.problem.id].add(reward)
        mixed = sum(len(outcomes) > 1 for outcomes in rewards.values())
        return self._components.ranks.sum(mixed)

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Return the verdict of one of the step's rollouts."""
        self._collect()
        return self._verdicts[problem.id, text]

    def verdicts(self, judged: Sequence[tuple[Rollout, Verdict]]) -> list[Verdict]:
        """Return the verdicts of the step's rollouts, with their rewards."""
        return [self._collect()[rollout.key].verdict for rollout, _ in judged]

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        """Return the critiques of the step's rollouts, in order."""
        critiques = [self._collect()[rollout.key].critique for rollout, _ in judged]
        return [critique for critique in critiques if critique is not None]

    def _collect(self) -> Mapping[tuple[str, int], CritiquedRollout]:
        if self._results is None:
            in_background = self._components.critic_threads > 0
            # A critic in this process may have swapped weights: it must not be interrupted.
            guard = self._started.interruptible if in_background else nullcontext
            with self._started.clock("critique", waits=in_background), guard():
                critiqued = self._components.ranks.all_or_raise(
                    lambda: [rollout for batch in self._batches for rollout in batch()]
                )
            self._results = {c.rollout.key: c for c in critiqued}
            self._verdicts = {
                (c.rollout.problem.id, c.rollout.answer_text): c.verdict
                for c in critiqued
                if c.rollout.verdict is None  # else an environment gave it
            }
        return self._results

    def _journaled(self, name: str) -> Components:
        critic, run, components = self._components.critic, self._run, self._components
        # Ranks may request the same critique, and one of them pays.
        buyer = f"{run.identity}/{components.ranks.rank}"
        if isinstance(components.reward, CombinedReward):
            update = (self._step - 1) * components.num_iterations
            reward = components.reward.at(update, RewardJournal(run, name, buyer))
            components = dataclasses.replace(components, reward=reward)
        if critic is None:
            return components

        def save(
            rollouts: Sequence[Rollout], critiques: Sequence[Critique | CritiqueFailure | None]
        ) -> None:
            run.save_critiques(name, rollouts, critiques)

        journaled = JournaledCritic(critic, self._saved, save, f"{buyer}/{name}")
        return dataclasses.replace(components, critic=journaled)
