"""Fused divergences from hidden states match the chunked loss, in Triton's interpreter.

With CUDA the same tests run compiled, in bf16.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="PyTorch's CPU builds come without Triton")

from covering import covering
from divergences import INF, label

from selfteach.losses import fused
from selfteach.losses.divergence import Divergence, per_token
from selfteach.losses.kernels import linear_kernels
from selfteach.losses.kernels.linear_kernels import Tiling
from selfteach.losses.objectives import Distillation
from selfteach.models.lm_head import Head, Scores, chunked_sum
from selfteach.types import Batch, Sequences

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CUDA = torch.cuda.is_available()
DEVICE, FLOAT = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
RTOL, ATOL = (2e-2, 2e-3) if CUDA else (1e-4, 1e-6)
N, V, H = 21, 75, 40
SPECS = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd"),
    Divergence("jsd", beta=0.8, jsd_scaled=True),
]
SPECS += [Divergence(spec.kind, beta=spec.beta, clip=0.02) for spec in SPECS[:3]]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows, splits and blocks of the vocabulary, the last of each smaller."""
    tiling = Tiling(rows=16, entries=16, inner=16, warps=4, stages=2)
    monkeypatch.setattr(linear_kernels, "SUMS", tiling)
    monkeypatch.setattr(linear_kernels, "GRADIENT", tiling)
    monkeypatch.setattr(linear_kernels, "PROGRAMS", 6)
    monkeypatch.setattr(linear_kernels, "BLOCK_BYTES", N * 32 * FLOAT.itemsize)
    monkeypatch.setattr(linear_kernels, "runs", lambda *_: True)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, FLOAT)


def inputs(width: int = H) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, the teacher's (of another width), ids, weights with a 0 among them."""
    weight_N = torch.linspace(-0.5, 1.0, N, device=DEVICE)
    weight_N[3] = 0.0
    return (
        noise(N, H).requires_grad_(), noise(V, H, seed=1).requires_grad_(),
        noise(N, width, seed=2), noise(V, width, seed=3),
        torch.arange(N, device=DEVICE) * 3 % V, weight_N,
    )  # fmt: skip


def scores(hidden_NH: Tensor, head_VH: Tensor) -> Scores:
    return Scores.single(hidden_NH, Head(head_VH))


def plainly(spec: Divergence, student: Scores, teacher: Scores, ids: Tensor, weight: Tensor):
    """Compute the chunked loss in float64, by the closed form."""

    def wide(x: Scores) -> Scores:
        ((hidden, head, _),) = x.terms
        return scores(hidden.double(), head.weight_VH.double())

    student, teacher = wide(student), wide(teacher)

    def fn(logits_CV: Tensor, rows: slice) -> dict[str, Tensor]:
        result = per_token(spec, logits_CV, teacher.logits(rows).detach(), ids[rows])
        return {
            "loss": result.loss,
            "clipped": result.clipped,
            "teacher_logratio": result.teacher_logratio,
        }

    return chunked_sum(fn, student, weight.double(), chunk_tokens=5)


def close(got: Tensor, want: Tensor, rtol: float = RTOL, atol: float = ATOL) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol)


def close_as_a_whole(got: Tensor, want: Tensor) -> None:
    """Assert a small relative error in norm: 5e-5 in float32, 1e-2 in bf16."""
    off = (got.double() - want.double()).norm() / want.double().norm()
    assert off < (1e-2 if CUDA else 5e-5), off


@pytest.mark.parametrize(("spec", "width"), covering(SPECS, [H, 48]), ids=label)
def test_value_statistics_and_gradients_match_the_chunked_loss(spec, width) -> None:
    hidden, head, teacher_hidden, teacher_head, ids, weight = inputs(width)
    student, teacher = scores(hidden, head), scores(teacher_hidden, teacher_head)
    results = []
    for fn in (
        lambda: fused.divergence_sum(spec, student, teacher, ids, weight),
        lambda: plainly(spec, student, teacher, ids, weight),
    ):
        total, values = fn()
        grads = torch.autograd.grad(2 * total, (hidden, head))
        results.append((total.detach(), values, grads))
    (got, values, grads), (want, stats, wanted) = results
    close(got, want)
    for one in ("loss", "clipped"):
        close(values[one], stats[one])
    close(values["teacher_logp"] - values["logp"], stats["teacher_logratio"])
    for mine, other in zip(grads, wanted, strict=True):
        assert mine.dtype == FLOAT
        close_as_a_whole(mine, other)


def test_rows_of_weight_zero_are_absent_even_where_nothing_is_finite() -> None:
    hidden, head, teacher_hidden, teacher_head, ids, weight = inputs()
    spec = SPECS[2]
    want = fused.divergence_sum(
        spec, scores(hidden, head), scores(teacher_hidden, teacher_head), ids, weight
    )[0]
    wanted = torch.autograd.grad(want, (hidden, head))
    with torch.no_grad():
        hidden[3] = torch.nan
        teacher_hidden[3] = INF
    got = fused.divergence_sum(
        spec, scores(hidden, head), scores(teacher_hidden, teacher_head), ids, weight
    )[0]
    grads = torch.autograd.grad(got, (hidden, head))
    close(got.detach(), want.detach(), 1e-6, 1e-6)
    for mine, other in zip(grads, wanted, strict=True):
        assert mine.isfinite().all()
        close_as_a_whole(mine, other)


@pytest.mark.parametrize("trains", ["hidden", "head", "nothing"])
def test_only_what_trains_has_a_gradient(trains) -> None:
    hidden, head, teacher_hidden, teacher_head, ids, weight = inputs()
    hidden.requires_grad_(trains == "hidden")
    head.requires_grad_(trains == "head")
    total, _ = fused.divergence_sum(
        SPECS[1], scores(hidden, head), scores(teacher_hidden, teacher_head), ids, weight
    )
    assert total.requires_grad == (trains != "nothing")
    if total.requires_grad:
        total.backward()
    assert (hidden.grad is not None) == (trains == "hidden")
    assert (head.grad is not None) == (trains == "head")


@pytest.mark.parametrize("cap", [None, 0.9])
def test_an_objective_returns_the_same_values_fused_or_chunked(cap, monkeypatch) -> None:
    hidden, head, teacher_hidden, teacher_head, ids, weight = inputs()
    nowhere = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    side = Sequences(nowhere, nowhere[0], nowhere[0])
    sampled = torch.full_like(weight, -5.0)
    batch = Batch(side, side, ids, weight, torch.zeros_like(weight), sampled)
    objective = Distillation(SPECS[2], 1.0, importance_cap=cap)
    student, teacher = scores(hidden, head), scores(teacher_hidden, teacher_head)
    results = []
    for allowed in (True, False):
        monkeypatch.setattr(fused, "supports", lambda *_, allowed=allowed: allowed)
        total, values = objective.loss(student, teacher, batch, 5)
        results.append((total.detach(), values, torch.autograd.grad(total, (hidden, head))))
    (got, values, grads), (want, stats, wanted) = results
    close(got, want)
    assert values.keys() == stats.keys()
    for one in values:
        close(values[one], stats[one], atol=2e-2 if CUDA else 1e-5)
    for mine, other in zip(grads, wanted, strict=True):
        close_as_a_whole(mine, other)


def test_a_subclass_with_another_per_token_is_not_fused() -> None:
    @dataclasses.dataclass(frozen=True, slots=True)
    class Doubled(Distillation):
        def per_token(self, logits_CV, teacher_logits_CV, batch, rows):
            values = Distillation.per_token(self, logits_CV, teacher_logits_CV, batch, rows)
            return {**values, "loss": 2 * values["loss"]}

    hidden, head, teacher_hidden, teacher_head, ids, weight = inputs()
    nowhere = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    side = Sequences(nowhere, nowhere[0], nowhere[0])
    batch = Batch(side, side, ids, weight, torch.zeros_like(weight), torch.zeros_like(weight))
    student, teacher = scores(hidden, head), scores(teacher_hidden, teacher_head)
    assert fused.supports(SPECS[1], student, teacher)
    want, got = (
        kind(SPECS[1], 1.0).loss(student, teacher, batch, 5)[0] for kind in (Distillation, Doubled)
    )
    close(got.detach(), 2 * want.detach())


def test_unsupported_inputs_are_not_fused() -> None:
    plain = scores(noise(2, H), noise(V, H))
    assert fused.supports(SPECS[0], plain, plain)
    topped = Divergence("jsd", support="top_k", top_k=3)
    warm = Divergence("jsd", temperature=2.0)
    assert not fused.supports(topped, plain, plain) and not fused.supports(warm, plain, plain)
    for odd in (
        Head(noise(V, H), bias_V=noise(V)), Head(noise(V, H), scale=2.0),
        Head(noise(V, H), softcap=3.0),
    ):  # fmt: skip
        other = Scores.single(noise(2, H), odd)
        assert not fused.supports(SPECS[0], other, plain)
        assert not fused.supports(SPECS[0], plain, other)
    mixed = Scores(((noise(2, H), Head(noise(V, H)), 0.5), (noise(2, H), Head(noise(V, H)), 0.5)))
    assert not fused.supports(SPECS[0], plain, mixed)
    empty = scores(noise(0, H), noise(V, H))
    assert not fused.supports(SPECS[0], empty, empty)


def test_gradient_blocks_have_the_allowed_size_and_share_memory(monkeypatch) -> None:
    """Blocks of the gradient are the only tensors of the logits' kind in memory."""
    blocks, gradient_block = list[Tensor](), linear_kernels.gradient_block

    def counted(*args) -> None:
        blocks.append(args[4])
        gradient_block(*args)

    monkeypatch.setattr(linear_kernels, "gradient_block", counted)
    hidden, head, teacher_hidden, teacher_head, ids, weight = inputs()
    student, teacher = scores(hidden, head), scores(teacher_hidden, teacher_head)
    fused.divergence_sum(SPECS[0], student, teacher, ids, weight)[0].backward()
    assert [x.shape for x in blocks] == [(N, 32), (N, 32), (N, V - 64)]
    assert all(x.numel() * x.element_size() <= linear_kernels.BLOCK_BYTES for x in blocks)
    assert len({x.data_ptr() for x in blocks}) == 1, "one piece of memory for all"
