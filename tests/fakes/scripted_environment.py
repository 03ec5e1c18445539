"""A scripted environment and a scripted engine: every reply and every turn is given beforehand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from selfteach.episodes import EnvironmentReply, Turn
from selfteach.prompts.renderer import Renderer
from selfteach.rollout.prompt_request import PromptRequest
from selfteach.types import Problem, Rollout, Sampling, Verdict

Step = EnvironmentReply | Callable[[Turn], Any] | Exception


class ScriptedEnvironment:
    """Replies with the steps of a script, in order; ends when there is none left."""

    def __init__(
        self,
        steps: Sequence[Step] = (),
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        observation: Any = "",
        verdict: Verdict | None = None,
    ) -> None:
        self.tools, self._steps = tools, list(steps)
        self._observation, self._verdict = observation, verdict
        self.seed: int | None = None
        self.closed = 0
        self.turns: list[Turn] = []

    def reset(self, problem: Problem, seed: int) -> str:
        self.seed = seed
        if isinstance(self._observation, Exception):
            raise self._observation
        return self._observation

    def step(self, turn: Turn) -> Any:
        self.turns.append(turn)
        if not self._steps:
            return EnvironmentReply((), done=True)
        step = self._steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step if isinstance(step, EnvironmentReply) else step(turn)

    def verdict(self) -> Verdict | None:
        return self._verdict

    def close(self) -> None:
        self.closed += 1


class ScriptedTurns:
    """Completes prompts with given texts, by (problem, sample) and turn; records the requests."""

    def __init__(
        self,
        renderer: Renderer,
        turns: Mapping[tuple[str, int], Sequence[str]],
        *,
        max_length: int = 10_000,
    ) -> None:
        self.max_length, self._renderer, self._turns = max_length, renderer, turns
        self.requests: list[list[PromptRequest]] = []
        self.version = 0

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.version = version

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        raise NotImplementedError

    def complete(self, requests: Sequence[PromptRequest], sampling: Sampling) -> list[Rollout]:
        self.requests.append(list(requests))
        return [self._turn(r, sample, sampling) for r in requests for sample in r.samples]

    def _turn(self, request: PromptRequest, sample: int, sampling: Sampling) -> Rollout:
        text = self._turns[request.problem.id, sample][request.turn]
        whole = self._renderer.encode_answer(text)
        ids = whole[: sampling.max_tokens]
        return Rollout(
            request.problem, sample, request.prompt_ids, ids, (-0.25,) * len(ids),
            self._renderer.decode(ids), len(ids) == len(whole), self.version,
        )  # fmt: skip


def hang(turn: Turn) -> EnvironmentReply:
    """Never reply; the thread ends with the process."""
    threading.Event().wait(60)
    raise AssertionError
