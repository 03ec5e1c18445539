"""Makes Python's cyclic garbage collector run rarely during imports, then as usual.

torch, transformers and their dependencies make 400,000 objects that stay, and at its default thresholds
the collector walks them over and over meanwhile: a third of the time of `import`. Only processes that
this package starts use it (the command line, a study's runs); a program that imports the package keeps
its settings.
"""

from __future__ import annotations

import gc

PAUSED_THRESHOLD = 100_000
"""New objects between collections while imports go on; Python's default is 700 or 2,000."""

_normal = gc.get_threshold()


def pause() -> None:
    """Collect rarely, until `resume`."""
    global _normal
    if gc.get_threshold()[0] != PAUSED_THRESHOLD:
        _normal = gc.get_threshold()
        gc.set_threshold(PAUSED_THRESHOLD, *_normal[1:])


def resume() -> None:
    """Collect as often as before `pause`: once a model runs, garbage may hold its tensors.

    Does nothing without a `pause`. (`gc.freeze` here would leave out what has been imported, but
    bindings made with nanobind then print at exit that they leak.)
    """
    if gc.get_threshold()[0] == PAUSED_THRESHOLD:
        gc.set_threshold(*_normal)
