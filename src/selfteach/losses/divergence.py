"""Compute how far the student is from the teacher at each token: KL divergences, JSD, surrogates.

Pure functions of log-probabilities and logits: no config, no logging, no collectives. Everything
is in nats. ``student`` and ``teacher`` are log-probabilities over the last axis; the teacher is a
constant and is detached here. Computed in float32 at least (float64 stays float64).

A mass of zero contributes zero (0 log 0 = 0), in value and in gradient, so that -inf logits are
allowed. A divergence that *is* infinite (KL(p ‖ q) where q misses a part of p) is returned
as infinite; only the JSD and a clipped term stay finite there.

Sources: generalised JSD, Agarwal et al. (GKD, arXiv:2306.13649, eq. 1); top-K and a tail bucket,
SDPO (arXiv:2601.20802); pointwise clip, OPSD (arXiv:2601.18734); control variate, vOPD
(arXiv:2605.07865).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfteach.losses.analytic_gradients import divergence_of_rows, scaled
from selfteach.losses.divergence_spec import LARGEST_DIFFERENCE, Divergence, Side
from selfteach.losses.policy_gradient import token_logp


class PerToken(NamedTuple):
    """Holds a divergence's values for each token; all fields have the shape of the token ids."""

    loss: Tensor
    """The term to minimise (nats); for a sampled token a surrogate with the KL's gradient."""
    teacher_logratio: Tensor
    """log teacher(y) - log student(y) of the sampled token, at temperature 1, detached (nats)."""
    clipped: Tensor
    """Share of the entries whose term was capped, detached."""
    logp: Tensor
    """log student(y) of the sampled token at the divergence's temperature, detached (nats)."""


def per_token(
    spec: Divergence,
    student_logits: Float[Tensor, "*rows V"],
    teacher_logits: Float[Tensor, "*rows V"],
    ids: Int[Tensor, "*rows"],
    *,
    sampling_temperature: float | None = None,
    donate_teacher_logits: bool = False,
) -> PerToken:
    """Compute the divergence that ``spec`` describes for every row of logits; ``loss`` has a gradient.

    ``ids`` are the sampled tokens, which the sampled-token losses and ``teacher_logratio`` refer to.
    They were sampled from the student at ``sampling_temperature`` (None: at ``spec.temperature``).
    Where the two differ, a sampled-token loss is weighted by the ratio of the probabilities, so that
    its expected gradient is still that of the divergence at ``spec.temperature``.
    ``spec.temperature`` applies to ``loss`` and ``logp``; ``teacher_logratio`` is at temperature 1.
    With ``donate_teacher_logits`` the teacher's logits may be overwritten, which saves a buffer of
    their size: the caller must not read them again, and ``loss`` can be differentiated only once.
    """
    teacher_logits = teacher_logits.detach()
    teacher_logratio = None
    # Computed first: `divergence_of_rows` may overwrite the teacher's logits.
    if spec.temperature != 1:
        teacher_logratio = _teacher_logratio(student_logits, teacher_logits, ids)
    if spec.support == "sampled":
        values = _of_sampled(spec, student_logits, teacher_logits, ids, sampling_temperature)
    else:
        values = divergence_of_rows(
            student_logits,
            teacher_logits,
            ids,
            spec,
            donate_teacher_logits=donate_teacher_logits,
        )
    loss, clipped, logp, teacher_logp = values
    if teacher_logratio is None:
        teacher_logratio = teacher_logp - logp
    return PerToken(loss, teacher_logratio, clipped, logp)


@torch.no_grad()
def _teacher_logratio(student_logits: Tensor, teacher_logits: Tensor, ids: Tensor) -> Tensor:
    return token_logp(teacher_logits, ids, 1.0) - token_logp(student_logits, ids, 1.0)


def _of_sampled(
    spec: Divergence,
    student_logits: Tensor,
    teacher_logits: Tensor,
    ids: Tensor,
    sampling_temperature: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what `divergence_of_rows` does, from the sampled tokens alone."""
    logp = token_logp(student_logits, ids, spec.temperature)
    teacher_logp = token_logp(teacher_logits, ids, spec.temperature)
    if spec.kind == "forward_kl":
        loss = sampled_forward_kl(logp, teacher_logp)
    elif not spec.control_variate:
        loss = sampled_reverse_kl(logp, teacher_logp)
    else:
        with torch.no_grad():
            student = log_probs(student_logits, spec.temperature)
            kl = reverse_kl(student, log_probs(teacher_logits, spec.temperature))
        loss = sampled_reverse_kl(logp, teacher_logp, kl=kl)
    if sampling_temperature not in (None, spec.temperature):
        sampled_logp = token_logp(student_logits.detach(), ids, sampling_temperature)
        loss = loss * (logp.detach() - sampled_logp).exp()
    return loss, torch.zeros_like(teacher_logp), logp.detach(), teacher_logp


def log_probs(
    logits: Float[Tensor, "*rows V"], temperature: float = 1.0
) -> Float[Tensor, "*rows V"]:
    """Compute the log-softmax of ``logits / temperature``, in float32 at least."""
    return scaled(logits, temperature).log_softmax(-1)


def kl_terms(p: Float[Tensor, "*rows V"], q: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
    """Compute the terms p log(p/q) whose sum is KL(p ‖ q), from log-probabilities of both.

    Differentiable in both. A term may be negative; their sum over the vocabulary is not.
    """
    # Mass that is zero, or too small for the dtype, is removed from value and gradient together:
    # both sides filled with 0 give 1 * (0 - 0), and the fill lets no gradient through.
    massless = p.exp() == 0
    p, q = p.masked_fill(massless, 0.0), q.masked_fill(massless, 0.0)
    return p.exp() * (p - q)


def forward_kl_terms(
    student: Float[Tensor, "*rows V"], teacher: Float[Tensor, "*rows V"]
) -> Float[Tensor, "*rows V"]:
    """Compute the terms t log(t/s) of KL(teacher ‖ student), from log-probabilities."""
    return kl_terms(teacher.detach(), student)


def reverse_kl_terms(
    student: Float[Tensor, "*rows V"], teacher: Float[Tensor, "*rows V"]
) -> Float[Tensor, "*rows V"]:
    """Compute the terms s log(s/t) of KL(student ‖ teacher), from log-probabilities."""
    return kl_terms(student, teacher.detach())


def jsd_terms(
    student: Float[Tensor, "*rows V"],
    teacher: Float[Tensor, "*rows V"],
    beta: float,
    *,
    scaled: bool = False,
) -> Float[Tensor, "*rows V"]:
    """Compute the terms of the generalised Jensen-Shannon divergence, from log-probabilities.

    ``beta KL(t ‖ m) + (1 - beta) KL(s ‖ m)`` with the mixture ``m = beta t + (1 - beta) s`` and
    ``0 < beta < 1``. It is at most the entropy of (beta, 1 - beta) and vanishes at both ends.
    ``scaled`` divides by beta (1 - beta): the limits are then KL(t ‖ s) at 0 and KL(s ‖ t) at 1.
    """
    teacher = teacher.detach()
    absent = (student == -math.inf) & (teacher == -math.inf)
    difference = teacher.masked_fill(absent, 0.0) - student.masked_fill(absent, 0.0)
    teacher_ratio, student_ratio = log_ratios_to_mixture(difference, beta)
    terms = beta * _weighted(teacher, teacher_ratio) + (1 - beta) * _weighted(
        student, student_ratio
    )
    return terms / (beta * (1 - beta)) if scaled else terms


def log_ratios_to_mixture(difference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute log(t/m) and log(s/m) from log t - log s, for the mixture m = beta t + (1 - beta) s.

    They keep their digits where beta or 1 - beta is small and the mixture nearly one of the two: a
    scaled JSD divides them by it.
    """
    # Beyond this difference one of the masses is below 2e-35 of the other, and so is its term.
    d = difference.clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)
    if beta <= 0.5:
        over_student = torch.log1p(beta * torch.expm1(d))
        return d - over_student, -over_student
    over_teacher = torch.log1p((1 - beta) * torch.expm1(-d))
    return -over_teacher, -d - over_teacher


def _weighted(logp: Tensor, log_ratio: Tensor) -> Tensor:
    """Compute p log(p/m); zero mass is removed from value and gradient, as in `kl_terms`."""
    massless = logp.exp() == 0
    return logp.masked_fill(massless, 0.0).exp() * log_ratio.masked_fill(massless, 0.0)


def forward_kl(
    student: Float[Tensor, "*rows V"], teacher: Float[Tensor, "*rows V"]
) -> Float[Tensor, "*rows"]:
    """Compute KL(teacher ‖ student) per row, in nats, from log-probabilities."""
    return forward_kl_terms(student, teacher).sum(-1)


def reverse_kl(
    student: Float[Tensor, "*rows V"], teacher: Float[Tensor, "*rows V"]
) -> Float[Tensor, "*rows"]:
    """Compute KL(student ‖ teacher) per row, in nats, from log-probabilities."""
    return reverse_kl_terms(student, teacher).sum(-1)


def jsd(
    student: Float[Tensor, "*rows V"],
    teacher: Float[Tensor, "*rows V"],
    beta: float,
    *,
    scaled: bool = False,
) -> Float[Tensor, "*rows"]:
    """Compute the generalised Jensen-Shannon divergence per row, in nats; see ``jsd_terms``."""
    return jsd_terms(student, teacher, beta, scaled=scaled).sum(-1)


def top_k_and_tail(
    student: Float[Tensor, "*rows V"],
    teacher: Float[Tensor, "*rows V"],
    k: int,
    side: Side = "student",
) -> tuple[Float[Tensor, "*rows K1"], Float[Tensor, "*rows K1"]]:
    """Keep one side's k likeliest entries and sum the rest into one bucket: K1 = k + 1 entries.

    Any divergence of the result is at most the one over the whole vocabulary (the log-sum
    inequality) and at least 0. The bucket is summed from the entries themselves: 1 minus the kept
    mass would lose its digits exactly where the top k hold nearly everything. With k >= V both
    come back as they are. Ties are broken as ``torch.topk`` does.
    """
    if k >= student.shape[-1]:
        return student, teacher
    index = (student if side == "student" else teacher).detach().topk(k, dim=-1).indices
    return _sum_tail(student, index), _sum_tail(teacher, index)


def _sum_tail(logp: Tensor, index: Tensor) -> Tensor:
    top, rest = logp.gather(-1, index), logp.scatter(-1, index, -math.inf)
    empty = (rest == -math.inf).all(-1, keepdim=True)  # logsumexp has no gradient there
    tail = rest.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)
    return torch.cat([top, tail], dim=-1)


def sampled_reverse_kl(
    logp: Float[Tensor, "*rows"],
    teacher_logp: Float[Tensor, "*rows"],
    *,
    kl: Float[Tensor, "*rows"] | None = None,
) -> Float[Tensor, "*rows"]:
    """Compute a policy-gradient surrogate of KL(student ‖ teacher) on a token y the student sampled.

    ``-A log s(y)`` with the constant reward ``A = log t(y) - log s(y)``. The value means nothing;
    its gradient, in expectation over y ~ student, is the gradient of the KL; for tokens of another
    distribution (another temperature) weight it by the ratio of probabilities. ``kl`` is the full
    KL(student ‖ teacher) as control variate (vOPD): A's mean is -KL, so A + KL is centred. That
    keeps the expected gradient and lowers its variance as a rule, though not for every pair.
    """
    reward = (teacher_logp - logp).detach()
    if kl is not None:
        reward = reward + kl.detach()
    return -reward * logp


def sampled_forward_kl(
    logp: Float[Tensor, "*rows"], teacher_logp: Float[Tensor, "*rows"]
) -> Float[Tensor, "*rows"]:
    """Compute an importance-weighted surrogate of KL(teacher ‖ student) on a token y from the student.

    ``-(t(y) / s(y)) log s(y)`` with the ratio held constant. The value means nothing; its
    gradient, in expectation over y ~ student, is the gradient of the KL. The ratio is not capped.
    """
    return -(teacher_logp - logp).detach().exp() * logp
