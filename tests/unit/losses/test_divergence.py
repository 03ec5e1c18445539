"""Golden values, parity with torch, gradients, edge rows and refusals of the divergences."""

import math
from dataclasses import replace

import jaxtyping
import pytest
import torch
from divergences import CLIPPED, EXACT, INF, LN2, LN3, SAMPLED, TEMPERED, close, f64, name, noise

from selfteach.errors import RecipeError
from selfteach.losses.divergence import (
    Divergence,
    forward_kl,
    forward_kl_terms,
    jsd,
    jsd_terms,
    log_probs,
    per_token,
    reverse_kl,
    reverse_kl_terms,
    sampled_forward_kl,
    sampled_reverse_kl,
    top_k_and_tail,
)

# Two entries: the student is (1/2, 1/2), the teacher (1/4, 3/4).
STUDENT, TEACHER = f64(1 / 2, 1 / 2).log(), f64(1 / 4, 3 / 4).log()
# 1/4 ln(1/2) + 3/4 ln(3/2) = 3/4 ln 3 - ln 2
FORWARD = 0.75 * LN3 - LN2
# 1/2 ln(2) + 1/2 ln(2/3) = ln 2 - 1/2 ln 3
REVERSE = LN2 - 0.5 * LN3
# m = (3/8, 5/8): half of each of KL(t||m) = 1/4 ln(2/3) + 3/4 ln(6/5)
# and KL(s||m) = 1/2 ln(4/3) + 1/2 ln(4/5)
JSD_HALF = 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)) + 0.5 * (
    0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
)
# m = t/4 + 3s/4 = (7/16, 9/16): KL(t||m) = 1/4 ln(4/7) + 3/4 ln(4/3),
# KL(s||m) = 1/2 ln(8/7) + 1/2 ln(8/9)
JSD_QUARTER = 0.25 * (0.25 * math.log(4 / 7) + 0.75 * math.log(4 / 3)) + 0.75 * (
    0.5 * math.log(8 / 7) + 0.5 * math.log(8 / 9)
)
GOLDEN = [
    (Divergence("forward_kl"), FORWARD),
    (Divergence("reverse_kl"), REVERSE),
    (Divergence("jsd"), JSD_HALF),
    (Divergence("jsd", beta=0.25), JSD_QUARTER),
    (Divergence("jsd", beta=0.25, jsd_scaled=True), JSD_QUARTER / (3 / 16)),
]


def test_golden_terms_and_sums() -> None:
    close(forward_kl_terms(STUDENT, TEACHER), f64(-LN2 / 4, 0.75 * math.log(1.5)))
    close(reverse_kl_terms(STUDENT, TEACHER), f64(LN2 / 2, 0.5 * math.log(2 / 3)))
    close(forward_kl(STUDENT, TEACHER), FORWARD)
    close(reverse_kl(STUDENT, TEACHER), REVERSE)
    close(jsd(STUDENT, TEACHER, 0.5), JSD_HALF)
    close(jsd(STUDENT, TEACHER, 0.25), JSD_QUARTER)
    close(jsd(STUDENT, TEACHER, 0.25, scaled=True), JSD_QUARTER * 16 / 3)


@pytest.mark.parametrize(("spec", "want"), GOLDEN)
def test_golden_from_logits(spec, want) -> None:
    # Logits need not be normalised: adding a constant changes nothing.
    got = per_token(spec, STUDENT + 3.0, TEACHER - 1.0, torch.tensor(1))
    close(got.loss, want)
    close(got.teacher_logratio, math.log(3 / 2))  # ln(3/4) - ln(1/2)
    assert got.clipped == 0


@pytest.mark.parametrize(("spec", "want"), GOLDEN)
def test_golden_temperature(spec, want) -> None:
    # Logits (0, 2 ln 3) at temperature 2 are (0, ln 3), which is (1/4, 3/4); uniform stays uniform.
    got = per_token(replace(spec, temperature=2.0), f64(0, 0), f64(0, 2 * LN3), torch.tensor(1))
    close(got.loss, want)
    close(got.teacher_logratio, math.log(9 / 10) - math.log(1 / 2))  # at temperature 1


@pytest.mark.parametrize(("spec", "want"), GOLDEN)
def test_golden_top_k(spec, want) -> None:
    # Student (1/2, 1/4, 1/4) and teacher (1/4, 1/4, 1/2). The student's top 1 is entry 0, so the
    # buckets are (1/2, 1/2) and (1/4, 3/4): the two-entry case.
    student, teacher = f64(1 / 2, 1 / 4, 1 / 4).log(), f64(1 / 4, 1 / 4, 1 / 2).log()
    spec = replace(spec, support="top_k", top_k=1)
    close(per_token(spec, student, teacher, torch.tensor(0)).loss, want)
    # With the sides exchanged the teacher's top 1 gives that same pair of buckets, exchanged.
    spec = replace(spec, top_k_from="teacher", beta=1 - spec.beta)
    want = {"forward_kl": REVERSE, "reverse_kl": FORWARD}.get(spec.kind, want)
    close(per_token(spec, teacher, student, torch.tensor(0)).loss, want)


def test_top_k_side_matters() -> None:
    # Teacher's top 1 of the case above is entry 2: student (1/4, 3/4), teacher (1/2, 1/2).
    student, teacher = f64(1 / 2, 1 / 4, 1 / 4).log(), f64(1 / 4, 1 / 4, 1 / 2).log()
    buckets = top_k_and_tail(student, teacher, 1, "teacher")
    close(buckets[0], f64(1 / 4, 3 / 4).log())
    close(buckets[1], f64(1 / 2, 1 / 2).log())


def test_top_k_of_the_whole_vocabulary_is_the_whole_vocabulary() -> None:
    student, teacher = noise(2, 4, 5)
    ids = torch.zeros(4, dtype=torch.long)
    for spec in EXACT[:5]:
        want = per_token(spec, student, teacher, ids).loss
        for k in (5, 9):
            got = per_token(replace(spec, support="top_k", top_k=k), student, teacher, ids).loss
            assert torch.equal(got, want)


def test_golden_clip() -> None:
    # Forward terms are -ln(2)/4 and 3/4 ln(3/2) = 0.304: a cap of 0.1 takes the second of the two
    # and turns the sum negative.
    got = per_token(Divergence("forward_kl", clip=0.1), STUDENT, TEACHER, torch.tensor(0))
    close(got.loss, 0.1 - LN2 / 4)
    assert got.loss < 0 and got.clipped == 0.5
    # The tail bucket is an entry like any other: (1/4, 3/4) is here the kept entry and the tail.
    spec = Divergence("forward_kl", support="top_k", top_k=1, clip=0.1)
    student, teacher = f64(1 / 2, 1 / 4, 1 / 4).log(), f64(1 / 4, 1 / 4, 1 / 2).log()
    got = per_token(spec, student, teacher, torch.tensor(0))
    close(got.loss, 0.1 - LN2 / 4)
    assert got.clipped == 0.5


def test_a_clipped_entry_has_no_gradient_and_a_wide_clip_does_nothing() -> None:
    student = STUDENT.clone().requires_grad_()
    terms = forward_kl_terms(student, TEACHER).clamp(max=0.1)
    (grad,) = torch.autograd.grad(terms.sum(), student)
    close(grad, f64(-1 / 4, 0.0))
    ids = torch.zeros(4, dtype=torch.long)
    for spec in EXACT:
        plain = per_token(spec, *noise(2, 4, 5), ids)
        wide = per_token(replace(spec, clip=1e6), *noise(2, 4, 5), ids)
        assert torch.equal(plain.loss, wide.loss) and wide.clipped.sum() == 0


def test_golden_sampled() -> None:
    # y = 1: A = ln(3/4) - ln(1/2) = ln(3/2), log s(y) = -ln 2, and KL(s||t) = REVERSE.
    y, advantage = torch.tensor(1), math.log(3 / 2)
    forward, reverse, controlled = (per_token(spec, STUDENT, TEACHER, y) for spec in SAMPLED)
    close(forward.loss, 1.5 * LN2)
    close(reverse.loss, advantage * LN2)
    close(controlled.loss, (advantage + REVERSE) * LN2)
    for got in (forward, reverse, controlled):
        close(got.teacher_logratio, advantage)
        assert got.clipped == 0


@pytest.mark.parametrize("sampling_temperature", [None, 1.0, 1.1, 0.6])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("spec", SAMPLED, ids=name)
def test_sampled_surrogate_has_the_gradient_of_the_kl(
    spec, temperature, sampling_temperature
) -> None:
    # The expectation over y ~ student is taken exactly, by summing over the vocabulary.
    spec = replace(spec, temperature=temperature)
    student, teacher = noise(2, 6)
    student.requires_grad_()
    every = torch.arange(6)
    losses = per_token(
        spec,
        student.expand(6, 6),
        teacher.expand(6, 6),
        every,
        sampling_temperature=sampling_temperature,
    ).loss
    chances = log_probs(student, sampling_temperature or temperature).exp().detach()
    (got,) = torch.autograd.grad((chances * losses).sum(), student)
    whole = Divergence(spec.kind, temperature=temperature)
    kl = per_token(whole, student, teacher, torch.tensor(0)).loss
    (want,) = torch.autograd.grad(kl, student)
    close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("beta", [1e-6, 1e-4, 0.3, 0.7, 1 - 1e-4, 1 - 1e-6])
def test_a_scaled_jsd_keeps_its_digits_in_float32(beta: float) -> None:
    student, teacher = (3 * noise(2, 4, 50)).float()
    spec = Divergence("jsd", beta=beta, jsd_scaled=True)
    ids = torch.zeros(4, dtype=torch.long)

    def both(s: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
        s = s.clone().requires_grad_()
        loss = per_token(spec, s, t, ids).loss
        plain = jsd(log_probs(s), log_probs(t), beta, scaled=True)
        grads = [torch.autograd.grad(x.sum(), s, retain_graph=True)[0] for x in (loss, plain)]
        return [loss.detach(), plain.detach(), *grads]

    for got, want in zip(
        both(student, teacher), both(student.double(), teacher.double()), strict=True
    ):
        close(got.double(), want, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("beta", [1e-4, 0.5, 0.9999])
def test_a_jsd_of_distributions_without_common_support_is_finite(beta: float) -> None:
    student = torch.tensor([[0.0, -math.inf, 200.0, -math.inf]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 200.0, -math.inf, -math.inf]], dtype=torch.float64)
    student.requires_grad_()
    result = per_token(Divergence("jsd", beta=beta), student, teacher, torch.tensor([0]))
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    close(result.loss, torch.tensor([entropy], dtype=torch.float64), rtol=1e-9)
    close(result.loss, jsd(log_probs(student), log_probs(teacher), beta), rtol=1e-12)
    (grad,) = torch.autograd.grad(result.loss.sum(), student)
    assert grad.isfinite().all()


def test_the_surrogates_differentiate_the_log_probability_alone() -> None:
    student, teacher = (x.clone().requires_grad_() for x in log_probs(noise(2, 6)))
    kl = reverse_kl(student, teacher)
    advantage = (teacher - student).detach()
    for surrogate, reward in [
        (sampled_reverse_kl(student, teacher), advantage),
        (sampled_reverse_kl(student, teacher, kl=kl.expand(6)), advantage + kl.detach()),
        (sampled_forward_kl(student, teacher), advantage.exp()),
    ]:
        (grad,) = torch.autograd.grad(surrogate.sum(), student)
        close(grad, -reward)


def test_parity_with_torch_kl_div() -> None:
    student, teacher = log_probs(noise(2, 4, 9))
    kl_div = torch.nn.functional.kl_div  # kl_div(q, p) is the terms of KL(p || q)
    close(
        forward_kl_terms(student, teacher),
        kl_div(student, teacher, reduction="none", log_target=True),
    )
    close(
        reverse_kl_terms(student, teacher),
        kl_div(teacher, student, reduction="none", log_target=True),
    )
    mixture = (0.3 * teacher.exp() + 0.7 * student.exp()).log()
    want = 0.3 * kl_div(mixture, teacher, reduction="none", log_target=True)
    want = want + 0.7 * kl_div(mixture, student, reduction="none", log_target=True)
    close(jsd_terms(student, teacher, 0.3), want, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("spec", EXACT + CLIPPED + TEMPERED, ids=name)
def test_gradcheck(spec) -> None:
    student, teacher = noise(2, 3, 5, seed=7)
    ids = torch.zeros(3, dtype=torch.long)
    assert torch.autograd.gradcheck(
        lambda logits: per_token(spec, logits, teacher, ids).loss, student.requires_grad_()
    )


def test_the_clipped_specs_do_clip() -> None:
    student, teacher = noise(2, 3, 5, seed=7)
    ids = torch.zeros(3, dtype=torch.long)
    for spec in CLIPPED:
        assert 0 < per_token(spec, student, teacher, ids).clipped.mean() < 1


@pytest.mark.parametrize("spec", EXACT + CLIPPED + SAMPLED, ids=name)
def test_the_teacher_gets_no_gradient_and_the_report_is_detached(spec) -> None:
    student, teacher = (x.clone().requires_grad_() for x in noise(2, 3, 5))
    got = per_token(spec, student, teacher, torch.tensor([0, 4, 2]))
    got.loss.sum().backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert not got.teacher_logratio.requires_grad and not got.clipped.requires_grad
    assert got.loss.shape == got.teacher_logratio.shape == got.clipped.shape == (3,)


def test_the_functions_themselves_detach_the_teacher() -> None:
    student, teacher = (x.clone().requires_grad_() for x in log_probs(noise(2, 3, 5)))
    values = [
        forward_kl(student, teacher),
        reverse_kl(student, teacher),
        jsd(student, teacher, 0.4),
        sampled_reverse_kl(student[..., 0], teacher[..., 0], kl=reverse_kl(student, teacher)),
        sampled_forward_kl(student[..., 0], teacher[..., 0]),
    ]
    for value in values:
        grads = torch.autograd.grad(value.sum(), (student, teacher), allow_unused=True)
        assert grads[0] is not None and grads[1] is None


# Rows as (student, teacher) logits; entries at -inf carry no mass on either side.
EDGES = {
    "the same certain token": (f64(0, -INF, -INF, -INF), f64(0, -INF, -INF, -INF)),
    "masked vocabulary": (f64(0, 1, -INF, 2), f64(1, 0, -INF, -1)),
    "all mass in the top two": (f64(3, 2, -INF, -INF), f64(2, 2.5, -INF, -INF)),
    "nearly certain": (f64(200, 0, 0, 0), f64(150, 0, 1, 0)),
    "far apart": (f64(30, 0, 0, 0), f64(0, 30, 0, 0)),
    "equal": (f64(1, 2, 3, 4), f64(1, 2, 3, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", EDGES)
@pytest.mark.parametrize("spec", EXACT + CLIPPED + SAMPLED, ids=name)
def test_edge_rows_have_finite_values_and_gradients(spec, row, dtype) -> None:
    student, teacher = (logits.to(dtype) for logits in EDGES[row])
    student.requires_grad_()
    got = per_token(spec, student, teacher, torch.tensor(0))
    (grad,) = torch.autograd.grad(got.loss, student)
    assert all(value.isfinite().all() for value in (*got, grad))
    if row in ("equal", "the same certain token") and spec != SAMPLED[0]:
        close(got.loss.double(), 0.0, atol=1e-6)
        close(grad.double(), 0.0, atol=1e-6)


@pytest.mark.parametrize("spec", EXACT + SAMPLED, ids=name)
def test_masked_entries_are_as_if_absent(spec) -> None:
    student, teacher = noise(2, 4)
    keep = torch.tensor([0, 1, 3])
    student[2] = teacher[2] = -INF
    student.requires_grad_()
    masked = per_token(spec, student, teacher, torch.tensor(0)).loss
    (grad,) = torch.autograd.grad(masked, student)
    short = student.detach()[keep].requires_grad_()
    whole = per_token(spec, short, teacher[keep], torch.tensor(0)).loss
    (want,) = torch.autograd.grad(whole, short)
    close(masked, whole.detach(), atol=1e-15)
    close(grad[keep], want, rtol=1e-10, atol=1e-15)
    assert grad[2] == 0


def test_tail_is_exact_where_one_minus_the_rest_would_round_to_zero() -> None:
    # The rest has mass 3 e^-60: 1 - sum is 0 in float64, the bucket's log is not.
    student = log_probs(f64(60, 0, 0, 0))
    buckets, _ = top_k_and_tail(student, student, 1)
    close(buckets, f64(0.0, math.log(3) - 60), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("spec", EXACT, ids=name)
def test_mass_too_small_for_the_dtype_counts_as_none(spec) -> None:
    # e^-2000 is 0 in float64 while its logit is finite: 0 * (-2000 + inf) must not become NaN.
    student, teacher = f64(0, 1, -2000, -INF), f64(1, 0, -INF, -2000)
    student.requires_grad_()
    loss = per_token(spec, student, teacher, torch.tensor(0)).loss
    (grad,) = torch.autograd.grad(loss, student)
    want = per_token(spec, f64(0, 1, -INF, -INF), f64(1, 0, -INF, -INF), torch.tensor(0)).loss
    close(loss, want)
    assert grad.isfinite().all()


def test_an_infinite_divergence_is_not_hidden() -> None:
    partial, full = f64(0, -INF), f64(0, 0)
    y = torch.tensor(0)
    assert per_token(Divergence("forward_kl"), partial, full, y).loss == INF
    assert per_token(Divergence("reverse_kl"), full, partial, y).loss == INF
    assert per_token(Divergence("forward_kl", clip=0.05), partial, full, y).loss.isfinite()
    # JSD: m = (3/4, 1/4), t = (1/2, 1/2), s = (1, 0)
    want = 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2)) + 0.5 * math.log(4 / 3)
    student = partial.clone().requires_grad_()
    got = per_token(Divergence("jsd"), student, full, y).loss
    close(got, want)
    assert torch.autograd.grad(got, student)[0].isfinite().all()


@pytest.mark.parametrize("spec", [*EXACT[:6], *SAMPLED], ids=name)
def test_precision(spec) -> None:
    student, teacher = noise(2, 3, 5).bfloat16()
    ids = torch.tensor([0, 1, 2])
    coarse = per_token(spec, student, teacher, ids)
    fine = per_token(spec, student.double(), teacher.double(), ids)
    for low, high in zip(coarse, fine, strict=True):
        assert low.dtype == torch.float32 and high.dtype == torch.float64
        torch.testing.assert_close(low.double(), high, rtol=1e-5, atol=1e-6)


def test_leading_axes_are_free() -> None:
    student, teacher = noise(2, 6, 5)
    ids = torch.arange(6) % 5
    flat = per_token(EXACT[0], student, teacher, ids)
    folded = per_token(EXACT[0], student.view(2, 3, 5), teacher.view(2, 3, 5), ids.view(2, 3))
    for one, other in zip(flat, folded, strict=True):
        assert torch.equal(one.view(2, 3), other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"kind": "kl"}, "kind must be one of"),
        ({"kind": "jsd", "support": "some"}, "support must be one of"),
        ({"kind": "jsd", "support": "top_k", "top_k": 1, "top_k_from": "x"}, "top_k_from must be"),
        ({"kind": "jsd", "support": "sampled"}, "no sampled-token form"),
        ({"kind": "reverse_kl", "control_variate": True}, "control_variate needs"),
        ({"kind": "forward_kl", "support": "sampled", "control_variate": True}, "control_variate"),
        ({"kind": "jsd", "support": "top_k"}, "top_k goes with"),
        ({"kind": "jsd", "top_k": 5}, "top_k goes with"),
        ({"kind": "jsd", "support": "top_k", "top_k": 0}, "at least 1, got 0"),
        ({"kind": "jsd", "top_k_from": "teacher"}, "top_k_from needs"),
        ({"kind": "jsd", "beta": 0.0}, "strictly between 0 and 1, got 0.0"),
        ({"kind": "jsd", "beta": 1.0}, "strictly between 0 and 1, got 1.0"),
        ({"kind": "jsd", "beta": math.nan}, "strictly between 0 and 1, got nan"),
        ({"kind": "forward_kl", "beta": 0.3}, "beta = 0.3 has no meaning"),
        ({"kind": "reverse_kl", "jsd_scaled": True}, "jsd_scaled has no meaning"),
        ({"kind": "forward_kl", "clip": 0.0}, "clip must be positive, got 0.0"),
        ({"kind": "forward_kl", "clip": -1.0}, "clip must be positive"),
        ({"kind": "reverse_kl", "support": "sampled", "clip": 0.1}, "clip has no meaning"),
        ({"kind": "forward_kl", "temperature": 0.0}, "temperature must be positive"),
        ({"kind": "forward_kl", "temperature": INF}, "temperature must be positive"),
    ],
)
def test_refusals(words, message, monkeypatch) -> None:
    # The test hook would refuse a wrong Literal before we do; users do not run it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(RecipeError, match=message) as caught:
        Divergence(**words)
    assert "\n" not in str(caught.value)
