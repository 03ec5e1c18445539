"""Sets what a recipe leaves open and what depends on the model: other defaults are the lab's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADAPTERS_LR, ALL_WEIGHTS_LR, MAX_TOKENS = 1e-4, 1e-5, 1024
"""Defaults for models and problems that are not the lab's."""


def with_model_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's values with defaults for its model, unless model or problems are the lab's."""
    model, data = values.get("model", {}), values.get("data", {})
    if not isinstance(model, Mapping) or not isinstance(data, Mapping):
        return values
    in_lab = str(model.get("path", "lab:")).startswith("lab:") or data.get("type", "lab") == "lab"
    if in_lab:
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
