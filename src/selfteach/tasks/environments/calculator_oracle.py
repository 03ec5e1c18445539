"""Critiques episodes of chain sums with a calculator: which call was wrong, and how to go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfteach.episodes import ToolCall, Turn
from selfteach.prompts.tool_calls import TOOL_FORMATS, ToolFormat
from selfteach.tasks import chain_sums
from selfteach.tasks.chain_sums import CRITIC_OFFSETS, Chain
from selfteach.tasks.environments.calculator import TOOL, compute
from selfteach.tasks.environments.tool_environment import ToolError
from selfteach.types import Case, Critique, CritiqueStep, Rollout

if TYPE_CHECKING:
    import numpy as np


HERMES = TOOL_FORMATS["hermes"].offering((TOOL,))


@dataclass(frozen=True, slots=True)
class CheckedTurn:
    """Holds a turn, and whether it is right."""

    text: str
    is_right: bool
    is_final: bool
    """True if the turn calls nothing: it is the answer."""
    terms_done: int
    """Number of terms added up after the turn if it is right, else before it."""


@dataclass(frozen=True, slots=True)
class CalculatorOracle:
    """Implements `EpisodeOracle` for chain sums.

    A call is right if its value is the sum of the question's first terms, at least as many as the
    calls before it have added up. A turn is wrong that makes another call, one that cannot be read, or
    that ends in another answer.
    """

    tool_format: ToolFormat = HERMES
    """How the policy writes calls."""

    def critique_episode(
        self, rollout: Rollout, *, error_rate: float, rng: np.random.Generator
    ) -> Critique:
        """Repeat the right turns verbatim, correct the earliest wrong one, and go on from there.

        A turn that was cut at its token limit is written anew, and is no error.
        With probability ``error_rate`` the critic errs: the call that it writes first has a wrong term.
        """
        chain = chain_sums.parse_question(rollout.problem.question)
        turns = self.check(rollout, chain)
        stop = next((i for i, turn in enumerate(turns) if not turn.is_right), None)
        offset = 0
        if error_rate > 0 and rng.random() < error_rate:
            offset = int(rng.choice(CRITIC_OFFSETS))
            calls = [i for i, turn in enumerate(turns) if not turn.is_final]
            stop = (int(rng.choice(calls)) if calls else 0) if stop is None else stop
        return self._trace(rollout, chain, turns, stop, offset)

    def check(self, rollout: Rollout, chain: Chain) -> list[CheckedTurn]:
        """Check every turn; after a wrong one the check goes on from what was added up before it."""
        done, checked = 1, list[CheckedTurn]()
        for segment in rollout.turns:
            turn = self.tool_format.read(segment.text)
            if not turn.calls and turn.malformed is None:
                right = chain_sums.parse_answer(turn.text) == str(chain.value())
                checked.append(CheckedTurn(segment.text, right, True, done))
                continue
            after = _terms_after(turn, chain, done)
            done = done if after is None else after
            checked.append(CheckedTurn(segment.text, after is not None, False, done))
        return checked

    def _trace(
        self,
        rollout: Rollout,
        chain: Chain,
        turns: Sequence[CheckedTurn],
        stop: int | None,
        offset: int,
    ) -> Critique:
        prefix = turns[:stop]
        done = prefix[-1].terms_done if prefix else 1
        steps = [CritiqueStep(turn.text, "kept", turn.text) for turn in prefix if not turn.is_final]
        added = self._calls_from(chain, done, offset)
        wrong = turns[stop] if stop is not None else None
        if wrong is not None and added:
            steps.append(CritiqueStep(added.pop(0), "fixed", wrong.text))
        steps += [CritiqueStep(text, "new") for text in added]
        answer = str(chain.value() + offset)
        is_cut = (
            rollout.is_cut and stop == len(turns) - 1
        )  # no error: it was not written to its end
        return Critique(
            _case(rollout, chain, turns), tuple(steps), answer, None if is_cut else stop
        )

    def _calls_from(self, chain: Chain, done: int, offset: int) -> list[str]:
        """Write a turn for each further term; the first is off by ``offset``, and so are the others."""
        turns, before = [], chain.value(done)
        for count in range(done, len(chain)):
            signed = chain.signed(count, count + 1)[0] + (offset if count == done else 0)
            expression = f"{before} {'-' if signed < 0 else '+'} {abs(signed)}"
            name = TOOL["function"]["name"]
            turns.append(self.tool_format.write(ToolCall(name, {"expression": expression})))
            before += signed
        return turns


def _terms_after(turn: Turn, chain: Chain, done: int) -> int | None:
    """Return how many terms are added up after a turn's calls; None if one of them is wrong."""
    if turn.malformed is not None:
        return None
    for call in turn.calls:
        try:
            value = compute(str(call.arguments["expression"]))
        except (KeyError, ToolError):
            return None
        if call.name != TOOL["function"]["name"]:
            return None
        counts = range(done, len(chain) + 1)
        after = next((count for count in counts if chain.value(count) == value), None)
        if after is None:
            return None
        done = after
    return done


def _case(rollout: Rollout, chain: Chain, turns: Sequence[CheckedTurn]) -> Case:
    if not rollout.finished:
        return "C"
    if any(not turn.is_right for turn in turns) or not (turns and turns[-1].is_final):
        return "D"
    return "A" if turns[-1].terms_done == len(chain) else "B"
