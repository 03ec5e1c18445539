"""Lessons into micro-batches: rows of similar length, answers' tokens found by index."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from selfteach.errors import AlignmentError
from selfteach.models.sequences import sequences
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.types import Batch, Sequences, TokenWeights, TrainingSample

Pair = tuple[TrainingSample, TokenWeights]
"""A sample and how much its tokens count."""


def collate(
    samples: Sequence[TrainingSample],
    token_weights: Sequence[TokenWeights],
    *,
    pad_id: int,
    micro_batch_tokens: int,
    ranks: Ranks = SINGLE_PROCESS,
) -> list[Batch]:
    """Micro-batches of at most ``micro_batch_tokens`` padded tokens (a longer sample stands alone).

    Lessons of which no token counts are left out: they have no gradient, and a denominator that
    counts them does not need them here. Rows are ordered by length, so that little is padded, those
    without a teacher apart; the split changes neither loss nor gradient, since every weight has its
    global denominator in it.

    Rows are dealt to ranks like cards, so that the n-th micro-batches of all ranks are alike in
    length. Every rank gets as many of each kind as any other, empty ones at the end: a pass through
    a sharded model is one that all ranks make.
    """
    pairs = [
        (sample, weights)
        for sample, weights in zip(samples, token_weights, strict=True)
        if any(weights.weights)
    ]
    pairs.sort(key=lambda pair: _length(pair[0]))
    batches: list[Batch] = []
    for told in (False, True):
        kind = [pair for pair in pairs if _has_teacher(pair[0]) == told]
        dealt = [_cut(kind[rank :: ranks.size], micro_batch_tokens) for rank in range(ranks.size)]
        batches += [_batch(part, pad_id) for part in dealt[ranks.rank]]
        missing = max(map(len, dealt)) - len(dealt[ranks.rank])
        batches += [_empty(kind[0], pad_id)] * missing if missing else []
    return batches


def _cut(pairs: Sequence[Pair], micro_batch_tokens: int) -> list[Sequence[Pair]]:
    """Neighbours together, as many as there is room for."""
    parts: list[Sequence[Pair]] = []
    start = 0
    for stop in range(1, len(pairs) + 1):
        if stop == len(pairs) or _length(pairs[stop][0]) * (stop + 1 - start) > micro_batch_tokens:
            parts.append(pairs[start:stop])
            start = stop
    return parts


def check_same_tokens(batch: Batch) -> None:
    """Student and teacher score the same answer token ids. Raises `AlignmentError` if not."""
    for name, side in (("student", batch.student), ("teacher", batch.teacher)):
        if side is not None and not torch.equal(
            side.ids_BT[side.rows_N, side.columns_N + 1], batch.ids_N
        ):
            raise AlignmentError(f"the {name}'s sequence does not hold the answers' token ids")


def _has_teacher(sample: TrainingSample) -> bool:
    return sample.teacher_prompt_ids is not None


def _length(sample: TrainingSample) -> int:
    """Tokens of a sample's student and teacher sequences together."""
    answer = len(sample.rollout.token_ids)
    length = len(sample.rollout.prompt_ids) + answer
    if sample.teacher_prompt_ids is not None:
        length += len(sample.teacher_prompt_ids) + answer
    return length


def _batch(pairs: Sequence[tuple[TrainingSample, TokenWeights]], pad_id: int) -> Batch:
    rollouts = [sample.rollout for sample, _ in pairs]
    answers = [rollout.token_ids for rollout in rollouts]
    teacher_prompts = [sample.teacher_prompt_ids for sample, _ in pairs]
    told = [prompt for prompt in teacher_prompts if prompt is not None]
    assert len(told) in (0, len(pairs)), "samples with and without a teacher do not mix"
    shares = [weights.shares for _, weights in pairs if weights.shares is not None]
    batch = Batch(
        student=sequences([rollout.prompt_ids for rollout in rollouts], answers, pad_id),
        teacher=sequences(told, answers, pad_id) if told else None,
        ids_N=torch.tensor([token for answer in answers for token in answer]),
        weight_N=torch.tensor([w for _, weights in pairs for w in weights.weights]),
        advantage_N=torch.tensor(
            [weights.advantage for _, weights in pairs for _ in weights.weights],
            dtype=torch.float32,
        ),
        sampled_logp_N=torch.tensor([logp for rollout in rollouts for logp in rollout.logps]),
        share_N=torch.tensor([share for own in shares for share in own]) if shares else None,
    )
    check_same_tokens(batch)
    return batch


def _empty(like: Pair, pad_id: int) -> Batch:
    """A micro-batch of the same kind in which no token is read: one token in, nothing out."""
    sample, weights = like
    nothing = torch.zeros(0, dtype=torch.long)
    padding = Sequences(torch.tensor([[pad_id]]), nothing, nothing)
    none_N = torch.zeros(0)
    return Batch(
        student=padding,
        teacher=padding if _has_teacher(sample) else None,
        ids_N=nothing,
        weight_N=none_N,
        advantage_N=torch.zeros(0, dtype=torch.float32),
        sampled_logp_N=none_N,
        share_N=None if weights.shares is None else none_N,
    )
