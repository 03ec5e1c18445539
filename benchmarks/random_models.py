"""Models of known shapes with random weights, and samples that are there already.

For machines that no weights can be brought to: what a step costs depends on shapes, not on what
weights say. Questions, answers and contexts are random tokens, the same for all who are compared; no
answer ends early, and nobody samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from selfteach.runtime.torch_setup import configure_torch
from selfteach.types import CritiquedRollout, Problem, Rollout, TrainingSample, Verdict


@dataclass(frozen=True, slots=True)
class Sized:
    """A model's shape and the step that it takes."""

    family: str
    shape: dict[str, Any]
    answers: int
    each: int
    """Answers to a question."""
    prompt: int
    shown: int
    """Tokens of the teacher's prompt."""
    length: int
    """Of an answer."""
    micro_batch_tokens: int
    peer_batch: int
    """Answers in a micro-batch of TRL's."""


SIZED = {
    "SmolLM2-135M, random weights": Sized(
        "llama",
        {
            "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49_152,
            "max_position_embeddings": 2048, "tie_word_embeddings": True,
        },
        answers=32, each=8, prompt=128, shown=256, length=256, micro_batch_tokens=32_768,
        peer_batch=32,
    ),
    "Qwen2.5-1.5B, random weights": Sized(
        "qwen2",
        {
            "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
            "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151_936,
            "max_position_embeddings": 4096, "tie_word_embeddings": True,
        },
        answers=32, each=8, prompt=128, shown=384, length=512, micro_batch_tokens=3584,
        peer_batch=4,
    ),
    "tiny, random weights": Sized(
        "llama",
        {
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512,
            "max_position_embeddings": 256, "tie_word_embeddings": True,
        },
        answers=8, each=4, prompt=16, shown=24, length=16, micro_batch_tokens=256, peer_batch=4,
    ),
}  # fmt: skip


def model_of(name: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The same weights whenever it is asked for on the same device."""
    sized = SIZED[name]
    config = AutoConfig.for_model(
        sized.family, **sized.shape, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    configure_torch(torch.device(device))  # of the process: the peer has it, too
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def lessons_of(name: str) -> list[TrainingSample]:
    """A step's samples; every other answer to a question is right."""
    sized = SIZED[name]
    dice = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        drawn = torch.randint(3, sized.shape["vocab_size"], (count,), generator=dice)
        return tuple(drawn.tolist())

    made = []
    for question in range(sized.answers // sized.each):
        problem, prompt, shown = (
            Problem(f"q{question}", "", ""),
            ids(sized.prompt),
            ids(sized.shown),
        )
        for sample in range(sized.each):
            rollout = Rollout(
                problem=problem, sample=sample, prompt_ids=prompt, token_ids=ids(sized.length),
                logps=(-10.0,) * sized.length, text=str(sample), finished=True, policy_version=0,
            )  # fmt: skip
            verdict = Verdict(sample % 2 == 0, True, "x")
            made.append(
                TrainingSample(
                    CritiquedRollout(rollout, verdict, None), context="", teacher_prompt_ids=shown
                )
            )
    return made
