"""Lessons into micro-batches: rows of similar length, answers' tokens found by index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selfteach.errors import AlignmentError
from selfteach.prefixes import shared_length
from selfteach.types import Batch, Lesson, Sequences, Signal


def collate(
    lessons: Sequence[Lesson], signals: Sequence[Signal], *, pad_id: int, micro_batch_tokens: int
) -> list[Batch]:
    """Micro-batches of at most ``micro_batch_tokens`` padded tokens (a longer lesson stands alone).

    Lessons of which no token counts are left out: they have no gradient, and a denominator that
    counts them does not need them here. Rows are ordered by length, so that little is padded, those
    without a teacher apart; the split changes neither loss nor gradient, since every weight has its
    global denominator in it.
    """
    pairs = [
        (lesson, signal)
        for lesson, signal in zip(lessons, signals, strict=True)
        if any(signal.weights)
    ]
    pairs.sort(key=lambda pair: (_has_teacher(pair[0]), _length(pair[0])))
    batches: list[Batch] = []
    start = 0
    for stop in range(1, len(pairs) + 1):
        full = stop == len(pairs) or (
            _length(pairs[stop][0]) * (stop + 1 - start) > micro_batch_tokens
            or _has_teacher(pairs[stop][0]) != _has_teacher(pairs[start][0])
        )
        if full:
            batches.append(_batch(pairs[start:stop], pad_id))
            start = stop
    return batches


def sequences(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_id: int
) -> Sequences:
    """Prompts with their answers appended, right-padded, and where the answers are predicted."""
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids_BT = torch.full((len(prompts), width), pad_id)
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids_BT[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        rows.append(torch.full((len(answer),), row))
        columns.append(torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1))
    return Sequences(ids_BT, torch.cat(rows), torch.cat(columns), shared_length(prompts))


def check_same_tokens(batch: Batch) -> None:
    """Student and teacher score the same answer token ids. Raises `AlignmentError` if not."""
    for name, side in (("student", batch.student), ("teacher", batch.teacher)):
        if side is not None and not torch.equal(
            side.ids_BT[side.rows_N, side.columns_N + 1], batch.ids_N
        ):
            raise AlignmentError(f"the {name}'s sequence does not hold the answers' token ids")


def _has_teacher(lesson: Lesson) -> bool:
    return lesson.teacher_prompt_ids is not None


def _length(lesson: Lesson) -> int:
    """Tokens of a lesson's student and teacher sequences together."""
    answer = len(lesson.rollout.answer_ids)
    length = len(lesson.rollout.prompt_ids) + answer
    if lesson.teacher_prompt_ids is not None:
        length += len(lesson.teacher_prompt_ids) + answer
    return length


def _batch(pairs: Sequence[tuple[Lesson, Signal]], pad_id: int) -> Batch:
    rollouts = [lesson.rollout for lesson, _ in pairs]
    answers = [rollout.answer_ids for rollout in rollouts]
    teacher_prompts = [lesson.teacher_prompt_ids for lesson, _ in pairs]
    told = [prompt for prompt in teacher_prompts if prompt is not None]
    assert len(told) in (0, len(pairs)), "lessons with and without a teacher do not mix"
    shares = [signal.shares for _, signal in pairs if signal.shares is not None]
    batch = Batch(
        student=sequences([rollout.prompt_ids for rollout in rollouts], answers, pad_id),
        teacher=sequences(told, answers, pad_id) if told else None,
        ids_N=torch.tensor([token for answer in answers for token in answer]),
        weight_N=torch.tensor([w for _, signal in pairs for w in signal.weights]),
        advantage_N=torch.tensor(
            [signal.advantage for _, signal in pairs for _ in signal.weights], dtype=torch.float32
        ),
        sampled_logp_N=torch.tensor([logp for rollout in rollouts for logp in rollout.logps]),
        share_N=torch.tensor([share for own in shares for share in own]) if shares else None,
    )
    check_same_tokens(batch)
    return batch
