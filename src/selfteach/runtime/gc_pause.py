"""When Python looks for garbage that refers to itself: seldom while imports go on, then as usual.

torch, transformers and what they bring make 400,000 objects that stay, and at Python's own pace these
are walked over and over meanwhile: a third of the time of `import`. Processes of ours ask for it (the
command line, a study's runs); whoever imports the package into their own keeps their settings.
"""

from __future__ import annotations

import gc

SELDOM = 100_000
"""New objects after which Python looks, while imports go on; 700 or 2,000 by itself."""

_usual = gc.get_threshold()


def rest() -> None:
    """Look seldom, until `resume`."""
    global _usual
    if gc.get_threshold()[0] != SELDOM:
        _usual = gc.get_threshold()
        gc.set_threshold(SELDOM, *_usual[1:])


def resume() -> None:
    """Look as often as before `rest`: once a model runs, garbage may hold its tensors.

    Does nothing where nobody has asked to rest. (`gc.freeze` here would leave out what has been
    imported, but bindings made with nanobind then print at exit that they leak.)
    """
    if gc.get_threshold()[0] == SELDOM:
        gc.set_threshold(*_usual)
