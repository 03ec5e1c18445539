"""Compares answers in a separate process: JSON lines in, JSON lines out. Started by `verify_client`.

math-verify's timeout is a signal, which works only in the main thread and does not interrupt a large
power computed in C; some scorers of reasoning-gym evaluate their input. In a separate process both can
be killed. Imports nothing from selfteach, since it runs as a plain script.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import sys
from functools import cache
from typing import Any

MEMORY_BYTES = 8 * 2**30
"""Limit of address space: an expression that explodes ends in a MemoryError, not in swapping."""


def main() -> None:
    """Answer requests until the pipe closes."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print must not write between the replies
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):  # writes no file
            resource.setrlimit(limit, (0, 0))
    for line in sys.stdin:
        try:
            request = json.loads(line)
            reply = _HANDLERS[request.pop("kind")](**request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        out.write(json.dumps(reply) + "\n")
        out.flush()


def import_library(library: str) -> dict[str, Any]:
    """Import a slow library, outside of any comparison's time limit."""
    importlib.import_module({"math": "math_verify", "gym": "reasoning_gym"}[library])
    return {}


def equal(gold: str, answer: str) -> dict[str, Any]:
    """Compare two answers mathematically; ``understood`` is False if ``gold`` does not parse."""
    from math_verify import verify

    parsed = _parsed(gold)
    if not parsed:
        return {"understood": False, "equal": False}
    same = verify(parsed, _parsed(answer), timeout_seconds=None)
    return {"understood": True, "equal": bool(same)}


def score(task: str, config: dict[str, Any], entry: dict[str, Any], answer: str) -> dict[str, Any]:
    """Compute reasoning-gym's score of an answer, from 0 to 1.

    Some scorers need the tuples that JSON turned into lists, so both forms are tried.
    """
    scorer = _scorer(task, json.dumps(config, sort_keys=True))
    points = max(_points(scorer, answer, form) for form in (entry, _with_tuples(entry)))
    return {"score": points}


def _points(scorer: Any, answer: str, entry: dict[str, Any]) -> float:
    try:
        return float(scorer.score_answer(answer, entry))
    except Exception:  # scorers raise anything on a malformed answer
        return 0.0


@cache
def _parsed(answer: str) -> list[Any]:
    from math_verify import parse

    return parse(f"${answer}$", parsing_timeout=None)  # type: ignore[arg-type]


@cache
def _scorer(task: str, config: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, size=1, seed=0, **json.loads(config))


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


_HANDLERS = {"import": import_library, "math": equal, "gym": score}


if __name__ == "__main__":
    main()
