"""Trains a tiny model and exports it each way: all weights, merged adapters, adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from model_families import byte_level
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from selfteach.commands.export.export_run import ExportRequest, export_run
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.models.trainable_model import without_peft_warnings
from selfteach.trainer.loop import run_to_end

TURNS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""A chat template whose turns end in another token than the tokenizer's end of text."""


def write_base(folder: Path, *, width: int = 16) -> None:
    """Write a model with random weights and a chat template, two heads wide."""
    tokenizer = byte_level(chat_template=TURNS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.3, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export_each(base: Path, folder: Path) -> dict[str, Path]:
    """Return the folder of each export of a run of two steps: ``all``, ``merged``, ``adapter``."""
    for name, numbers in (("train", range(4)), ("validation", range(4, 6))):
        rows = [json.dumps({"question": f"{n} + {n}?", "answer": str(2 * n)}) for n in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    common: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {
            "type": "files", "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
        },
        "objective": {"type": "distillation"}, "context": {"type": "environment"},
        "sampling": {"max_tokens": 8}, "optimizer": {"lr": 1e-2},
        "train": {"steps": 2, "problems_per_step": 2, "group_size": 2, "threads": 1},
        "evaluation": {"every": 2, "validation_k": 1, "test": False},
    }  # fmt: skip
    for name, changes in {"all": {}, "lora": {"model": {"lora": {"rank": 4, "alpha": 8}}}}.items():
        run_to_end(validate(Recipe, merge(common, changes)), folder / name)
    return {
        "all": export_run(ExportRequest(folder / "all", folder / "x_all")),
        "merged": export_run(ExportRequest(folder / "lora", folder / "x_merged", merge=True)),
        "adapter": export_run(ExportRequest(folder / "lora", folder / "x_lora", base=str(base))),
    }


def token_logps(folder: Path, base: Path, ids: list[int]) -> list[float]:
    """Return the log-probability of each token after the first, computed here."""
    with torch.no_grad():
        logps = loaded(folder, base)(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logps[i - 1, ids[i]]) for i in range(1, len(ids))]


def loaded(folder: Path, base: Path) -> torch.nn.Module:
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    with without_peft_warnings():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def logp(folder: Path, base: Path, context: str, continuation: str) -> float:
    """Return the log-probability of a continuation, computed here."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before, whole = (tokenizer(t)["input_ids"] for t in (context, context + continuation))
    return sum(token_logps(folder, base, whole)[len(before) - 1 :])
