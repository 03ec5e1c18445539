"""Products by oneDNN are the products: values, bias, shapes; and where a gradient is wanted, BLAS's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from selfteach.models import matmul


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every weight counts as wide; and the rows that oneDNN was given."""
    monkeypatch.setattr(matmul, "WIDE", 0)
    seen, ask = list[torch.Tensor](), torch.ops.mkldnn._linear_pointwise

    class Watched:
        @staticmethod
        def _linear_pointwise(rows: torch.Tensor, *rest: object) -> torch.Tensor:
            seen.append(rows)
            return ask(rows, *rest)

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
        told = matmul.linear(rows, weight, bias), matmul.packed(weight, bias, 8)(rows)
    assert len(wide) == 2
    for got in told:
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_rows_of_a_view_are_the_rows(wide: list) -> None:
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
def test_other_types_are_left_alone(
    wide: list, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "multiplies_halves", lambda _: True)
    rows, weight = torch.randn(4, 8, dtype=dtype), torch.randn(9, 8, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(matmul.linear(rows, weight, None), F.linear(rows, weight))
    assert not wide


def test_no_rows_are_no_rows(wide: list) -> None:
    with torch.no_grad():
        assert matmul.linear(torch.zeros(0, 8), torch.zeros(9, 8), None).shape == (0, 9)


def test_autocast_is_obeyed(wide: list) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        told = matmul.linear(torch.ones(4, 8), torch.ones(9, 8), None)
    assert told.dtype == torch.bfloat16 and not wide


@pytest.fixture
def widening(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without instructions for halves; and weights of several parts, the last not whole."""
    monkeypatch.setattr(matmul, "multiplies_halves", lambda _: False)
    monkeypatch.setattr(matmul, "PART_ENTRIES", 40 * 48)


def halves(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (0,)])
@pytest.mark.parametrize("biased", [False, True])
def test_halves_are_multiplied_in_float32_where_there_are_no_instructions_for_them(
    widening: None, shape: tuple[int, ...], biased: bool
) -> None:
    rows, weight, bias = halves(*shape, 48), halves(101, 48), halves(101) if biased else None
    with torch.no_grad():
        got = matmul.linear(rows, weight, bias)
    want = F.linear(rows.float(), weight.float(), None if bias is None else bias.float())
    assert got.shape == want.shape and (got.dtype == torch.float32 or not got.numel())
    torch.testing.assert_close(got.float(), want, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_halves_goes_through_all_the_same(widening: None) -> None:
    rows, weight = halves(4, 48).requires_grad_(), halves(101, 48)
    matmul.linear(rows, weight, None).sum().backward()
    torch.testing.assert_close(rows.grad, weight.sum(0).expand(4, 48), rtol=0.02, atol=0.05)


def test_products_with_a_wide_gradient_are_those_of_float64(widening: None) -> None:
    """What `scores` and `slabs` ask for behind a loss whose logits came in float32."""
    grad, weight, rows = torch.randn(7, 101), halves(101, 48), halves(7, 48)
    assert matmul.narrowed(grad, rows) is grad
    close = {"rtol": 1e-5, "atol": 1e-5}
    got = matmul.times(grad, weight)
    torch.testing.assert_close(got, (grad.double() @ weight.double()).float(), **close)
    weighted_loss = torch.ones(101, 48)
    matmul.add(weighted_loss, grad.T, rows)
    want = grad.T.double() @ rows.double()
    torch.testing.assert_close(weighted_loss, (1 + want).float(), **close)
    into = torch.empty(101, 48, dtype=torch.bfloat16)
    matmul.write(into, grad.T, rows)
    torch.testing.assert_close(into, want.bfloat16(), rtol=1e-2, atol=1e-5)


def test_a_processor_with_instructions_for_halves_is_asked_for_halves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matmul, "multiplies_halves", lambda _: True)
    rows, weight = halves(4, 48), halves(101, 48)
    with torch.no_grad():
        assert torch.equal(matmul.linear(rows, weight, None), F.linear(rows, weight))
    assert matmul.narrowed(torch.randn(4, 101), rows).dtype == torch.bfloat16
    assert not matmul.widens(rows.float())
