"""Exported models load in transformers and PEFT with the logits of the run, and their card is right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from selfteach.cli import app
from selfteach.commands.export import export_run as exporting
from selfteach.commands.export import model_card
from selfteach.commands.export.export_run import ExportRequest, export_run, hub_id_of
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CheckpointError, RecipeError
from selfteach.evaluation.evaluation_record import load_evaluation
from selfteach.models.model_path import resolve
from selfteach.models.trainable_model import without_peft_warnings
from selfteach.trainer.loop import run_to_end

TINY = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 8, "validation": 3, "test": 4},
    "sampling": {"max_tokens": 40},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "train": {"steps": 2, "problems_per_step": 2, "group_size": 4, "threads": 1},
    "evaluation": {"every": 2, "validation_k": 2, "test_k": 2},
    "optimizer": {"lr": 1e-2},
}
IDS = torch.arange(3, 15)[None]
BASE = resolve("lab:two_styles")


def trained(folder: Path, **changes: object) -> Path:
    run_to_end(validate(Recipe, merge(TINY, changes), where="test"), folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    return trained(folder, model={"lora": {"rank": 4, "alpha": 8}})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("whole"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def with_adapter(folder: Path) -> torch.Tensor:
    with without_peft_warnings():
        return logits(
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), str(folder))
        )


def of_run(run: Path) -> torch.Tensor:
    if (run / "model" / "adapter_config.json").exists():
        return with_adapter(run / "model")
    return logits(AutoModelForCausalLM.from_pretrained(run / "model"))


def test_an_adapter_names_a_base_that_others_have(adapters: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="which others do not have: name its hub id"):
        export_run(ExportRequest(adapters, tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    folder = export_run(ExportRequest(adapters, tmp_path / "a", base="lab/two-styles"))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "lab/two-styles"
    assert torch.equal(with_adapter(folder), of_run(adapters))
    assert not torch.equal(of_run(adapters), logits(AutoModelForCausalLM.from_pretrained(BASE)))


def test_merged_weights_have_the_logits_of_the_adapters(adapters: Path, tmp_path: Path) -> None:
    folder = export_run(ExportRequest(adapters, tmp_path / "merged", merge=True))
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(model), of_run(adapters), rtol=0, atol=1e-4)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr(), "tied"
    assert not list(folder.glob("adapter*"))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_full_model_keeps_its_logits(whole: Path, tmp_path: Path, dtype: str | None) -> None:
    folder = export_run(ExportRequest(whole, tmp_path / "model", dtype=dtype))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == (torch.bfloat16 if dtype else torch.float32)
    expected = of_run(whole)
    allowed = 0.05 * float(expected.abs().max()) if dtype else 0
    torch.testing.assert_close(logits(model.float()), expected, rtol=0, atol=allowed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template and tokenizer.eos_token
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())


def test_the_card_has_the_numbers_and_their_limits(whole: Path, tmp_path: Path) -> None:
    card = (export_run(ExportRequest(whole, tmp_path / "model")) / "README.md").read_text()
    test = load_evaluation(whole, "test", 2)
    row = re.search(r"\| test \(4 × 2\) \| 2 \| Avg@2 \| (\S+) \| \[(\S+), (\S+)\] \|", card)
    assert row is not None
    mean, low, high = map(float, row.groups())
    assert mean == pytest.approx(test.means()["avg"], abs=0.05) and low <= mean <= high
    assert "validation (3 × 2) | 0 |" in card and "one run with seed 0" in card
    assert "| training rollouts | 16 |" in card and str(tmp_path) not in card
    values = json.loads(card.split("```json\n")[1].split("```")[0])
    again = validate(Recipe, values, where="card")
    assert again.optimizer.lr == 1e-2 and again.context.type == "step_aligned"


def test_the_cards_recipe_is_the_runs_without_what_is_of_this_machine() -> None:
    judge = {
        "type": "judge", "base_url": "http://10.0.0.7/v1", "model": "m", "api_key_env": "MY_KEY",
        "reply_cache": "/home/me/r.sqlite",
    }  # fmt: skip
    made = validate(Recipe, {
        "model": {"path": "/home/me/base"},
        "objective": {"type": "grpo"}, "teacher": {"type": "ema"},
        "data": {"type": "files", "train": "/home/me/train.jsonl", "validation": ["../v.jsonl"]},
        "reward": {"functions": ["verifier", judge, "/home/me/r.py:f"], "success": 1.0},
    })  # fmt: skip
    portable = model_card._portable(made)
    for secret in ("/home", "..", "10.0.0.7", "MY_KEY", "sqlite"):
        assert secret not in json.dumps(portable)
    assert portable["model"]["path"] == "base" and portable["data"]["train"] == "train.jsonl"
    assert portable["objective"]["type"] == "grpo" and portable["teacher"]["type"] == "ema"
    kinds = [function["type"] for function in portable["reward"]["functions"]]
    assert kinds == ["verifier", "judge", "r.py:f"]
    assert "rewards `verifier`, `judge`, `f`" in model_card._method(made)


def test_wrong_input_is_one_line(whole: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(RecipeError, match="no adapter to merge"):
        export_run(ExportRequest(whole, tmp_path / "a", merge=True))
    with pytest.raises(RecipeError, match="--dtype 'int3'"):
        export_run(ExportRequest(whole, tmp_path / "a", dtype="int3"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(CheckpointError, match="is not empty"):
        export_run(ExportRequest(whole, tmp_path / "full"))
    with pytest.raises(CheckpointError, match="no complete run"):
        export_run(ExportRequest(tmp_path, tmp_path / "b"))

    class Refusing:
        def create_repo(self, *_: object, **__: object) -> None:
            raise OSError("401\nUnauthorized")

    monkeypatch.setattr("huggingface_hub.HfApi", Refusing)
    with pytest.raises(CheckpointError, match="401 Unauthorized; the model is in"):
        export_run(ExportRequest(whole, tmp_path / "c", push_to_hub="me/it"))
    assert (tmp_path / "c" / "README.md").exists()


def test_what_a_hub_id_is() -> None:
    assert hub_id_of("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    for path in ("lab:two_styles", "package:x", "./a/b", "/a", "gpt2", "src/selfteach"):
        assert hub_id_of(path) is None
    assert exporting.EXPORT_DTYPES["bfloat16"] == torch.bfloat16


def test_the_command(whole: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(whole), "--to", str(tmp_path / "m")])
    assert result.exit_code == 0 and "README.md" in result.output
