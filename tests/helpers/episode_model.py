"""Saves a small random model of a family whose chat template knows tools; its turns end soon."""

from __future__ import annotations

from pathlib import Path

import torch
from model_families import with_tools
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM


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
