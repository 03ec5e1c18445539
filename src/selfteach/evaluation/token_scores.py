"""Scores the same rollout tokens with student and self-teacher, under any number of contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfteach.losses.divergence import forward_kl, log_probs, reverse_kl
from selfteach.models.lm_head import Scores
from selfteach.models.sequences import select_tokens, sequences
from selfteach.types import Sequences

ScoreFn = Callable[[Sequences], Scores]
"""Scores sequences with a model: logits of the rollouts' tokens."""

TokenScores = dict[str, np.ndarray]
"""The values of `compare_logits` of one rollout under one context, each [tokens] in float32."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Holds a rollout's tokens with its prompts: the student's, and the teacher's by context."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    teacher_prompts: Mapping[str, tuple[int, ...]]
    positions: Sequence[int] | None = None
    """Indices of the tokens that are scored, such as the model's; None: all."""

    @property
    def scored(self) -> Sequence[int]:
        """Return the indices of the tokens that are scored."""
        return range(len(self.token_ids)) if self.positions is None else self.positions

    @property
    def length(self) -> int:
        """Return the number of tokens of the rollout with its longest prompt."""
        prompts = [self.prompt_ids, *self.teacher_prompts.values()]
        return max(map(len, prompts)) + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class ScoringLimits:
    """Limits how much is held in memory at a time."""

    batch_tokens: int
    """Padded tokens in one forward pass (a longer rollout is a batch by itself)."""
    chunk_tokens: int
    """Tokens whose logits [tokens, vocabulary] exist at a time."""


def compare_logits(
    student_CV: Float[Tensor, "C V"], teacher_CV: Float[Tensor, "C V"], ids_C: Int[Tensor, " C"]
) -> dict[str, Float[Tensor, " C"]]:
    """Compare student and teacher at each token: logits at temperature 1, full vocabulary, in nats.

    ``advantage`` is log teacher(y) − log student(y), ``kl_forward`` KL(teacher ‖ student),
    ``kl_reverse`` KL(student ‖ teacher); rounding leaves neither of them below 0.
    """
    student, teacher = log_probs(student_CV), log_probs(teacher_CV)
    student_logp, teacher_logp = (x.gather(-1, ids_C[:, None])[:, 0] for x in (student, teacher))
    return {
        "student_logp": student_logp,
        "teacher_logp": teacher_logp,
        "advantage": teacher_logp - student_logp,
        "kl_forward": forward_kl(student, teacher).clamp(min=0),
        "kl_reverse": reverse_kl(student, teacher).clamp(min=0),
        "student_entropy": _entropy(student),
        "teacher_entropy": _entropy(teacher),
    }


@torch.no_grad()
def score_rollouts(
    student: ScoreFn,
    teacher: ScoreFn,
    requests: Sequence[ScoreRequest],
    *,
    pad_id: int,
    device: torch.device,
    limits: ScoringLimits,
) -> list[dict[str, TokenScores]]:
    """Return `compare_logits` of each rollout's scored tokens, by context; in ``requests``' order.

    Rollouts of similar length share a forward pass. The student's is run once for all contexts.
    """
    scores: list[dict[str, TokenScores]] = [{} for _ in requests]
    for bucket in _buckets(requests, limits.batch_tokens):
        batch = [requests[i] for i in bucket]
        completions = [request.token_ids for request in batch]
        lengths, at = [len(row) for row in completions], [request.scored for request in batch]
        whole = sequences([request.prompt_ids for request in batch], completions, pad_id)
        student_side = select_tokens(whole, lengths, at)
        student_scores = student(student_side.to(device))
        for name in dict.fromkeys(name for request in batch for name in request.teacher_prompts):
            rows = [row for row, request in enumerate(batch) if name in request.teacher_prompts]
            prompts = [batch[row].teacher_prompts[name] for row in rows]
            whole = sequences(prompts, [completions[row] for row in rows], pad_id)
            teacher_side = select_tokens(
                whole, [lengths[row] for row in rows], [at[row] for row in rows]
            )
            has_context_N = torch.isin(student_side.rows_N, torch.tensor(rows)).to(device)
            values_N = _compare_in_chunks(
                _select(student_scores, has_context_N),
                teacher(teacher_side.to(device)),
                teacher_side,
                limits,
            )
            by_rollout = _split(values_N, [len(at[row]) for row in rows])
            for row, values in zip(rows, by_rollout, strict=True):
                scores[bucket[row]][name] = values
    return scores


def _compare_in_chunks(
    student: Scores, teacher: Scores, side: Sequences, limits: ScoringLimits
) -> TokenScores:
    """Return `compare_logits` over all tokens of a bucket, a chunk of logits at a time."""
    ids_N = side.ids_BT[side.rows_N, side.columns_N + 1]
    chunks: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(ids_N), limits.chunk_tokens):
        rows = slice(start, min(start + limits.chunk_tokens, len(ids_N)))
        student_CV, teacher_CV = student.logits(rows), teacher.logits(rows)
        values = compare_logits(student_CV, teacher_CV, ids_N[rows].to(student_CV.device))
        for name, value_C in values.items():
            chunks.setdefault(name, []).append(value_C.to("cpu").numpy())
    return {name: np.concatenate(values) for name, values in chunks.items()}


def _buckets(requests: Sequence[ScoreRequest], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of requests that share a forward pass: similar lengths, within ``batch_tokens``."""
    bucket: list[int] = []
    for i in sorted(range(len(requests)), key=lambda i: requests[i].length):
        if bucket and requests[i].length * (len(bucket) + 1) > batch_tokens:
            yield bucket
            bucket = []
        bucket.append(i)
    if bucket:
        yield bucket


def _select(scores: Scores, selected_N: Tensor) -> Scores:
    """Return the scores of some of the tokens."""
    return Scores(
        tuple((hidden_NH[selected_N], head, mix) for hidden_NH, head, mix in scores.terms)
    )


def _split(values_N: TokenScores, lengths: Sequence[int]) -> list[TokenScores]:
    """Split a bucket's values by rollout."""
    ends = np.cumsum(lengths)[:-1]
    pieces = {name: np.split(values, ends) for name, values in values_N.items()}
    return [{name: pieces[name][i] for name in pieces} for i in range(len(lengths))]


def _entropy(logp_CV: Tensor) -> Tensor:
    return torch.special.entr(logp_CV.exp()).sum(-1)
