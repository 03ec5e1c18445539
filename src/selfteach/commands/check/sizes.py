"""Measure a run before it starts: model size, number of problems, lengths in tokens.

`measure` reads the sizes off a run that was built. `measure_offline` loads no weights and asks no
server: it lists what is not available on this machine (hub models in no cache, whose size then comes
from a table of known shapes; problem sets that do not exist yet; servers) instead of failing. A wrong
name stays an error: a model folder that does not exist, a file missing from a folder that does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from selfteach.commands.check.memory import DeviceLoad, VllmMemory
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
from selfteach.models.loading import (
    build_renderer,
    context_length,
    dtypes_of,
    load_tokenizer,
    weights_dtype_of,
)
from selfteach.models.model_path import resolve
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.tasks.task import Task, load_task
from selfteach.trainer.build import (
    Built,
    chunk_tokens,
    max_sequence_length,
)
from selfteach.trainer.build_critic import build_critic
from selfteach.trainer.build_objective import build_objective
from selfteach.trainer.fit_checks import (
    require_fitting_templates,
    require_references,
    require_splits,
    within_context,
)

SIZES = {"float32": 4, "bfloat16": 2}
"""Bytes per element, by dtype."""
CHARACTERS_PER_TOKEN = 4
"""For English text, where no tokenizer is available to count."""


@dataclass(frozen=True, slots=True)
class RunSizes:
    """Holds the sizes of one run: its model, its problems, and their lengths in tokens."""

    device: str
    shape: Shape | None
    """None for a model whose architecture is unknown."""
    parameters: int
    """Of the model, adapters excluded."""
    trained: int
    """Trainable parameters."""
    lengths: Lengths
    problems: dict[str, int]
    """Number of problems by split; empty if they could not be read."""
    unchecked: tuple[str, ...] = ()
    """What was not loaded and why, one line each."""
    task: Task | None = None
    """The problems; None if they could not be read."""


def measure(recipe: Recipe, built: Built) -> RunSizes:
    """Return the sizes of a run that was built. Raises `DataError` if a split that it uses is empty."""
    require_splits(recipe, built.task)
    require_references(recipe, built.task)
    policy = built.components.policy
    shape = shape_of(policy.model.config)
    adapters = sum(p.numel() for p in policy.trainable.values()) if policy.has_adapters else 0
    parameters = sum(p.numel() for p in policy.model.parameters()) - adapters
    trained = sum(p.numel() for p in policy.trainable.values())
    problems = {s: len(getattr(built.task, s)) for s in ("train", "validation", "test")}
    templates = Templates(recipe.model.templates or built.task.templates)
    lengths = count_lengths(
        built.components.max_length, built.components.renderer, templates, built.task, recipe
    )
    return RunSizes(
        str(policy.device), shape, parameters, trained, lengths, problems, task=built.task
    )


def measure_offline(recipe: Recipe) -> RunSizes:
    """Return the sizes of a run from what is on this machine; loads no weights, asks no server.

    Raises what `build` would raise about the components that are available.
    """
    unchecked: list[str] = []
    build_objective(recipe)
    model, lora = recipe.model, recipe.model.lora
    shape, parameters = _size(model, unchecked)
    task = _task(recipe, unchecked)
    renderer = None
    templates = Templates(model.templates or _template_set(recipe))
    if shape is not None and cached_config(model) is not None:
        renderer = build_renderer(model, load_tokenizer(model), templates)
    window = (
        max_sequence_length(recipe, shape.positions) if shape else recipe.train.max_length or 4096
    )
    if task is not None or isinstance(recipe.data, AnswerReading):
        require_fitting_templates(recipe, templates)
    if task is not None:
        require_splits(recipe, task)
        require_references(recipe, task)
    if renderer is not None and task is not None:
        task = within_context(renderer, task, window, recipe)
    _critic(recipe, task, templates, unchecked)
    problems = {s: len(getattr(task, s)) for s in ("train", "validation", "test")} if task else {}
    trained = shape.adapters(lora.rank, lora.targets) if lora and shape else parameters
    lengths = count_lengths(window, renderer, templates, task, recipe)
    return RunSizes(
        model.device, shape, parameters, trained, lengths, problems, tuple(unchecked), task
    )


def device_load(recipe: Recipe, sizes: RunSizes) -> DeviceLoad | None:
    """Return what one device has to hold; None for a model whose architecture is unknown."""
    shape, model, train = sizes.shape, recipe.model, recipe.train
    if shape is None:
        return None
    dtypes = dtypes_of(model, sizes.device, all_weights_train=recipe.all_weights_train)
    completion, lengths = recipe.sampling.max_tokens, sizes.lengths
    prompt = lengths.longest_prompt
    teacher = recipe.scoring_teacher.type
    copies = int(teacher != "live" and (teacher == "ema" or model.lora is None))
    copies += int(isinstance(recipe.critic, PolicyCriticConfig) and model.lora is None)
    rows = min(recipe.sampling.batch_size, train.problems_per_step * train.group_size)
    return DeviceLoad(
        shape=shape,
        parameters=sizes.parameters,
        trained=sizes.trained,
        adapters=(model.lora.rank, len(model.lora.targets)) if model.lora else None,
        weight_bytes=dtypes.weights.itemsize,
        compute_bytes=dtypes.compute.itemsize,
        recompute=model.gradient_checkpointing,
        copies=copies,
        # A sample longer than a micro-batch is a micro-batch of its own; the teacher's forward pass
        # stores no activations.
        micro_batch_tokens=max(train.micro_batch_tokens, prompt + completion),
        chunk_entries=chunk_tokens(shape.vocabulary, sizes.device) * shape.vocabulary,
        sample_rows=rows,
        sample_length=min(lengths.window, prompt + completion),
        sampler=_sampler(recipe, rows, sizes.device),
    )


def _sampler(
    recipe: Recipe, rows: int, device: str
) -> Literal["trainer", "elsewhere"] | VllmMemory:
    match recipe.engine:
        case VllmServerConfig():
            return "elsewhere"
        case VllmProcessConfig() as engine:
            weights = weights_dtype_of(recipe.model, device)
            dtype = weights if engine.dtype == "auto" else engine.dtype
            sleeps = engine.sleep and not device.startswith("cpu")
            rows = min(rows, engine.max_num_seqs)
            return VllmMemory(SIZES[dtype], rows, engine.gpu_memory_utilization, sleeps)
        case _:
            return "trainer"


def shape_of(config: PreTrainedConfig) -> Shape:
    """Convert a transformers configuration to a `Shape`; missing fields take Llama's defaults."""
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
        positions=context_length(config),
        tied=bool(config.tie_word_embeddings),
    )


def count_lengths(
    window: int,
    renderer: Renderer | None,
    templates: Templates,
    task: Task | None,
    recipe: Recipe,
) -> Lengths:
    """Count lengths in tokens, as far as tokenizer and problems are available."""
    template = _critic_prompt(templates, recipe)
    if renderer is None:
        return Lengths(window, critic_template=len(template) // CHARACTERS_PER_TOKEN)
    template_tokens = len(renderer.encode_answer(template)) - 1 if template else 0
    if task is None or not task.train:
        return Lengths(window, critic_template=template_tokens)
    problems = (*task.train, *task.validation, *task.test)
    prompts = [len(renderer.solver_prompt(problem)) for problem in problems]
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
        critic_template=template_tokens,
    )


def _critic_prompt(templates: Templates, recipe: Recipe) -> str:
    """Render the critic's prompt without question and answer; empty for a critic that has none."""
    if not isinstance(recipe.critic, LlmCriticConfig) or not templates.has("critic"):
        return ""
    messages = templates.critic("", "", steps=(), finished=True)
    return "\n".join(message["content"] for message in messages)


def cached_config(model: ModelConfig, *, fetch: bool = False) -> PreTrainedConfig | None:
    """Return a model's configuration from its folder or the cache; None if it is in neither.

    ``fetch``: also from the hub.
    """
    try:
        if model.gguf_file:
            return _gguf_config(resolve(model.path), model.gguf_file)
        return AutoConfig.from_pretrained(
            resolve(model.path),
            local_files_only=not fetch,
            trust_remote_code=model.trust_remote_code,
        )
    except (OSError, ValueError):
        return None


@functools.lru_cache(maxsize=2)
def _gguf_config(path: str, gguf_file: str) -> PreTrainedConfig:
    """Read the configuration from a GGUF file, once per process: it takes seconds."""
    return AutoConfig.from_pretrained(path, gguf_file=gguf_file, local_files_only=True)


def _size(model: ModelConfig, unchecked: list[str]) -> tuple[Shape | None, int]:
    """Return a model's shape and parameters from its folder, the cache, or the table of shapes."""
    if not _installed(model.path):
        unchecked.append(f"model {model.path}: the package is not installed; its size is unknown")
        return None, 0
    config = cached_config(model)
    if config is not None:
        unchecked.append(f"model {model.path}: its weights were not loaded; sizes from its config")
        with torch.device("meta"):
            model_on_meta = AutoModelForCausalLM.from_config(config)
        assert isinstance(model_on_meta, PreTrainedModel)
        return shape_of(config), sum(p.numel() for p in model_on_meta.parameters())
    path = resolve(model.path)
    if Path(path).is_dir():
        raise EngineError(f"model.path = {model.path!r}: the folder has no config.json")
    shape = known_shapes().get(path)
    source = "sizes from its known shape" if shape else "its size is unknown"
    unchecked.append(f"model {model.path}: not in the local cache; {source}")
    return shape, shape.parameters if shape else 0


def _installed(path: str) -> bool:
    """Return False for a model in a Python package that is not installed."""
    try:
        return bool(resolve(path))
    except EngineError:
        if path.startswith("package:"):
            return False
        raise


def _task(recipe: Recipe, unchecked: list[str]) -> Task | None:
    """Load the problems; None if their files do not exist yet or the hub cannot be reached."""
    data, path = recipe.data, recipe.model.path
    folder = resolve(path) if _installed(path) else path
    if isinstance(data, FilesData):
        absent = [p for p in _paths(data) if not p.exists() and not p.parent.is_dir()]
        if absent:
            unchecked.append(f"problems {absent[0]}: {absent[0].parent} does not exist yet")
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
    """Return the template set that a task of this kind uses unless the recipe names another."""
    data = recipe.data
    if isinstance(data, AnswerReading):
        return "steps" if data.steps == "tags" else "free"
    return data.type  # the lab's and chain sums' sets are named like them


def _critic(recipe: Recipe, task: Task | None, templates: Templates, unchecked: list[str]) -> None:
    """Check the critic as far as that needs no server and no weights; note what was not checked."""
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
                unchecked.append(f"critic {critic.model} at {critic.base_url}: not contacted")
            case LocalCriticConfig():
                _size(ModelConfig(path=critic.path), unchecked)
            case _:
                pass
    elif task is not None:
        build_critic(critic, task, templates, seed=recipe.seed)
