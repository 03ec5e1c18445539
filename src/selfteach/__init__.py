"""selfteach: train a language model on feedback about its own reasoning."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("selfteach")
except PackageNotFoundError:
    __version__ = "0"
