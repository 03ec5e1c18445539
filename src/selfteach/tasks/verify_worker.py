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
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

TOKEN = re.compile(
    r"(?P<command>\\(?:begin|end|operatorname|math[a-z]+)\s*\{[A-Za-z*]+\}|\\[A-Za-z]+)"
    r"|\d+(?:\.\d+)?|\.\d+|[A-Za-z]"
)
"""Matches the commands, numbers and variables of a formula."""
COMMAND = re.compile(r"\\([A-Za-z]+)")
COMMANDS = frozenset(
    {
        "frac", "dfrac", "tfrac", "cfrac", "sqrt", "binom", "dbinom", "tbinom", "cdot", "times",
        "div", "ast", "pm", "mp", "le", "leq", "leqslant", "lt", "ge", "geq", "geqslant", "gt",
        "ne", "neq", "in", "notin", "infty", "cup", "cap", "setminus", "emptyset", "mathbb",
        "mathbf", "mathrm", "mathit", "mathcal", "left", "right", "big", "Big", "bigg", "Bigg",
        "bigl", "bigr", "Bigl", "Bigr", "begin", "end", "operatorname", "circ", "degree",
        "lfloor", "rfloor", "lceil", "rceil", "lvert", "rvert", "vert", "mid", "sin", "cos",
        "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "ln",
        "log", "exp", "lg", "det", "gcd", "lcm", "max", "min", "mod", "pmod", "bmod", "int",
        "sum", "prod", "lim", "to", "infinity", "overline", "bar", "hat", "vec", "dot", "tilde",
        "underline", "displaystyle", "limits", "text", "lbrace", "rbrace", "lbrack", "rbrack",
        "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa",
        "lambda", "mu", "nu", "xi", "omicron", "pi", "rho", "sigma", "tau", "upsilon", "phi",
        "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma",
        "Upsilon", "Phi", "Psi", "Omega", "ell",
    }
)  # fmt: skip
"""Commands of TeX that math-verify reads; it drops others, such as ``\\ldots``, in silence."""
ENVIRONMENT = re.compile(r"\\begin\s*\{([^{}]*)\}")
MATRICES = frozenset(
    ["matrix", "pmatrix", "bmatrix", "Bmatrix", "vmatrix", "Vmatrix", "smallmatrix", "array"]
)
SYMBOLS = re.compile(r"[-A-Za-z0-9\s+*/^_=<>!(){}\[\]|,;:.%&\\]*")
"""Matches a formula of characters that math-verify reads; it drops others, such as primes."""
DANGLING = re.compile(
    r"^\s*(?:[<>]|\\(?:[lg]t|[lg]eq?|neq?|i?n)\b)|[<>=+*/^_-]\s*$"
    r"|\\(?:cdot|times|div|ast|pm|mp|to|cup|cap)\s*$|[\^_]\s*\{\s*\}|\^\s*(?:\{\s*)?T(?![A-Za-z])|(?<!\d)\.(?!\d)|\.\d*\.|\.$"
)
"""Matches an operator without an operand, a transposition, and a stop that is no decimal point."""
MAX_TOKENS = 200
"""Numbers and variables of a formula that is parsed."""
MEMORY_BYTES = 8 * 2**30
"""Limit of address space: an expression that explodes ends in a MemoryError, not in swapping."""


def main(limit_s: float, life: int) -> None:
    """Answer requests until the pipe closes, each within ``limit_s`` seconds of CPU time.

    ``life`` is a pipe that ends when the parent does.
    """
    _end_with_parent(life)
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
            kind = request.pop("kind")
            with _limited(0.0 if kind == "import" else limit_s):
                reply = _HANDLERS[kind](**request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        out.write(json.dumps(reply) + "\n")
        out.flush()


def _end_with_parent(life: int) -> None:
    """Have the kernel end this process when the parent has ended, also within a long computation."""
    import fcntl

    if hasattr(os, "O_ASYNC") and hasattr(fcntl, "F_SETOWN"):  # not on every system
        signal.signal(signal.SIGIO, signal.SIG_DFL)
        fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(life, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            if not os.read(life, 1):  # the parent has ended before
                os._exit(0)


@contextlib.contextmanager
def _limited(limit_s: float) -> Iterator[None]:
    """End this process when it has used more CPU time than this; 0 sets no limit.

    The signal's default action ends it also within a computation in C, which no handler interrupts.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def import_library(library: str) -> dict[str, Any]:
    """Import a slow library, outside of any comparison's time limit."""
    importlib.import_module({"math": "math_verify", "gym": "reasoning_gym"}[library])
    return {}


def equal(gold: str, answer: str) -> dict[str, Any]:
    """Compare two formulas; ``understood`` is False if ``gold`` does not parse as a whole."""
    from math_verify import verify

    expected, stated = map(_parsed, _cased(gold, answer))
    same = bool(expected and stated) and verify(expected, stated, timeout_seconds=None)
    return {"understood": bool(expected), "equal": bool(same)}


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
def _parsed(formula: str) -> list[Any]:
    """Parse a formula; [] unless math-verify reads all of it.

    It drops what it does not understand, mostly the end. So another number or variable in the place of
    each must make another value; the last is enough where it says that it has read the same
    numbers and letters.
    """
    parsed = _parse(formula) if _is_readable(formula) else []
    if len(parsed) < 2 or isinstance(parsed[0], str):
        return []
    tokens = _tokens(formula)
    read = Counter(t[0] for t in _tokens(str(parsed[1])))
    dropped = Counter(t[0] for t in tokens if t[0].isalpha()) - read
    if len(tokens) > MAX_TOKENS or dropped:
        return []
    if read == Counter(t[0] for t in tokens):
        tokens = tokens[-1:]
    for token in tokens:
        another = "1" + token[0] if not token[0].isalpha() else "v" if token[0] == "w" else "w"
        changed = formula[: token.start()] + another + formula[token.end() :]
        if _parse(changed)[:1] == parsed[:1]:
            return []
    return parsed


def _is_readable(formula: str) -> bool:
    """Return whether a formula holds only what math-verify is known to read."""
    names = {match[1] for match in COMMAND.finditer(formula)}
    environments = {match[1] for match in ENVIRONMENT.finditer(formula)}
    return bool(
        SYMBOLS.fullmatch(formula)
        and names <= COMMANDS
        and environments <= MATRICES
        and ("to" not in names or "lim" in names)
        and formula.count("{") == formula.count("}")
        and sum(map(formula.count, "([")) == sum(map(formula.count, ")]"))
        and DANGLING.search(formula) is None
    )


def _parse(formula: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, parse

    return parse(
        f"${formula}$",
        extraction_config=(_latex(), ExprExtractionConfig()),
        parsing_timeout=None,  # type: ignore[arg-type]
    )


@cache
def _latex() -> Any:
    """Return math-verify's settings of LaTeX, except that ``5 m`` is a product: units are taken off
    before."""
    from dataclasses import replace

    from math_verify import LatexExtractionConfig

    default = LatexExtractionConfig()
    return replace(default, normalization_config=replace(default.normalization_config, units=False))


def _cased(*formulas: str) -> list[str]:
    """Write ``A`` as ``a_{99}`` in formulas that have both A and a: math-verify drops the case."""
    letters = {token[0] for formula in formulas for token in _tokens(formula)}
    both = {letter for letter in letters if letter.isupper() and letter.lower() in letters}

    def renamed(match: re.Match[str]) -> str:
        return f"{match[0].lower()}_{{99}}" if match[0] in both else match[0]

    return [TOKEN.sub(renamed, formula) for formula in formulas]


def _tokens(formula: str) -> list[re.Match[str]]:
    return [match for match in TOKEN.finditer(formula) if match["command"] is None]


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
    main(float(sys.argv[1]), int(sys.argv[2]))
