"""The memory that `check` estimates for a step, against the peak of the device's allocator."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_on_device import ALIGNED, recipe, training_samples
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfteach.commands.check.sizes import device_load, measure
from selfteach.runtime.torch_setup import configure_torch
from selfteach.trainer import step
from selfteach.trainer.build import build
from selfteach.trainer.device_memory import gib, memory
from selfteach.types import TrainingSample

pytestmark = pytest.mark.gpu

COMPLETION_TOKENS, ROWS = 480 if torch.cuda.is_available() else 24, 16
SHAPE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024,
    "vocab_size": 32_768, "tie_word_embeddings": True,
}  # fmt: skip
ARMS: dict[str, tuple[dict[str, Any], float]] = {
    "grpo": ({"objective": {"type": "grpo"}}, 1.5),
    "step_aligned": (ALIGNED, 2.5),
    "ema": ({**ALIGNED, "teacher": {"type": "ema"}}, 2.5),
    "autocast": ({"objective": {"type": "grpo"}, "model": {"autocast": "bfloat16"}}, 2.0),
    "lora": (
        {"objective": {"type": "grpo"}, "model": {"lora": {"rank": 8, "alpha": 16}}}, 1.5
    ),
    "recomputed": (
        {"objective": {"type": "grpo"}, "model": {"gradient_checkpointing": True}}, 2.0
    ),
}  # fmt: skip
"""Changes of the recipe, and the largest allowed ratio of estimate to peak. A micro-batch counts tokens
of student and teacher, and the teacher's keep no activations: an estimate is high there."""


def long_samples(samples: list[TrainingSample], vocabulary: int) -> list[TrainingSample]:
    """Return the samples with rollouts of random tokens, which share no prefix."""
    torch.manual_seed(0)
    long = []
    for index, sample in enumerate(samples[:ROWS]):
        ids = tuple(torch.randint(3, vocabulary, (COMPLETION_TOKENS,)).tolist())
        rollout = dataclasses.replace(
            sample.rollout, token_ids=ids, logps=(-3.0,) * COMPLETION_TOKENS, sample=index
        )
        critiqued = dataclasses.replace(sample.critiqued, rollout=rollout)
        long.append(dataclasses.replace(sample, critiqued=critiqued, steps=()))
    return long


@pytest.fixture(scope="module")
def model_folder(
    lab_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, pad_token_id=lab_tokenizer.pad_token_id)).save_pretrained(
        folder
    )
    lab_tokenizer.save_pretrained(folder)
    world = Path(__file__).parents[2] / "src/selfteach/tasks/lab/bases/two_styles/world.json"
    (folder / "world.json").write_text(world.read_text())
    return folder


@pytest.mark.parametrize("arm", ARMS)
def test_the_estimate_covers_a_real_step(
    arm: str, device: str, model_folder: Path, record_property: Callable[[str, object], None]
) -> None:
    changes, most = ARMS[arm]
    completions = 2 * COMPLETION_TOKENS if "context" in changes else COMPLETION_TOKENS
    sizes = {
        "model": {"path": str(model_folder)},
        "sampling": {"max_tokens": COMPLETION_TOKENS, "batch_size": ROWS},
        "train": {"micro_batch_tokens": ROWS * (completions + 128), "max_length": 1024},
    }
    sized = recipe(device, changes, sizes)
    # Contexts come from a trained model: the samples need ids, not this model's weights.
    samples = long_samples(training_samples(build(recipe("cpu", changes))), SHAPE["vocab_size"])
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    built = build(sized)
    estimate = memory(needed) if (needed := device_load(sized, measure(sized, built))) else None
    assert estimate is not None
    for _ in range(2):  # the second with gradients and moments of the first
        metrics = step.learn(built.components, samples)
        assert metrics["grad_norm"] > 0
    if device != "cuda":
        return
    peak = torch.cuda.max_memory_allocated() - before
    record_property(arm, f"{gib(estimate.peak)} estimated, {gib(peak)} at the peak")
    assert peak <= 1.1 * estimate.peak, "a run that passes `check` has to fit"
    assert estimate.peak <= most * peak


def test_attention_in_float32_stores_no_square_per_head(device: str) -> None:
    """Grouped-query heads have no float32 kernel: plain attention would store [heads, T, T]."""
    configure_torch(torch.device("cuda"))
    length, heads = (4096, 8) if device == "cuda" else (64, 8)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=2, max_position_embeddings=length,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, device)
    ids = torch.randint(64, (1, length), device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    model.model(input_ids=ids, use_cache=False)[0].sum().backward()
    if device == "cuda":
        assert torch.cuda.max_memory_allocated() - before < heads * length**2 * 4 / 2
    assert model.model.embed_tokens.weight.grad is not None
