"""Deterministic mode: what it sets on a GPU, what it refuses, and that sampling is the same."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from selfteach.errors import EngineError
from selfteach.rollout.decoding import token_sampling
from selfteach.rollout.decoding.token_sampling import TokenDistribution, sample_token
from selfteach.runtime import torch_setup
from selfteach.runtime.torch_setup import CUBLAS_CONFIG, configure_torch


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(CUBLAS_CONFIG, "")
    monkeypatch.delenv(CUBLAS_CONFIG)
    monkeypatch.setattr(torch_setup, "repeat_kv_heads_in_float32", lambda: None)
    fill, benchmark = (
        torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    )  # fmt: skip
    sdp = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cuda.enable_cudnn_sdp(sdp)


def test_on_a_gpu_every_algorithm_has_a_fixed_order() -> None:
    configure_torch(torch.device("cuda"), deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), (
        "with warnings alone attention's gradient has no fixed order"
    )
    assert os.environ[CUBLAS_CONFIG] == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(("device", "deterministic"), [("cuda", False), ("cpu", True)])
def test_else_nothing_changes(device: str, deterministic: bool) -> None:
    configure_torch(torch.device(device), deterministic=deterministic)
    assert not torch.are_deterministic_algorithms_enabled()
    assert CUBLAS_CONFIG not in os.environ


def test_another_workspace_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS_CONFIG, ":0:0")
    with pytest.raises(EngineError, match="unset it, or set it to :4096:8") as error:
        configure_torch(torch.device("cuda"), deterministic=True)
    assert "\n" not in str(error.value)
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(CUBLAS_CONFIG, ":16:8")
    configure_torch(torch.device("cuda"), deterministic=True)


@pytest.mark.parametrize("vocabulary", [40, 3000])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sums_of_integers_sample_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, vocabulary: int, top_p: float
) -> None:
    torch.manual_seed(0)
    logits_RV, uniform_B = 3 * torch.randn(200, vocabulary), torch.rand(200)
    logits_RV[:, ::3] = -torch.inf  # tokens of probability 0
    distribution = TokenDistribution(0.8, top_p=top_p)
    expected = sample_token(logits_RV, uniform_B, distribution)
    monkeypatch.setattr(
        token_sampling, "_running_sums", lambda prob, *_: token_sampling._integer_sums(prob)
    )
    tokens_B, logp_B = sample_token(logits_RV, uniform_B, distribution)
    assert torch.equal(tokens_B, expected[0]) and torch.equal(logp_B, expected[1])
    assert torch.isfinite(logp_B).all()
