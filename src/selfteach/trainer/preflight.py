"""Check servers, folders and optional packages before a run spends anything.

Imports neither torch nor transformers: the process of a study calls this. What needs them (the clients
of the servers) is imported only where a recipe names a server.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from selfteach.config.critic_section import CriticConfig, RecordedConfig
from selfteach.config.engine_section import VllmServerConfig
from selfteach.config.part_section import named_parts
from selfteach.config.recipe import Recipe
from selfteach.config.reward_section import JudgeConfig
from selfteach.config.served_model import ServedModelConfig
from selfteach.errors import CriticError
from selfteach.runtime import tracking

log = logging.getLogger("selfteach")

CRITIC_IDENTITY = {
    "base_url", "base_urls", "model", "api_key_env", "api_key_envs", "api_key_header", "thinking",
    "extra_body", "parameters", "temperature", "retry_temperature",
}  # fmt: skip
"""Settings of a served critic or judge on which its healthcheck depends."""
ENGINE_IDENTITY = {"engine", "model"}
"""Sections of a recipe on which the healthcheck of its engine server depends."""


def preflight(
    recipes: Iterable[Recipe], *, critic_only: bool = False, output_folders: Iterable[Path] = ()
) -> list[str]:
    """Check servers, folders and packages that runs need, each server once for all runs.

    In this order: parts of the user's own, which are imported, the packages of tracking sinks, the
    folders of recorded critics, critic servers
    (unless ``critic.healthcheck = false``), vLLM servers that sample. With ``critic_only`` just what
    the critics need. ``output_folders`` are those that these runs write: a recorded critic may
    replay one before it exists. Returns a line with the state of each member of a fleet. Raises
    `RecipeError`, `CriticError` or `EngineError` in one line.
    """
    checked = list(recipes)
    _require_parts(checked)
    if not critic_only:
        for recipe in checked:
            tracking.require_packages(recipe.tracking.sinks)
    critics = [recipe.critic for recipe in checked if recipe.critic is not None]
    judges = [judge for recipe in checked if recipe.reward for judge in recipe.reward.judges]
    for critic in critics:
        if isinstance(critic, RecordedConfig):
            _require_recording(critic, list(output_folders))
    states = _require_served([*critics, *([] if critic_only else judges)])
    return states if critic_only else [*states, *_require_engines(checked)]


def _require_parts(recipes: Iterable[Recipe]) -> None:
    """Import each distinct part of a user's own, and check its options. Raises `PartError`."""
    parts = [part for recipe in recipes for part in named_parts(recipe).values()]
    distinct = {(pair[0], pair[1].type, repr(pair[1].options)): pair for pair in parts}
    if distinct:
        from selfteach.runtime.parts import require_part  # imports the part, which may import torch

        for kind, part in distinct.values():
            require_part(kind, part)


def _require_recording(critic: RecordedConfig, output_folders: Iterable[Path]) -> None:
    """Raise `CriticError` unless a recorded critic's run or study exists or is among these runs."""
    run = Path(critic.run).resolve()
    among_these = any(
        run in (folder, *folder.parents) for folder in map(Path.resolve, output_folders)
    )
    if not among_these and not run.is_dir():
        raise CriticError(
            f"critic.run = {critic.run!r}: no such folder; name a run folder or a study's"
        )


def _require_served(models: Iterable[CriticConfig | JudgeConfig]) -> list[str]:
    """Check each distinct server once, for the longest replies that any recipe requests."""
    servers: dict[str, ServedModelConfig] = {}
    for model in models:
        if isinstance(model, ServedModelConfig) and model.healthcheck:
            key = f"{model.role} {model.model_dump_json(include=CRITIC_IDENTITY)}"
            longest = servers.setdefault(key, model)
            if model.max_tokens > longest.max_tokens:
                servers[key] = model
    if not servers:
        return []
    from selfteach.trainer.build_critic import require_served_model  # imports torch

    return [
        f"{model.role} {model.model} at {state}"
        for model in servers.values()
        for state in _of_fleet(require_served_model(model))
    ]


def _of_fleet(states: list[str]) -> list[str]:
    """Return the states of servers that are members of a fleet, and report those that are down."""
    for state in states:
        if len(states) > 1 and not state.endswith(": replies"):
            log.warning("%s", state)
    return states if len(states) > 1 else []


def _require_engines(recipes: Iterable[Recipe]) -> list[str]:
    """Check each distinct vLLM server once, for the longest completions that any recipe samples."""
    servers: dict[str, Recipe] = {}
    for recipe in recipes:
        if isinstance(recipe.engine, VllmServerConfig):
            key = recipe.model_dump_json(include=ENGINE_IDENTITY)
            longest = servers.setdefault(key, recipe)
            if recipe.sampling.max_tokens > longest.sampling.max_tokens:
                servers[key] = recipe
    if not servers:
        return []
    from selfteach.trainer.build_engine import require_engine  # imports torch

    states = [_of_fleet(require_engine(recipe)) for recipe in servers.values()]
    return [f"engine at {state}" for fleet in states for state in fleet]
