"""Heads that train in half precision on a processor: as the walk over tokens, with less in memory."""

from __future__ import annotations

import pytest
import torch
from divergences import INF, name
from torch import Tensor

from selfteach.losses import analytic_gradients, fused_cpu
from selfteach.losses.divergence import Divergence, per_token
from selfteach.losses.objectives import Distillation
from selfteach.models import matmul
from selfteach.models.lm_head import Head, Scores, chunked_sum
from selfteach.types import Batch, Sequences

N, V, H = 21, 75, 40
SPECS = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd", beta=0.8, jsd_scaled=True),
    Divergence("reverse_kl", clip=0.02),
    Divergence("jsd", support="top_k", top_k=7),
    Divergence("forward_kl", support="top_k", top_k=7, top_k_from="teacher"),
    Divergence("reverse_kl", support="top_k", top_k=V - 1),
]


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slabs and blocks of rows, the last of each in part."""
    monkeypatch.setattr(fused_cpu, "WIDE", H)
    monkeypatch.setattr(fused_cpu, "SLAB_ENTRIES", N * 32)
    monkeypatch.setitem(analytic_gradients.BLOCK_ENTRIES, "cpu", 8 * 32)


@pytest.fixture(params=[True, False], ids=["halves", "widened"])
def both_processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With instructions for products of halves, and without."""
    monkeypatch.setattr(matmul, "multiplies_halves", lambda _: request.param)
    return request.param


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def inputs(width: int = H) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, the teacher's (of another width), ids, weights with a 0 among them."""
    weight_N = torch.linspace(-0.5, 1.0, N)
    weight_N[3] = 0.0
    return (
        noise(N, H).requires_grad_(), noise(V, H, seed=1).requires_grad_(),
        noise(N, width, seed=2), noise(V, width, seed=3), torch.arange(N) * 3 % V, weight_N,
    )  # fmt: skip


def scores(hidden_NH: Tensor, head_VH: Tensor) -> Scores:
    return Scores.single(hidden_NH, Head(head_VH))


def of(spec: Divergence, student: Scores, teacher: Scores, ids: Tensor, weight: Tensor):
    return fused_cpu.divergence_sum(spec, student, teacher, ids, weight, chunk_tokens=5)


def plainly(spec: Divergence, student: Scores, teacher: Scores, ids: Tensor, weight: Tensor):
    """The walk over tokens, whose head's gradient is summed up in float32."""

    def fn(logits_CV: Tensor, rows: slice) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher_CV = teacher.logits(rows)
        told = per_token(spec, logits_CV, teacher_CV, ids[rows])
        return {
            "loss": told.loss,
            "clipped": told.clipped,
            "teacher_logratio": told.teacher_logratio,
        }

    return chunked_sum(fn, student, weight, chunk_tokens=5)


def off(got: Tensor, want: Tensor) -> float:
    """The part of the wanted norm that is missing."""
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("spec", SPECS, ids=name)
@pytest.mark.parametrize("width", [H, 48])
def test_it_is_the_walk_over_tokens_in_value_statistics_and_gradients(
    spec, width, both_processors
) -> None:
    hidden, head, teacher_hidden, teacher_head, ids, weight = inputs(width)
    student, teacher = scores(hidden, head), scores(teacher_hidden, teacher_head)
    assert fused_cpu.runs(spec, student, teacher)
    (got, said), (want, stats) = (fn(spec, student, teacher, ids, weight) for fn in (of, plainly))
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-4, atol=1e-5)
    for one in ("loss", "clipped"):
        torch.testing.assert_close(said[one], stats[one], rtol=1e-4, atol=1e-5)
    advantage = said["teacher_logp"] - said["logp"]
    torch.testing.assert_close(advantage, stats["teacher_logratio"], rtol=1e-4, atol=1e-4)
    mine, others = (torch.autograd.grad(2 * total, (hidden, head)) for total in (got, want))
    for one, other in zip(mine, others, strict=True):
        assert one.dtype == torch.bfloat16
        assert off(one, other) < 1e-2


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_without_instructions_for_halves_gradients_are_those_of_float64(
    spec: Divergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and their gradient stay in float32 there, so that the only rounding is the last."""
    monkeypatch.setattr(matmul, "multiplies_halves", lambda _: False)
    hidden, head, teacher_hidden, teacher_head, ids, weight = inputs()
    wide = [x.detach().double() for x in (hidden, head, teacher_hidden, teacher_head)]
    wanted = (wide[0].requires_grad_(), wide[1].requires_grad_())
    sides = scores(*wanted), scores(*wide[2:])
    want = torch.autograd.grad(plainly(spec, *sides, ids, weight.double())[0], wanted)
    sides = scores(hidden, head), scores(teacher_hidden, teacher_head)
    for fn in (of, plainly):
        got = torch.autograd.grad(fn(spec, *sides, ids, weight)[0], (hidden, head))
        for one, other in zip(got, want, strict=True):
            assert off(one, other) < 3e-3


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_a_slab_s_gradient_is_the_walk_s_to_the_digit(spec: Divergence) -> None:
    """In float64, where nothing hides behind rounding."""
    student, teacher = noise(N, V).double(), noise(N, V, seed=1).double()
    ids, scale = torch.arange(N)[:, None], torch.linspace(-0.5, 1.0, N).double()
    want = torch.empty_like(student)
    _, kept = analytic_gradients.walked(spec, student, teacher, ids, want)
    got = torch.empty_like(student)
    for first in range(0, V, 32):
        part = slice(first, first + 32)
        theirs = teacher[:, part] if not spec.has_tail(V) else None
        analytic_gradients.gradient_of_slab(
            spec, student[:, part], theirs, kept, first, scale, got[:, part]
        )
    torch.testing.assert_close(got, want * scale[:, None], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[4]], ids=name)
def test_rows_of_weight_zero_are_absent_even_where_nothing_is_finite(
    spec: Divergence, both_processors: bool
) -> None:
    hidden, head, teacher_hidden, teacher_head, ids, weight = inputs()

    def told() -> tuple[Tensor, ...]:
        sides = scores(hidden, head), scores(teacher_hidden, teacher_head)
        total = of(spec, *sides, ids, weight)[0]
        return total.detach(), *torch.autograd.grad(total, (hidden, head))

    want = told()
    with torch.no_grad():
        hidden[3] = torch.nan
        teacher_hidden[3] = INF
    for got, wanted in zip(told(), want, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_only_a_plain_wide_head_of_halves_that_trains_is_walked_in_slabs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, head, teacher_hidden, teacher_head, *_ = inputs()
    own, teacher = SPECS[1], scores(teacher_hidden, teacher_head)
    assert fused_cpu.runs(own, scores(hidden, head), teacher)
    assert fused_cpu.runs(own, scores(hidden, head), scores(teacher_hidden, teacher_head.float()))
    assert not fused_cpu.runs(own, scores(hidden, head.detach()), teacher)
    assert not fused_cpu.runs(own, scores(hidden, head.float().detach().requires_grad_()), teacher)
    assert not fused_cpu.runs(own, scores(hidden.float(), head), teacher)
    assert not fused_cpu.runs(
        own, scores(hidden, head), scores(teacher_hidden.half(), teacher_head)
    )
    biased = Scores.single(hidden, Head(head, torch.zeros(V)))
    assert not fused_cpu.runs(own, biased, teacher) and not fused_cpu.runs(own, teacher, biased)
    mixed = Scores(((teacher_hidden, Head(teacher_head), 0.5),) * 2)
    assert not fused_cpu.runs(own, scores(hidden, head), mixed)
    warmer = Divergence("reverse_kl", temperature=2.0)
    assert not fused_cpu.runs(warmer, scores(hidden, head), teacher)
    with torch.no_grad():
        assert not fused_cpu.runs(own, scores(hidden, head), teacher)
    monkeypatch.setattr(fused_cpu, "WIDE", H + 1)
    assert not fused_cpu.runs(own, scores(hidden, head), teacher)


def test_the_objective_says_what_the_walk_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """With importance weights, too."""
    hidden, head, teacher_hidden, teacher_head, ids, weight = inputs()
    nothing = torch.zeros(0, dtype=torch.long)
    batch = Batch(
        Sequences(nothing, nothing, nothing), None, ids, weight, torch.zeros(N),
        sampled_logp_N=torch.linspace(-9.0, -1.0, N),
    )  # fmt: skip
    objective = Distillation(SPECS[1], sampling_temperature=1.0, importance_cap=2.0)
    told = []
    for folded in (True, False):
        if not folded:
            monkeypatch.setattr(fused_cpu, "runs", lambda *_: False)
        sides = scores(hidden, head), scores(teacher_hidden, teacher_head)
        total, said = objective.loss(*sides, batch, 5)
        told.append((said, torch.autograd.grad(total, (hidden, head))))
    (said, grads), (wanted, others) = told
    assert said.keys() == wanted.keys() and 0 < said["importance_capped"].sum() < N
    for key, value in wanted.items():
        torch.testing.assert_close(said[key], value, rtol=1e-4, atol=1e-4)
    for one, other in zip(grads, others, strict=True):
        assert off(one, other) < 1e-2
