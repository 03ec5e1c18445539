"""A critic that writes: asks a language model for each answer, and reads what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from selfteach.errors import CriticError
from selfteach.feedback.critics.chat_model import NoReply, Reply, Request
from selfteach.feedback.critics.parser import Reader
from selfteach.feedback.critics.reply_cache import Stored
from selfteach.prompts.control_tokens import ControlTokenEscaper
from selfteach.prompts.template_set import Templates
from selfteach.tasks.segmentation import content
from selfteach.types import Critique, CritiqueFailure, Rollout, Usage, Verdict

Judged = tuple[Rollout, Verdict]
SHOWN = 2_000
"""Characters of a text that is no critique that are kept with the reason."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How a critic is asked."""

    max_tokens: int
    temperature: float = 0.0
    retry_temperature: float = 0.7
    """Of a repeated request: a greedy critic would only say the same again."""
    max_attempts: int = 2
    sees_reference: bool = False
    price_prompt: float = 0.0
    """Per million tokens sent."""
    price_completion: float = 0.0
    """Per million tokens written."""
    escaper: ControlTokenEscaper | None = None
    """Broken in what is sent, where a tokenizer that we do not have would read them as control tokens;
    None for a model whose tokenizer is here."""


class TextCritic:
    """Marks answers by asking a chat model; every reply is on disk before it is read."""

    def __init__(
        self,
        model: Stored,
        templates: Templates,
        reader: Reader,
        asking: Asking,
        policies: Mapping[str, str],
    ) -> None:
        """``policies`` says for every `CritiqueFailureKind`: ``retry`` (then drop), ``drop``, ``fallback`` (to
        another context, which is not decided here) or ``stop``."""
        self._model, self._templates, self._reader = model, templates, reader
        self._asking, self._policies = asking, policies

    def __call__(self, judged: Sequence[Judged]) -> list[Critique | CritiqueFailure]:
        """A critique of every answer, or the reason for none.

        Raises `CriticError` for an outcome whose policy is to stop; what had been answered by then
        is in the store.
        """
        said: dict[int, Critique | CritiqueFailure] = {}
        waiting = list(range(len(judged)))
        for attempt in range(self._asking.max_attempts):
            requests = [self._request(*judged[index], attempt) for index in waiting]
            replies = self._model.complete(requests)
            for index, (reply, reused) in zip(waiting, replies, strict=True):
                before = said[index].usage if index in said else Usage()
                read = self._read(reply, *judged[index])
                said[index] = replace(read, usage=before + self._usage(reply, reused))
            waiting = [i for i in waiting if self._policy(said[i]) == "retry"]
            if not waiting:
                break
        for critique in said.values():
            if self._policy(critique) == "stop":
                assert isinstance(critique, CritiqueFailure)
                raise CriticError(
                    f"critic: {critique.reason}: {critique.detail}; what it has answered is kept, "
                    "and selfteach resume asks only for the rest"
                )
        return [said[index] for index in range(len(judged))]

    def _policy(self, said: Critique | CritiqueFailure) -> str | None:
        return None if isinstance(said, Critique) else self._policies[said.reason]

    def _request(self, rollout: Rollout, verdict: Verdict, attempt: int) -> Request:
        asking, problem = self._asking, rollout.problem
        steps = [content(rollout.text, span) for span in self._reader.split_steps(rollout.text)]
        final = steps.pop() if steps and verdict.parsed is not None else None
        rendered = self._templates.critic(
            problem.question,
            rollout.text,
            steps=steps,
            final=final,
            finished=rollout.finished,
            reference=problem.references.get("reference") if asking.sees_reference else None,
        )
        as_text = asking.escaper.escape if asking.escaper else str
        messages = tuple((m["role"], as_text(m["content"])) for m in rendered)
        temperature = asking.retry_temperature if attempt else asking.temperature
        return Request(messages, temperature, asking.max_tokens, attempt)

    def _read(
        self, reply: Reply | NoReply, rollout: Rollout, verdict: Verdict
    ) -> Critique | CritiqueFailure:
        if isinstance(reply, NoReply):
            return CritiqueFailure("unavailable", reply.reason)
        escaper = self._asking.escaper
        text = escaper.unescape(reply.text) if escaper else reply.text
        said = self._reader(text, rollout, verdict, finished=reply.finished)
        return said if isinstance(said, Critique) else replace(said, said=text[:SHOWN])

    def _usage(self, reply: Reply | NoReply, reused: bool) -> Usage:
        if isinstance(reply, NoReply):
            return Usage()
        if reused:
            return Usage(cached=1)
        asking = self._asking
        cost = reply.prompt_tokens * asking.price_prompt
        cost += reply.completion_tokens * asking.price_completion
        return Usage(1, 0, reply.prompt_tokens, reply.completion_tokens, cost / 1e6)
