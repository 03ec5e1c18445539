"""Llama's own passes are the model's: rows branch, move and end; prompts are padded or shared."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from selfteach.models import prefix_cache
from selfteach.rollout.decoding import llama
from selfteach.rollout.decoding.forward import ModelPasses, Prompts
from selfteach.rollout.decoding.generate import branches
from selfteach.rollout.decoding.llama import LlamaPasses

VOCABULARY = 50
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama, other angles": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SHAPE,
            rope_parameters={
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            },
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
}  # fmt: skip
EQUAL = [[7, 8, 9], [4, 5, 6], [9, 2, 3]]
PADDED = [[7, 8, 9, 10], [4, 5], [9, 2, 3]]
SHARED = [[*range(1, 41), *own] for own in PADDED]
# Parents and tokens, pass by pass: rows branch, one takes the place of another, they end, and go on.
MOVES = [
    ([0, 1, 2, 0, 2], [3, 4, 5, 6, 7]),
    ([0, 4, 2, 3], [8, 9, 10, 11]),
    ([0, 1, 2, 3, 3, 1], [1, 2, 3, 4, 5, 6]),
    ([4, 5], [2, 3]),
    *[([0, 1], [n % VOCABULARY, 2 * n % VOCABULARY]) for n in range(llama.BLOCK + 8)],
]


def told(passes: LlamaPasses | ModelPasses) -> list[torch.Tensor]:
    return [passes(np.array(parent), torch.tensor(token)) for parent, token in MOVES]


@pytest.mark.parametrize("prompts", [EQUAL, PADDED, SHARED], ids=["equal", "padded", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("copied", ["joined", "packed", "not"])
def test_its_logits_are_the_models(
    family: str, prompts: list[list[int]], copied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "JOINED", 10**9 if copied == "joined" else 0)
    monkeypatch.setattr(llama, "PACKED", 10**9 if copied == "packed" else 0)
    model = FAMILIES[family]().eval()
    for name, value in model.named_parameters():
        if "norm" in name or "bias" in name:  # all ones and zeros would hide one that is left out
            torch.nn.init.normal_(value, 1.0, 0.3)
    assert LlamaPasses.fits(model)
    with torch.inference_mode():
        own = told(LlamaPasses(model, Prompts(model, prompts, 0), answers=6))
        models = told(ModelPasses(model, Prompts(model, prompts, 0)))
    for a, b in zip(own, models, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))
    assert (prefix_cache.shared_length(prompts) > 0) == (prompts is SHARED)


def test_adapters_and_half_precision_are_the_models() -> None:
    model = FAMILIES["llama"]().eval()
    with warnings.catch_warnings():  # peft asks transformers for a name that is on its way out
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
        adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        own = told(LlamaPasses(model, Prompts(model, SHARED, 0), answers=6))
        models = told(ModelPasses(model, Prompts(model, SHARED, 0)))
    with torch.inference_mode():
        exact = told(LlamaPasses(model, Prompts(model, SHARED, 0), answers=6))
        with adapted.disable_adapter():
            plain = told(LlamaPasses(model, Prompts(model, SHARED, 0), answers=6))
    off = torch.stack([(a - b).abs().mean() for a, b in zip(own[4:], models[4:], strict=True)])
    noise = torch.stack([(a - b).abs().mean() for a, b in zip(models[4:], exact[4:], strict=True)])
    assert off.mean() < noise.mean(), "nearer to the model's half precision than that is to float32"
    assert (exact[0] - plain[0]).abs().mean() > 3 * noise.mean(), "and the adapter counts"


def test_models_that_do_not_look_like_it_run_their_own_way() -> None:
    sliding = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4))
    other = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    windows = {**SHAPE, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    qwen = Qwen2ForCausalLM(Qwen2Config(**windows))
    assert not any(LlamaPasses.fits(model) for model in (sliding, other, qwen))


def test_rows_stay_where_they_are_if_they_can() -> None:
    # Rows 0..4; row 1 ends; rows 0 and 3 branch; of row 4 all answers go one way.
    row = np.array([0, 0, 2, 3, 3, 3, 4, 4])
    token = np.array([5, 6, 7, 8, 9, 8, 2, 2])
    parent, drawn, now = branches(row, token)
    assert parent.tolist() == [0, 0, 2, 3, 4, 3] and drawn.tolist() == [5, 6, 7, 8, 2, 9]
    assert (parent[now] == row).all() and (drawn[now] == token).all()
    # Fewer rows than before: the last ones move to the front.
    parent, drawn, now = branches(np.array([1, 4]), np.array([3, 3]))
    assert parent.tolist() == [4, 1] and now.tolist() == [1, 0]
    # Everyone alone in a row, in any order: all rows stay. One that ended leaves a place to fill.
    parent, drawn, now = branches(np.array([2, 0, 1]), np.array([7, 8, 9]))
    assert (
        parent.tolist() == [0, 1, 2] and drawn.tolist() == [8, 9, 7] and now.tolist() == [2, 0, 1]
    )
    parent, drawn, now = branches(np.array([3, 0, 1]), np.array([7, 8, 9]))
    assert (
        parent.tolist() == [0, 1, 3] and drawn.tolist() == [8, 9, 7] and now.tolist() == [2, 0, 1]
    )
