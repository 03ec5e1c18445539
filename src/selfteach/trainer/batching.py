"""Collates training samples into micro-batches of similar length; the model's tokens are indexed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from selfteach.errors import AlignmentError
from selfteach.models.sequences import (
    PADDED,
    SequenceLayout,
    kept_tokens,
    select_tokens,
    sequences,
)
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.types import Batch, Sequences, TokenWeights, TrainingSample

Pair = tuple[TrainingSample, TokenWeights]
"""A sample and the loss weights of its tokens."""


def collate(
    samples: Sequence[TrainingSample],
    token_weights: Sequence[TokenWeights],
    *,
    pad_id: int,
    micro_batch_tokens: int,
    layout: SequenceLayout = PADDED,
    ranks: Ranks = SINGLE_PROCESS,
) -> list[Batch]:
    """Return micro-batches of at most ``micro_batch_tokens`` padded tokens (a longer sample is alone).

    For a policy that runs packed sequences (``layout``) padding does not count.

    Samples whose token weights are all zero are left out: they have no gradient, and the denominators
    already count them. Rows are sorted by length, so that there is little padding, and samples with
    and without a teacher are not mixed. The split changes neither loss nor gradient, since every
    weight includes its global denominator.

    Rows are dealt to ranks in turn, so that the n-th micro-batches of all ranks have similar lengths.
    Every rank gets equally many micro-batches of each kind, the last ones empty if needed: all ranks
    must take part in a pass through a sharded model.
    """
    pairs = [
        (sample, weights)
        for sample, weights in zip(samples, token_weights, strict=True)
        if any(weights.weights)
    ]
    pairs.sort(key=lambda pair: _length(pair[0]))
    batches: list[Batch] = []
    for with_teacher in (False, True):
        kind = [pair for pair in pairs if _has_teacher(pair[0]) == with_teacher]
        dealt = [
            _cut(kind[rank :: ranks.size], micro_batch_tokens, packed=layout.packed)
            for rank in range(ranks.size)
        ]
        batches += [_batch(micro_batch, pad_id, layout) for micro_batch in dealt[ranks.rank]]
        missing = max(map(len, dealt)) - len(dealt[ranks.rank])
        batches += [_empty(kind[0], pad_id)] * missing if missing else []
    return batches


def _cut(pairs: Sequence[Pair], micro_batch_tokens: int, *, packed: bool) -> list[Sequence[Pair]]:
    """Cut into contiguous micro-batches, each as large as the limit allows."""
    micro_batches: list[Sequence[Pair]] = []
    lengths = [_length(sample) for sample, _ in pairs]
    start = 0
    for stop in range(1, len(pairs) + 1):
        taken = lengths[start : stop + 1]
        tokens = sum(taken) if packed else taken[-1] * len(taken)  # sorted: the last is the longest
        if stop == len(pairs) or tokens > micro_batch_tokens:
            micro_batches.append(pairs[start:stop])
            start = stop
    return micro_batches


def check_same_tokens(batch: Batch) -> None:
    """Check that student and teacher score the same token ids. Raises `AlignmentError` if not."""
    for name, side in (("student", batch.student), ("teacher", batch.teacher)):
        if side is not None and not torch.equal(
            side.ids_BT[side.rows_N, side.columns_N + 1], batch.ids_N
        ):
            raise AlignmentError(f"the {name}'s sequence does not hold the rollouts' token ids")


def _has_teacher(sample: TrainingSample) -> bool:
    return sample.teacher_prompt_ids is not None


def _length(sample: TrainingSample) -> int:
    """Return the number of tokens of a sample's student and teacher sequences together."""
    completion = len(sample.rollout.token_ids)
    length = len(sample.rollout.prompt_ids) + completion
    if sample.teacher_prompt_ids is not None:
        length += len(sample.teacher_prompt_ids) + completion
    return length


def _batch(pairs: Sequence[Pair], pad_id: int, layout: SequenceLayout) -> Batch:
    rollouts = [sample.rollout for sample, _ in pairs]
    completions = [rollout.token_ids for rollout in rollouts]
    prompts = [sample.teacher_prompt_ids for sample, _ in pairs]
    teacher_prompts = [prompt for prompt in prompts if prompt is not None]
    assert len(teacher_prompts) in (0, len(pairs)), "samples with and without a teacher do not mix"
    shares = [weights.shares for _, weights in pairs if weights.shares is not None]

    def side(prompts: Sequence[Sequence[int]]) -> Sequences:
        return sequences(prompts, completions, pad_id, layout=layout)

    batch = Batch(
        student=side([rollout.prompt_ids for rollout in rollouts]),
        teacher=side(teacher_prompts) if teacher_prompts else None,
        ids_N=torch.tensor([token for completion in completions for token in completion]),
        weight_N=torch.tensor([w for _, weights in pairs for w in weights.weights]),
        advantage_N=torch.tensor(
            [weights.advantage for _, weights in pairs for _ in weights.weights],
            dtype=torch.float32,
        ),
        sampled_logp_N=torch.tensor([logp for rollout in rollouts for logp in rollout.logps]),
        share_N=torch.tensor([share for row in shares for share in row]) if shares else None,
    )
    check_same_tokens(batch)
    lengths = [len(completion) for completion in completions]
    return _of_model(batch, lengths, [rollout.model_positions for rollout in rollouts])


def _of_model(batch: Batch, lengths: Sequence[int], at: Sequence[Sequence[int]]) -> Batch:
    """Return a batch of the tokens that the model has sampled: an environment's have no logits."""
    keep_N = kept_tokens(lengths, at)
    if keep_N is None:
        return batch
    tokens = ("ids_N", "weight_N", "advantage_N", "sampled_logp_N")
    return replace(
        batch,
        student=select_tokens(batch.student, lengths, at),
        teacher=batch.teacher and select_tokens(batch.teacher, lengths, at),
        share_N=None if batch.share_N is None else batch.share_N[keep_N],
        **{name: getattr(batch, name)[keep_N] for name in tokens},
    )


def _empty(like: Pair, pad_id: int) -> Batch:
    """Return a micro-batch of the same kind without loss: one padding token, no completion token."""
    sample, weights = like
    empty_N = torch.zeros(0, dtype=torch.long)
    padding = Sequences(torch.tensor([[pad_id]]), empty_N, empty_N)
    none_N = torch.zeros(0)
    return Batch(
        student=padding,
        teacher=padding if _has_teacher(sample) else None,
        ids_N=empty_N,
        weight_N=none_N,
        advantage_N=torch.zeros(0, dtype=torch.float32),
        sampled_logp_N=none_N,
        share_N=None if weights.shares is None else none_N,
    )
