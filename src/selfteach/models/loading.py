"""Models and tokenizers by name: Hugging Face ids, folders, installed packages, the lab's bases."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from selfteach.config.recipe import ModelConfig
from selfteach.errors import EngineError
from selfteach.models import matmul
from selfteach.prompts.renderer import Renderer

BASES = Path(__file__).parents[1] / "tasks" / "lab" / "bases"
"""The shipped base models, one folder per world, in Hugging Face format."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve(path: str) -> str:
    """A model's name in a recipe as something that transformers can load.

    ``lab:WORLD`` is a base model in this package, ``package:NAME`` the folder of an installed Python
    package (``package:NAME/sub/folder`` inside it); anything else is a folder or a hub id.
    Raises `EngineError` if there is no such base or package.
    """
    scheme, _, rest = path.partition(":")
    if scheme == "lab":
        folder = BASES / rest
        if not (folder / "config.json").exists():
            known = ", ".join(f"lab:{p.name}" for p in sorted(BASES.iterdir()) if p.is_dir())
            raise EngineError(f"model.path = {path!r}: no such base model; shipped: {known}")
        return str(folder)
    if scheme == "package":
        name, _, inside = rest.partition("/")
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise EngineError(
                f"model.path = {path!r}: the Python package {name!r} is not installed"
            )
        return str(Path(next(iter(spec.submodule_search_locations))) / inside)
    return path


def autocast_of(config: ModelConfig, device: str) -> torch.dtype | None:
    """What a model's products are computed in on a device (``cuda``, ``cpu``, or ``auto`` for the one
    that `choose_device` takes); None for the weights' own dtype."""
    if config.autocast == "auto":
        kind = choose_device(device).type if device == "auto" else torch.device(device).type
        return torch.bfloat16 if matmul.has_fast_bf16(kind) else None
    return DTYPES[config.autocast] if config.autocast else None


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises `EngineError` in one line if there is none."""
    path, trust = resolve(config.path), config.trust_remote_code
    try:
        if config.gguf_file:
            tokenizer = copy.deepcopy(_gguf_tokenizer(path, config.gguf_file, trust))
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except (OSError, ValueError, ImportError) as error:
        raise EngineError(_cannot_load("tokenizer", config, error)) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@functools.lru_cache(maxsize=2)
def _gguf_tokenizer(path: str, gguf_file: str, trust: bool) -> PreTrainedTokenizerBase:
    """Read once per process: it takes seconds, and a study's check builds every arm."""
    return AutoTokenizer.from_pretrained(path, gguf_file=gguf_file, trust_remote_code=trust)


def load_model(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The causal language model of a recipe, in evaluation mode on its device.

    Weights come from safetensors or GGUF files only. Raises `EngineError` in one line.
    """
    extra: dict[str, Any] = {"use_safetensors": True}
    if config.gguf_file:
        from transformers import GgufConfig  # only recent releases have it, only GGUF needs it

        extra = {"gguf_file": config.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    try:
        with _no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(
                resolve(config.path),
                dtype=DTYPES[config.weights_dtype],
                trust_remote_code=config.trust_remote_code,
                **extra,
            )
    except (OSError, ValueError, ImportError) as error:
        raise EngineError(_cannot_load("model", config, error)) from error
    assert isinstance(model, PreTrainedModel)
    if config.gguf_file:
        # The weights are plain tensors by now; the mark would forbid training and saving them.
        vars(model.config).pop("quantization_config", None)
        vars(model).update(hf_quantizer=None, is_quantized=False)
    torch.nn.Module.to(model, device)
    return model.eval()


def context_length(model: PreTrainedModel) -> int:
    """Longest sequence in tokens that a model was built for; 4,096 where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4096


def end_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, renderer: Renderer
) -> list[int]:
    """Token ids that end an answer: the tokenizer's, what the model's own settings add, and what its
    chat template writes behind an answer, lest a model whose settings forget it never stops."""
    own = getattr(model.generation_config, "eos_token_id", None)
    extra = own if isinstance(own, list) else [own]
    known = (tokenizer.eos_token_id, renderer.end_id, *extra)
    return sorted({i for i in known if isinstance(i, int)})


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up rows; `load_tokenizer` sees to it that there is one."""
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id


def choose_device(name: str) -> torch.device:
    """The device a recipe asks for; ``auto`` takes CUDA where there is one, else the CPU.

    Raises `EngineError` for a device that this machine lacks, and for Apple's MPS, whose float64
    gap breaks our sampling.
    """
    if name == "mps":
        raise EngineError(
            'model.device = "mps" is not supported (sampling needs float64): use "cpu"'
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineError('model.device = "cuda": torch sees no CUDA device here; use "cpu"')
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading takes a moment; its bars would stand between ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _cannot_load(what: str, config: ModelConfig, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason and not config.trust_remote_code:
        reason = "it brings code of its own, which runs only with model.trust_remote_code = true"
    if len(reason) > 200:
        reason = reason[:200] + "…"
    return f"model.path = {config.path!r}: cannot load the {what}: {reason}"
