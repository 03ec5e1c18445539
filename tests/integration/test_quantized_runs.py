"""Runs with 4-bit base weights, with bitsandbytes on the CPU: they train, resume and are exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selfteach.commands.check.sizes import measure, measure_offline
from selfteach.commands.export.export_run import ExportRequest, export_run
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.models.sequences import sequences
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.build import build
from selfteach.trainer.loop import run_to_end, train

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow

RUN: dict[str, Any] = {
    "model": {
        "path": "lab:two_styles", "quantization": "nf4", "device": "cpu",
        "lora": {"rank": 4, "alpha": 8},
    },
    "data": {"type": "lab", "train": 8, "validation": 2, "test": 2},
    "sampling": {"max_tokens": 40},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "train": {
        "steps": 3, "problems_per_step": 2, "group_size": 4, "threads": 1, "checkpoint_every": 1,
    },
    "evaluation": {"every": 3, "validation_k": 1, "test_k": 1},
    "optimizer": {"lr": 1e-2},
}  # fmt: skip


def recipe(**changes: Any) -> Recipe:
    return validate(Recipe, merge(RUN, changes), where="test")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    run_to_end(recipe(), folder)
    return folder


def test_the_base_is_in_4_bits_and_the_teacher_is_the_base_without_adapters() -> None:
    built = build(recipe())
    policy: Any = built.components.policy
    layer = policy.model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.base_layer.weight.dtype == torch.uint8
    assert {w.dtype for w in policy.trainable.values()} == {torch.float32}
    side = sequences([[1, 4, 5], [1, 6]], [[7, 8, 2], [9, 2]], 0)
    before = built.components.teacher.score(side).logits(slice(None))
    for name, weight in policy.trainable.items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    after = built.components.teacher.score(side).logits(slice(None))
    assert torch.equal(before, after)
    with torch.no_grad():
        assert not torch.allclose(policy.score(side).logits(slice(None)), before)


def test_check_counts_weights_not_bytes() -> None:
    whole = recipe(model={"quantization": False})
    sizes = [measure_offline(whole), measure(recipe(), build(recipe()))]
    assert sizes[0].parameters == sizes[1].parameters


def test_it_trains_and_engine_and_trainer_agree(run: Path) -> None:
    rows = [row for row in RunFolder(run).metrics() if row["kind"] == "step"]
    assert len(rows) == 3
    assert all(row["grad_norm"] > 0 and row["mismatch_max"] < 1e-3 for row in rows)


def test_a_stopped_run_ends_in_the_same_weights(run: Path, tmp_path: Path) -> None:
    stopping = train(recipe(), tmp_path)
    for _ in range(2):
        next(stopping)
    stopping.close()
    run_to_end(recipe(), tmp_path)
    ours, theirs = (
        load_file(folder / "model" / "adapter_model.safetensors") for folder in (run, tmp_path)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_is_exported_with_how_its_base_was_held(run: Path, tmp_path: Path) -> None:
    export_run(ExportRequest(run, tmp_path / "adapter", base="organisation/base"))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert 'bnb_4bit_quant_type="nf4"' in card
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "organisation/base"


def test_a_merge_adds_to_whole_weights_and_the_card_says_so(run: Path, tmp_path: Path) -> None:
    export_run(ExportRequest(run, tmp_path / "merged", merge=True))
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert "quantization_config" not in json.loads(
        (tmp_path / "merged" / "config.json").read_text()
    )
    adapter = load_file(run / "model" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    low, high = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    base = build(recipe(model={"quantization": False})).components.policy.model.get_base_model()
    whole = base.get_parameter(f"{name}.base_layer.weight").detach()
    torch.testing.assert_close(weights[f"{name}.weight"], whole + 2.0 * high @ low)
    assert "this model was not measured" in (tmp_path / "merged" / "README.md").read_text()
