"""Rewards rollouts with the number that a chat model gives each: an LLM judge."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jinja2

from selfteach.config.reward_section import JudgeConfig
from selfteach.errors import CriticError, RecipeError
from selfteach.feedback.critics.chat_model import Message, NoReply, Reply, Request
from selfteach.feedback.critics.llm import usage_of
from selfteach.feedback.critics.reply_cache import CachedModel
from selfteach.feedback.rewards.scored import BatchScores, Score
from selfteach.prompts.bounded_jinja import BoundedEnvironment
from selfteach.prompts.control_tokens import ControlTokenEscaper
from selfteach.prompts.template_set import fence
from selfteach.prompts.thinking import split_thinking
from selfteach.types import Rollout

EXCERPT = 200
"""Characters of a reply that are shown with the reason why it has no number."""
LONGEST_READ = 20_000
"""Characters of a reply, its last ones, in which the number is looked for."""


class LlmJudge:
    """Rewards rollouts with a chat model; every reply is in the reply cache before it is read."""

    def __init__(self, model: CachedModel, config: JudgeConfig) -> None:
        self.name, self.weight = config.name, config.weight
        self._model, self._config = model, config
        environment = BoundedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
        environment.filters["fence"] = fence
        self._escaper = ControlTokenEscaper(config.control_tokens)
        try:
            self._template = environment.from_string(config.prompt)
        except jinja2.TemplateError as error:
            raise RecipeError(f"prompt of judge {self.name!r} is no template: {error}") from None

    def messages(self, rollout: Rollout) -> tuple[Message, ...]:
        """Return the conversation about one rollout. Raises `RecipeError` if the template fails."""
        problem = rollout.problem
        try:
            text = self._template.render(
                question=problem.transcript, completion=rollout.text, answer=problem.answer,
                reference=problem.references.get("reference"),
                columns={**problem.references, **problem.meta, **problem.columns},
            )  # fmt: skip
        except Exception as error:  # a template may divide by zero, or worse
            reason = " ".join(str(error).split())
            raise RecipeError(
                f"prompt of judge {self.name!r}, for problem {problem.label!r}: {reason}"
            ) from error
        system = () if self._config.system is None else (("system", self._config.system),)
        return (*system, ("user", self._escaper.escape(text.strip())))

    def scores(self, rollouts: Sequence[Rollout]) -> BatchScores:
        """Return the judge's number for each rollout, or why there is none.

        Raises `CriticError` for a failure whose policy is ``stop``; replies up to then stay in the
        reply cache.
        """
        config, scores = self._config, dict[int, Score]()
        pending, kinds = list(range(len(rollouts))), dict[int, str]()
        for attempt in range(config.max_attempts):
            temperature = config.retry_temperature if attempt else config.temperature
            requests = [
                Request(self.messages(rollouts[i]), temperature, config.max_tokens, attempt)
                for i in pending
            ]
            for i, (reply, cached) in zip(pending, self._model.complete(requests), strict=True):
                score, kinds[i] = self._read(reply)
                usage = usage_of(reply, cached, config)
                before = scores[i].usage + usage if i in scores else usage
                scores[i] = replace(score, usage=before)
            pending = [i for i in pending if self._policy(kinds[i]) == "retry"]
            if not pending:
                break
        for i, score in scores.items():
            if self._policy(kinds[i]) == "stop":
                raise CriticError(
                    f"judge {self.name!r}: {score.failure}; replies so far are in the reply cache, and "
                    "selfteach resume requests only the rest"
                )
        return BatchScores([scores[i] for i in range(len(rollouts))])

    def _policy(self, kind: str) -> str | None:
        return getattr(self._config.on_failure, kind) if kind else None

    def _read(self, reply: Reply | NoReply) -> tuple[Score, str]:
        """Return the score in a reply, and the kind of its failure, empty if there is none."""
        if isinstance(reply, NoReply):
            return _failed("refused" if reply.permanent else "unavailable", reply.reason)
        if reply.refusal:
            return _failed("refused", reply.refusal)
        text = split_thinking(self._escaper.unescape(reply.text))[1].strip()
        if not reply.finished:
            return _failed("truncated", f"cut after {reply.completion_tokens} tokens")
        if not text:
            return _failed("empty", "no text")
        number = read_number(text, self._config)
        if isinstance(number, str):
            return _failed("malformed", f"{number}: {text[-EXCERPT:]!r}")
        return Score(number), ""


def read_number(text: str, config: JudgeConfig) -> float | str:
    """Return the number in a judge's reply, or why there is none within the range."""
    text = text[-LONGEST_READ:]
    if config.json_field is not None:
        value = _in_json(text, config.json_field)
        if value is None:
            return f"no number in the JSON field {config.json_field!r}"
    else:
        matches = [match[1] for match in re.finditer(config.pattern, text) if match[1]]
        if not matches:
            return "no number where the pattern looks for one"
        value = matches[-1]
    try:
        number = float(value)
    except ValueError:
        return f"{str(value)[:40]!r} is no number"
    low, high = config.range
    if not (math.isfinite(number) and low <= number <= high):
        return f"{number:g} is outside {low:g} to {high:g}"
    return number


def _in_json(text: str, field: str) -> float | str | None:
    """Return the field of the last JSON object in a text that has it as a number."""
    decoder, at, last = json.JSONDecoder(), 0, None
    while (at := text.find("{", at)) >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        inner = _field(value, field)
        last, at = (last if inner is None else inner), end
    return last


def _field(value: Any, field: str) -> float | str | None:
    for name in field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    is_number = isinstance(value, int | float | str) and not isinstance(value, bool)
    return value if is_number else None


def _failed(kind: str, detail: str) -> tuple[Score, str]:
    return Score(None, failure=f"{kind}: {detail}"), kind
