"""Sampling on a device: logprobs equal those of scoring, draws repeat, logits equal the model's."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
from runs_on_device import ALIGNED, LOW_PRECISION, recipe, training_samples
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from selfteach.models.sequences import sequences
from selfteach.rollout.decoding import llama
from selfteach.rollout.decoding.forward import PrefilledPrompts, TransformersDecoder
from selfteach.rollout.decoding.llama import LlamaDecoder
from selfteach.rollout.decoding.token_sampling import TokenDistribution, sample_token
from selfteach.trainer.build import build

pytestmark = pytest.mark.gpu

VOCABULARY = 50
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3,
    "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
}
PADDED = [[7, 8, 9, 10], [4, 5], [9, 2, 3]]
PROMPTS = {
    "equal": [[7, 8, 9], [4, 5, 6], [9, 2, 3]],
    "padded": PADDED,
    "shared": [[*range(1, 41), *prompt] for prompt in PADDED],
}
# Parents and tokens, step by step: rows branch, one takes the place of another, they end, and go on.
MOVES = [
    ([0, 1, 2, 0, 2], [3, 4, 5, 6, 7]),
    ([0, 4, 2, 3], [8, 9, 10, 11]),
    ([0, 1, 2, 3, 3, 1], [1, 2, 3, 4, 5, 6]),
    ([4, 5], [2, 3]),
    *[([0, 1], [n % VOCABULARY, 2 * n % VOCABULARY]) for n in range(llama.BLOCK + 8)],
]


def logits_of(decoder: LlamaDecoder | TransformersDecoder, device: str) -> torch.Tensor:
    steps = [decoder(np.array(p), torch.tensor(t, device=device)) for p, t in MOVES]
    return torch.cat([logits.float() for logits in steps])


@pytest.mark.parametrize("dtype", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [True, False])
def test_decoder_logits_equal_the_models(
    family: str, prompts: str, dtype: str, fused: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(llama, "MAX_FUSED_WEIGHTS", 10**9 if fused else 0)
    model = FAMILIES[family]().eval()
    for name, value in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(value, 1.0, 0.3)
    torch.nn.Module.to(model, device, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    read = [list(prompt) for prompt in PROMPTS[prompts]]
    with (
        torch.inference_mode(),
        torch.autocast(device, torch.bfloat16, enabled=dtype == "autocast"),
    ):
        ours = logits_of(
            LlamaDecoder(model, PrefilledPrompts(model, read, 0), completions=6), device
        )
        models = logits_of(TransformersDecoder(model, PrefilledPrompts(model, read, 0)), device)
    if dtype == "float32":
        torch.testing.assert_close(ours, models, rtol=0, atol=2e-5 * float(models.abs().max()))
        return
    # They round at different places: their probabilities are close on average.
    difference = (ours.log_softmax(-1) - models.log_softmax(-1)).exp().sub(1).abs()
    weight = models.softmax(-1)
    assert float((difference * weight).sum(-1).mean()) < 0.1
    assert torch.isfinite(ours).all()


@pytest.mark.parametrize("vocabulary", [50, 1000, 151_936])
def test_a_device_samples_the_tokens_that_a_cpu_samples(vocabulary: int, device: str) -> None:
    logits_RV = 3 * torch.randn(16, vocabulary)
    uniform_B = torch.rand(64, dtype=torch.float64)
    row_B = torch.arange(64) % 16
    for distribution in (
        TokenDistribution(0.7), TokenDistribution(1.0), TokenDistribution(1.0, 0.9, 40, 0.01),
    ):  # fmt: skip
        token, logp = sample_token(logits_RV, uniform_B, distribution, row_B)
        device_token, device_logp = sample_token(
            logits_RV.to(device), uniform_B.to(device), distribution, row_B.to(device)
        )
        same = device_token.cpu() == token
        assert same.float().mean() > 0.95, (
            "a number at the boundary of two tokens may fall on either side"
        )
        torch.testing.assert_close(device_logp.cpu()[same], logp[same], rtol=1e-5, atol=1e-5)
    greedy, greedy_logp = sample_token(
        logits_RV.to(device), uniform_B.to(device), TokenDistribution(0.0)
    )
    assert torch.equal(greedy.cpu(), logits_RV.argmax(-1)) and not greedy_logp.any()


@pytest.mark.parametrize("precision", ["float32", *LOW_PRECISION])
def test_stored_logprobs_equal_those_of_scoring(precision: str, device: str) -> None:
    built = build(recipe(device, ALIGNED, LOW_PRECISION.get(precision, {})))
    components = built.components
    rollouts = components.engine.generate(built.task.problems("train")[:8], components.sampling)
    prompts, completions = ([getattr(r, n) for r in rollouts] for n in ("prompt_ids", "token_ids"))
    side = sequences(prompts, completions, components.pad_id).to(components.policy.device)
    with torch.no_grad():
        logits_NV = components.policy.score(side).logits(slice(None)).float()
    assert logits_NV.device.type == device
    ids_N = torch.tensor([i for ids in completions for i in ids], device=logits_NV.device)
    scored_N = logits_NV.log_softmax(-1).gather(-1, ids_N[:, None])[:, 0].cpu()
    stored_N = torch.tensor([logp for r in rollouts for logp in r.logps])
    difference_N = (scored_N - stored_N).abs()
    if precision == "float32":
        assert difference_N.max() < 1e-3
    else:
        assert difference_N.mean() < 0.05


@pytest.mark.parametrize("precision", ["float32", *LOW_PRECISION])
def test_the_same_seed_samples_the_same_rollouts(precision: str, device: str) -> None:
    recipes = [
        recipe(device, ALIGNED, LOW_PRECISION.get(precision, {}), {"seed": s}) for s in (0, 0, 1)
    ]
    first, again, other = (
        built.components.engine.generate(built.task.problems("train")[:8], s)
        for built in map(build, recipes)
        for s in [built.components.sampling]
    )
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert [r.logps for r in first] == [r.logps for r in again], "bitwise"
    assert [r.token_ids for r in first] != [r.token_ids for r in other]


def test_rollouts_equal_those_of_a_cpu_but_for_rounding(device: str) -> None:
    on_cpu, on_device = (build(recipe(where, ALIGNED)) for where in ("cpu", device))
    problems = on_cpu.task.problems("train")
    ours, theirs = (
        b.components.engine.generate(problems, b.components.sampling) for b in (on_device, on_cpu)
    )
    same = [a.token_ids == b.token_ids for a, b in zip(ours, theirs, strict=True)]
    assert statistics.mean(same) >= 0.95
    assert len(training_samples(on_device)) == 16
