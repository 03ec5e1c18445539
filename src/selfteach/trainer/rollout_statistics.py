"""Compute statistics of rollouts that show how training degrades: repetition, hesitation, lost ends.

Pure functions of ids, words and weights, cheap enough to be logged at every step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from selfteach.types import Rollout, TokenWeights, TrainingSample

NGRAM = 4
"""Length of the runs of tokens that `repetition` looks for: long enough that prose rarely repeats one,
short enough to catch a loop of a few words."""

HESITATION = re.compile(
    r"\b(?:wait|hmm+|hold on|actually|alternatively|let me (?:re)?check|let me see|let me think"
    r"|double[- ]check|on second thought|maybe|perhaps|not sure|but what if)\b",
    re.IGNORECASE,
)
"""Words with which a solver stops to doubt (the self-correction that distilled models lose first)."""


def repetition(ids: Sequence[int], n: int = NGRAM) -> float:
    """Return the share of a rollout's n-grams that repeat an earlier one, 0 to 1; 0 for fewer than two.

    Example: ``repetition([1, 2, 1, 2, 1], n=2)`` is 0.5: of (1 2) (2 1) (1 2) (2 1) two are new.
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repetition_in_turns(rollout: Rollout) -> float:
    """Return the `repetition` of what the model has sampled: the mean over its turns, by length."""
    turns = [(turn.stop - turn.start, turn) for turn in rollout.turns]
    if len(turns) == 1:
        return repetition(rollout.token_ids[turns[0][1].start : turns[0][1].stop])
    ids = rollout.token_ids
    weighted = sum(n * repetition(ids[turn.start : turn.stop]) for n, turn in turns)
    return weighted / max(1, rollout.length)


def hesitations(text: str) -> int:
    """Count the phrases of `HESITATION` in a rollout's text."""
    return len(HESITATION.findall(text))


def frac_in_loss(token_weights: Sequence[TokenWeights]) -> float:
    """Return the share of rollouts with a token in the loss; 0 without rollouts."""
    return sum(any(s.weights) for s in token_weights) / max(1, len(token_weights))


def eos_in_loss(
    samples: Sequence[TrainingSample], token_weights: Sequence[TokenWeights]
) -> float | None:
    """Return the share of the rollouts in the loss whose end token is in the loss, too.

    A rollout that was truncated at the token limit has no end token. None if no rollout is in the
    loss. A model whose end token is never supervised forgets to stop.
    """
    counted = [(x, s) for x, s in zip(samples, token_weights, strict=True) if any(s.weights)]
    ended = sum(
        x.rollout.finished and s.weights[x.rollout.turns[-1].stop - 1] != 0 for x, s in counted
    )
    return ended / len(counted) if counted else None
