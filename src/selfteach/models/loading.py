"""Load models and tokenizers by name: hub ids, folders, installed packages, the lab's base models."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from selfteach.config.recipe import ModelConfig
from selfteach.errors import EngineError
from selfteach.models import matmul
from selfteach.models.model_path import may_be_hub_id, resolve
from selfteach.models.quantization import loading_options
from selfteach.models.weight_files import no_pickle, require_whole
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.prompts.thinking import Thinking
from selfteach.prompts.tool_calls import JSON_CALLS, Tool

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Holds a causal language model with its tokenizer, and what follows from both."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    device: torch.device
    """Where the model computes; a model that will be sharded is still on the CPU."""
    autocast: torch.dtype | None
    """dtype of matmuls; None for the dtype of the weights."""
    max_length: int
    """Longest sequence in tokens that the model supports."""
    end_ids: list[int]
    """Token ids that end a rollout."""
    pad_id: int


def load(
    config: ModelConfig,
    templates: Templates,
    *,
    device: torch.device,
    on_cpu: bool = False,
    all_weights_train: bool = False,
    tools: Sequence[Tool] = (),
) -> LoadedModel:
    """Load a model and its tokenizer; with ``on_cpu`` the weights stay in the host's memory.

    Prompts offer ``tools``.

    Bfloat16 weights that all train are kept in float32 and cast for every matmul: an update of a
    thousandth of a weight is lost in bfloat16, which has eight bits. Raises `EngineError` in one line.
    """
    tokenizer = load_tokenizer(config)
    renderer = build_renderer(config, tokenizer, templates, tools)
    dtypes = dtypes_of(config, device.type, all_weights_train=all_weights_train)
    model = load_model(
        config, torch.device("cpu") if on_cpu else device, dtypes.weights, compute=dtypes.compute
    )
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        renderer=renderer,
        device=device,
        autocast=dtypes.autocast,
        max_length=context_length(model.config),
        end_ids=end_ids(model, tokenizer, renderer),
        pad_id=pad_id(tokenizer, model),
    )


def build_renderer(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    templates: Templates,
    tools: Sequence[Tool] = (),
) -> Renderer:
    """Build the renderer of the policy's and the teacher's prompts, which offer ``tools``."""
    thinking = Thinking(**config.thinking.model_dump())
    return Renderer(
        tokenizer,
        templates,
        system=config.system,
        teacher_system=config.teacher_system,
        thinking=thinking,
        tools=tools,
        tool_calls=JSON_CALLS if config.tool_calls == "json" else None,
    )


def autocast_of(config: ModelConfig, device: str) -> torch.dtype | None:
    """Return the dtype of a model's matmuls on a device (``cuda``, ``cpu``, or ``auto`` for the one
    that `choose_device` returns); None for the dtype of the weights."""
    if config.autocast == "auto":
        kind = choose_device(device).type if device == "auto" else torch.device(device).type
        return torch.bfloat16 if matmul.has_fast_bf16(kind) else None
    return DTYPES[config.autocast] if config.autocast else None


class Dtypes(NamedTuple):
    """Holds the dtype of a model's weights and of its matmuls."""

    weights: torch.dtype
    autocast: torch.dtype | None
    """None for the dtype of the weights."""

    @property
    def compute(self) -> torch.dtype:
        """Return the dtype of matmuls."""
        return self.autocast or self.weights


def dtypes_of(config: ModelConfig, device: str, *, all_weights_train: bool) -> Dtypes:
    """Return a model's dtypes on a device, which is named as in `autocast_of`.

    Weights that all train are float32 even where the recipe says bfloat16: matmuls then cast them.
    """
    weights, autocast = DTYPES[weights_dtype_of(config, device)], autocast_of(config, device)
    if all_weights_train and weights == torch.bfloat16:
        return Dtypes(torch.float32, autocast or torch.bfloat16)
    return Dtypes(weights, autocast)


def weights_dtype_of(config: ModelConfig, device: str) -> Literal["float32", "bfloat16"]:
    """Return the dtype that the recipe gives the weights on a device, named as in `autocast_of`."""
    if config.weights_dtype != "auto":
        return config.weights_dtype
    kind = choose_device(device).type if device == "auto" else torch.device(device).type
    return "bfloat16" if matmul.has_fast_bf16(kind) else "float32"


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer. Raises `EngineError` in one line if there is none."""
    path, trust = resolve(config.path), config.trust_remote_code
    try:
        if config.gguf_file:
            tokenizer = copy.deepcopy(_gguf_tokenizer(path, config.gguf_file, trust))
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except Exception as error:  # damaged files raise anything
        raise EngineError(_cannot_load("tokenizer", config, error)) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@functools.lru_cache(maxsize=2)
def _gguf_tokenizer(path: str, gguf_file: str, trust: bool) -> PreTrainedTokenizerBase:
    """Load once per process: it takes seconds, and a study's check builds every arm."""
    return AutoTokenizer.from_pretrained(path, gguf_file=gguf_file, trust_remote_code=trust)


def load_model(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    compute: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load the causal language model of a recipe, in evaluation mode on its device.

    ``dtype`` of the weights; None: the recipe's. ``compute`` is the dtype of matmuls with weights of
    4 bits; None: that of the others.

    Weights come from safetensors or GGUF files only, all of the model's are there, and all are finite.
    Raises `EngineError` in one line.
    """
    dtype = dtype or DTYPES[weights_dtype_of(config, device.type)]
    extra = {"use_safetensors": True, **loading_options(config, device, compute or dtype)}
    if config.gguf_file:
        from transformers import GgufConfig  # only recent releases have it, only GGUF needs it

        extra = {"gguf_file": config.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    try:
        with _no_progress_bars(), no_pickle(config, resolve(config.path)):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                resolve(config.path),
                dtype=dtype,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                **extra,
            )
            model, info = loaded
    except EngineError:
        raise
    except Exception as error:  # damaged files raise anything
        raise EngineError(_cannot_load("model", config, error)) from error
    assert isinstance(model, PreTrainedModel)
    require_whole(model, info, config)
    if config.gguf_file:
        # The weights are plain tensors by now; the flag would forbid training and saving them.
        vars(model.config).pop("quantization_config", None)
        vars(model).update(hf_quantizer=None, is_quantized=False)
    torch.nn.Module.to(model, device)
    return model.eval()


def context_length(config: PreTrainedConfig) -> int:
    """Return the longest sequence in tokens of a model; 4,096 where its config has none.

    Rotary embeddings of type ``dynamic`` and ``longrope`` change with a sequence's length beyond the
    original one: a token's probability would depend on tokens after it. So that is their limit.
    """
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or {}
    settings = [rotary, *(value for value in rotary.values() if isinstance(value, dict))]
    fixed = [
        setting.get("original_max_position_embeddings")
        for setting in settings
        if setting.get("rope_type") in ("dynamic", "longrope")
    ]
    if fixed:
        fixed.append(getattr(text, "original_max_position_embeddings", None))
    lengths = [*fixed, getattr(text, "max_position_embeddings", None)]
    return min([length for length in lengths if length], default=4096)


def end_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, renderer: Renderer
) -> list[int]:
    """Return the token ids that end a rollout: those of tokenizer and generation config, and what the
    chat template writes after an assistant turn (some generation configs lack it)."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    extra = configured if isinstance(configured, list) else [configured]
    candidates = (tokenizer.eos_token_id, renderer.end_id, *extra)
    return sorted({i for i in candidates if isinstance(i, int)})


def pad_id(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Return the id that fills up rows: the padding token's, or 0 where the model cannot embed that.

    No state that is read depends on it; `load_tokenizer` ensures that there is a padding token.
    """
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id if tokenizer.pad_token_id < embedded_tokens(model) else 0


def embedded_tokens(model: PreTrainedModel) -> int:
    """Return the number of token ids that a model embeds."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return len(weight)


def choose_device(name: str) -> torch.device:
    """Return the device a recipe names; ``auto`` is CUDA where there is one, else the CPU.

    Raises `EngineError` for a device that this machine lacks, and for Apple's MPS, which has no
    float64, which sampling needs.
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
    """Hide transformers' progress bars, which would interrupt ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _cannot_load(what: str, config: ModelConfig, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    missing = ""
    if may_be_hub_id(config.path) and resolve(config.path) == config.path:
        missing = "no such folder here, and it was not loaded from the hub: "
    if "trust_remote_code" in reason and not config.trust_remote_code:
        reason = "the model has custom code, which runs only with model.trust_remote_code = true"
    if len(reason) > 200:
        reason = reason[:200] + "…"
    return f"model.path = {config.path!r}: {missing}cannot load the {what}: {reason}"
