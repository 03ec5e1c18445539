"""Locate a rollout's tokens in its text, turn by turn."""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict

from selfteach.episodes import GAP, Span
from selfteach.prompts.renderer import Renderer
from selfteach.types import Problem, Rollout


def token_ends(renderer: Renderer, rollout: Rollout) -> list[int]:
    """Return where each token ends in the rollout's text, in characters (`Renderer.token_ends`).

    A turn's tokens end where they do in the turn; an environment's all end where its message does.
    """
    if not rollout.segments:
        return renderer.token_ends(rollout.token_ids)
    ends: list[int] = []
    for segment, (begin, end) in zip(rollout.segments, rollout.text_spans, strict=True):
        ids = rollout.token_ids[segment.start : segment.stop]
        if segment.kind == "model":
            ends += [begin + at for at in renderer.token_ends(ids)]
        else:
            ends += [end] * len(ids)
    return ends


def with_observation(problem: Problem, observation: str) -> Problem:
    """Return a problem as a policy sees it: with what an environment shows behind the question."""
    if not observation:
        return problem
    return replace(problem, question=f"{problem.question}{GAP}{observation}")


def shown_problem(rollout: Rollout) -> Problem:
    """Return the problem as the policy saw it that sampled a rollout."""
    return with_observation(rollout.problem, rollout.observation)


class Unscored(TypedDict):
    """Holds the tokens of thoughts that are not scored, as fields of a `TrainingSample`."""

    scored_from: int
    unscored: tuple[Span, ...]


def unscored_thoughts(renderer: Renderer, rollout: Rollout) -> Unscored:
    """Return where the first turn's thought ends and the ranges of later ones, where not scored."""
    first, *others = [
        (turn.start, turn.start + renderer.scored_from(rollout.token_ids[turn.start : turn.stop]))
        for turn in rollout.turns
    ]
    return Unscored(
        scored_from=first[1] if first[1] > first[0] else 0,
        unscored=tuple(span for span in others if span[1] > span[0]),
    )
