"""The named worlds, each with a base model in the package."""

from __future__ import annotations

from selfteach.lab.world import WorldConfig

WORLDS: dict[str, WorldConfig] = {
    "two_styles": WorldConfig(),
    # No pull of style: a writer takes look-ups from a context, never its order or phrasing.
    "no_pull": WorldConfig(pull=0.0),
    # The truth within reach of sampling.
    "easy": WorldConfig(beliefs="easy"),
    # The solver has one style, so that its habit and this answer's style are the same thing.
    "one_style": WorldConfig(native_styles=("plus",)),
}
