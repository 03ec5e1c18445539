"""Samples episodes: turns of the policy through an engine, and an environment's replies between them.

All episodes of a batch that go on sample their next turn side by side, and so do their environments
reply. What an environment replies is rendered by the chat template once and appended as token ids;
nothing that was sampled is tokenised again. Random streams are keyed by (seed, problem, sample, turn,
version), and so is an environment's seed, so an episode depends on no other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from selfteach.episodes import EnvironmentReply, EventKind, Turn
from selfteach.errors import EngineError
from selfteach.prompts.episode_tokens import with_observation
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.tool_calls import Role
from selfteach.protocols import Environment
from selfteach.rollout.journaled_engine import SamplingInterrupted
from selfteach.rollout.prompt_request import CompletionEngine, ContinuingEngine, PromptRequest
from selfteach.rollout.running_episode import RunningEpisode, role_of
from selfteach.runtime.deadline_calls import CallFailure, call_all
from selfteach.runtime.seeds import EpisodeKey, SeedBy, episode_seed
from selfteach.types import Problem, Rewards, Rollout, Sampling, Verdict

BROKEN = Verdict(False, False, None, rewards=Rewards(None, {}))
"""The verdict on an episode whose environment has failed."""
REPLY_EVENTS: tuple[EventKind, ...] = (
    "tool_result", "tool_error", "malformed_call", "observation",
)  # fmt: skip
"""Events that an environment may give to a reply; the others are the engine's."""


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """Limits what an episode and its environment may take."""

    max_turns: int = 8
    """Turns of the policy."""
    deadline_s: float = 60.0
    """Seconds for each reply of an environment."""
    threads: int = 32
    """Environments that reply at the same time."""
    max_reply_chars: int = 4000
    """Characters of a reply; of a longer one the middle is left out, and its place says so."""
    seed_by: SeedBy = "sample"
    """Whether each episode has a seed of its own, or all of a problem the same."""


class EpisodeEngine:
    """Implements `Engine` on a `CompletionEngine` and environments, one of them per episode.

    An environment that raises or does not reply in time ends its episode, as an event. So does a turn
    that is cut at ``sampling.max_tokens``, and an episode without a turn or a token left. Raises
    `EngineError` for a chat template to which replies cannot be appended. Environments are closed
    however a batch ends.
    """

    def __init__(
        self,
        engine: CompletionEngine,
        renderer: Renderer,
        make_environment: Callable[[], Environment],
        limits: EpisodeLimits,
    ) -> None:
        self._engine, self._renderer = engine, renderer
        self._make_environment, self._limits = make_environment, limits
        self._version = 0
        self._usable_roles: set[Role] = set()
        if limits.max_turns > 1:
            self._require_role("tool" if make_environment().tools else "user")

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights into the engine."""
        self._engine.load_weights(named_weights, version)
        self._version = version

    @property
    def max_length(self) -> int:
        """Return the most tokens of a prompt and its episode together."""
        return self._engine.max_length

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """Run ``sampling.samples`` episodes of each problem, all of them side by side.

        Raises `EngineError` if a prompt leaves no room for a turn, or if no environment can begin;
        `SamplingInterrupted` with the complete groups if the engine fails.
        """
        samples = range(sampling.samples)
        episodes = [
            RunningEpisode(p, n, self._seed(p, EpisodeKey(sampling.seed, n, self._version)))
            for p in problems
            for n in samples
        ]
        with self._environments(episodes):
            for episode in episodes:
                shown = with_observation(episode.problem, episode.observation)
                episode.prompt_ids = self._renderer.solver_prompt(shown)
            return self._run(episodes, sampling, len(samples))

    def complete(self, requests: Sequence[PromptRequest], sampling: Sampling) -> list[Rollout]:
        """Run episodes from given first prompts, such as the self-teacher's.

        Raises what `generate` does, and `EngineError` for an environment that shows something before
        the first turn, unless the prompts are of earlier episodes and show it.
        """
        rows = [
            (r, n, key)
            for r in requests
            for n, key in zip(r.samples, r.episodes or [None] * len(r.samples), strict=True)
        ]
        episodes = []
        for request, n, key in rows:
            key = key or EpisodeKey(sampling.seed, n, self._version)
            seed = self._seed(request.problem, key)
            episodes.append(RunningEpisode(request.problem, n, seed, prompt_ids=request.prompt_ids))
        with self._environments(episodes):
            pairs = zip(episodes, rows, strict=True)
            if any(episode.observation and key is None for episode, (_, _, key) in pairs):
                raise EngineError(
                    "the environment shows something before the first turn, so its episodes cannot "
                    "begin with another prompt, as the teacher's"
                )
            return self._run(episodes, sampling, len(requests[0].samples) if requests else 0)

    def _run(
        self, episodes: list[RunningEpisode], sampling: Sampling, group_size: int
    ) -> list[Rollout]:
        """Run episodes to their ends; the groups are what an engine that fails leaves complete."""
        for episode in episodes:
            if len(episode.prompt_ids) >= self.max_length:
                raise EngineError(
                    f"problem {episode.problem.id!r} has a prompt of {len(episode.prompt_ids)} tokens; "
                    f"it leaves no room for a turn in the context of {self.max_length}"
                )
        active = episodes
        with self._continuing_sequences():
            while active:
                try:
                    turns = self._sample_turns(active, sampling)
                except SamplingInterrupted as failure:
                    raise self._interrupted(failure, episodes, group_size) from None
                for episode, turn in zip(active, turns, strict=True):
                    episode.add_turn(turn)
                self._reply(list(zip(active, turns, strict=True)))
                active = [episode for episode in active if not episode.is_over]
        self._judge(episodes)
        return [episode.rollout() for episode in episodes]

    def _continuing_sequences(self) -> AbstractContextManager[None]:
        """Have an engine in this process hold keys and values between turns; servers do anyway."""
        several_turns = self._limits.max_turns > 1
        if several_turns and isinstance(self._engine, ContinuingEngine):
            return self._engine.continuing_sequences()
        return nullcontext()

    def _seed(self, problem: Problem, key: EpisodeKey) -> int:
        return episode_seed(problem, key, self._limits.seed_by)

    @contextmanager
    def _environments(self, episodes: Sequence[RunningEpisode]) -> Iterator[None]:
        """Begin the episodes, and close their environments in the end, whatever happens."""
        try:
            self._reset(episodes)
            yield
        finally:
            closing = [getattr(episode.environment, "close", None) for episode in episodes]
            self._call([close for close in closing if callable(close)])

    def _reset(self, episodes: Sequence[RunningEpisode]) -> None:
        """Begin the episodes: store what each environment shows first, or why it cannot begin.

        Raises `EngineError` if not one can begin: there would be nothing to learn from.
        """

        def begin(episode: RunningEpisode) -> object:
            environment = episode.environment = self._make_environment()
            return environment.reset(episode.problem, episode.seed)

        begun = self._call([partial(begin, episode) for episode in episodes])
        for episode, result in zip(episodes, begun, strict=True):
            if isinstance(result, CallFailure):
                episode.broken = result.kind, _plain(result.detail)
            elif isinstance(result, str):
                episode.observation = self._shortened(result)
            else:
                episode.broken = "failed", f"reset returned {_named(result)} and not a text"
        broken = [episode.broken for episode in episodes if episode.broken is not None]
        if broken and len(broken) == len(episodes):
            raise EngineError(
                f"none of the {len(episodes)} environments of a batch could begin, so nothing was "
                f"sampled; the first: {broken[0][1]}"
            )

    def _sample_turns(self, active: Sequence[RunningEpisode], sampling: Sampling) -> list[Rollout]:
        """Sample the next turn of each episode; a prompt that several share is one request."""
        groups: defaultdict[Any, list[RunningEpisode]] = defaultdict(list)
        for episode in active:
            groups[episode.problem.id, episode.turns, episode.ids].append(episode)
        if len({len(group) for group in groups.values()}) > 1:
            groups = defaultdict(list, {i: [episode] for i, episode in enumerate(active)})
        requests = [
            PromptRequest(g[0].problem, g[0].ids, tuple(e.sample for e in g), g[0].turns)
            for g in groups.values()
        ]
        sampled = iter(self._engine.complete(requests, sampling))
        turns = {id(episode): next(sampled) for group in groups.values() for episode in group}
        return [turns[id(episode)] for episode in active]

    def _reply(self, turns: Sequence[tuple[RunningEpisode, Rollout]]) -> None:
        """Have the environments reply to the turns; end the episodes that are over."""
        waiting: list[tuple[RunningEpisode, Callable[[], Any]]] = []
        for episode, turn in turns:
            if episode.broken is not None:
                episode.end(*episode.broken)
            elif not turn.finished:
                episode.end("truncated", "the turn reached its token limit")
            else:
                assert episode.environment is not None
                step = partial(episode.environment.step, self._read(turn.text))
                waiting.append((episode, step))
        replies = self._call([step for _, step in waiting])
        for (episode, _), reply in zip(waiting, replies, strict=True):
            if isinstance(reply, CallFailure):
                episode.broken = reply.kind, _plain(reply.detail)
            elif (broken := broken_reply(reply)) is not None:
                episode.broken = "failed", broken
            else:
                self._take(episode, reply)
                continue
            episode.end(*episode.broken)

    def _take(self, episode: RunningEpisode, reply: EnvironmentReply) -> None:
        """Append a reply to an episode that goes on; end one that is over, or has nothing left."""
        reply = EnvironmentReply(tuple(map(self._shortened, reply.texts)), reply.event, reply.done)
        text = "\n".join(reply.texts)
        if reply.done:
            if text:
                episode.note(reply.event, text)
            episode.end()
        elif episode.turns >= self._limits.max_turns:
            episode.note(reply.event, text)
            episode.end("budget", f"no turn is left of {self._limits.max_turns}")
        elif isinstance(ids := self._encoded(reply), str):
            episode.note(reply.event, text)
            episode.broken = "failed", ids
            episode.end(*episode.broken)
        else:
            length = len(episode.ids) + len(ids)
            if length >= self.max_length:
                episode.note(reply.event, text)
                episode.end("budget", f"no room is left in {self.max_length} tokens")
            else:
                episode.add_reply(reply, ids)

    def _encoded(self, reply: EnvironmentReply) -> tuple[int, ...] | str:
        """Return a reply's ids, or why the chat template cannot render it behind a turn."""
        try:
            self._require_role(role_of(reply))
            return self._renderer.reply(reply.texts, role_of(reply))
        except EngineError as error:  # an environment with tools may write as the user, too
            return _plain(str(error))

    def _require_role(self, role: Role) -> None:
        """Raise `EngineError` if messages of a role cannot follow a turn as it was sampled."""
        if role not in self._usable_roles:
            self._renderer.require_replies(role)
            self._usable_roles.add(role)

    def _read(self, text: str) -> Turn:
        tool_format = self._renderer.tool_format
        return Turn(text) if tool_format is None else tool_format.read(text)

    def _interrupted(
        self, failure: SamplingInterrupted, episodes: Sequence[RunningEpisode], samples: int
    ) -> SamplingInterrupted:
        """Return the engine's failure with the groups whose episodes are all over, judged."""
        groups = [episodes[start : start + samples] for start in range(0, len(episodes), samples)]
        over = [e for group in groups if all(e.is_over for e in group) for e in group]
        self._judge(over)
        saved = f"{len(over)} of {len(episodes)} episodes of this batch are saved"
        rollouts = [episode.rollout() for episode in over]
        return SamplingInterrupted(f"{failure.bare} ({saved})", rollouts, bare=failure.bare)

    def _judge(self, episodes: Sequence[RunningEpisode]) -> None:
        """Store the verdicts of the environments that give one.

        A rollout whose environment is broken is no success and has no reward: it is not the policy's
        doing, so it has no advantage.
        """
        usable = [(e, e.environment) for e in episodes if e.broken is None and e.environment]
        for episode in episodes:
            if episode.broken is not None:
                episode.verdict = BROKEN
        verdicts = self._call([environment.verdict for _, environment in usable])
        for (episode, _), verdict in zip(usable, verdicts, strict=True):
            if isinstance(verdict, CallFailure):
                episode.note(verdict.kind, _plain(verdict.detail))
                episode.verdict = BROKEN
            elif isinstance(verdict, Verdict | None):
                episode.verdict = verdict
            else:
                episode.note("failed", f"verdict returned {_named(verdict)} and not a Verdict")
                episode.verdict = BROKEN

    def _call(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        limits = self._limits
        return call_all(calls, deadline_s=limits.deadline_s, threads=limits.threads)

    def _shortened(self, text: str) -> str:
        """Return a text that is short enough; where its middle is left out it says so."""
        text, most = _plain(text), self._limits.max_reply_chars
        if len(text) <= most:
            return text
        head, tail = text[: most // 2], text[len(text) - (most - most // 2) :]
        return f"{head}\n[{len(text) - most} characters are left out here]\n{tail}"


def broken_reply(reply: object) -> str | None:
    """Return what is broken about a reply; None if nothing is."""
    if not isinstance(reply, EnvironmentReply):
        return f"step returned {_named(reply)} and not an EnvironmentReply"
    if isinstance(reply.texts, str) or not all(isinstance(text, str) for text in reply.texts):
        return "step returned an EnvironmentReply whose texts are no tuple of texts"
    if reply.event not in REPLY_EVENTS:
        return f"step returned the event {reply.event!r}: it is one of {', '.join(REPLY_EVENTS)}"
    if not reply.done and not reply.texts:
        return "step returned no text for an episode that goes on"
    return None


def _plain(text: str) -> str:
    """Return a text without halves of surrogate pairs, which no tokenizer and no file takes."""
    return text.encode("utf-8", "replace").decode()


def _named(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
