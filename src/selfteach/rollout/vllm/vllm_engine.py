"""Samples rollouts with vLLM, in this process or behind an address, and survives server restarts.

What samples is a `SyncedSampler`: one vLLM, or a fleet of servers. It returns completions of the
newest weights alone. Several ranks may sample from it, each its share of the rollouts: rank 0 sends
new weights while no rank samples, and every rank runs the weight check.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from selfteach.errors import EngineError
from selfteach.prompts.renderer import Renderer
from selfteach.rollout.journaled_engine import SamplingInterrupted
from selfteach.rollout.prompt_request import PromptRequest
from selfteach.runtime.dispatcher import Dispatcher
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.runtime.seeds import stream_key
from selfteach.types import Problem, Rollout, Sampling

RETRY_INTERVAL_S = 1.0
"""Between attempts to reach a server that is unavailable."""
RELOAD_SEPARATOR = "+"
"""In a label, between the name of the weights and the id of one load of them."""
LABEL_PREFIX = "selfteach"
"""Begins all labels; the run's id follows, then the number of the load and the version."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """Describes one completion to sample: token ids in, sampling parameters, end tokens."""

    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int
    temperature: float
    end_ids: tuple[int, ...]
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def parameters(self) -> dict[str, Any]:
        """Return vLLM's sampling parameters, whatever the model's generation config says.

        A completion ends at our end tokens only.
        """
        return {
            "max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed,
            "stop_token_ids": list(self.end_ids), "top_p": self.top_p, "top_k": self.top_k,
            "min_p": self.min_p, "repetition_penalty": 1.0, "ignore_eos": True,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Completion:
    """Holds sampled ids, the end token included, and their log-probabilities (nats) at the requested
    temperature."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TrainableWeights:
    """Gives access to the trainer's trainable weights."""

    named: Callable[[], Iterable[tuple[str, Tensor]]]
    """Returns the present weights by name."""
    tied: Mapping[str, str]
    """From another name of a weight, like that of a tied output head, to its name in ``named``."""


class EngineUnavailable(Exception):
    """Is raised when the engine is unreachable or returned a server error."""


@runtime_checkable
class VllmBackend(Protocol):
    """Drives a vLLM in this process or behind an address.

    Any method may raise `EngineUnavailable`.
    """

    @property
    def name(self) -> str:
        """Return the engine's name in messages."""
        ...

    @property
    def patience_s(self) -> float:
        """Return how long the engine may be unavailable, in seconds."""
        ...

    @property
    def main_reloads(self) -> bool:
        """Return True if a restarted engine can get its weights again from rank 0 alone."""
        ...

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], label: str) -> None:
        """Load new weights, empty the prefix cache of the old ones, and set this label (or the label
        with a suffix behind `RELOAD_SEPARATOR`)."""
        ...

    def reload_weights(self, label: str) -> None:
        """Load the weights of the last ``load_weights`` again after a restart, with a new suffix."""
        ...

    def current_label(self, expected: str) -> str | None:
        """Return the label of the loaded weights; None if they have none, or if an adapter of the
        ``expected`` name is not loaded."""
        ...

    def complete(
        self, requests: Sequence[CompletionRequest], label: str
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the request, completion) in the order of arrival."""
        ...

    def top_logprobs(self, request: CompletionRequest, label: str) -> Mapping[int, float]:
        """Return log-probabilities (nats) by id of some of the most likely first tokens."""
        ...


@dataclass(frozen=True, slots=True)
class SentWeights:
    """Describes the newest weights: their label, and the trainer's logits [V] of the probe."""

    label: str
    logits_V: Tensor


@runtime_checkable
class SyncedSampler(Protocol):
    """Samples with the weights that were sent last, and with no others.

    Any method may raise `EngineUnavailable`, or `EngineError` if waiting is of no use.
    """

    @property
    def name(self) -> str:
        """Return the engine's name in messages."""
        ...

    @property
    def patience_s(self) -> float:
        """Return how long the engine may be unavailable, in seconds."""
        ...

    def send(self, named_weights: Sequence[tuple[str, Tensor]], weights: SentWeights) -> None:
        """Load new weights; rank 0 alone calls this, again if the engine was unavailable."""
        ...

    def verify(self, weights: SentWeights) -> None:
        """Check that the engine uses the weights that were sent; every rank calls this."""
        ...

    def complete(self, requests: Sequence[CompletionRequest]) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the request, completion of the newest weights) in any order."""
        ...


class RetryWindow:
    """Limits how long an engine may be unavailable without interruption."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.restart()

    def restart(self) -> None:
        """Start the window again: the engine has just replied."""
        self._deadline = time.monotonic() + self._seconds

    def wait(self, error: EngineUnavailable) -> None:
        """Sleep before the next attempt; raises ``error`` when the window is over."""
        if time.monotonic() >= self._deadline:
            raise error
        time.sleep(min(RETRY_INTERVAL_S, self._seconds))


class VllmEngine:
    """Implements `Engine` on a `SyncedSampler`; ``run_id`` is unique to this run, equal on all ranks.

    ``logits`` returns the trainer's present logits [V] of the probe (`WeightCheck`).
    """

    def __init__(
        self,
        sampler: SyncedSampler,
        renderer: Renderer,
        logits: Callable[[], Tensor],
        weights: TrainableWeights,
        *,
        run_id: str,
        end_ids: Sequence[int],
        max_length: int,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        self._sampler, self._renderer, self._logits = sampler, renderer, logits
        self._weights = weights
        self._end_ids, self.max_length = tuple(end_ids), max_length
        self._run_id, self._ranks = run_id, ranks
        self._version, self._loads = 0, 0
        # A whole batch or a whole update holds it: no batch is sampled from two versions.
        self._lock = threading.RLock()

    @property
    def fleet(self) -> Dispatcher | None:
        """Return the dispatcher of several servers; None for one engine."""
        return getattr(self._sampler, "fleet", None)

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send the engine new weights and check that it uses them; all ranks call this together.

        Raises `EngineError` on all ranks if the engine is unavailable, stale, or has other weights.
        """
        with self._lock:
            self._ranks.barrier()  # no rank samples with the old weights
            self._loads += 1
            label = f"{LABEL_PREFIX}-{self._run_id}-{self._loads}-v{version}"
            named = self._gather(named_weights)
            # A forward pass of all ranks where the weights are sharded.
            weights = SentWeights(label, self._logits())
            self._ranks.all_or_raise(lambda: self._send(named, weights))
            self._version = version
            self._ranks.all_or_raise(lambda: self._retry(lambda: self._sampler.verify(weights)))

    def _gather(self, named_weights: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """Return the weights under all their names on rank 0; other ranks help to gather them."""
        many, is_main = self._ranks.size > 1, self._ranks.is_main
        # The full weights of a sharded model may not fit the device.
        weights = {name: w.cpu() if many else w for name, w in named_weights if is_main}
        # vLLM's CPU build keeps a packed copy of a tied head, which is loaded by a separate name.
        tied = {
            alias: weights[name] for alias, name in self._weights.tied.items() if name in weights
        }
        return [*weights.items(), *tied.items()]

    def _send(self, named: list[tuple[str, Tensor]], weights: SentWeights) -> None:
        if self._ranks.is_main:
            self._retry(lambda: self._sampler.send(named, weights))

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """Sample with one request per rollout, each with its own seed; the engine's prefix cache
        computes a prompt once per problem.

        Raises `EngineError` if a prompt leaves no room for a completion, or the engine is stale;
        `SamplingInterrupted` with the finished problems if the engine is unavailable for too long.
        """
        samples = tuple(range(sampling.samples))
        prompts = [(problem, self._renderer.solver_prompt(problem)) for problem in problems]
        return self.complete([PromptRequest(*prompt, samples) for prompt in prompts], sampling)

    def complete(self, requests: Sequence[PromptRequest], sampling: Sampling) -> list[Rollout]:
        """Sample completions of given prompts, equally many of each: `CompletionEngine`.

        The engine's prefix cache holds the earlier turns of an episode. Raises what `generate` does.
        """
        with self._lock:
            if not self._loads:  # nothing trains here: use the weights as they were loaded
                self.load_weights(self._weights.named(), 0)
            keys = [(request, sample) for request in requests for sample in request.samples]
            needed = [self._request(request, sample, sampling) for request, sample in keys]
            completions: dict[int, Completion] = {}
            try:
                self._collect(needed, completions)
            except EngineUnavailable as error:
                each = len(keys) // max(1, len(requests))
                finished = _finished_problems(len(requests), each, completions)
                rollouts = [self._rollout(*keys[i], completions[i]) for i in finished]
                raise SamplingInterrupted(
                    self._unavailable(error, f"{len(finished)} of {len(keys)}"),
                    rollouts,
                    bare=self._unavailable(error),
                ) from None
            return [self._rollout(*key, completions[i]) for i, key in enumerate(keys)]

    def _request(
        self, request: PromptRequest, sample: int, sampling: Sampling
    ) -> CompletionRequest:
        problem, prompt = request.problem, request.prompt_ids
        if len(prompt) >= self.max_length:
            raise EngineError(
                f"problem {problem.id!r} has a prompt of {len(prompt)} tokens; "
                f"it leaves no room for a completion in the context of {self.max_length}"
            )
        key = stream_key(problem, sample, sampling, self._version, request.turn)
        max_tokens = min(sampling.max_tokens, self.max_length - len(prompt))
        return CompletionRequest(
            prompt, key % 2**63, max_tokens, sampling.temperature, self._end_ids,
            top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p,
        )  # fmt: skip

    def _collect(
        self, requests: Sequence[CompletionRequest], completions: dict[int, Completion]
    ) -> None:
        """Fill ``completions``; those received before an engine died stay in it.

        Raises `EngineUnavailable` if nothing arrives for a whole retry window.
        """
        window = RetryWindow(self._sampler.patience_s)
        while len(completions) < len(requests):
            missing = [i for i in range(len(requests)) if i not in completions]
            try:
                for index, completion in self._sampler.complete([requests[i] for i in missing]):
                    completions[missing[index]] = completion
                    window.restart()
            except EngineUnavailable as error:
                window.wait(error)

    def _retry(self, call: Callable[[], None]) -> None:
        """Call until the engine is available; `EngineError` when the retry window is over."""
        window = RetryWindow(self._sampler.patience_s)
        while True:
            try:
                return call()
            except EngineUnavailable as error:
                try:
                    window.wait(error)
                except EngineUnavailable:
                    raise EngineError(self._unavailable(error)) from None

    def _unavailable(self, error: EngineUnavailable, received: str | None = None) -> str:
        saved = f"; {received} rollouts of this batch are saved" if received else ""
        return (
            f"engine: {self._sampler.name} is unavailable ({error}){saved}: restart it, "
            "then call selfteach resume"
        )

    def _rollout(self, request: PromptRequest, sample: int, completion: Completion) -> Rollout:
        return Rollout(
            problem=request.problem,
            sample=sample,
            prompt_ids=request.prompt_ids,
            token_ids=completion.ids,
            logps=completion.logps,
            text=self._renderer.decode(completion.ids),
            finished=completion.ids[-1] in self._end_ids,
            policy_version=self._version,
        )


def _finished_problems(
    problems: int, samples: int, completions: Mapping[int, Completion]
) -> list[int]:
    """Return the indices of the completions of problems whose whole group is there."""
    groups = [range(p * samples, (p + 1) * samples) for p in range(problems)]
    return [i for group in groups if all(i in completions for i in group) for i in group]
