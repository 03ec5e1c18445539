"""Weights on disk in the formats of vLLM and PEFT: a checkpoint or an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from selfteach.rollout.vllm.weight_sync import WeightFolder

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"


def test_an_adapter_has_peft_s_names_and_settings(tmp_path: Path) -> None:
    weight_folder = WeightFolder(tmp_path, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    folder = weight_folder.write([(A, torch.ones(4, 2))], "x-v0")
    assert weight_folder.holds_adapters and folder == weight_folder.path("x-v0")
    assert list(load_file(folder / "adapter_model.safetensors")) == [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    ]
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)


def test_only_the_newest_weights_stay(tmp_path: Path) -> None:
    weight_folder = WeightFolder(tmp_path, None)
    for version in range(3):
        weight_folder.write([("w", torch.full((2,), float(version)))], f"x-v{version}")
    (newest,) = tmp_path.iterdir()
    assert newest.name == "x-v2" and not weight_folder.holds_adapters
    assert load_file(newest / "model.safetensors")["w"].tolist() == [2.0, 2.0]
