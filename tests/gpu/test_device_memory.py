"""What `check` says a step needs, beside what the device's allocator has given for one."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_on_device import ALIGNED, lessons_of, recipe
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfteach.commands.check.memory import gib, memory
from selfteach.commands.check.sizes import load_of, measure
from selfteach.runtime.torch_setup import settle
from selfteach.trainer import step
from selfteach.trainer.build import build
from selfteach.types import TrainingSample

pytestmark = pytest.mark.gpu

ANSWER, ROWS = 480 if torch.cuda.is_available() else 24, 16
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
"""What is asked for, and how many times the peak an estimate may be. A micro-batch counts prompts and
answers of both sides, of which the teacher's leave nothing behind: an estimate is high there."""


def long_answers(samples: list[TrainingSample], vocabulary: int) -> list[TrainingSample]:
    """The same samples with answers of random tokens, none of which begin alike."""
    torch.manual_seed(0)
    made = []
    for index, sample in enumerate(samples[:ROWS]):
        ids = tuple(torch.randint(3, vocabulary, (ANSWER,)).tolist())
        rollout = dataclasses.replace(
            sample.rollout, token_ids=ids, logps=(-3.0,) * ANSWER, sample=index
        )
        critiqued = dataclasses.replace(sample.critiqued, rollout=rollout)
        made.append(dataclasses.replace(sample, critiqued=critiqued, steps=()))
    return made


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
def test_the_estimate_holds_a_real_step(
    arm: str, device: str, model_folder: Path, record_property: Callable[[str, object], None]
) -> None:
    changes, most = ARMS[arm]
    answers = 2 * ANSWER if "context" in changes else ANSWER
    own = {
        "model": {"path": str(model_folder)},
        "sampling": {"max_tokens": ANSWER, "batch_size": ROWS},
        "train": {"micro_batch_tokens": ROWS * (answers + 128), "max_length": 1024},
    }
    asked = recipe(device, changes, own)
    # Contexts are those of a model that can answer: ids, not weights, are what the samples need.
    samples = long_answers(lessons_of(build(recipe("cpu", changes))), SHAPE["vocab_size"])
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    built = build(asked)
    estimate = memory(needed) if (needed := load_of(asked, measure(asked, built))) else None
    assert estimate is not None
    for _ in range(2):  # with gradients and moments of the step before
        said = step.learn(built.components, samples)
        assert said["grad_norm"] > 0
    if device != "cuda":
        return
    peak = torch.cuda.max_memory_allocated() - before
    record_property(arm, f"{gib(estimate.peak)} estimated, {gib(peak)} at the peak")
    assert peak <= 1.1 * estimate.peak, "a run that `check` lets pass has to fit"
    assert estimate.peak <= most * peak


def test_attention_in_float32_holds_no_square_of_every_head(device: str) -> None:
    """Heads that share keys have no kernel there: the plain way would keep [heads, T, T]."""
    settle(torch.device("cuda"))
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
