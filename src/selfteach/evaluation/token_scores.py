"""What student and self-teacher make of the same answer tokens, under any number of contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfteach.losses.divergence import forward_kl, log_probs, reverse_kl
from selfteach.models.lm_head import Scores
from selfteach.models.sequences import sequences
from selfteach.types import Sequences

ScoreFn = Callable[[Sequences], Scores]
"""A model as far as it matters here: sequences in, logits of the answers' tokens out."""

TokenScores = dict[str, np.ndarray]
"""The values of `compare` of one answer under one context, each [tokens] in float32."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One answer with the prompts before it: the question alone, and one with each context."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    teacher_prompts: Mapping[str, tuple[int, ...]]

    @property
    def length(self) -> int:
        """Tokens of the longest prompt with the answer."""
        prompts = [self.prompt_ids, *self.teacher_prompts.values()]
        return max(map(len, prompts)) + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is held at a time."""

    batch_tokens: int
    """Padded tokens in one forward pass (a longer answer stands alone)."""
    chunk_tokens: int
    """Rows of logits: never [tokens, vocabulary] at once."""


def compare(
    student_CV: Float[Tensor, "C V"], teacher_CV: Float[Tensor, "C V"], ids_C: Int[Tensor, " C"]
) -> dict[str, Float[Tensor, " C"]]:
    """All that is said of each token, from logits at temperature 1; nats, full vocabulary.

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
def score_answers(
    student: ScoreFn,
    teacher: ScoreFn,
    asked: Sequence[Asked],
    *,
    pad_id: int,
    device: torch.device,
    limits: Limits,
) -> list[dict[str, TokenScores]]:
    """`compare` for each answer, by context; in the order of ``asked``.

    Answers of similar length share a forward pass. The student's is run once for all contexts.
    """
    told: list[dict[str, TokenScores]] = [{} for _ in asked]
    for bucket in _buckets(asked, limits.batch_tokens):
        own = [asked[i] for i in bucket]
        answers = [a.token_ids for a in own]
        side = sequences([a.prompt_ids for a in own], answers, pad_id)
        plain = student(side.to(device))
        for name in dict.fromkeys(name for a in own for name in a.teacher_prompts):
            rows = [row for row, a in enumerate(own) if name in a.teacher_prompts]
            prompts = [own[row].teacher_prompts[name] for row in rows]
            shown = sequences(prompts, [answers[row] for row in rows], pad_id)
            seen = torch.isin(side.rows_N, torch.tensor(rows)).to(device)
            scored = _walk(_only(plain, seen), teacher(shown.to(device)), shown, limits)
            for row, values in zip(
                rows, _split(scored, [len(answers[r]) for r in rows]), strict=True
            ):
                told[bucket[row]][name] = values
    return told


def _walk(student: Scores, teacher: Scores, shown: Sequences, limits: Limits) -> TokenScores:
    """`compare` over all tokens of a bucket, a chunk of logits at a time."""
    ids_N = shown.ids_BT[shown.rows_N, shown.columns_N + 1]
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(ids_N), limits.chunk_tokens):
        rows = slice(start, min(start + limits.chunk_tokens, len(ids_N)))
        student_CV, teacher_CV = student.logits(rows), teacher.logits(rows)
        said = compare(student_CV, teacher_CV, ids_N[rows].to(student_CV.device))
        for name, value_C in said.items():
            parts.setdefault(name, []).append(value_C.to("cpu").numpy())
    return {name: np.concatenate(chunks) for name, chunks in parts.items()}


def _buckets(asked: Sequence[Asked], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of answers that are run together: of similar length, within ``batch_tokens``."""
    bucket: list[int] = []
    for i in sorted(range(len(asked)), key=lambda i: asked[i].length):
        if bucket and asked[i].length * (len(bucket) + 1) > batch_tokens:
            yield bucket
            bucket = []
        bucket.append(i)
    if bucket:
        yield bucket


def _only(scores: Scores, seen_N: Tensor) -> Scores:
    """The scores of some of the tokens."""
    return Scores(tuple((hidden_NH[seen_N], head, mix) for hidden_NH, head, mix in scores.terms))


def _split(scored: TokenScores, lengths: Sequence[int]) -> list[TokenScores]:
    """A bucket's values, answer by answer."""
    at = np.cumsum(lengths)[:-1]
    pieces = {name: np.split(values, at) for name, values in scored.items()}
    return [{name: pieces[name][i] for name in pieces} for i in range(len(lengths))]


def _entropy(logp_CV: Tensor) -> Tensor:
    return torch.special.entr(logp_CV.exp()).sum(-1)
