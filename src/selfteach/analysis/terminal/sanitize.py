"""Make text of models safe to print on a terminal."""

from __future__ import annotations

import re

ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\|$)|[ -/]*[0-~])", re.DOTALL
)
"""Escape sequences: of the cursor and colours, of titles and links, and of two characters."""
INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
)
"""Control characters except tab and line break, and characters that reorder or hide text."""


def sanitized(text: str) -> str:
    """Remove escape sequences, control characters and characters that reorder text."""
    return INVISIBLE.sub("", ESCAPES.sub("", text.replace("\r\n", "\n")))
