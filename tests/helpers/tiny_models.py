"""Saves tiny models with a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path

from model_families import byte_level
from transformers import LlamaConfig, LlamaForCausalLM


def save_model(folder: Path, *, chat_template: str | None = None, **settings: object) -> Path:
    """Save a tiny model with a tokenizer of 300 and more tokens."""
    tokenizer = byte_level(**({"chat_template": chat_template} if chat_template else {}))
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "initializer_range": 0.3,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**(sizes | settings))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
