"""Chunked scoring against the plain computation, and what must never be allocated."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfteach.losses.divergence import Divergence, per_token
from selfteach.models import matmul
from selfteach.models.lm_head import Head, PerTokenFn, Scores, WithGradients, chunked_sum

N, V, H = 7, 11, 4
NAN, INF = float("nan"), float("inf")

SPECS = [
    Divergence("forward_kl"),
    Divergence("reverse_kl", temperature=1.7),
    Divergence("jsd", beta=0.3, jsd_scaled=True),
    Divergence("jsd", clip=0.05),
    Divergence("reverse_kl", support="top_k", top_k=3),
    Divergence("forward_kl", support="top_k", top_k=3, top_k_from="teacher", clip=0.05),
    Divergence("forward_kl", support="sampled"),
    Divergence("reverse_kl", support="sampled"),
    Divergence("reverse_kl", support="sampled", control_variate=True),
]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 1.5},
    "all": {"bias": True, "scale": 0.5, "softcap": 2.0},
    "frozen": {"bias": True, "frozen": True},
}


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_head(
    *, bias: bool = False, scale: float = 1.0, softcap: float | None = None, frozen: bool = False
) -> Head:
    weight_VH = noise(V, H, seed=1).requires_grad_(not frozen)
    bias_V = noise(V, seed=2).requires_grad_(not frozen) if bias else None
    return Head(weight_VH, bias_V, scale, softcap)


def make_student(head: Head) -> Scores:
    return Scores.single(noise(N, H, seed=3).requires_grad_(), head)


TEACHER = Scores(
    (
        (noise(N, H, seed=4), Head(noise(V, H, seed=5)), 0.9),
        (noise(N, H, seed=6), Head(noise(V, H, seed=5), softcap=3.0), 0.1),
    )
)
IDS_N = torch.tensor([0, 3, 10, 3, 7, 1, 2])
WEIGHT_N = torch.tensor([0.5, 1.0, 0.0, 2.0, 0.25, -1.0, 3.0], dtype=torch.float64)


def divergence_fn(spec: Divergence, teacher: Scores = TEACHER, ids_N: Tensor = IDS_N) -> PerTokenFn:
    def fn(logits_CV: Tensor, rows: slice) -> Mapping[str, Tensor]:
        return per_token(spec, logits_CV, teacher.logits(rows), ids_N[rows])._asdict()

    return fn


def sources(student: Scores) -> list[Tensor]:
    ((hidden_NH, head, _),) = student.terms
    every = [hidden_NH, head.weight_VH, head.bias_V]
    return [source for source in every if source is not None and source.requires_grad]


def plain(fn: PerTokenFn, student: Scores, weight_N: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
    values = fn(student.logits(slice(None)), slice(None))
    return (weight_N * values["loss"]).sum(), values


@pytest.mark.parametrize("words", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.support}")
def test_chunked_matches_plain(spec, words) -> None:
    student, fn = make_student(make_head(**words)), divergence_fn(spec)
    want, want_stats = plain(fn, student, WEIGHT_N)
    want_grads = torch.autograd.grad(want, sources(student))
    for chunk_tokens in (1, 3, N, 100):
        got, stats = chunked_sum(fn, student, WEIGHT_N, chunk_tokens=chunk_tokens)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        grads = torch.autograd.grad(got, sources(student))
        for grad, want_grad in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-13)
        assert stats.keys() == want_stats.keys()
        for key, value_N in stats.items():
            assert not value_N.requires_grad
            torch.testing.assert_close(value_N, want_stats[key].detach(), rtol=1e-12, atol=1e-14)


def test_head_golden() -> None:
    # h = 2, w = (1, -3), b = (0, 1): products 2 and -5, halved 1 and -2.5, capped 2 tanh(x / 2).
    head = Head(torch.tensor([[1.0], [-3.0]]), torch.tensor([0.0, 1.0]), scale=0.5, softcap=2.0)
    want_V = 2 * torch.tanh(torch.tensor([0.5, -1.25]))
    torch.testing.assert_close(head.logits(torch.tensor([[2.0]])), want_V[None])


def test_mixture_is_linear_in_logits() -> None:
    rows = slice(2, 5)
    (hidden_a, head_a, _), (hidden_b, head_b, _) = TEACHER.terms
    want_CV = 0.9 * head_a.logits(hidden_a[rows]) + 0.1 * head_b.logits(hidden_b[rows])
    torch.testing.assert_close(TEACHER.logits(rows), want_CV, rtol=1e-14, atol=0)
    single = Scores.single(hidden_a, head_a)
    assert torch.equal(single.logits(rows), head_a.logits(hidden_a)[rows])


def test_a_student_s_mixture_weight_scales_its_logits() -> None:
    hidden_NH, head = noise(N, H, seed=3).requires_grad_(), make_head()
    student, fn = Scores(((hidden_NH, head, 0.5),)), divergence_fn(SPECS[0])
    want = torch.autograd.grad(plain(fn, student, WEIGHT_N)[0], sources(student))
    got = torch.autograd.grad(
        chunked_sum(fn, student, WEIGHT_N, chunk_tokens=2)[0], sources(student)
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_gradcheck() -> None:
    head = make_head(**HEADS["all"])
    assert head.bias_V is not None

    def total(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
        student = Scores.single(hidden_NH, replace(head, weight_VH=weight_VH, bias_V=bias_V))
        return chunked_sum(divergence_fn(SPECS[2]), student, WEIGHT_N, chunk_tokens=3)[0]

    hidden_NH = noise(N, H, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(total, (hidden_NH, head.weight_VH, head.bias_V))


def test_upstream_gradient_scales_and_accumulates() -> None:
    student = make_student(make_head(**HEADS["bias"]))
    total, _ = chunked_sum(divergence_fn(SPECS[0]), student, WEIGHT_N, chunk_tokens=2)
    want = torch.autograd.grad(total, sources(student), retain_graph=True)
    (3 * total).backward(retain_graph=True)
    total.backward()
    for source, grad in zip(sources(student), want, strict=True):
        torch.testing.assert_close(source.grad, 4 * grad, rtol=1e-12, atol=1e-14)


def test_gradient_flows_on_into_the_model() -> None:
    # The hidden states and the head come from elsewhere: a tied embedding gets both its parts.
    weight_VH = noise(V, H, seed=1).requires_grad_()
    results = []
    for run in (plain, lambda *args: chunked_sum(*args, chunk_tokens=2)):
        student = Scores.single(weight_VH[IDS_N].tanh(), Head(weight_VH))
        results.append(
            torch.autograd.grad(run(divergence_fn(SPECS[0]), student, WEIGHT_N)[0], weight_VH)[0]
        )
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-13)


def test_only_tensors_that_require_a_gradient_get_one() -> None:
    frozen = make_student(make_head(**HEADS["frozen"]))
    chunked_sum(divergence_fn(SPECS[0]), frozen, WEIGHT_N, chunk_tokens=2)[0].backward()
    ((hidden_NH, head, _),) = frozen.terms
    assert hidden_NH.grad is not None and head.weight_VH.grad is None
    head_only = Scores.single(noise(N, H, seed=3), make_head())
    chunked_sum(divergence_fn(SPECS[0]), head_only, WEIGHT_N, chunk_tokens=2)[0].backward()
    assert head_only.terms[0][0].grad is None and head_only.terms[0][1].weight_VH.grad is not None


def test_the_function_gets_every_row_once_in_order_and_grad_only_when_needed() -> None:
    seen: list[tuple[int, int, bool]] = []

    def fn(logits_CV: Tensor, rows: slice) -> Mapping[str, Tensor]:
        assert logits_CV.shape == (rows.stop - rows.start, V)
        seen.append((rows.start, rows.stop, logits_CV.requires_grad))
        return {"loss": logits_CV.sum(-1)}

    student = make_student(make_head())
    chunked_sum(fn, student, WEIGHT_N, chunk_tokens=3)
    assert seen == [(0, 3, True), (3, 6, True), (6, 7, True)]
    seen.clear()
    with torch.no_grad():
        total, stats = chunked_sum(fn, student, WEIGHT_N, chunk_tokens=5)
    assert seen == [(0, 5, False), (5, 7, False)] and not total.requires_grad
    torch.testing.assert_close(total, (WEIGHT_N * stats["loss"]).sum())
    every_NV = student.logits(slice(None)).detach()
    torch.testing.assert_close(total, (WEIGHT_N * every_NV.sum(-1)).sum())


def test_zero_rows_sum_to_zero() -> None:
    head = make_head(bias=True)
    student = Scores.single(torch.zeros(0, H, dtype=torch.float64, requires_grad=True), head)
    total, stats = chunked_sum(divergence_fn(SPECS[0]), student, WEIGHT_N[:0], chunk_tokens=4)
    total.backward()
    assert total == 0 and "loss" in stats and not any(map(len, stats.values()))
    for source in sources(student):
        assert source.grad is not None and source.grad.shape == source.shape
        assert source.grad.abs().sum() == 0


def test_a_split_matches_the_whole() -> None:
    student, fn = make_student(make_head(bias=True)), divergence_fn(SPECS[4])
    ((hidden_NH, head, _),) = student.terms
    whole, _ = chunked_sum(fn, student, WEIGHT_N, chunk_tokens=2)
    parts = []
    for rows in (slice(0, 4), slice(4, N)):
        teacher = Scores(tuple((hidden[rows], h, mix) for hidden, h, mix in TEACHER.terms))
        part_fn = divergence_fn(SPECS[4], teacher, IDS_N[rows])
        part = Scores.single(hidden_NH[rows], head)
        parts.append(chunked_sum(part_fn, part, WEIGHT_N[rows], chunk_tokens=2)[0])
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-12, atol=0)
    want = torch.autograd.grad(whole, sources(student))
    for got, grad in zip(torch.autograd.grad(sum(parts), sources(student)), want, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.support}")
def test_rows_of_weight_zero_are_as_if_absent(spec, where, poison) -> None:
    absent_N = torch.tensor([False, True, True, False, False, True, False])
    weight_N = WEIGHT_N.masked_fill(absent_N, 0.0) + torch.where(absent_N, 0.0, 0.1)
    hidden_NH, head = noise(N, H, seed=3), make_head(bias=True)
    teacher_hidden_NH = noise(N, H, seed=4)
    (hidden_NH if where == "student" else teacher_hidden_NH)[absent_N] = poison
    student = Scores.single(hidden_NH.requires_grad_(), head)
    teacher = Scores.single(teacher_hidden_NH, TEACHER.terms[0][1])
    total, stats = chunked_sum(divergence_fn(spec, teacher), student, weight_N, chunk_tokens=2)
    grads = torch.autograd.grad(total, sources(student))

    present = Scores.single(hidden_NH.detach()[~absent_N].requires_grad_(), head)
    teacher = Scores.single(teacher_hidden_NH[~absent_N], TEACHER.terms[0][1])
    fn = divergence_fn(spec, teacher, IDS_N[~absent_N])
    want, _ = plain(fn, present, weight_N[~absent_N])
    want_grads = list(torch.autograd.grad(want, sources(present)))
    want_grads[0] = torch.zeros_like(hidden_NH).index_put((~absent_N,), want_grads[0])
    torch.testing.assert_close(total, want, rtol=1e-12, atol=1e-14)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-13)
    assert not stats["loss"][absent_N].isfinite().any()  # reported as it is, not hidden


def test_statistics_of_rows_of_weight_zero_are_real() -> None:
    student, fn = make_student(make_head()), divergence_fn(SPECS[0])
    _, stats = chunked_sum(fn, student, torch.zeros_like(WEIGHT_N), chunk_tokens=3)
    _, want = plain(fn, student, WEIGHT_N)
    torch.testing.assert_close(stats["teacher_logratio"], want["teacher_logratio"])
    torch.testing.assert_close(stats["loss"], want["loss"].detach())


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_hidden_states(weight_dtype, native, monkeypatch) -> None:
    monkeypatch.setattr(matmul, "has_fast_bf16", lambda _: native)
    hidden_NH = noise(N, H, seed=3).bfloat16().requires_grad_()
    head = Head(noise(V, H, seed=1).to(weight_dtype).requires_grad_(), scale=0.5)
    student, fn = Scores.single(hidden_NH, head), divergence_fn(SPECS[0])
    total, stats = chunked_sum(fn, student, WEIGHT_N, chunk_tokens=2)
    assert student.logits(slice(0, 2)).dtype == torch.float32
    total.backward()
    like = student
    if not native:  # nothing is rounded on the way, a float32 head neither
        wide = [x.detach().float().requires_grad_() for x in sources(student)]
        like = Scores.single(wide[0], replace(head, weight_VH=wide[1]))
    want, want_stats = plain(fn, like, WEIGHT_N)
    want_grads = torch.autograd.grad(want, sources(like))
    torch.testing.assert_close(stats["loss"], want_stats["loss"].detach())
    for source, want_grad in zip(sources(student), want_grads, strict=True):
        assert source.grad is not None and source.grad.dtype == source.dtype
        torch.testing.assert_close(source.grad, want_grad, rtol=0.03, atol=0.03, check_dtype=False)


def test_head_gradient_accumulates_in_float32() -> None:
    # A thousand ones added up one by one in bfloat16 would stop at 256.
    head = Head(torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True))
    student = Scores.single(torch.ones(1000, 1, dtype=torch.bfloat16), head)
    total, _ = chunked_sum(
        lambda logits_CV, _: {"loss": logits_CV[:, 0]}, student, torch.ones(1000), chunk_tokens=1
    )
    total.backward()
    assert head.weight_VH.grad is not None
    assert head.weight_VH.grad.flatten().tolist() == [1000.0, 0.0]


def test_under_autocast() -> None:
    hidden_NH = noise(N, H, seed=3, dtype=torch.float32).requires_grad_()
    head = Head(noise(V, H, seed=1, dtype=torch.float32).requires_grad_())
    student, fn = Scores.single(hidden_NH, head), divergence_fn(SPECS[0])
    want = torch.autograd.grad(plain(fn, student, WEIGHT_N)[0], sources(student))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = chunked_sum(fn, student, WEIGHT_N, chunk_tokens=2)
        # The pass must not leave a gradient-less copy of the weight in autocast's cache.
        after = torch.nn.functional.linear(hidden_NH, head.weight_VH)
    assert torch.autograd.grad(after.sum(), head.weight_VH)[0].abs().sum() > 0
    for got, grad in zip(torch.autograd.grad(total, sources(student)), want, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, grad, rtol=0.1, atol=0.1)


class Allocations(TorchDispatchMode):
    """Records the size of every tensor that an operation made, views of its inputs left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in inputs:
                self.sizes.append(value.numel())
        return out


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.support}")
def test_nothing_of_size_rows_times_vocabulary(spec) -> None:
    rows, vocabulary, width, chunk = 64, 32, 3, 4
    head = Head(noise(vocabulary, width, seed=1).requires_grad_())
    student = Scores.single(noise(rows, width, seed=3).requires_grad_(), head)
    teacher = Scores.single(noise(rows, width, seed=4), Head(noise(vocabulary, width, seed=5)))
    fn = divergence_fn(spec, teacher, torch.arange(rows) % vocabulary)
    weight_N = torch.ones(rows, dtype=torch.float64)
    with Allocations() as chunked:
        chunked_sum(fn, student, weight_N, chunk_tokens=chunk)[0].backward()
    with Allocations() as whole:
        plain(fn, student, weight_N)[0].backward()
    assert max(whole.sizes) >= rows * vocabulary  # the recorder does see it
    assert max(chunked.sizes) <= max(chunk * vocabulary, rows * width, vocabulary * width)


def test_a_frozen_head_costs_nothing_and_another_dtype_one_copy() -> None:
    rows, vocabulary, width, chunk = 8, 32, 64, 2
    hidden_NH = noise(rows, width, seed=3, dtype=torch.float32).requires_grad_()
    weight_N = torch.ones(rows)

    def heads_made(weight_dtype: torch.dtype) -> int:
        head = Head(noise(vocabulary, width, seed=1).to(weight_dtype))
        with Allocations() as seen:
            total, _ = chunked_sum(
                lambda logits_CV, _: {"loss": logits_CV.sum(-1)},
                Scores.single(hidden_NH, head),
                weight_N,
                chunk_tokens=chunk,
            )
            total.backward()
        return sum(size >= vocabulary * width for size in seen.sizes)

    assert heads_made(torch.float32) == 0
    assert heads_made(torch.float64) == 1


def test_refusals() -> None:
    student, fn = make_student(make_head()), divergence_fn(SPECS[0])
    with pytest.raises(ValueError, match="one model, got 2 terms"):
        chunked_sum(fn, TEACHER, WEIGHT_N, chunk_tokens=2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        chunked_sum(fn, student, WEIGHT_N, chunk_tokens=0)
    with pytest.raises(ValueError, match=r"loss of shape \(2, 1\) for 2 rows"):
        # Multiplied by a weight [C] this would quietly become [C, C].
        chunked_sum(lambda x, _: {"loss": x[:, :1]}, student, WEIGHT_N, chunk_tokens=2)
    with pytest.raises(ValueError, match="5 weights for 7 rows"):
        chunked_sum(fn, student, WEIGHT_N[:5], chunk_tokens=2)


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    student = make_student(make_head())
    total, _ = chunked_sum(divergence_fn(SPECS[0]), student, WEIGHT_N, chunk_tokens=2)
    (grad,) = torch.autograd.grad(total**2, student.terms[0][0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_off_the_cpu_gradients_are_scaled_in_place_and_only_once() -> None:
    """A scaled copy would be a second [V, H]; a second backward would scale twice."""
    total, grad = torch.zeros((), device="meta"), torch.zeros(3, 2, device="meta")
    source = torch.zeros(3, 2, device="meta", requires_grad=True)
    total_with_gradient = WithGradients.apply(total, grad, None, None, source, None, None)
    (got,) = torch.autograd.grad(total_with_gradient, source, retain_graph=True)
    assert got.shape == (3, 2)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(total_with_gradient, source)
