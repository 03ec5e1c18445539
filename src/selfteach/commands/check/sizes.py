"""Measure a run before it starts: model size, number of problems, lengths in tokens.

`measure` reads the sizes off a run that was built. `measure_offline` loads no weights and asks no
server: it lists what is not available on this machine (hub models in no cache, whose size then comes
from a table of known shapes; problem sets that do not exist yet; servers) instead of failing. A wrong
name stays an error: a model folder that does not exist, a file missing from a folder that does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from selfteach.commands.check.shared_prompts import count_prompts, teacher_prompts
from selfteach.commands.check.tokens import Lengths
from selfteach.config.critic_section import (
    EndpointConfig,
    LlmCriticConfig,
    LocalCriticConfig,
)
from selfteach.config.data_section import AnswerReading, FilesData, HubData
from selfteach.config.part_section import CustomPart, named_parts
from selfteach.config.recipe import ModelConfig, Recipe
from selfteach.errors import DataError, EngineError, RecipeError
from selfteach.models.architectures import Shape, known_shapes
from selfteach.models.loading import (
    build_renderer,
    load_tokenizer,
)
from selfteach.models.model_path import resolve
from selfteach.models.model_size import cached_config, count_parameters, shape_of
from selfteach.models.quantization import count_weights, require_library
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.runtime.parts import require_part
from selfteach.tasks.task import Task, load_task
from selfteach.trainer.build import (
    Built,
    max_sequence_length,
)
from selfteach.trainer.build_critic import build_critic
from selfteach.trainer.build_environment import environment_tools
from selfteach.trainer.build_objective import build_objective
from selfteach.trainer.device_load import load_of
from selfteach.trainer.device_memory import DeviceLoad, fit
from selfteach.trainer.fit_checks import (
    require_fitting_templates,
    require_references,
    require_splits,
    within_context,
)

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
    parts: tuple[str, ...] = ()
    """A line for each part of one's own whose contract was checked."""


def measure(recipe: Recipe, built: Built) -> RunSizes:
    """Return the sizes of a run that was built. Raises `DataError` if a split that it uses is empty."""
    require_splits(recipe, built.task)
    require_references(recipe, built.task)
    policy = built.components.policy
    shape = shape_of(policy.model.config)
    adapters = sum(p.numel() for p in policy.trainable.values()) if policy.has_adapters else 0
    parameters = count_weights(policy.model) - adapters
    trained = sum(p.numel() for p in policy.trainable.values())
    problems = {s: len(getattr(built.task, s)) for s in ("train", "validation", "test")}
    renderer = built.components.renderer
    lengths = count_lengths(
        built.components.max_length, renderer, renderer.templates, built.task, recipe
    )
    return RunSizes(
        str(policy.device), shape, parameters, trained, lengths, problems, task=built.task
    )


def measure_offline(recipe: Recipe) -> RunSizes:
    """Return the sizes of a run from what is on this machine; loads no weights, asks no server.

    Raises what `build` would raise about the components that are available.
    """
    unchecked = list(_custom_parts(recipe))
    build_objective(recipe)
    require_library(recipe.model)
    model, lora = recipe.model, recipe.model.lora
    shape, parameters = _size(model, unchecked)
    task = _task(recipe, unchecked)
    renderer = None
    templates = Templates(model.templates or _template_set(recipe))
    if shape is not None and cached_config(model) is not None:
        renderer = build_renderer(
            model, load_tokenizer(model), templates, environment_tools(recipe, task)
        )
        templates = renderer.templates
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


def device_load(
    recipe: Recipe, sizes: RunSizes, available: float | None = None
) -> DeviceLoad | None:
    """Return what one device has to hold; None for a model whose architecture is unknown.

    What the recipe leaves open is chosen for a device with ``available`` bytes; None: not known here.
    """
    if sizes.shape is None:
        return None
    load = load_of(
        recipe,
        sizes.shape,
        parameters=sizes.parameters,
        trained=sizes.trained,
        device=sizes.device,
        longest_prompt=sizes.lengths.longest_prompt,
        window=sizes.lengths.window,
    )
    return load if available is None else fit(load, available)


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
    lengths, shared = count_prompts(map(renderer.solver_prompt, problems), len(task.train))
    references = [
        len(renderer.encode_answer(problem.references["reference"]))
        for problem in task.train
        if "reference" in problem.references
    ]
    return Lengths(
        window=window,
        longest_prompt=max(lengths),
        mean_prompt=fmean(lengths[: len(task.train)]),
        mean_reference=fmean(references) if references else None,
        critic_template=template_tokens,
        shared_prompt=shared,
        teacher=teacher_prompts(recipe, renderer, task.train),
    )


def _critic_prompt(templates: Templates, recipe: Recipe) -> str:
    """Render the critic's prompt without question and answer; empty for a critic that has none."""
    if not isinstance(recipe.critic, LlmCriticConfig) or not templates.has("critic"):
        return ""
    messages = templates.critic("", "", steps=(), finished=True)
    return "\n".join(message["content"] for message in messages)


def _size(model: ModelConfig, unchecked: list[str]) -> tuple[Shape | None, int]:
    """Return a model's shape and parameters from its folder, the cache, or the table of shapes."""
    if not _installed(model.path):
        unchecked.append(f"model {model.path}: the package is not installed; its size is unknown")
        return None, 0
    config = cached_config(model)
    if config is not None:
        unchecked.append(f"model {model.path}: its weights were not loaded; sizes from its config")
        return shape_of(config), count_parameters(config)
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


def _custom_parts(recipe: Recipe) -> Iterator[str]:
    """Import parts of one's own and check their options; yield that nothing else was checked."""
    for key, (kind, part) in named_parts(recipe).items():
        require_part(kind, part)
        yield f"{key} {part.label}: imported, its options fit; its contract was not checked"


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
            return load_task(data, folder, reward=recipe.reward, episodes=recipe.runs_hub_episodes)
        except DataError as error:
            unchecked.append(f"problems: {error}")
            return None
    return load_task(data, folder, reward=recipe.reward, episodes=recipe.runs_hub_episodes)


def _paths(data: FilesData) -> Iterator[Path]:
    for paths in (data.train, data.validation, data.test, data.pool):
        for path in (paths,) if isinstance(paths, str) else paths or ():
            yield Path(path)


def _template_set(recipe: Recipe) -> str:
    """Return the template set that a task of this kind uses unless the recipe names another."""
    data = recipe.data
    if isinstance(data, AnswerReading):
        return "steps" if data.steps == "tags" else "free"
    assert not isinstance(data, CustomPart)
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
                unchecked.append(f"critic {critic.model} at {critic.address}: not contacted")
            case LocalCriticConfig():
                _size(ModelConfig(path=critic.path), unchecked)
            case _:
                pass
    elif task is not None:
        build_critic(critic, task, templates, seed=recipe.seed)
