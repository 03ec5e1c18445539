"""Sets what a recipe leaves open and what depends on the model: other defaults are the lab's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

ADAPTERS_LR, ALL_WEIGHTS_LR, MAX_TOKENS = 1e-4, 1e-5, 1024
"""Defaults for models that are not the lab's."""
LAB_MODEL = "lab:"
"""Begins the name of a base model of the lab."""
LAB_DATA = "lab"
"""The type of data that is the default."""
EPISODE_TEMPLATES = {"chain_sums": "turns_chain_sums", "verifiers": "turns_bare"}
"""Template sets of episodes by the type of data; of others it is ``turns``."""
WORLD_FILE = "world.json"
"""File in the folder of a model of the lab, also of one that was trained or exported from it."""


def with_model_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's values with defaults for its model, unless that is a model of the lab."""
    model = values.get("model", {})
    if not isinstance(model, Mapping) or is_lab_model(str(model.get("path", LAB_MODEL))):
        return values
    defaults = {
        "optimizer": {"lr": ADAPTERS_LR if model.get("lora") else ALL_WEIGHTS_LR},
        "sampling": {"max_tokens": MAX_TOKENS},
    }
    for section, usual in defaults.items():
        given = values.get(section, {})
        if isinstance(given, Mapping):
            values[section] = {**usual, **given}
    return values


def with_episode_templates(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's values with the templates of episodes, if it names none; not for the lab."""
    model, data = values.get("model", {}), values.get("data", {})
    if not values.get("environment") or not isinstance(model, Mapping) or model.get("templates"):
        return values
    kind, verifier = (
        data.get(key) if isinstance(data, Mapping) else getattr(data, key, None)
        for key in ("type", "verifier")
    )
    if verifier in EPISODE_TEMPLATES:  # problems of that kind in files
        kind = verifier
    if kind in (None, LAB_DATA):  # a vocabulary of its own
        return values
    name = EPISODE_TEMPLATES.get(str(kind), "turns")
    return {**values, "model": {**model, "templates": name}}


def is_lab_model(path: str) -> bool:
    """Return True for a base model of the lab, and for a folder with a model trained from one."""
    if path.startswith(LAB_MODEL):
        return True
    try:
        return (Path(path).expanduser() / WORLD_FILE).is_file()
    except (OSError, RuntimeError):  # a name that no folder can have, a user that does not exist
        return False
