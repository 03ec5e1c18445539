"""A step of two groups for GRPO's losses: as samples and a micro-batch, and as padded tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selfteach.losses.grpo import Grpo
from selfteach.models.lm_head import Head, Scores
from selfteach.models.sequences import sequences
from selfteach.types import Batch, CritiquedRollout, Problem, Rollout, TrainingSample, Verdict

LENGTHS = (4, 2, 3, 1, 4, 2)
CORRECT = (True, False, False, False, True, True)
FINISHED = (False, True, True, True, False, True)
GROUPS = ("a", "a", "a", "b", "b", "b")
B, T, V, H = len(LENGTHS), max(LENGTHS), 7, 5
LIMIT = 5
"""The token limit; TRL's max_completion_length."""
TEMPERATURE = 0.7


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids_of(row: int) -> tuple[int, ...]:
    return tuple((3 * row + 2 * t) % V for t in range(LENGTHS[row]))


def samples() -> list[TrainingSample]:
    made = []
    for row in range(B):
        ids = ids_of(row)
        rollout = Rollout(
            Problem(GROUPS[row], "?", "x"),
            row,
            (1, 2),
            ids,
            (-0.7,) * len(ids),
            "",
            FINISHED[row],
            0,
        )
        verdict = Verdict(CORRECT[row], True, "x")
        made.append(TrainingSample(CritiquedRollout(rollout, verdict, None)))
    return made


@dataclass(frozen=True)
class Case:
    """The same numbers ragged and padded; the padding holds what must never count."""

    head_VH: Tensor
    hidden_NH: Tensor
    reference_NV: Tensor
    old_N: Tensor | None
    sampled_N: Tensor

    @property
    def mask_BT(self) -> Tensor:
        lengths_B1 = torch.tensor(LENGTHS)[:, None]
        return (torch.arange(T)[None] < lengths_B1).double()

    def padded(self, values_N: Tensor) -> Tensor:
        """Return values [N] as [B, T], with 7 in the padding."""
        rows = torch.split(values_N, list(LENGTHS))
        return torch.stack([torch.cat([row, row.new_full((T - len(row),), 7.0)]) for row in rows])

    def logp(self, logits_NV: Tensor) -> Tensor:
        ids_N = torch.tensor([i for row in range(B) for i in ids_of(row)])
        logp_NV = (logits_NV / TEMPERATURE).log_softmax(-1)
        return logp_NV.gather(1, ids_N[:, None])[:, 0]


def case(*, later: bool) -> Case:
    """Return a case; ``later``: an update after the first, with another old policy."""
    count = sum(LENGTHS)
    made = Case(
        noise(V, H, seed=1),
        noise(count, H, seed=2),
        noise(count, V, seed=3),
        None,
        noise(1, seed=0),
    )
    logp_N = made.logp(made.hidden_NH @ made.head_VH.T)
    old_N = logp_N + 0.4 * noise(count, seed=4) if later else None
    sampled_N = (logp_N if old_N is None else old_N) + 0.3 * noise(count, seed=5)
    return Case(made.head_VH, made.hidden_NH, made.reference_NV, old_N, sampled_N)


def our_loss(objective: Grpo, made: Case, *, chunk_tokens: int = 1000) -> tuple[Tensor, Tensor]:
    """Return the step's loss and its gradient in the hidden states, as the trainer forms them."""
    step = samples()
    weights = objective.token_weights(step, objective.denominators(step))
    batch = Batch(
        student=sequences([(1, 2)] * B, [ids_of(row) for row in range(B)], 0),
        teacher=None,
        ids_N=torch.tensor([i for row in range(B) for i in ids_of(row)]),
        weight_N=torch.tensor([w for one in weights for w in one.weights], dtype=torch.float64),
        advantage_N=torch.tensor(
            [one.advantage for one in weights for _ in one.weights], dtype=torch.float64
        ),
        sampled_logp_N=made.sampled_N,
        old_logp_N=made.old_N,
    )
    hidden_NH = made.hidden_NH.clone().requires_grad_()
    student = Scores.single(hidden_NH, Head(made.head_VH))
    identity = Head(torch.eye(V, dtype=torch.float64))
    teacher = Scores.single(made.reference_NV, identity) if objective.needs_teacher else None
    loss, _ = objective.loss(student, teacher, batch, chunk_tokens)
    return loss.detach(), torch.autograd.grad(loss, hidden_NH)[0]


FORMS = {
    "grpo": {"surrogate": "clipped", "aggregation": "sequence_mean"},
    "bnpo": {"surrogate": "clipped", "aggregation": "token_mean"},
    "dapo": {"surrogate": "clipped", "aggregation": "token_mean"},
    "dr_grpo": {"surrogate": "clipped", "aggregation": "max_tokens"},
    "cispo": {"surrogate": "cispo", "aggregation": "token_mean"},
}
OPTIONS = {
    "plain": {},
    "penalised": {"kl_coef": 0.04},
    "delta": {"clip_delta": 1.4},
    "masked": {"mask_truncated": True},
    "capped": {"importance_cap": 1.1},
    "all": {"kl_coef": 0.04, "mask_truncated": True, "importance_cap": 1.1, "clip_delta": 1.4},
}


def objective(form: str, option: str, level: str) -> Grpo | None:
    """Return one of the forms; None for cispo with a delta, which has none."""
    options = dict(OPTIONS[option])
    if form == "cispo":
        options.pop("clip_delta", None)
        if not options and option != "plain":
            return None
    return Grpo(
        TEMPERATURE, clip_high=0.28, importance_level=level, max_tokens=LIMIT,  # type: ignore[arg-type]
        **FORMS[form], **options,
    )  # fmt: skip
