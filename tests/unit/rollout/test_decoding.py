"""LlamaDecoder against the model: rows branch, move and end; prompts are padded or share a prefix."""

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
from selfteach.rollout.decoding.forward import PrefilledPrompts, TransformersDecoder
from selfteach.rollout.decoding.generate import next_rows
from selfteach.rollout.decoding.llama import LlamaDecoder

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
SHARED = [[*range(1, 41), *prompt] for prompt in PADDED]
# Parents and tokens, step by step: rows branch, one takes the place of another, they end, and go on.
MOVES = [
    ([0, 1, 2, 0, 2], [3, 4, 5, 6, 7]),
    ([0, 4, 2, 3], [8, 9, 10, 11]),
    ([0, 1, 2, 3, 3, 1], [1, 2, 3, 4, 5, 6]),
    ([4, 5], [2, 3]),
    *[([0, 1], [n % VOCABULARY, 2 * n % VOCABULARY]) for n in range(llama.BLOCK + 8)],
]


def logits_of(decoder: LlamaDecoder | TransformersDecoder) -> list[torch.Tensor]:
    return [decoder(np.array(parent), torch.tensor(token)) for parent, token in MOVES]


@pytest.mark.parametrize("prompts", [EQUAL, PADDED, SHARED], ids=["equal", "padded", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("copied", ["fused", "packed", "not"])
def test_logits_equal_the_models(
    family: str, prompts: list[list[int]], copied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "MAX_FUSED_WEIGHTS", 10**9 if copied == "fused" else 0)
    monkeypatch.setattr(llama, "MAX_PACKED_WEIGHTS", 10**9 if copied == "packed" else 0)
    model = FAMILIES[family]().eval()
    for name, value in model.named_parameters():
        if (
            "norm" in name or "bias" in name
        ):  # with ones and zeros, one that is left out would not show
            torch.nn.init.normal_(value, 1.0, 0.3)
    assert LlamaDecoder.supports(model)
    with torch.inference_mode():
        ours = logits_of(LlamaDecoder(model, PrefilledPrompts(model, prompts, 0), completions=6))
        models = logits_of(TransformersDecoder(model, PrefilledPrompts(model, prompts, 0)))
    for a, b in zip(ours, models, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))
    assert (prefix_cache.shared_length(prompts) > 0) == (prompts is SHARED)


def test_adapters_and_bf16_logits_equal_the_models() -> None:
    model = FAMILIES["llama"]().eval()
    with warnings.catch_warnings():  # peft uses a deprecated name of transformers
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
        adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        ours = logits_of(LlamaDecoder(model, PrefilledPrompts(model, SHARED, 0), completions=6))
        models = logits_of(TransformersDecoder(model, PrefilledPrompts(model, SHARED, 0)))
    with torch.inference_mode():
        exact = logits_of(LlamaDecoder(model, PrefilledPrompts(model, SHARED, 0), completions=6))
        with adapted.disable_adapter():
            plain = logits_of(
                LlamaDecoder(model, PrefilledPrompts(model, SHARED, 0), completions=6)
            )
    difference = torch.stack(
        [(a - b).abs().mean() for a, b in zip(ours[4:], models[4:], strict=True)]
    )
    noise = torch.stack([(a - b).abs().mean() for a, b in zip(models[4:], exact[4:], strict=True)])
    assert difference.mean() < noise.mean(), "nearer to the model in bf16 than bf16 is to float32"
    assert (exact[0] - plain[0]).abs().mean() > 3 * noise.mean(), "and the adapter counts"


def test_other_architectures_are_not_supported() -> None:
    sliding = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4))
    other = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    windows = {**SHAPE, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    qwen = Qwen2ForCausalLM(Qwen2Config(**windows))
    assert not any(LlamaDecoder.supports(model) for model in (sliding, other, qwen))


def test_rows_stay_in_place_where_possible() -> None:
    # Rows 0..4; row 1 ends; rows 0 and 3 branch; all completions of row 4 sample the same token.
    row = np.array([0, 0, 2, 3, 3, 3, 4, 4])
    token = np.array([5, 6, 7, 8, 9, 8, 2, 2])
    parent, tokens, new_row = next_rows(row, token)
    assert parent.tolist() == [0, 0, 2, 3, 4, 3] and tokens.tolist() == [5, 6, 7, 8, 2, 9]
    assert (parent[new_row] == row).all() and (tokens[new_row] == token).all()
    # Fewer rows than before: the last ones move to the front.
    parent, tokens, new_row = next_rows(np.array([1, 4]), np.array([3, 3]))
    assert parent.tolist() == [4, 1] and new_row.tolist() == [1, 0]
    # One completion per row, in any order: all rows stay. A row that ended leaves a place to fill.
    parent, tokens, new_row = next_rows(np.array([2, 0, 1]), np.array([7, 8, 9]))
    assert (
        parent.tolist() == [0, 1, 2]
        and tokens.tolist() == [8, 9, 7]
        and new_row.tolist() == [2, 0, 1]
    )
    parent, tokens, new_row = next_rows(np.array([3, 0, 1]), np.array([7, 8, 9]))
    assert (
        parent.tolist() == [0, 1, 3]
        and tokens.tolist() == [8, 9, 7]
        and new_row.tolist() == [2, 0, 1]
    )
