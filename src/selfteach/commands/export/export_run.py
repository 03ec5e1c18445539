"""Write a run's model to a folder that others can load, with its card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from selfteach.commands.export.model_card import model_card
from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.errors import CheckpointError, RecipeError
from selfteach.models.loading import build_renderer, end_ids, load_model, load_tokenizer
from selfteach.models.model_path import HUB_ID
from selfteach.models.trainable_model import without_peft_warnings
from selfteach.prompts.template_set import Templates
from selfteach.runtime.atomic_files import report_full_disk
from selfteach.runtime.run_folder import RunFolder

EXPORT_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip

OF_THIS_MACHINE = ("is_local", "local_files_only", "name_or_path", "cache_dir", "gguf_file")
"""What transformers writes into a tokenizer's configuration about how it was loaded."""


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """Says which run to export, where to, and in which form."""

    run: Path
    to: Path
    merge: bool = False
    dtype: str | None = None
    """A key of `EXPORT_DTYPES`; None: as the run has saved them."""
    base: str | None = None
    """Hub id of the base model; None: the recipe's ``model.path``, if that is one."""
    push_to_hub: str | None = None


def export_run(request: ExportRequest) -> Path:
    """Write weights, tokenizer and card to ``request.to``, and upload them if asked; return the folder.

    An adapter names its base by hub id, never by a path of this machine. Raises `CheckpointError` for a
    run that is not complete or a folder that is not empty, and `RecipeError` for an adapter whose
    base has no hub id, before anything is loaded.
    """
    run = RunFolder(request.run)
    if not run.is_complete or not (request.run / "model").is_dir():
        raise CheckpointError(f"{request.run} is no complete run with a model: finish it first")
    if request.to.exists() and (not request.to.is_dir() or any(request.to.iterdir())):
        raise CheckpointError(f"--to {request.to} is not empty; name a new or an empty folder")
    if request.dtype is not None and request.dtype not in EXPORT_DTYPES:
        raise RecipeError(f"--dtype {request.dtype!r}: one of {', '.join(EXPORT_DTYPES)}")
    recipe = validate(Recipe, run.config(), where=str(request.run))
    is_adapter = (request.run / "model" / "adapter_config.json").exists()
    base = request.base or hub_id_of(recipe.model.path)
    if is_adapter and not request.merge and base is None:
        raise RecipeError(
            f"the adapter's base is {recipe.model.path!r}, which others do not have: name its hub id "
            "(--base ORGANISATION/NAME), or export merged weights (--merge)"
        )
    if request.merge and not is_adapter:
        raise RecipeError("--merge: this run trained all weights; there is no adapter to merge")
    request.to.mkdir(parents=True, exist_ok=True)
    with report_full_disk():
        _write_weights(request, recipe, base)
        _write_tokenizer(recipe, request.to)
        card = model_card(run, recipe, base, is_adapter=is_adapter and not request.merge)
        (request.to / "README.md").write_text(card, encoding="utf-8")
        for path in request.to.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes for its owner alone
    if request.push_to_hub:
        _upload(request.to, request.push_to_hub)
    return request.to


def hub_id_of(path: str) -> str | None:
    """Return a model's hub id; None for a folder, a package or a model of the lab."""
    is_id = HUB_ID.fullmatch(path) is not None and "/" in path
    return path if is_id and not Path(path).exists() else None


def _write_weights(request: ExportRequest, recipe: Recipe, base: str | None) -> None:
    saved = request.run / "model"
    if not (saved / "adapter_config.json").exists():
        _save(AutoModelForCausalLM.from_pretrained(saved), request, recipe)
        return
    # Adapters are added to the whole weights, also where they were trained on 4-bit ones.
    whole = recipe.model.model_copy(update={"quantization": None})
    model = load_model(whole, torch.device("cpu"))
    with without_peft_warnings():
        adapted = PeftModel.from_pretrained(model, str(saved))
    if request.merge:
        merged: Any = adapted.merge_and_unload()  # pyright: ignore[reportCallIssue]
        _save(merged, request, recipe)
        return
    if request.dtype is not None:
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.to(EXPORT_DTYPES[request.dtype])
    adapted.save_pretrained(str(request.to), save_embedding_layers=False)
    path = request.to / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Write the tokenizer, without how it was loaded here."""
    load_tokenizer(recipe.model).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    portable = {name: value for name, value in config.items() if name not in OF_THIS_MACHINE}
    path.write_text(json.dumps(portable, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save(model: PreTrainedModel, request: ExportRequest, recipe: Recipe) -> None:
    """Write the weights; generation ends where rollouts did, at the end of a turn too."""
    tokenizer = load_tokenizer(recipe.model)
    renderer = build_renderer(recipe.model, tokenizer, Templates())
    if model.generation_config is not None:
        model.generation_config.eos_token_id = end_ids(model, tokenizer, renderer)
    if request.dtype is not None:
        torch.nn.Module.to(model, EXPORT_DTYPES[request.dtype])
        model.config.dtype = EXPORT_DTYPES[request.dtype]
    model.save_pretrained(str(request.to))


def _upload(folder: Path, hub_id: str) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(hub_id, exist_ok=True)
        HfApi().upload_folder(folder_path=str(folder), repo_id=hub_id)
    except Exception as error:  # the client raises anything from its HTTP library
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"--push-to-hub {hub_id}: {reason}; the model is in {folder}, and huggingface-cli upload "
            "sends it later"
        ) from error
