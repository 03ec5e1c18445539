"""Sampling with vLLM, wherever it runs: seeds, labels, proofs, and a server that comes and goes.

An answer counts only between two looks at the engine's label that both show the label which this very
process gave with its last weights. Whoever loads other weights changes the label first, and an engine
that was started again has none: so no answer can come from weights other than those of its version.
That the weights behind the label are the trainer's is for `fingerprint` to say.

Many ranks ask one engine, each for its share: rank 0 hands new weights over while nobody samples, and
every rank has them proved to it. Whoever finds that the engine was started again gives it the weights
of before, one rank at a time and under a new suffix of the label, so that the others see it too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from selfteach.errors import EngineError
from selfteach.prompts.renderer import Renderer
from selfteach.rollout.journaled_engine import Interrupted
from selfteach.rollout.vllm.weight_check import Fingerprint
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.runtime.seeds import stream_key
from selfteach.types import Problem, Rollout, Sampling

LOOK_EVERY_S = 2.0
"""Between looks at the label while answers come in; so much is asked again when a server dies."""
PAUSE_S = 1.0
"""Between attempts to reach a server that is gone."""
AGAIN = "+"
"""In a label, between the weights' name and that of their loading."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer that is wanted."""

    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int
    temperature: float
    end_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Sampled ids, the end token included, and their log-probabilities at the asked temperature."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """The trainer's weights that train."""

    named: Callable[[], Iterable[tuple[str, Tensor]]]
    """As they are now."""
    tied: Mapping[str, str]
    """Other names of some of them, like that of a tied output head."""


class EngineUnavailable(Exception):
    """Nobody answers, or not as an engine that is well."""


@runtime_checkable
class Sampler(Protocol):
    """A vLLM in this process or behind an address. Any method may raise `EngineUnavailable`."""

    @property
    def where(self) -> str:
        """How messages call it."""
        ...

    @property
    def patience_s(self) -> float:
        """How long it may be gone."""
        ...

    def load(self, named_weights: Iterable[tuple[str, Tensor]], label: str) -> None:
        """Take new weights, forget what caches hold of the old ones, and bear this label (or it and
        a suffix behind `AGAIN`)."""
        ...

    def reload_weights(self, label: str) -> None:
        """Take the weights of the last ``load`` once more, after a restart: with another suffix."""
        ...

    def label(self, ours: str) -> str | None:
        """The label that it bears; None if it has none, or an adapter ``ours`` is not there."""
        ...

    def answers(self, asks: Sequence[Ask], label: str) -> Iterator[tuple[int, Answer]]:
        """Answers with their index, as they come."""
        ...

    def likeliest(self, ask: Ask, label: str) -> Mapping[int, float]:
        """Log-probabilities by id of some of the likeliest first tokens."""
        ...


class Patience:
    """How long an engine may be gone at a stretch."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        """It was there a moment ago."""
        self._deadline = time.monotonic() + self._seconds

    def wait(self, gone: EngineUnavailable) -> None:
        """A pause before the next attempt. Raises ``gone`` when there is to be none."""
        if time.monotonic() >= self._deadline:
            raise gone
        time.sleep(min(PAUSE_S, self._seconds))


class VllmEngine:
    """An `Engine` on top of a `Sampler`; ``owner`` is this run's own name, the same on all ranks."""

    def __init__(
        self,
        sampler: Sampler,
        renderer: Renderer,
        fingerprint: Fingerprint,
        weights: Weights,
        *,
        owner: str,
        end_ids: Sequence[int],
        max_length: int,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        self._sampler, self._renderer, self._fingerprint = sampler, renderer, fingerprint
        self._weights, self._patience_s = weights, sampler.patience_s
        self._end_ids, self._max_length = tuple(end_ids), max_length
        self._owner, self._ranks = owner, ranks
        self._version, self._label, self._loads = 0, "", 0
        self._seen: str | None = None
        # Whole batches and whole updates take turns: no batch sees two versions.
        self._turn = threading.RLock()

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give the engine new weights and have it prove that it has them; all ranks together.

        Raises `EngineError` on all of them if it is gone, is stale, or has others.
        """
        with self._turn:
            self._ranks.wait()  # nobody samples with the old ones
            self._loads += 1
            label = f"selfteach-{self._owner}-{self._loads}-v{version}"
            named = self._to_hand_over(named_weights)
            self._ranks.all_or_raise(lambda: self._hand_over(named, label))
            self._version, self._label = version, label
            logits_V = (
                self._fingerprint.probe.logits()
            )  # a pass of all ranks where weights are sharded
            self._ranks.all_or_raise(lambda: self._patiently(lambda: self._prove_current(logits_V)))

    def _to_hand_over(
        self, named_weights: Iterable[tuple[str, Tensor]]
    ) -> list[tuple[str, Tensor]]:
        """The weights by all their names on rank 0; the others help to gather them, and keep none."""
        many, leads = self._ranks.size > 1, self._ranks.is_main
        # The whole of a sharded model may not fit the device.
        own = {name: w.cpu() if many else w for name, w in named_weights if leads}
        # vLLM's CPU build keeps a packed copy of a tied head, which is loaded by its own name.
        tied = {a: own[name].clone() for a, name in self._weights.tied.items() if name in own}
        return [*own.items(), *tied.items()]

    def _hand_over(self, named: list[tuple[str, Tensor]], label: str) -> None:
        if self._ranks.is_main:
            self._patiently(lambda: self._sampler.load(named, label))

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """One request per answer, each with a seed of its own; prompts are run once per question.

        Raises `EngineError` if a question leaves no room for an answer, or the engine is stale;
        `Interrupted` with the problems that are answered if it is gone for longer than allowed.
        """
        with self._turn:
            if not self._label:  # nobody trains here: the weights are those that were loaded
                self.load_weights(self._weights.named(), 0)
            keys = [(problem, sample) for problem in problems for sample in range(sampling.samples)]
            prompts = {problem.id: self._prompt(problem) for problem in problems}
            asks = [self._ask(prompts[p.id], p, sample, sampling) for p, sample in keys]
            got: dict[int, Answer] = {}
            try:
                self._collect(asks, got)
            except EngineUnavailable as gone:
                whole = _whole_problems(len(problems), sampling.samples, got)
                rollouts = [self._rollout(*keys[i], prompts, got[i]) for i in whole]
                raise Interrupted(
                    self._gone(gone, f"{len(whole)} of {len(asks)}"), rollouts
                ) from None
            return [self._rollout(*keys[i], prompts, got[i]) for i in range(len(asks))]

    def _prompt(self, problem: Problem) -> tuple[int, ...]:
        prompt = self._renderer.solver_prompt(problem)
        if len(prompt) >= self._max_length:
            raise EngineError(
                f"problem {problem.id!r} has a prompt of {len(prompt)} tokens; "
                f"the context holds {self._max_length} with the answer"
            )
        return prompt

    def _ask(
        self, prompt: tuple[int, ...], problem: Problem, sample: int, sampling: Sampling
    ) -> Ask:
        seed = stream_key(problem, sample, sampling, self._version) % 2**63
        room = min(sampling.max_tokens, self._max_length - len(prompt))
        return Ask(prompt, seed, room, sampling.temperature, self._end_ids)

    def _collect(self, asks: Sequence[Ask], got: dict[int, Answer]) -> None:
        """Fill ``got``; what an engine that dies had answered stays in it.

        Raises `EngineUnavailable` if there was no answer for as long as patience lasts.
        """
        patience = Patience(self._patience_s)
        while len(got) < len(asks):
            missing = [i for i in range(len(asks)) if i not in got]
            try:
                if self._be_current():
                    self._fingerprint.verify_restart(self._said(), self._sampler.where)
                for index, answer in self._vouched_for([asks[i] for i in missing]):
                    got[missing[index]] = answer
                    patience.renew()
            except EngineUnavailable as gone:
                patience.wait(gone)

    def _vouched_for(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Answer]]:
        """Answers behind which the label has been seen once more."""
        waiting: list[tuple[int, Answer]] = []
        looked = time.monotonic()
        for numbered in self._sampler.answers(asks, self._label):
            waiting.append(numbered)
            if time.monotonic() > looked + LOOK_EVERY_S:
                self._still_current()
                yield from waiting
                waiting, looked = [], time.monotonic()
        self._still_current()
        yield from waiting

    def _be_current(self) -> bool:
        """Give an engine that was started again its weights, of which it has none then; True if so."""
        before = self._look()
        if before is None:
            with self._ranks.mutex():
                if self._look() is None:  # no other rank was faster
                    self._sampler.reload_weights(self._label)
        self._seen = before or self._look()
        return before is None

    def _prove_current(self, logits_V: Tensor) -> None:
        self._be_current()
        self._fingerprint.check(self._said(), logits_V, self._sampler.where)

    def _still_current(self) -> None:
        # Another suffix: between the looks another rank gave it our weights, and before it had others.
        if self._look() != self._seen or self._seen is None:
            raise EngineUnavailable("it was started again")

    def _look(self) -> str | None:
        label = self._sampler.label(self._label)
        if label is not None and label.partition(AGAIN)[0] != self._label:
            raise EngineError(
                f"engine: {self._sampler.where} is stale: it has the weights {label!r} where this run "
                f"gave it {self._label!r}; another run uses it. Its answers are thrown away and "
                "nothing was trained on them: give each run an engine of its own"
            )
        return label

    def _said(self) -> Mapping[int, float]:
        probe = self._fingerprint.probe
        ask = Ask(probe.prompt_ids, 0, 1, probe.temperature, ())
        return self._sampler.likeliest(ask, self._label)

    def _patiently(self, call: Callable[[], None]) -> None:
        """Call, and call again while the engine is gone; `EngineError` when patience is at an end."""
        patience = Patience(self._patience_s)
        while True:
            try:
                return call()
            except EngineUnavailable as gone:
                try:
                    patience.wait(gone)
                except EngineUnavailable:
                    raise EngineError(self._gone(gone)) from None

    def _gone(self, gone: EngineUnavailable, answered: str | None = None) -> str:
        kept = f"; {answered} answers of this batch are kept" if answered else ""
        return (
            f"engine: {self._sampler.where} is gone ({gone}){kept}: start it again, "
            "then call selfteach resume"
        )

    def _rollout(
        self,
        problem: Problem,
        sample: int,
        prompts: Mapping[str, tuple[int, ...]],
        answer: Answer,
    ) -> Rollout:
        return Rollout(
            problem=problem,
            sample=sample,
            prompt_ids=prompts[problem.id],
            token_ids=answer.ids,
            logps=answer.logps,
            text=self._renderer.decode(answer.ids),
            finished=answer.ids[-1] in self._end_ids,
            policy_version=self._version,
        )


def _whole_problems(problems: int, samples: int, got: Mapping[int, Answer]) -> list[int]:
    """Indices of the answers to problems of which every answer is there."""
    groups = [range(p * samples, (p + 1) * samples) for p in range(problems)]
    return [i for group in groups if all(i in got for i in group) for i in group]
