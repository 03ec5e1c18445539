"""Deal a step's rollouts to trainers and micro-batches, and count what prompts share there.

Rollouts are dealt as in `trainer.batching`: sorted by length, to the trainers in turn, and cut into
micro-batches of padded tokens. Within a micro-batch a prefix that all prompts share is one pass
(`models.prefix_cache`), where trainers have such passes, and what else prompts share is one path of a
tree (`models.tree_attention`), where that saves enough. Attention runs along whole paths: only the
prefix with a pass is left out of it.

Shape suffixes: R rollouts, group after group; T trainers, M micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from selfteach.commands.planning.workload import SharedTokens
from selfteach.models.tree_attention import MIN_SAVING


@dataclass(frozen=True, slots=True)
class DealtRollouts:
    """Holds where each rollout of a step is trained on."""

    trainer_R: np.ndarray
    micro_batch_R: np.ndarray
    """Number of the micro-batch, over all trainers."""
    micro_batches_T: np.ndarray


@dataclass(frozen=True, slots=True)
class TokensShared:
    """Holds tokens of each rollout's sequence that another one of its micro-batch computes, [R]."""

    tokens_R: np.ndarray
    prefix_R: np.ndarray
    """Those of the prefix that all prompts share: the tokens at the front."""


def deal(tokens_R: np.ndarray, trainers: int, limit: int) -> DealtRollouts:
    """Deal rollouts of so many tokens, student and teacher together, to micro-batches of ``limit``."""
    return _deal(np.asarray(tokens_R, dtype=np.float64).tobytes(), trainers, limit)


@lru_cache(64)  # a search for the best layout deals the same rollouts again and again
def _deal(tokens: bytes, trainers: int, limit: int) -> DealtRollouts:
    tokens_R = np.frombuffer(tokens)
    trainer_R, micro_batch_R = (np.zeros(len(tokens_R), dtype=np.int64) for _ in range(2))
    micro_batches_T = np.zeros(trainers, dtype=np.int64)
    order_R = np.argsort(tokens_R, kind="stable")
    for trainer in range(min(trainers, len(tokens_R))):
        rows = order_R[trainer::trainers]
        cut = _cut(tokens_R[rows].tolist(), limit)
        trainer_R[rows], micro_batch_R[rows] = trainer, int(micro_batches_T.sum()) + np.array(cut)
        micro_batches_T[trainer] = cut[-1] + 1
    return DealtRollouts(trainer_R, micro_batch_R, micro_batches_T)


def tokens_shared(
    shared: SharedTokens,
    length_R: np.ndarray,
    group_size: int,
    dealt: DealtRollouts,
    *,
    prefix_pass: bool = True,
) -> TokensShared:
    """Count what sequences of these lengths share; the first one of a micro-batch computes it."""
    prefix = shared.prefix if prefix_pass else 0.0
    micro_batch_R, rollouts = dealt.micro_batch_R, len(length_R)
    later_R = ~_first(micro_batch_R)
    later_of_group_R = ~_first(micro_batch_R * rollouts + np.arange(rollouts) // group_size)
    prefix_R = np.where(later_R, prefix, 0.0)
    further_R = np.where(later_R, shared.of_all - prefix, 0.0)
    further_R = np.where(later_of_group_R, shared.of_group - prefix, further_R)
    rest_R = length_R - prefix
    longest_M = np.zeros(int(micro_batch_R.max(initial=-1)) + 1)
    np.maximum.at(longest_M, micro_batch_R, rest_R)
    nodes_M = np.bincount(micro_batch_R, rest_R - further_R)
    saves_M = nodes_M <= MIN_SAVING * longest_M * np.bincount(micro_batch_R)
    return TokensShared(prefix_R + np.where(saves_M[micro_batch_R], further_R, 0.0), prefix_R)


def _cut(sorted_tokens: list[float], limit: int) -> list[int]:
    """Return the micro-batch of each rollout: padded to the longest, at most ``limit`` tokens each."""
    numbers, start = [0], 0
    for row, longest in enumerate(sorted_tokens[1:], 1):
        full = longest * (row + 1 - start) > limit
        start = row if full else start
        numbers.append(numbers[-1] + full)
    return numbers


def _first(keys_R: np.ndarray) -> np.ndarray:
    """Return True for the first row of each key."""
    first_R = np.zeros(len(keys_R), dtype=bool)
    first_R[np.unique(keys_R, return_index=True)[1]] = True
    return first_R
