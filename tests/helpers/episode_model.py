"""Saves a small random model of a family whose chat template knows tools; its turns end soon."""

from __future__ import annotations

from pathlib import Path

import torch
from model_families import with_tools
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate


def save_model(folder: Path, *, ends: int = 60, family: str = "qwen3") -> Path:
    """Write a model of 30 k parameters to a folder; the first ``ends`` ids all end a turn."""
    tokenizer = with_tools(family)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2000,
        initializer_range=0.3, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=list(range(1, ends)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def calculator_recipe(model: Path, **changes: object) -> Recipe:
    """Return a recipe of step-aligned critiques of episodes with a calculator."""
    values = {
        "environment": {"type": "calculator", "max_turns": 3},
        "model": {"path": str(model), "thinking": {"student": False, "teacher": False}},
        "data": {"type": "chain_sums", "train": 8, "validation": 2, "test": 2},
        "sampling": {"max_tokens": 12, "batch_size": 8},
        "critic": {"type": "oracle"}, "context": {"type": "step_aligned"},
        "objective": {"type": "distillation", "from_first_error": True},
        "train": {
            "steps": 2, "problems_per_step": 2, "group_size": 4, "checkpoint_every": 1, "threads": 1,
        },
        "evaluation": {"every": 2, "validation_k": 1, "test_k": 1},
    }  # fmt: skip
    return validate(Recipe, merge(values, changes), where="test")
