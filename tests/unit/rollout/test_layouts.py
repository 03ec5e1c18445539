"""Models sample and are scored as in their plain pass, whatever their windows and caches are."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_architectures
import torch
from tiny_architectures import CONTEXT, tiny_model
from transformers import AutoConfig, PreTrainedModel

from selfteach.errors import EngineError
from selfteach.models import prefix_cache
from selfteach.models.loading import context_length
from selfteach.models.plain_pass import plain_logits
from selfteach.models.policy import Policy, Schedule
from selfteach.models.prefix_cache import MIN_SHARED
from selfteach.models.sequences import sequences
from selfteach.rollout.decoding.forward import Layout
from selfteach.rollout.decoding.generate import sample_completions
from selfteach.rollout.decoding.prompt_layout import proven_layout
from selfteach.rollout.decoding.token_sampling import TokenDistribution

EXPECTED: dict[str, Layout] = {
    "llama": "shared_prefix",
    "gpt2": "shared_prefix",
    "gemma2": "left_padded",
    "gemma3_text": "left_padded",
    "mistral": "left_padded",
    "gpt_oss": "left_padded",
    "llama4_text": "left_padded",
    "qwen3_next": "left_padded",
    "lfm2": "left_padded",
    "jamba": "left_padded",
    "falcon_mamba": "equal_lengths",
    "rwkv": "uncached",
}
# A shared beginning, lengths that differ by more than a window, all longer than it.
COMMON = [3 + i % 90 for i in range(MIN_SHARED)]
PROMPTS = [[*COMMON, 5], [*COMMON, *range(10, 30)], [*COMMON, 7, 8, 9]]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside transformers
        yield


def largest_error(model: PreTrainedModel, layout: Layout) -> float:
    """Return how far the sampler's log-probabilities are from the plain pass's, in nats."""
    uniforms_BT = np.random.default_rng(0).random((6, 12))
    spread = float(plain_logits(model, PROMPTS[1]).std())  # so that no token is certain
    with torch.no_grad():
        ids, logps = sample_completions(
            model, PROMPTS, uniforms_BT, distribution=TokenDistribution(spread), end_ids=[2], pad_id=0,
            max_length=CONTEXT, layout=layout,
        )  # fmt: skip
        errors = []
        for row, (completion, ours) in enumerate(zip(ids, logps, strict=True)):
            prompt = PROMPTS[row // 2]
            plain = plain_logits(model, [*prompt, *completion[:-1]]).double() / spread
            logp = plain.log_softmax(-1)[range(len(prompt) - 1, len(plain)), completion]
            errors.append((logp - torch.tensor(ours)).abs().max())
    return float(max(errors))


@pytest.mark.parametrize("family", EXPECTED)
def test_sampling_is_the_plain_pass(family: str) -> None:
    model = tiny_model(family)
    layout = proven_layout(model, pad_id=0, max_length=CONTEXT)
    assert layout == EXPECTED[family]
    assert largest_error(model, layout) < 2e-3


def next_turn_error(model: PreTrainedModel) -> float:
    """Return how far the log-probabilities of a second turn are from the plain pass's, in nats."""
    uniforms_BT = np.random.default_rng(0).random((6, 12))
    spread = float(plain_logits(model, PROMPTS[1]).std())
    states: dict[int, prefix_cache.States] = {}
    with torch.no_grad():
        ids, _ = sample_completions(
            model, PROMPTS, uniforms_BT, distribution=TokenDistribution(spread), end_ids=range(2, 30),
            pad_id=0, max_length=CONTEXT, on_end=states.__setitem__,
        )  # fmt: skip
        assert len({len(completion) for completion in ids}) > 2
        longer = [[*PROMPTS[b // 2], *ids[b], *range(40, 41 + 3 * b)] for b in range(6)]
        assert [prefix_cache.length(states[b]) for b in range(6)] == [
            len(PROMPTS[b // 2]) + len(ids[b]) - 1 for b in range(6)
        ]
        stored_Q = [states[b] for b in range(6)]
        ids, logps = sample_completions(
            model, longer, uniforms_BT, distribution=TokenDistribution(spread), end_ids=(), pad_id=0,
            max_length=CONTEXT, stored_Q=stored_Q,
        )  # fmt: skip
        errors = []
        for prompt, completion, ours in zip(longer, ids, logps, strict=True):
            plain = plain_logits(model, [*prompt, *completion[:-1]]).double() / spread
            logp = plain.log_softmax(-1)[range(len(prompt) - 1, len(plain)), completion]
            errors.append((logp - torch.tensor(ours)).abs().max())
    return float(max(errors))


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3"])
def test_a_second_turn_goes_on_from_stored_states(family: str) -> None:
    assert next_turn_error(tiny_model(family)) < 2e-3


def test_a_second_turn_in_16_bits_goes_on_from_stored_states() -> None:
    assert next_turn_error(tiny_model("llama").bfloat16()) < 0.2


@pytest.mark.parametrize("family", ["gemma2", "mistral", "gpt_oss"])
def test_padding_inside_a_prompt_uses_up_a_window(family: str) -> None:
    assert largest_error(tiny_model(family), "shared_prefix") > 0.1


@pytest.mark.parametrize("family", EXPECTED)
def test_scores_are_those_of_the_plain_pass(family: str) -> None:
    model = tiny_model(family)
    policy = Policy(model, Schedule(1e-3))
    completions = [[5, 6, 7, 8, 9, 3], [5, 6, 4], [12]]
    with torch.no_grad():
        side = sequences(PROMPTS, completions, pad_id=0)
        ours_NV = policy.score(side).logits(slice(None))
        plain_NV = torch.cat([
            plain_logits(model, [*prompt, *completion])[len(prompt) - 1 : -1]
            for prompt, completion in zip(PROMPTS, completions, strict=True)
        ])  # fmt: skip
    torch.testing.assert_close(ours_NV, plain_NV, rtol=0, atol=2e-3 * float(plain_NV.std()))


def test_a_window_that_no_sequence_reaches_costs_nothing() -> None:
    model = tiny_model("mistral", sliding_window=64)
    assert proven_layout(model, pad_id=0, max_length=64) == "shared_prefix"
    assert proven_layout(model, pad_id=0, max_length=65) == "left_padded"
    assert model.config.sliding_window == 64


def test_a_slower_layout_is_reported_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "selfteach"):
        proven_layout(tiny_model("llama"), pad_id=0, max_length=CONTEXT)
        assert not caplog.messages
        proven_layout(tiny_model("rwkv"), pad_id=0, max_length=CONTEXT)
    (line,) = caplog.messages
    assert "RwkvForCausalLM" in line and "without a cache" in line and "\n" not in line


@pytest.mark.parametrize("family", ["bert", "xlnet"])
def test_a_model_that_reads_later_tokens_is_refused(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(EngineError, match="not causal"):
        proven_layout(model, pad_id=0, max_length=CONTEXT)
    with pytest.raises(EngineError, match="not causal"):
        Policy(model, Schedule(1e-3))


def test_bfloat16_rounding_is_not_taken_for_a_difference() -> None:
    for family in ("llama", "qwen2", "mistral", "qwen3_moe"):
        model = tiny_model(family).bfloat16()
        assert proven_layout(model, pad_id=0, max_length=CONTEXT) == (
            "left_padded" if family == "mistral" else "shared_prefix"
        )
        assert Policy(model, Schedule(1e-3)).shares_prefixes


@pytest.mark.parametrize(
    ("rotary", "longest"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 256),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
          "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0,
          "original_max_position_embeddings": 64}, 64),
        ({"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 4,
          "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}, 64),
    ],
)  # fmt: skip
def test_rotary_embeddings_that_change_with_length_limit_it(rotary: dict, longest: int) -> None:
    config = AutoConfig.for_model("llama", max_position_embeddings=256, rope_parameters=rotary)
    assert context_length(config) == longest


@pytest.mark.slow
def test_the_page_of_architectures_is_what_they_do() -> None:
    page = Path(__file__).parents[3] / "docs" / "architectures.md"
    assert page.read_text(encoding="utf-8").splitlines() == list(tiny_architectures.page())
