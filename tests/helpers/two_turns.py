"""Hand-made episodes: turns of a model, and an environment's tokens between them."""

from __future__ import annotations

from collections.abc import Sequence

from selfteach.episodes import Segment, episode_text
from selfteach.types import Problem, Rollout

PROBLEM = Problem("p", "q", "a")


def episode(
    *runs: Sequence[int],
    prompt: Sequence[int] = (1, 2),
    problem: Problem = PROBLEM,
    sample: int = 0,
    texts: Sequence[str] | None = None,
    logp: float = -0.5,
) -> Rollout:
    """Return an episode whose first, third, … run of ids is the model's, the others no model's."""
    segments, ids, logps = list[Segment](), list[int](), list[float]()
    for index, run in enumerate(runs):
        is_model = index % 2 == 0
        text = texts[index] if texts is not None else " ".join(map(str, run))
        segments.append(
            Segment(
                "model" if is_model else "environment",
                len(ids),
                len(ids) + len(run),
                text,
                None if is_model else "tool_result",
            )
        )
        ids += run
        logps += [logp if is_model else 0.0] * len(run)
    return Rollout(
        problem, sample, tuple(prompt), tuple(ids), tuple(logps), episode_text(segments), True, 0,
        segments=tuple(segments),
    )  # fmt: skip
