"""A process of its own that compares answers: JSON lines in, JSON lines out. Started by `judge`.

math-verify stops itself with a signal, which threads cannot use and which no big power in C heeds;
some scorers of reasoning-gym evaluate what they are given. Here both can be killed. Imports nothing of
ours, since it runs as a plain script.
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
"""Of address space; a bomb ends as a MemoryError instead of taking the machine along."""


def main() -> None:
    """Answer requests until the pipe closes."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not stand between our lines
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        try:
            request = json.loads(line)
            reply = {"ready": ready, "math": equal, "gym": score}[request.pop("what")](**request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        out.write(json.dumps(reply) + "\n")
        out.flush()


def ready(library: str) -> dict[str, Any]:
    """Import what takes long, outside of any comparison's time."""
    importlib.import_module({"math": "math_verify", "gym": "reasoning_gym"}[library])
    return {}


def equal(gold: str, found: str) -> dict[str, Any]:
    """Whether two answers are the same as mathematics; ``understood`` says if ``gold`` is any."""
    from math_verify import verify

    parsed = _parsed(gold)
    if not parsed:
        return {"understood": False, "equal": False}
    same = verify(parsed, _parsed(found), timeout_seconds=None)
    return {"understood": True, "equal": bool(same)}


def score(task: str, config: dict[str, Any], entry: dict[str, Any], answer: str) -> dict[str, Any]:
    """reasoning-gym's own score of an answer, 0 to 1.

    Some scorers need the tuples that JSON made lists of.
    """
    scorer = _scorer(task, json.dumps(config, sort_keys=True))
    points = max(_points(scorer, answer, form) for form in (entry, _with_tuples(entry)))
    return {"score": points}


def _points(scorer: Any, answer: str, entry: dict[str, Any]) -> float:
    try:
        return float(scorer.score_answer(answer, entry))
    except Exception:  # whatever an answer that makes no sense does to a scorer
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


if __name__ == "__main__":
    main()
