"""Names the worlds of the lab; those with a folder in `models.model_path.BASES` ship a base model."""

from __future__ import annotations

import json
from pathlib import Path

from selfteach.errors import DataError
from selfteach.tasks.lab.world import World, WorldConfig

WORLDS: dict[str, WorldConfig] = {
    "two_styles": WorldConfig(),
    # No pull of style: a writer takes look-ups from a context, never its order or phrasing.
    "no_pull": WorldConfig(pull=0.0),
    # The truth is often sampled.
    "easy": WorldConfig(beliefs="easy"),
    # The solver has one style, so its habit and the style of any answer are the same.
    "one_style": WorldConfig(native_styles=("plus",)),
}


def world_of(model_folder: str | Path) -> World:
    """Load the world that a base model was trained in, from the ``world.json`` beside its weights.

    Raises `DataError` if the folder does not exist or has no such file.
    """
    path = Path(model_folder) / "world.json"
    if not path.parent.is_dir():
        raise DataError(
            f"{model_folder}: no such folder; a model of the hub needs a recipe whose data.type "
            'is not "lab"; name a local folder, or give such a recipe'
        )
    try:
        settings = json.loads(path.read_text())["world"]
    except (OSError, KeyError, ValueError):
        raise DataError(
            f"{model_folder} has no world.json, so it is no base model of the lab; "
            "set data.world, or another data.type"
        ) from None
    settings["native_styles"] = tuple(settings["native_styles"])
    return World(WorldConfig(**settings))
