"""Critiques rollouts with a language model: requests a critique of each, and parses the reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from selfteach.config.critic_section import EndpointConfig, LlmCriticConfig
from selfteach.config.served_model import ChatModelConfig, ServedModelConfig
from selfteach.errors import CriticError, SelfteachError
from selfteach.feedback.critics.chat_model import NoReply, Reply, Request
from selfteach.feedback.critics.code_parser import CodeCritiqueParser
from selfteach.feedback.critics.parser import CritiqueParser
from selfteach.feedback.critics.reply_cache import CachedModel
from selfteach.prompts.control_tokens import ControlTokenEscaper
from selfteach.prompts.template_set import (
    Message,
    Templates,
    conversation,
    with_history,
    without_tools,
)
from selfteach.prompts.thinking import split_thinking
from selfteach.tasks.segmentation import before_answer, content, step_spans
from selfteach.types import (
    CriticSolution,
    Critique,
    CritiqueFailure,
    Problem,
    Rollout,
    Usage,
    Verdict,
)

JudgedRollout = tuple[Rollout, Verdict]
PASSED = "All tests are passed."
"""What a critic that sees evidence is shown of a right answer."""
EXCERPT = 2_000
"""Characters of a failed critique that are saved with the reason."""


class LlmCritic:
    """Critiques rollouts with a chat model; every reply is in the reply cache before it is parsed."""

    def __init__(
        self,
        model: CachedModel,
        templates: Templates,
        parser: CritiqueParser | CodeCritiqueParser,
        config: LlmCriticConfig,
    ) -> None:
        self._model, self._templates, self._parser = model, templates, parser
        self.fleet = model.fleet
        self._config = config
        # A served model's tokenizer is not available here; a local model's renderer escapes them.
        served = isinstance(config, EndpointConfig)
        self._escaper = ControlTokenEscaper(config.control_tokens) if served else None

    def __call__(self, judged: Sequence[JudgedRollout]) -> list[Critique | CritiqueFailure]:
        """Return a critique of every rollout, or why there is none.

        Raises `CriticError` for a failure whose policy is ``stop``; replies up to then stay in the
        reply cache.
        """
        solutions = self._solutions_shown([rollout.problem for rollout, _ in judged])
        critiques: dict[int, Critique | CritiqueFailure] = {}
        pending = list(range(len(judged)))
        for attempt in range(self._config.max_attempts):
            requests = [
                self._request(*judged[index], attempt, solutions[index].text) for index in pending
            ]
            replies = self._model.complete(requests)
            for index, (reply, cached) in zip(pending, replies, strict=True):
                before = (critiques if index in critiques else solutions)[index].usage
                critique = self._parse(reply, *judged[index])
                critiques[index] = replace(
                    critique, usage=before + usage_of(reply, cached, self._config)
                )
            pending = [i for i in pending if self._policy(critiques[i]) == "retry"]
            if not pending:
                break
        for critique in critiques.values():
            self._stop_if_required(critique)
        return [critiques[index] for index in range(len(judged))]

    def solve(self, problems: Sequence[Problem]) -> list[CriticSolution]:
        """Return the critic's own solution of each question, requested with the policy's prompt."""
        config = self._config
        requests = []
        for problem in problems:
            question = conversation(self._templates.render("solver", question=problem.question))
            rendered = without_tools(with_history(question, problem.history))
            requests.append(
                Request(self._messages(rendered), config.temperature, config.max_tokens)
            )
        solutions = []
        for reply, cached in self._model.complete(requests):
            text = None
            if isinstance(reply, NoReply) and not reply.permanent:
                # Without its solution a critique would be another one than that of a later attempt.
                self._stop_if_required(CritiqueFailure("unavailable", reply.reason))
            if isinstance(reply, Reply) and reply.finished and not reply.refusal:
                unescaped = self._escaper.unescape(reply.text) if self._escaper else reply.text
                text = split_thinking(unescaped)[1].strip() or None
            solutions.append(CriticSolution(text, usage_of(reply, cached, self._config)))
        return solutions

    def _solutions_shown(self, problems: Sequence[Problem]) -> list[CriticSolution]:
        """Return the solution that the critic sees beside the rollout of each problem."""
        if self._config.solves_first:
            return self.solve(problems)
        if self._config.sees_reference:
            return [CriticSolution(problem.references.get("reference")) for problem in problems]
        return [CriticSolution(None)] * len(problems)

    def _stop_if_required(self, critique: Critique | CritiqueFailure) -> None:
        """Raise `CriticError` for a failure whose policy is ``stop``."""
        if isinstance(critique, CritiqueFailure) and self._policy(critique) == "stop":
            raise CriticError(
                f"critic: {critique.reason}: {critique.detail}; replies so far are in the reply "
                "cache, and selfteach resume requests only the rest"
            )

    def _messages(self, rendered: Sequence[Message]) -> tuple[tuple[str, str], ...]:
        escape = self._escaper.escape if self._escaper else str
        return tuple((m["role"], escape(m["content"])) for m in rendered)

    def _policy(self, critique: Critique | CritiqueFailure) -> str | None:
        if isinstance(critique, Critique):
            return None
        return getattr(self._config.on_failure, critique.reason)

    def _request(
        self, rollout: Rollout, verdict: Verdict, attempt: int, solution: str | None
    ) -> Request:
        config, problem = self._config, rollout.problem
        spans = step_spans(rollout, self._parser.split_steps)
        steps = [content(rollout.text, span) for span in before_answer(rollout, verdict, spans)]
        final = content(rollout.text, spans[-1]) if len(steps) < len(spans) else None
        rendered = self._templates.critic(
            problem.transcript,
            rollout.text,
            steps=steps,
            final=final,
            finished=rollout.finished,
            reference=solution,
            segments=rollout.segments,
            **_evidence(verdict if config.sees_evidence else None),
        )
        temperature = config.retry_temperature if attempt else config.temperature
        return Request(self._messages(rendered), temperature, config.max_tokens, attempt)

    def _parse(
        self, reply: Reply | NoReply, rollout: Rollout, verdict: Verdict
    ) -> Critique | CritiqueFailure:
        if isinstance(reply, NoReply):
            return CritiqueFailure("refused" if reply.permanent else "unavailable", reply.reason)
        text = self._escaper.unescape(reply.text) if self._escaper else reply.text
        if reply.refusal:
            return CritiqueFailure("refused", reply.refusal, reply=text[:EXCERPT])
        try:
            critique = self._parser(text, rollout, verdict, finished=reply.finished)
        except SelfteachError:
            raise
        # A reply is data: no text may end a run, and each of its resumes.
        except Exception as error:
            critique = CritiqueFailure(
                "malformed", f"it cannot be parsed: {type(error).__name__}: {error}"[:EXCERPT]
            )
        if isinstance(critique, Critique):
            return critique
        return replace(critique, reply=text[:EXCERPT])


def _evidence(verdict: Verdict | None) -> dict[str, Any]:
    """Return what running an answer has shown, for the prompt; nothing without a verdict to show."""
    if verdict is None or verdict.evidence is None:
        return {}
    return {"evidence": verdict.feedback or PASSED, "facts": verdict.evidence}


def usage_of(reply: Reply | NoReply, cached: bool, config: ChatModelConfig) -> Usage:
    """Return what a reply cost, at the prices of a served model."""
    if isinstance(reply, NoReply):
        return Usage()
    if cached:
        return Usage(cached=1)
    prompt = reply.prompt_tokens + reply.hedge_prompt_tokens
    completion = reply.completion_tokens + reply.hedge_completion_tokens
    cost = 0.0
    if isinstance(config, ServedModelConfig):
        cost += prompt * config.price_prompt
        cost += completion * config.price_completion
    return Usage(1, 0, prompt, completion, cost / 1e6)
