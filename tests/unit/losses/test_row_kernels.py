"""Triton kernels match the closed form and autograd, run by Triton's interpreter.

With CUDA the same tests run compiled, in float32 (see tests/gpu for bf16 and sizes).
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="PyTorch's CPU builds come without Triton")

from covering import covering
from divergences import CLIPPED, EXACT, INF, TEMPERED, label, name

from selfteach.losses.analytic_gradients import FusedRows, Rows
from selfteach.losses.divergence import Divergence
from selfteach.losses.kernels import row_kernels
from selfteach.losses.policy_gradient import _FusedTokenLogp, token_logp

# -inf - -inf, whose NaN is then passed over: NumPy, which interprets, says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CUDA = torch.cuda.is_available()
FLOAT = torch.float32 if CUDA else torch.float64
RTOL, ATOL = (1e-4, 1e-6) if CUDA else (1e-10, 1e-13)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=FLOAT).to("cuda" if CUDA else "cpu")


def close(got: Tensor, want: Tensor, rtol: float = RTOL, atol: float = ATOL) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def both(
    student: Tensor, teacher: Tensor, ids: Tensor, spec: Divergence
) -> list[tuple[Tensor, ...]]:
    """Values and gradient by kernels, and by the closed form."""
    weights, results = noise(*ids.shape, seed=1), []
    for rows in (FusedRows, Rows):
        logits = student.clone().requires_grad_()
        values = rows.apply(logits, teacher, ids, spec, False)
        (grad,) = torch.autograd.grad((weights * values[0]).sum(), logits)
        assert values[0].shape == ids.shape and grad.shape == student.shape
        results.append((*values, grad))
    return results


@pytest.mark.parametrize(
    ("spec", "absent"), covering(EXACT + CLIPPED + TEMPERED, [False, True]), ids=label
)
def test_kernels_are_the_closed_form_in_value_and_gradient(spec, absent, monkeypatch) -> None:
    monkeypatch.setattr(row_kernels, "BLOCK", 16)  # three blocks, the last in part
    student, teacher = 3 * noise(2, 4, 37)
    if absent:
        student[:, 9], teacher[:, 9] = -INF, -INF
        (student if spec.kind == "reverse_kl" else teacher)[:, 8] = -INF
    ids = torch.tensor([0, 5, 20, 36], device=student.device)
    kernels, closed = both(student, teacher, ids, spec)
    for got, want in zip(kernels, closed, strict=True):
        close(got, want)


@pytest.mark.parametrize("spec", [EXACT[1], EXACT[6]], ids=name)
@pytest.mark.parametrize("shape", [(2, 3, 11), (1, 11), (0, 11), (11,)])
def test_rows_come_in_any_shape(spec, shape) -> None:
    student, teacher = 3 * noise(2, *shape)
    ids = torch.full(shape[:-1], 3, device=student.device)
    for got, want in zip(*both(student, teacher, ids, spec), strict=True):
        close(got, want)


@pytest.mark.parametrize("spec", EXACT[:3] + EXACT[5:8], ids=name)
def test_strided_rows_and_columns_are_read_without_a_copy(spec) -> None:
    student, teacher = noise(5, 22)[:, :11], noise(11, 5, seed=2).T
    ids = torch.arange(5, device=student.device)
    for got, want in zip(*both(student, teacher, ids, spec), strict=True):
        close(got, want)


def test_a_block_of_minus_infinity_is_skipped(monkeypatch) -> None:
    monkeypatch.setattr(row_kernels, "BLOCK", 16)
    student, teacher = noise(2, 3, 40)
    student[:, :16], teacher[:, :16] = -INF, -INF
    ids = torch.tensor([16, 20, 3], device=student.device)
    for got, want in zip(*both(student, teacher, ids, EXACT[2]), strict=True):
        close(got, want)


@pytest.mark.parametrize("k", [1, 10, 11, 40])
def test_an_empty_tail_and_more_entries_than_there_are(k) -> None:
    student, teacher = noise(2, 4, 11)
    student[:2, 4:], teacher[:2, 4:] = -INF, -INF
    ids = torch.zeros(4, dtype=torch.long, device=student.device)
    spec = Divergence("jsd", support="top_k", top_k=k)
    for got, want in zip(*both(student, teacher, ids, spec), strict=True):
        close(got, want)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_tokens_log_probability_and_its_gradient(temperature, monkeypatch) -> None:
    monkeypatch.setattr(row_kernels, "BLOCK", 16)
    logits, weights = 3 * noise(2, 3, 37), noise(2, 3, seed=1)
    logits[0, 1, 30] = -INF
    ids = torch.tensor([[0, 4, 5], [36, 17, 16]], device=logits.device)
    results = []
    for fn in (_FusedTokenLogp.apply, lambda *a: token_logp(*a) if not CUDA else plain(*a)):
        leaf = logits.clone().requires_grad_()
        logp = fn(leaf, ids, temperature)
        results.append((logp, *torch.autograd.grad((weights * logp).sum(), leaf)))
    for got, want in zip(*results, strict=True):
        close(got, want)


def plain(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


@pytest.mark.parametrize("spec", EXACT[:3] + EXACT[5:8], ids=name)
def test_bf16_logits_are_computed_in_float32(spec) -> None:
    student, teacher = (3 * x.to(torch.bfloat16) for x in noise(2, 4, 37))
    ids = torch.arange(4, device=student.device)
    kernels, closed = both(student, teacher, ids, spec)
    assert kernels[0].dtype == torch.float32 and kernels[-1].dtype == torch.bfloat16
    for got, want in zip(kernels[:4], closed[:4], strict=True):
        close(got, want, 1e-5, 1e-6)
    close(kernels[4].float(), closed[4].float(), 1e-2, 1e-4)


def test_the_kernels_do_not_run_on_a_cpu() -> None:
    assert not row_kernels.runs(torch.zeros(2, 3))
