"""The named worlds; those with a folder in `models.loading.BASES` have a base model in the package."""

from __future__ import annotations

import json
from pathlib import Path

from selfteach.errors import DataError
from selfteach.tasks.lab.world import World, WorldConfig

WORLDS: dict[str, WorldConfig] = {
    "two_styles": WorldConfig(),
    # No pull of style: a writer takes look-ups from a context, never its order or phrasing.
    "no_pull": WorldConfig(pull=0.0),
    # The truth within reach of sampling.
    "easy": WorldConfig(beliefs="easy"),
    # The solver has one style, so that its habit and this answer's style are the same thing.
    "one_style": WorldConfig(native_styles=("plus",)),
}


def world_of(model_folder: str | Path) -> World:
    """The world that a base model was trained in, from the ``world.json`` beside its weights.

    Raises `DataError` if there is no such folder, or none of the lab: it has no such file.
    """
    path = Path(model_folder) / "world.json"
    if not path.parent.is_dir():
        raise DataError(
            f"{model_folder}: no such folder here, and no recipe that says which problems a model "
            "of the hub should solve; name a folder, or give a recipe with another data.type"
        )
    try:
        facts = json.loads(path.read_text())["world"]
    except (OSError, KeyError, ValueError):
        raise DataError(
            f"{model_folder} has no world.json, so it is no base model of the lab; "
            "name a world with data.world, or another data.type"
        ) from None
    facts["native_styles"] = tuple(facts["native_styles"])
    return World(WorldConfig(**facts))
