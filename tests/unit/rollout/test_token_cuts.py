"""Cut distributions: the tokens that transformers' processors keep, and the slow form of each."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from selfteach.rollout.decoding.token_sampling import BLOCK, TokenDistribution, sample_token

CUTS = [
    TokenDistribution(0.7, top_p=0.8),
    TokenDistribution(1.0, top_p=1e-6),
    TokenDistribution(1.3, top_k=5),
    TokenDistribution(1.0, top_k=10_000),
    TokenDistribution(1.0, min_p=0.1),
    TokenDistribution(1.0, min_p=1.0),
    TokenDistribution(0.6, top_p=0.95, top_k=20),
    TokenDistribution(1.0, top_p=0.9, top_k=30, min_p=0.05),
]


def logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def slow_form(row: list[float], cut: TokenDistribution) -> list[float]:
    """Return probabilities, 0 for tokens that are cut, with sorting and sums of numbers."""
    left = {i: math.exp(x / cut.temperature) for i, x in enumerate(row)}
    if cut.top_k:
        left = dict(sorted(left.items(), key=lambda item: -item[1])[: cut.top_k])
    if cut.top_p < 1:
        total, mass, nucleus = sum(left.values()), 0.0, dict[int, float]()
        for i, p in sorted(left.items(), key=lambda item: -item[1]):
            if mass < cut.top_p * total:
                nucleus[i] = p
            mass += p
        left = nucleus
    left = {i: p for i, p in left.items() if p >= cut.min_p * max(left.values())}
    return [left.get(i, 0.0) / sum(left.values()) for i in range(len(row))]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_cut_distribution_is_its_slow_form(cut: TokenDistribution) -> None:
    scores = logits(6, 50)
    want = torch.tensor([slow_form(row, cut) for row in scores.tolist()])
    torch.testing.assert_close(cut.logp(scores).exp(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocabulary", [50, 2000])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_cut_distribution_is_that_of_transformers(
    cut: TokenDistribution, vocabulary: int
) -> None:
    scores = logits(8, vocabulary, seed=1)
    processors = LogitsProcessorList([TemperatureLogitsWarper(cut.temperature)])
    if cut.top_k:
        processors.append(TopKLogitsWarper(cut.top_k))
    if cut.top_p < 1:
        processors.append(TopPLogitsWarper(cut.top_p))
    if cut.min_p:
        processors.append(MinPLogitsWarper(cut.min_p))
    no_ids = torch.zeros(8, 1, dtype=torch.long)
    want = processors(no_ids, scores).log_softmax(-1)  # pyright: ignore[reportArgumentType]
    got = cut.logp(scores)
    assert torch.equal(got.isinf(), want.isinf()), "the same tokens"
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [40, BLOCK + 7, 3 * BLOCK])
def test_tokens_are_sampled_as_often_as_the_distribution_says(vocabulary: int) -> None:
    cut, draws = TokenDistribution(1.0, top_p=0.9, top_k=30, min_p=0.01), 20_000
    scores = logits(1, vocabulary, seed=2)
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    token, logp = sample_token(scores, uniform, cut, torch.zeros(draws, dtype=torch.long))
    share = token.bincount(minlength=vocabulary) / draws
    torch.testing.assert_close(share, cut.logp(scores)[0].exp(), rtol=0, atol=2 / draws)
    assert torch.equal(logp, cut.logp(scores)[0, token])


@pytest.mark.parametrize("vocabulary", [40, 5 * BLOCK])
def test_no_token_that_is_cut_is_ever_sampled(vocabulary: int) -> None:
    scores = logits(50, vocabulary, seed=3)
    scores[:, vocabulary // 2 :] -= 20  # the end of the vocabulary is cut
    ends = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for cut in CUTS:
        row = torch.arange(50).repeat_interleave(len(ends))
        _, logp = sample_token(scores, ends.repeat(50), cut, row)
        assert torch.isfinite(logp).all()


def test_greedy_takes_the_likeliest_token_whatever_is_cut() -> None:
    scores = logits(5, 60)
    token, logp = sample_token(scores, torch.rand(5), TokenDistribution(0.0, 0.5, 3, 0.2))
    assert torch.equal(token, scores.argmax(-1)) and not logp.any()


@pytest.mark.parametrize("vocabulary", [40, BLOCK + 7])
def test_logits_that_are_no_numbers_give_some_token(vocabulary: int) -> None:
    """The trainer finds such weights by their loss and says so; sampling must not fail before."""
    scores = torch.full((2, vocabulary), torch.nan)
    for cut in CUTS:
        token, logp = sample_token(scores, torch.tensor([0.1, 0.9]), cut)
        assert (token < vocabulary).all() and logp.isnan().all()
