"""Reads off a model what its recipe depends on: size, context, chat template, layers for adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from selfteach.config.model_defaults import is_lab_model
from selfteach.config.recipe import LoraConfig, ModelConfig
from selfteach.errors import EngineError
from selfteach.models.architectures import known_shapes
from selfteach.models.loading import context_length, load_tokenizer
from selfteach.models.model_path import resolve
from selfteach.models.model_size import cached_config


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Holds what is known of a model before its weights are loaded."""

    path: str
    """The model as a recipe names it."""
    gguf_file: str | None
    parameters: int | None
    """None for a model that is not on this machine and whose size no table has."""
    window: int | None
    """Longest sequence in tokens."""
    tokenizer: PreTrainedTokenizerBase | None
    """None if it is not on this machine and must not be fetched."""
    targets: tuple[str, ...]
    """Linear layers of the decoder's blocks, by name, for adapters."""
    thinks: bool
    """True if its chat template has a switch for thinking."""

    @property
    def is_lab(self) -> bool:
        """Return True for a model of the lab."""
        return is_lab_model(self.path)


def read_facts(path: str, *, offline: bool) -> ModelFacts:
    """Return the facts of a model; ``offline``: of what is on this machine, fetching nothing.

    Raises `EngineError` in one line if there is no such model.
    """
    path, gguf_file = _folder_and_file(path)
    config = ModelConfig(path=path, gguf_file=gguf_file)
    is_here = cached_config(config) is not None
    if offline and not is_here:
        if Path(resolve(path)).is_dir():
            raise EngineError(f"--model {path}: the folder has no config.json")
        shape = known_shapes().get(path)
        facts = (shape.parameters, shape.positions) if shape else (None, None)
        targets = LoraConfig().targets
        return ModelFacts(path, None, *facts, None, targets, "Qwen3" in path)
    tokenizer = load_tokenizer(config)
    if tokenizer.chat_template is None:
        raise EngineError(
            f"--model {path}: its tokenizer has no chat template: it is a base model; use the "
            "instruction-tuned one, or save the tokenizer with a template"
        )
    return _facts(config, tokenizer)


def _facts(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> ModelFacts:
    architecture = cached_config(config, fetch=True)
    if architecture is None:
        raise EngineError(f"--model {config.path}: it has no config.json that can be read")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    assert isinstance(model, nn.Module)
    template = str(tokenizer.get_chat_template())
    return ModelFacts(
        config.path,
        config.gguf_file,
        sum(parameter.numel() for parameter in model.parameters()),
        context_length(architecture),
        tokenizer,
        _linear_layers(model),
        "enable_thinking" in template,
    )


def _linear_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the linear layers of the blocks; the head is none of them."""
    names = dict[str, int]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and any(
            part.isdigit() for part in name.split(".")
        ):
            last = name.rpartition(".")[2]
            names[last] = names.get(last, 0) + 1
    return tuple(name for name in names if not name.isdigit())


def _folder_and_file(path: str) -> tuple[str, str | None]:
    """Return a model's folder or id, and its GGUF file: that named, or the folder's only one."""
    file = Path(path)
    if file.suffix == ".gguf" and file.is_file():
        return str(file.parent), file.name
    folder = Path(resolve(path, "--model"))
    if not folder.is_dir() or any(folder.glob("*.safetensors*")):
        return path, None
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if len(files) > 1:
        raise EngineError(
            f"--model {path}: it holds {len(files)} GGUF files: name one of them, like "
            f"{str(folder / files[0])!r}"
        )
    return path, files[0] if files else None
