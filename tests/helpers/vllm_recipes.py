"""Recipes that sample with a real vLLM server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import vllm_server
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate

TOLERANCE = 1e-3
"""Nats between trainer and engine on a sampled token, both in float32; about 5e-5 are measured."""


def served_recipe(
    base: Mapping[str, Any], server: vllm_server.Server, more: Mapping[str, Any] | None = None
) -> Recipe:
    """Return a recipe whose engine is the server."""
    section = {
        "type": "vllm_server", "url": server.address, "model": vllm_server.NAME,
        "tolerance": TOLERANCE, "patience_seconds": 900.0, "concurrency": 4,
    }  # fmt: skip
    return validate(Recipe, merge(merge(dict(base), {"engine": section}), more or {}), where="test")
