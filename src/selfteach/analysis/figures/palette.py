"""Holds the colours of arms and contexts, one for a light and one for a dark page.

Any two differ by at least 0.055 in OKLab (about three just noticeable differences), to readers with
ordinary sight and as protanopia, deuteranopia and tritanopia change them (Machado, Oliveira and
Fernandes 2009, severity 1), and each has a contrast of 3 against its page (WCAG 2.2, 1.4.11). They
were chosen by maximizing the smallest of these distances; a test measures them.
"""

from __future__ import annotations

from typing import NamedTuple


class Colour(NamedTuple):
    """Holds a colour in both themes."""

    light: str
    dark: str


PALETTE = (
    Colour("#32a155", "#547925"),
    Colour("#073e93", "#68a0fe"),
    Colour("#8c352a", "#f99b44"),
    Colour("#2a7899", "#b0c0d1"),
    Colour("#4c0c49", "#bf489e"),
    Colour("#a05b11", "#a89388"),
    Colour("#9f61f2", "#635aea"),
    Colour("#4f5566", "#82ec9c"),
    Colour("#646956", "#fabb41"),
    Colour("#14361d", "#46d193"),
    Colour("#b87ca4", "#dc2c60"),
    Colour("#8489da", "#93a0c8"),
    Colour("#734bdd", "#8678c9"),
    Colour("#6a2e43", "#f36451"),
    Colour("#431575", "#6684fb"),
    Colour("#d37812", "#856e6a"),
    Colour("#71867a", "#bcfc73"),
    Colour("#cb3ca7", "#bf71a6"),
    Colour("#853eb1", "#fdc6f7"),
    Colour("#543669", "#d5a8f8"),
)
