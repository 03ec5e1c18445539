"""Make models of known shapes with random weights, and samples of random tokens.

For machines without weights: the cost of a step depends on shapes, not on values. Prompts, rollouts and
contexts are random tokens, the same for all compared trainers; no rollout ends early, and sampling is
skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from selfteach.runtime.torch_setup import configure_torch
from selfteach.types import CritiquedRollout, Problem, Rollout, TrainingSample, Verdict


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Describes a model's shape and the size of its step."""

    family: str
    shape: dict[str, Any]
    rollouts: int
    group_size: int
    """Rollouts per problem."""
    prompt: int
    teacher_prompt: int
    """Tokens of the teacher's prompt."""
    length: int
    """Tokens of a rollout."""
    trl_batch: int
    """Rollouts in a micro-batch of TRL's."""

    def trl_tokens(self, *, with_teacher: bool) -> int:
        """Return the micro-batch of ours, in tokens, that has as many samples as TRL's.

        A sample is the student's sequence and, where there is a teacher, the teacher's.
        """
        sample = self.prompt + self.length
        if with_teacher:
            sample += self.teacher_prompt + self.length
        return self.trl_batch * sample


QWEN_1_5B = {
    "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151_936,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
MODEL_SIZES = {
    "SmolLM2-135M, random weights": ModelSize(
        "llama",
        {
            "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49_152,
            "max_position_embeddings": 2048, "tie_word_embeddings": True,
        },
        rollouts=32, group_size=8, prompt=128, teacher_prompt=256, length=256,
        trl_batch=32,
    ),
    "Qwen2.5-1.5B, random weights": ModelSize(
        "qwen2",
        QWEN_1_5B,
        rollouts=32, group_size=8, prompt=128, teacher_prompt=384, length=512,
        trl_batch=4,
    ),
    "Qwen2.5-1.5B, 2,048 tokens": ModelSize(
        "qwen2",
        QWEN_1_5B,
        rollouts=32, group_size=8, prompt=128, teacher_prompt=384, length=2048,
        trl_batch=4,
    ),
    "tiny, random weights": ModelSize(
        "llama",
        {
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512,
            "max_position_embeddings": 256, "tie_word_embeddings": True,
        },
        rollouts=8, group_size=4, prompt=16, teacher_prompt=24, length=16,
        trl_batch=4,
    ),
}  # fmt: skip


def model_of(name: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Return a model; its weights are the same in every call on the same device."""
    size = MODEL_SIZES[name]
    config = AutoConfig.for_model(
        size.family, **size.shape, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    configure_torch(torch.device(device))  # process-wide: applies to TRL as well
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def samples_of(name: str) -> list[TrainingSample]:
    """Return a step's samples; every other rollout of a group is correct."""
    size = MODEL_SIZES[name]
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        sampled = torch.randint(3, size.shape["vocab_size"], (count,), generator=generator)
        return tuple(sampled.tolist())

    samples = []
    for number in range(size.rollouts // size.group_size):
        problem = Problem(f"q{number}", "", "")
        prompt, teacher_prompt = ids(size.prompt), ids(size.teacher_prompt)
        for sample in range(size.group_size):
            rollout = Rollout(
                problem=problem, sample=sample, prompt_ids=prompt, token_ids=ids(size.length),
                logps=(-10.0,) * size.length, text=str(sample), finished=True, policy_version=0,
            )  # fmt: skip
            verdict = Verdict(sample % 2 == 0, True, "x")
            critiqued = CritiquedRollout(rollout, verdict, None)
            samples.append(TrainingSample(critiqued, context="", teacher_prompt_ids=teacher_prompt))
    return samples
