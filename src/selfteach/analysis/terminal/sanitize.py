"""Text of models on a terminal: it is shown, and does nothing."""

from __future__ import annotations

import re

ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\|$)|[ -/]*[0-~])", re.DOTALL
)
"""Escape sequences: of the cursor and colours, of titles and links, and of two characters."""
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
"""Control characters but tab and line break, and what turns or hides text."""


def plain(text: str) -> str:
    """Text without escape sequences, control characters and marks that reorder it."""
    return UNSEEN.sub("", ESCAPES.sub("", text.replace("\r\n", "\n")))
