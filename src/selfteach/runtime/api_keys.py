"""Reads API keys from the environment, and keeps them and other secrets where they belong."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from selfteach.errors import SelfteachError

KEY = re.compile(r"[!-~]+")
"""What a header can carry: ASCII without spaces and control characters."""
MIN_REDACTED = 6
"""Characters of a shorter key, like ``none``, are words of any text."""
CHILD_VARIABLES = re.compile(
    r"PATH|PYTHON(?:PATH|HOME|HASHSEED|UTF8|IOENCODING)|VIRTUAL_ENV|(?:DY)?LD_LIBRARY_PATH"
    r"|LANG(?:UAGE)?|LC_[A-Z]+|TZ|TMP|TEMP|TMPDIR|SYSTEMROOT|OMP_NUM_THREADS"
)
"""Environment variables that a child needs to start Python; all others may be secrets."""


def read_key(variable: str | None, setting: str, error: type[SelfteachError]) -> str:
    """Return the key in an environment variable, stripped; ``none`` if the recipe names no variable.

    Raises ``error``, which never holds the key, if the variable is not set or cannot be a key.
    """
    if variable is None:
        return "none"
    key = os.environ.get(variable, "").strip()
    if not key:
        raise error(f"{setting}: the environment variable {variable} is not set, or is empty")
    if not KEY.fullmatch(key):
        raise error(
            f"{setting}: the environment variable {variable} holds spaces, line breaks or characters "
            "beyond ASCII, which no key has: set it to the key alone"
        )
    return key


def redact(text: str, key: str) -> str:
    """Return a text without a key that it may repeat: servers quote keys that they refuse."""
    return text.replace(key, "[key]") if len(key) >= MIN_REDACTED else text


def child_environment(**more: str) -> dict[str, str]:
    """Return the environment of a child that runs others' code: no variable that may be a secret."""
    return {**without_secrets(os.environ), **more}


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return those variables that a child needs to start Python."""
    return {name: value for name, value in environment.items() if CHILD_VARIABLES.fullmatch(name)}
