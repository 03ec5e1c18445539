"""selfteach: train a language model on feedback about its own reasoning."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("selfteach")
except PackageNotFoundError:
    __version__ = "0"


API = (
    "ForecastRequest", "InspectionRequest", "Recipe", "build", "evaluate", "forecast_recipe", "inspect",
    "load_recipe", "train", "train_step",
)  # fmt: skip
"""Names of `selfteach.api` that are also here; the first use of one imports torch."""


def __getattr__(name: str) -> Any:
    """Return ``selfteach.train`` and the other names of `API`."""
    if name not in API:  # also a submodule that is not imported yet
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("selfteach.api"), name)
