"""What a budget needs to know of a run: the model's size, problems, lengths; built or looked up.

A run that can be built is measured. Offline, what cannot be had here is named and left out: models of
a hub that are in no cache (their size is then that of their known shape), problem sets that are not
made yet, servers. What is named wrongly stays an error: a model's folder that is not there, a problem
set that is missing from a folder that is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from selfteach.commands.check.memory import Load, Vllm
from selfteach.commands.check.tokens import Lengths
from selfteach.config.critic_section import (
    EndpointConfig,
    LlmCriticConfig,
    LocalCriticConfig,
    PolicyCriticConfig,
)
from selfteach.config.data_section import AnswerReading, FilesData, HubData
from selfteach.config.engine_section import VllmProcessConfig, VllmServerConfig
from selfteach.config.recipe import ModelConfig, Recipe
from selfteach.errors import DataError, EngineError, RecipeError
from selfteach.models.architectures import Shape, known_shapes
from selfteach.models.loading import autocast_of, load_tokenizer, resolve
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.tasks.task import Task, load_task
from selfteach.trainer.build import (
    Built,
    build_objective,
    build_renderer,
    check_lengths,
    chunk_tokens,
    longest,
)
from selfteach.trainer.build_critic import build_critic

HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
"""What may be a model of a hub; anything else (``./x``, ``~/x``, ``a/b/c``) is a folder."""
SIZES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number."""
LETTERS = 4
"""Characters of English in a token, where no tokenizer is here to count."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of a run before it begins."""

    device: str
    shape: Shape | None
    """None for a model of which nothing is known here."""
    parameters: int
    trained: int
    lengths: Lengths
    problems: dict[str, int]
    """How many, by split; empty if they could not be read."""
    unchecked: tuple[str, ...] = ()
    """What was not loaded, and why; a line each."""
    task: Task | None = None
    """The problems, where they are here."""


def survey(recipe: Recipe, built: Built) -> Survey:
    """Of a run that could be built."""
    policy = built.components.policy
    shape = shape_of(policy.model.config)
    adapters = sum(p.numel() for p in policy.trainable.values()) if policy.has_adapters else 0
    parameters = sum(p.numel() for p in policy.model.parameters()) - adapters
    trained = sum(p.numel() for p in policy.trainable.values())
    problems = {s: len(getattr(built.task, s)) for s in ("train", "validation", "test")}
    templates = Templates(recipe.model.templates or built.task.templates)
    lengths = measure(
        built.components.max_length, built.components.renderer, templates, built.task, recipe
    )
    return Survey(
        str(policy.device), shape, parameters, trained, lengths, problems, task=built.task
    )


def look(recipe: Recipe) -> Survey:
    """Of a run of which parts are missing here. Loads no weights and asks no server.

    Raises what building it would raise of the parts that are here.
    """
    unchecked: list[str] = []
    build_objective(recipe)
    model, lora = recipe.model, recipe.model.lora
    shape, parameters = _size(model, unchecked)
    task = _task(recipe, unchecked)
    renderer = None
    templates = Templates(model.templates or _template_set(recipe))
    if shape is not None and _cached(model) is not None:
        renderer = build_renderer(model, load_tokenizer(model), templates)
    window = longest(recipe, shape.positions) if shape else recipe.train.max_length or 4096
    if renderer is not None and task is not None:
        check_lengths(renderer, task, window, recipe)
    _critic(recipe, task, templates, unchecked)
    problems = {s: len(getattr(task, s)) for s in ("train", "validation", "test")} if task else {}
    trained = shape.adapters(lora.rank, lora.targets) if lora and shape else parameters
    lengths = measure(window, renderer, templates, task, recipe)
    return Survey(
        model.device, shape, parameters, trained, lengths, problems, tuple(unchecked), task
    )


def load_of(recipe: Recipe, known: Survey) -> Load | None:
    """What a device would have to hold; None for a model of which nothing is known here."""
    shape, model, train = known.shape, recipe.model, recipe.train
    if shape is None:
        return None
    weights = SIZES[model.weights_dtype]
    answer, lengths = recipe.sampling.max_tokens, known.lengths
    prompt = lengths.longest_prompt
    copies = int(
        recipe.teacher.type != "live" and (recipe.teacher.type == "ema" or model.lora is None)
    )
    copies += int(isinstance(recipe.critic, PolicyCriticConfig) and model.lora is None)
    rows = min(recipe.sampling.batch_size, train.problems_per_step * train.group_size)
    return Load(
        shape=shape,
        parameters=known.parameters,
        trained=known.trained,
        adapters=(model.lora.rank, len(model.lora.targets)) if model.lora else None,
        weight_bytes=weights,
        compute_bytes=2 if autocast_of(model, known.device) else weights,
        recompute=model.gradient_checkpointing,
        copies=copies,
        # A sample longer than a micro-batch stands alone; the teacher's side keeps no activations.
        learn_tokens=max(train.micro_batch_tokens, prompt + answer),
        chunk_entries=chunk_tokens(shape.vocabulary, known.device) * shape.vocabulary,
        sample_rows=rows,
        sample_length=min(lengths.window, prompt + answer),
        sampler=_sampler(recipe, rows, known.device),
    )


def _sampler(recipe: Recipe, rows: int, device: str) -> Literal["trainer", "elsewhere"] | Vllm:
    match recipe.engine:
        case VllmServerConfig():
            return "elsewhere"
        case VllmProcessConfig() as own:
            dtype = recipe.model.weights_dtype if own.dtype == "auto" else own.dtype
            sleeps = own.sleep and not device.startswith("cpu")
            rows = min(rows, own.max_num_seqs)
            return Vllm(SIZES[dtype], rows, own.gpu_memory_utilization, sleeps)
        case _:
            return "trainer"


def shape_of(config: PreTrainedConfig) -> Shape:
    """A loaded configuration as a `Shape`; what it does not say is as with Llama."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return Shape(
        family=text.model_type,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None) or 4096,
        tied=bool(config.tie_word_embeddings),
    )


def measure(
    window: int,
    renderer: Renderer | None,
    templates: Templates,
    task: Task | None,
    recipe: Recipe,
) -> Lengths:
    """Lengths in tokens, as far as tokenizer and problems are here."""
    template = _critic_words(templates, recipe)
    if renderer is None:
        return Lengths(window, critic_template=len(template) // LETTERS)
    counted = len(renderer.encode_answer(template)) - 1 if template else 0
    if task is None or not task.train:
        return Lengths(window, critic_template=counted)
    everything = (*task.train, *task.validation, *task.test)
    prompts = [len(renderer.solver_prompt(problem)) for problem in everything]
    references = [
        len(renderer.encode_answer(problem.references["reference"]))
        for problem in task.train
        if "reference" in problem.references
    ]
    return Lengths(
        window=window,
        longest_prompt=max(prompts),
        mean_prompt=fmean(prompts[: len(task.train)]),
        mean_reference=fmean(references) if references else None,
        critic_template=counted,
    )


def _critic_words(templates: Templates, recipe: Recipe) -> str:
    if not isinstance(recipe.critic, LlmCriticConfig) or not templates.has("critic"):
        return ""
    messages = templates.critic("", "", steps=(), finished=True)
    return "\n".join(message["content"] for message in messages)


def _cached(model: ModelConfig) -> PreTrainedConfig | None:
    """A model's configuration, from its folder or the cache."""
    try:
        if model.gguf_file:
            return _gguf_config(resolve(model.path), model.gguf_file)
        return AutoConfig.from_pretrained(
            resolve(model.path), local_files_only=True, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError):
        return None


@functools.lru_cache(maxsize=2)
def _gguf_config(path: str, gguf_file: str) -> PreTrainedConfig:
    """Read once per process: it takes seconds."""
    return AutoConfig.from_pretrained(path, gguf_file=gguf_file, local_files_only=True)


def _size(model: ModelConfig, unchecked: list[str]) -> tuple[Shape | None, int]:
    """A model's shape and parameters, from its folder, the cache, or what is known of it."""
    if not _installed(model.path):
        unchecked.append(f"model {model.path}: the package is not installed; its size is unknown")
        return None, 0
    config = _cached(model)
    if config is not None:
        unchecked.append(f"model {model.path}: its weights were not loaded; sizes from its config")
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(config)
        assert isinstance(bare, PreTrainedModel)
        return shape_of(config), sum(p.numel() for p in bare.parameters())
    path = resolve(model.path)
    if Path(path).is_dir():
        raise EngineError(f"model.path = {model.path!r}: the folder has no config.json")
    if not HUB_ID.fullmatch(path):
        raise EngineError(f"model.path = {model.path!r}: no such folder")
    known = known_shapes().get(path)
    sizes = "sizes from its known shape" if known else "its size is unknown"
    unchecked.append(f"model {model.path}: not in the local cache; {sizes}")
    return known, known.parameters if known else 0


def _installed(path: str) -> bool:
    """False for a model in a Python package that is not installed here."""
    try:
        return bool(resolve(path))
    except EngineError:
        if path.startswith("package:"):
            return False
        raise


def _task(recipe: Recipe, unchecked: list[str]) -> Task | None:
    """The problems; None if they are not made yet."""
    data, path = recipe.data, recipe.model.path
    folder = resolve(path) if _installed(path) else path
    if isinstance(data, FilesData):
        absent = [p for p in _paths(data) if not p.exists() and not p.parent.is_dir()]
        if absent:
            unchecked.append(f"problems {absent[0]}: {absent[0].parent} is not there yet")
            return None
    if isinstance(data, HubData) and not Path(data.path or "").is_dir():
        try:
            return load_task(data, folder)
        except DataError as error:
            unchecked.append(f"problems: {error}")
            return None
    return load_task(data, folder)


def _paths(data: FilesData) -> Iterator[Path]:
    for paths in (data.train, data.validation, data.test, data.pool):
        for path in (paths,) if isinstance(paths, str) else paths or ():
            yield Path(path)


def _template_set(recipe: Recipe) -> str:
    data = recipe.data
    if isinstance(data, AnswerReading):
        return "steps" if data.steps == "tags" else "free"
    return data.type  # the lab's and chain sums' sets are named like them


def _critic(recipe: Recipe, task: Task | None, templates: Templates, unchecked: list[str]) -> None:
    critic = recipe.critic
    if critic is None:
        return
    if isinstance(critic, LlmCriticConfig):
        if not templates.has("critic"):
            raise RecipeError(
                f'critic.type = "{critic.type}": the template set has no critic.jinja'
            )
        match critic:
            case EndpointConfig():
                unchecked.append(f"critic {critic.model} at {critic.base_url}: not asked")
            case LocalCriticConfig():
                _size(ModelConfig(path=critic.path), unchecked)
            case _:
                pass
    elif task is not None:
        build_critic(critic, task, templates, None, seed=recipe.seed)
