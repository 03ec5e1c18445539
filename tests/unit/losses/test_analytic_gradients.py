"""Analytic gradients match autograd's: values, gradients, untouched inputs."""

import pytest
import torch
from divergences import CLIPPED, EXACT, INF, TEMPERED, close, name, noise
from torch import Tensor

from selfteach.losses import analytic_gradients
from selfteach.losses.divergence import (
    Divergence,
    forward_kl_terms,
    jsd_terms,
    log_probs,
    per_token,
    reverse_kl_terms,
    top_k_and_tail,
)

SAMPLED = [
    Divergence(kind, support="sampled", temperature=t)
    for kind in ("forward_kl", "reverse_kl")
    for t in (1.0, 0.7)
]
DTYPES = [
    (torch.float64, torch.float64), (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
]  # fmt: skip
PLAIN = {"forward_kl": forward_kl_terms, "reverse_kl": reverse_kl_terms, "jsd": jsd_terms}


def plainly(spec: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """Each row's divergence from the terms as they are written in a book, for autograd."""
    student, teacher = (log_probs(x, spec.temperature) for x in (student, teacher))
    if spec.top_k is not None:
        student, teacher = top_k_and_tail(student, teacher, spec.top_k, spec.top_k_from)
    more = {"beta": spec.beta, "scaled": spec.jsd_scaled} if spec.kind == "jsd" else {}
    terms = PLAIN[spec.kind](student, teacher, **more)
    return (terms if spec.clip is None else terms.clamp(max=spec.clip)).sum(-1)


@pytest.mark.parametrize("spec", EXACT + CLIPPED + TEMPERED, ids=name)
@pytest.mark.parametrize("absent", [False, True], ids=["", "-inf"])
def test_values_and_gradients_match_autograd(spec, absent) -> None:
    student, teacher = 3 * noise(2, 6, 11)
    weights, ids = noise(6, seed=1), torch.arange(6)
    if absent:  # an entry that neither side has, and one that one side lacks where that is finite
        student[:, 9], teacher[:, 9] = -INF, -INF
        (student if spec.kind == "reverse_kl" else teacher)[:, 8] = -INF
    leaf = [student.clone().requires_grad_() for _ in range(2)]
    got, want = per_token(spec, leaf[0], teacher, ids).loss, plainly(spec, leaf[1], teacher)
    close(got, want.detach(), rtol=1e-12, atol=1e-14)
    grads = [
        torch.autograd.grad((weights * loss).sum(), x)[0]
        for loss, x in zip((got, want), leaf, strict=True)
    ]
    close(grads[0], grads[1], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("spec", EXACT + CLIPPED + TEMPERED, ids=name)
@pytest.mark.parametrize("shape", [(7, 11), (2, 3, 11), (1, 11), (0, 11)])
def test_blocks_of_rows_match_all_rows_at_once(
    spec, shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows at a time, the last alone, give the values and gradients of all at once."""
    student, teacher = 3 * noise(2, *shape)
    weights, ids = noise(*shape[:-1], seed=1), torch.zeros(shape[:-1], dtype=torch.long) + 3
    results = []
    for entries in (2 * 11 + 5, 10**6):
        monkeypatch.setitem(analytic_gradients.BLOCK_ENTRIES, "cpu", entries)
        leaf = student.clone().requires_grad_()
        values = per_token(spec, leaf, teacher, ids)
        assert (
            values.loss.shape == values.teacher_logratio.shape == values.clipped.shape == shape[:-1]
        )
        (grad,) = torch.autograd.grad((weights * values.loss).sum(), leaf)
        results.append((*values, grad))
    for few, all_ in zip(*results, strict=True):
        close(few, all_, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("spec", EXACT + CLIPPED, ids=name)
def test_logits_are_unchanged_and_a_second_backward_gives_the_same(spec) -> None:
    student, teacher = noise(2, 3, 7)
    student.requires_grad_()
    before = student.detach().clone(), teacher.clone()
    loss = per_token(spec, student, teacher, torch.zeros(3, dtype=torch.long)).loss.sum()
    first, again = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    assert torch.equal(first, again)


@pytest.mark.parametrize("spec", EXACT + CLIPPED + TEMPERED, ids=name)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_donated_teacher_logits_become_the_gradient(spec, dtypes, monkeypatch) -> None:
    """Where dtype and layout allow, two rows at a time; values are the same to the last bit."""
    monkeypatch.setitem(analytic_gradients.BLOCK_ENTRIES, "cpu", 2 * 11 + 5)
    student, teacher = (x.to(to) for x, to in zip(3 * noise(2, 5, 11), dtypes, strict=True))
    weights, ids, results = noise(5, seed=1).to(student.dtype), torch.arange(5), []
    for donate_teacher_logits in (False, True):
        leaf, others = student.clone().requires_grad_(), teacher.clone()
        values = per_token(spec, leaf, others, ids, donate_teacher_logits=donate_teacher_logits)
        loss = (weights * values.loss).sum()
        (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        results.append((*values, grad))
        assert torch.equal(leaf, student)
        holds = donate_teacher_logits and teacher.dtype == torch.promote_types(
            student.dtype, torch.float32
        )
        assert torch.equal(others, teacher) != holds
    for whole, donated in zip(*results, strict=True):
        assert torch.equal(whole, donated)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)  # the gradient is scaled in place, once


@pytest.mark.parametrize("spec", EXACT + CLIPPED + TEMPERED + SAMPLED, ids=name)
def test_a_loss_returns_the_tokens_log_probabilities(spec) -> None:
    student, teacher = 3 * noise(2, 6, 11)
    values = per_token(spec, student, teacher, torch.arange(6))
    at = [
        log_probs(x, t).diagonal()
        for x, t in ((student, spec.temperature), (student, 1.0), (teacher, 1.0))
    ]
    close(values.logp, at[0], rtol=1e-12, atol=1e-14)
    close(values.teacher_logratio, at[2] - at[1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("entries", [16, 19, 40, 67])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("kind", ["any", "ties", "mostly -inf", "one NaN", "rising"])
def test_the_largest_entries_are_those_of_a_full_search(entries, k, kind, monkeypatch) -> None:
    """With groups of four, where there are enough groups, and a remainder smaller than a group."""
    monkeypatch.setattr(analytic_gradients, "GROUP", 4)
    rows = noise(6, entries)
    match kind:
        case "ties":
            rows = rows.mul(2).round()
        case "mostly -inf":
            rows[:, 3:] = -INF
        case "one NaN":
            rows[:, entries // 2] = torch.nan
        case "rising":  # the largest are adjacent, at the end
            rows = rows.sort(-1).values
    index = analytic_gradients.largest(rows, k)
    assert index.shape == (6, k) and all(len(set(leaf)) == k for leaf in index.tolist())
    got = rows.gather(-1, index).sort(-1, descending=True).values
    torch.testing.assert_close(got, rows.topk(k, -1).values, rtol=0, atol=0, equal_nan=True)


def test_with_many_entries_only_groups_with_large_ones_are_searched(monkeypatch) -> None:
    searched, topk = [], Tensor.topk
    monkeypatch.setattr(
        Tensor, "topk", lambda x, *a, **kw: (searched.append(x.shape[-1]), topk(x, *a, **kw))[1]
    )
    analytic_gradients.largest(torch.randn(2, 64 * 100 + 3), 5)
    assert searched == [100, 5 * 64 + 3]
    searched.clear()
    analytic_gradients.largest(torch.randn(2, 64 * 9), 5)
    assert searched == [64 * 9], "too few groups to leave one out"
