"""Weights in 4 bits: what is refused, what is passed to transformers, how much memory they take."""

from __future__ import annotations

import dataclasses
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from selfteach.config.foreign_names import hint_for
from selfteach.config.recipe import ModelConfig, Recipe
from selfteach.config.schema import validate
from selfteach.errors import EngineError, RecipeError
from selfteach.models import loading, quantization
from selfteach.models.architectures import known_shapes
from selfteach.trainer.device_load import load_of, require_fits
from selfteach.trainer.device_memory import memory

LORA: dict[str, Any] = {"lora": {"rank": 4, "alpha": 8}}
SMALL = known_shapes()["Qwen/Qwen2.5-1.5B-Instruct"]


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ({}, {}, r"add \[model.lora\]"),
        ({**LORA, "gguf_file": "a.gguf"}, {}, "gguf_file exclude each other"),
        (LORA, {"distributed": {"shard": "full"}}, "are not sharded"),
    ],
)
def test_what_cannot_be_held_in_4_bits_is_refused(model: Any, more: Any, message: str) -> None:
    values = {"model": {"quantization": "nf4", **model}, "train": {"steps": 0}, **more}
    with pytest.raises(RecipeError, match=message) as error:
        validate(Recipe, values, where="recipe")
    assert "\n" not in str(error.value)


def test_false_removes_it_and_other_kinds_are_refused() -> None:
    assert ModelConfig.model_validate({"quantization": False}).quantization is None
    with pytest.raises(ValidationError, match="nf4"):
        ModelConfig.model_validate({"quantization": "int8", **LORA})
    assert "model.quantization" in (hint_for("load_in_4bit") or "")


def test_without_bitsandbytes_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(quantization, "version", missing)
    config = ModelConfig.model_validate({"quantization": "nf4", **LORA})
    with pytest.raises(EngineError, match=r"pip install \"selfteach\[4bit\]\"") as error:
        loading.load_model(config, torch.device("cpu"))
    assert "\n" not in str(error.value)
    quantization.require_library(ModelConfig())


def test_transformers_gets_what_qlora_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "version", lambda name: "1")
    config = ModelConfig.model_validate({"quantization": "nf4", **LORA})
    device = torch.device("cuda", 1)
    options = quantization.loading_options(config, device, torch.bfloat16)
    settings = options["quantization_config"]
    assert settings.load_in_4bit and settings.bnb_4bit_use_double_quant
    assert settings.bnb_4bit_quant_type == "nf4"
    assert settings.bnb_4bit_compute_dtype == torch.bfloat16
    assert options["device_map"] == {"": device}, "quantised on its device"
    assert quantization.loading_options(ModelConfig(), device, torch.bfloat16) == {}


def load(**model: Any) -> Any:
    recipe = validate(Recipe, {"model": {**LORA, **model}, "train": {"steps": 0}}, where="recipe")
    adapters = SMALL.adapters(4, recipe.model.lora.targets if recipe.model.lora else ())
    return load_of(recipe, SMALL, parameters=SMALL.parameters, trained=adapters, device="cpu")


def test_memory_counts_half_a_byte_and_the_scales() -> None:
    whole, quarter = (
        {item.name: item for items in (m.always, m.training) for item in items}
        for m in (memory(load()), memory(load(quantization="nf4")))
    )
    linear = SMALL.linear_weights
    rest = SMALL.parameters - linear
    assert whole["weights"].bytes == 4 * SMALL.parameters
    assert quarter["weights"].bytes == 4 * rest + quantization.quantized_bytes(linear)
    assert 0.515 < quantization.quantized_bytes(linear) / linear < 0.517
    assert quarter["a layer's weights, dequantised"].bytes == 4 * SMALL.hidden * SMALL.intermediate
    assert "4.13 bits" in quarter["weights"].arithmetic
    assert "a layer's weights, dequantised" not in whole


def test_a_device_that_is_too_small_is_pointed_to_4_bits() -> None:
    model = ModelConfig.model_validate(LORA)
    with pytest.raises(RecipeError, match=r'model\.quantization = "nf4"'):
        require_fits(load(), 2**30, model)
    quantized = load(quantization="nf4")
    with pytest.raises(RecipeError, match="a smaller model"):
        require_fits(quantized, 2**20, ModelConfig.model_validate({"quantization": "nf4", **LORA}))
    require_fits(dataclasses.replace(quantized, weight_bytes=2), 2 * 2**30, model)
