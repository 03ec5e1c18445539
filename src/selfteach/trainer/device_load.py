"""Compute what a recipe has a device hold, and refuse what cannot fit before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedConfig

from selfteach.config.critic_section import LocalCriticConfig, PolicyCriticConfig
from selfteach.config.engine_section import VllmProcessConfig, VllmServerConfig
from selfteach.config.recipe import ModelConfig, Recipe
from selfteach.errors import EngineError, RecipeError
from selfteach.models.architectures import Shape, known_shapes
from selfteach.models.loading import choose_device, dtypes_of, weights_dtype_of
from selfteach.models.model_path import resolve
from selfteach.models.model_size import cached_config, count_parameters, shape_of
from selfteach.trainer.device_memory import (
    MICRO_BATCHES,
    DeviceLoad,
    VllmMemory,
    chunk_tokens,
    fit,
    gib,
    memory,
)

BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes per element, by dtype."""
CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def load_of(
    recipe: Recipe,
    shape: Shape,
    *,
    parameters: int,
    trained: int,
    device: str,
    longest_prompt: int = 0,
    window: int | None = None,
) -> DeviceLoad:
    """Return what one device has to hold. ``parameters`` are the model's, adapters excluded."""
    model, train = recipe.model, recipe.train
    dtypes = dtypes_of(model, device, all_weights_train=recipe.all_weights_train)
    completion = recipe.most_sampled
    teacher = recipe.scoring_teacher.type
    copies = int(teacher != "live" and (teacher == "ema" or model.lora is None))
    copies += int(isinstance(recipe.critic, PolicyCriticConfig) and model.lora is None)
    rows = min(recipe.sampling.batch_size, train.problems_per_step * train.group_size)
    length = longest_prompt + completion
    return DeviceLoad(
        shape=shape,
        parameters=parameters,
        trained=trained,
        adapters=(model.lora.rank, len(model.lora.targets)) if model.lora else None,
        weight_bytes=dtypes.weights.itemsize,
        compute_bytes=dtypes.compute.itemsize,
        recompute=model.gradient_checkpointing is True,
        copies=copies,
        # A sample longer than a micro-batch is a micro-batch of its own; the teacher's forward pass
        # stores no activations.
        micro_batch_tokens=max(
            MICRO_BATCHES[0] if train.micro_batch_tokens == "auto" else train.micro_batch_tokens,
            length,
        ),
        chunk_entries=chunk_tokens(shape.vocabulary, device) * shape.vocabulary,
        sample_rows=rows,
        sample_length=length if window is None else min(window, length),
        has_turns=recipe.environment is not None,
        sampler=_sampler(recipe, rows, device),
        critic_bytes=_critic_bytes(recipe, device),
        chooses_micro_batch=train.micro_batch_tokens == "auto",
        chooses_recompute=_chooses_recompute(recipe, device),
        quantized=0 if model.quantization is None else min(shape.linear_weights, parameters),
    )


def _chooses_recompute(recipe: Recipe, device: str) -> bool:
    """Return True if gradient checkpointing follows the memory.

    Prompts that share their beginning fill a micro-batch with far fewer tokens than the estimate
    counts, and recomputation would run that beginning for each of them: several times slower. So a
    micro-batch that a recipe names is not recomputed on a CPU unless the recipe says so.
    """
    if recipe.model.gradient_checkpointing != "auto":
        return False
    return recipe.train.micro_batch_tokens == "auto" or device != "cpu"


def require_memory(recipe: Recipe) -> None:
    """Check that what a run always holds fits the memory of its device.

    Weights, optimizer moments and copies, of the policy and of a critic in this process. Models whose
    size is unknown before they are downloaded are not checked. Raises `RecipeError`.
    """
    if recipe.distributed.shard != "none" or recipe.train.steps == 0:
        return
    load = _load_by_config(recipe)
    if load is not None:
        available = device_memory(recipe.model.device)
        require_fits(load, available, recipe.model)


def with_memory_choices(recipe: Recipe, shards: int = 1) -> Recipe:
    """Return the recipe with what it leaves to the device's free memory (`device_memory.fit`).

    ``shards`` are the ranks that share the weights. A model whose size is unknown gets the smallest
    micro-batch on a GPU, the largest on a CPU, and no recomputation.
    """
    if "auto" not in (recipe.train.micro_batch_tokens, recipe.model.gradient_checkpointing):
        return recipe
    load = _load_by_config(recipe, fetch=True)
    if load is None:
        on_cpu = choose_device(recipe.model.device).type == "cpu"
        return with_choices(recipe, MICRO_BATCHES[0 if on_cpu else -1], False)
    chosen = fit(replace(load, shards=shards), free_memory(recipe.model.device))
    return with_choices(recipe, chosen.micro_batch_tokens, chosen.recompute)


def with_choices(recipe: Recipe, micro_batch_tokens: int, gradient_checkpointing: bool) -> Recipe:
    """Return the recipe with these in place of what it leaves open."""
    train, model = recipe.train, recipe.model
    if train.micro_batch_tokens == "auto":
        train = train.model_copy(update={"micro_batch_tokens": micro_batch_tokens})
    if model.gradient_checkpointing == "auto":
        model = model.model_copy(update={"gradient_checkpointing": gradient_checkpointing})
    return recipe.model_copy(update={"train": train, "model": model})


def fitting_runs(recipe: Recipe) -> int | None:
    """Return how many runs of a recipe its device holds at their peaks; None if that is unknown.

    At least 1; prompts count as nothing, so it is an upper bound.
    """
    load = _load_by_config(recipe)
    if load is None:
        return None
    available = device_memory(recipe.model.device)
    return max(1, available // max(1, memory(fit(load, available)).peak))


def require_fits(load: DeviceLoad, available: int, model: ModelConfig) -> None:
    """Raise `RecipeError` if what is always allocated exceeds the memory of the device, in bytes."""
    always = sum(item.bytes for item in memory(load).always)
    if always <= available:
        return
    critic = f", the critic's {gib(load.critic_bytes)} included" if load.critic_bytes else ""
    fix = "a smaller model"
    if model.lora is None:
        fix = "train adapters (model.lora)"
    elif model.quantization is None:
        fix = 'hold the frozen weights in 4 bits (model.quantization = "nf4")'
    raise RecipeError(
        f"weights and optimizer moments need {gib(always)}{critic}, and this device has "
        f"{gib(available)}: {fix}, or shard (distributed.shard)"
    )


def device_memory(device: str) -> int:
    """Return the memory in bytes of the device that a recipe names, here: in a container its limit."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        return torch.cuda.get_device_properties(chosen).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_container_limits()])


def free_memory(device: str) -> int:
    """Return the free memory in bytes of a GPU; of a CPU all of it, so that a run can be repeated."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        return torch.cuda.mem_get_info(chosen)[0]
    return device_memory(device)


def _container_limits() -> Iterator[int]:
    """Yield the memory limits in bytes that Linux sets this process by cgroup, version 2 or 1."""
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # no such version, or "max": no limit
            yield int(path.read_text(encoding="ascii"))


def _load_by_config(recipe: Recipe, *, fetch: bool = False) -> DeviceLoad | None:
    """Return what a run has its device hold, prompts aside; None for a model of unknown size.

    ``fetch``: a configuration that is not here may come from the hub.
    """
    size = _size(recipe.model, fetch=fetch)
    if size is None:
        return None
    shape, parameters = size
    lora = recipe.model.lora
    trained = shape.adapters(lora.rank, lora.targets) if lora else parameters
    device = choose_device(recipe.model.device).type
    return load_of(recipe, shape, parameters=parameters, trained=trained, device=device)


def _size(model: ModelConfig, *, fetch: bool = False) -> tuple[Shape, int] | None:
    """Return a model's shape and parameters from its configuration or the table; else None."""
    try:
        config, path = cached_config(model, fetch=fetch), resolve(model.path)
    except EngineError:  # no such folder or package: loading says so
        return None
    if config is not None:
        return _sized(config)
    shape = known_shapes().get(path)
    return None if shape is None else (shape, shape.parameters)


def _sized(config: PreTrainedConfig) -> tuple[Shape, int] | None:
    try:
        return shape_of(config), count_parameters(config)
    except Exception:  # configurations are others' code, and loading will say what is wrong
        return None


def _critic_bytes(recipe: Recipe, device: str) -> int:
    """Return the bytes of the weights of a critic that runs on this device in this process."""
    critic = recipe.critic
    if not isinstance(critic, LocalCriticConfig):
        return 0
    kind = choose_device(device).type if device == "auto" else torch.device(device).type
    if critic.device not in ("auto", kind):
        return 0
    model = ModelConfig(
        path=critic.path,
        gguf_file=critic.gguf_file,
        weights_dtype=critic.weights_dtype,
        trust_remote_code=critic.trust_remote_code,
    )
    size = _size(model)
    return 0 if size is None else size[1] * BYTES[weights_dtype_of(model, device)]


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
            return VllmMemory(BYTES[dtype], rows, engine.gpu_memory_utilization, sleeps)
        case _:
            return "trainer"
