"""oneDNN's matmuls have the right values, bias and shapes; with a gradient BLAS computes them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from selfteach.models import matmul


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Treat every weight as wide; returns the rows that oneDNN was called with."""
    monkeypatch.setattr(matmul, "WIDE", 0)
    seen, onednn = list[torch.Tensor](), torch.ops.mkldnn._linear_pointwise

    class Watched:
        @staticmethod
        def _linear_pointwise(rows: torch.Tensor, *rest: object) -> torch.Tensor:
            seen.append(rows)
            return onednn(rows, *rest)

        _reorder_linear_weight = staticmethod(torch.ops.mkldnn._reorder_linear_weight)

    monkeypatch.setattr(torch.ops, "mkldnn", Watched)
    return seen


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")


@needs_onednn
@pytest.mark.parametrize("shape", [(1,), (7,), (64,), (3, 5)])
@pytest.mark.parametrize("biased", [False, True])
def test_values_are_those_of_float64(wide: list, shape: tuple[int, ...], biased: bool) -> None:
    rows, weight = torch.randn(*shape, 48), torch.randn(101, 48)
    bias = torch.randn(101) if biased else None
    want = F.linear(rows.double(), weight.double(), None if bias is None else bias.double())
    with torch.no_grad():
        results = matmul.linear(rows, weight, bias), matmul.pack(weight, bias, 8)(rows)
    assert len(wide) == 2
    for got in results:
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_a_view_has_the_values_of_its_rows(wide: list) -> None:
    rows, weight = torch.randn(48, 12).t()[::2], torch.randn(101, 96).t()[:48].t()
    with torch.no_grad():
        got = matmul.linear(rows, weight, None)
    assert len(wide) == 1
    torch.testing.assert_close(got, rows @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_gradient_goes_through(wide: list) -> None:
    rows, weight = torch.randn(4, 8).requires_grad_(), torch.randn(9, 8).requires_grad_()
    matmul.linear(rows, weight, None).sum().backward()
    assert not wide
    torch.testing.assert_close(rows.grad, weight.sum(0).expand(4, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_do_not_use_onednn(
    wide: list, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "has_fast_bf16", lambda _: True)
    rows, weight = torch.randn(4, 8, dtype=dtype), torch.randn(9, 8, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(matmul.linear(rows, weight, None), F.linear(rows, weight))
    assert not wide


def test_zero_rows_give_zero_rows(wide: list) -> None:
    with torch.no_grad():
        assert matmul.linear(torch.zeros(0, 8), torch.zeros(9, 8), None).shape == (0, 9)


def test_autocast_is_respected(wide: list) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = matmul.linear(torch.ones(4, 8), torch.ones(9, 8), None)
    assert out.dtype == torch.bfloat16 and not wide


@pytest.fixture
def widening(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bf16 instructions; weights of several blocks, the last one smaller."""
    monkeypatch.setattr(matmul, "has_fast_bf16", lambda _: False)
    monkeypatch.setattr(matmul, "BLOCK_ENTRIES", 40 * 48)


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (0,)])
@pytest.mark.parametrize("biased", [False, True])
def test_bf16_is_multiplied_in_float32_without_bf16_instructions(
    widening: None, shape: tuple[int, ...], biased: bool
) -> None:
    rows, weight, bias = bf16(*shape, 48), bf16(101, 48), bf16(101) if biased else None
    with torch.no_grad():
        got = matmul.linear(rows, weight, bias)
    want = F.linear(rows.float(), weight.float(), None if bias is None else bias.float())
    assert got.shape == want.shape and (got.dtype == torch.float32 or not got.numel())
    torch.testing.assert_close(got.float(), want, rtol=1e-5, atol=1e-5)


def test_a_bf16_gradient_goes_through_without_bf16_instructions(widening: None) -> None:
    rows, weight = bf16(4, 48).requires_grad_(), bf16(101, 48)
    matmul.linear(rows, weight, None).sum().backward()
    torch.testing.assert_close(rows.grad, weight.sum(0).expand(4, 48), rtol=0.02, atol=0.05)


def test_matmuls_with_a_float32_gradient_match_float64(widening: None) -> None:
    """As `lm_head.chunked_sum` calls them when a loss's logits are float32."""
    grad, weight, rows = torch.randn(7, 101), bf16(101, 48), bf16(7, 48)
    assert matmul.cast_gradient(grad, rows) is grad
    close = {"rtol": 1e-5, "atol": 1e-5}
    got = matmul.mm(grad, weight)
    torch.testing.assert_close(got, (grad.double() @ weight.double()).float(), **close)
    total = torch.ones(101, 48)
    matmul.addmm_into(total, grad.T, rows)
    want = grad.T.double() @ rows.double()
    torch.testing.assert_close(total, (1 + want).float(), **close)
    into = torch.empty(101, 48)
    matmul.mm_into(into, grad.T, rows.float())
    torch.testing.assert_close(into, want.float(), **close)


def test_a_cpu_with_bf16_instructions_multiplies_in_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matmul, "has_fast_bf16", lambda _: True)
    rows, weight = bf16(4, 48), bf16(101, 48)
    with torch.no_grad():
        assert torch.equal(matmul.linear(rows, weight, None), F.linear(rows, weight))
    assert matmul.cast_gradient(torch.randn(4, 101), rows).dtype == torch.bfloat16
    assert not matmul.computes_in_float32(rows.float())
