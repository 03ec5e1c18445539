"""Aligns an answer's program with a worked solution: which lines correspond, and which names."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache

from selfteach.tasks.code.code_steps import is_remark

TOKEN = re.compile(
    r"""[rRbBuUfF]{0,2}(?:'''(?:[^\\]|\\.)*?'''|\"""(?:[^\\]|\\.)*?\""")"""
    r"""|[rRbBuUfF]{0,2}(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")"""
    r"""|\#[^\n]*|\d[\w.]*|[^\W\d]\w*|\s+|[-+*/<>=!%&|^:]=|[/*<>]{2}=?|->|.""",
    re.DOTALL | re.VERBOSE,
)
NAMES = frozenset({*keyword.kwlist, *keyword.softkwlist, *dir(builtins)})
"""Names that stand for themselves in every program."""
DEFINITION = re.compile(r"(?:async\s+)?(?:def|class|import|from)\b|@")
MIN_PAIR = 0.5
"""Two lines correspond if their tokens, names apart, are at least so similar."""
NAME = "‹name›"


@dataclass(frozen=True, slots=True)
class Alignment:
    """Holds a worked solution in an answer's names, and how its lines correspond to the answer's."""

    solution: tuple[str, ...]
    """Steps of the solution, its variables named as the answer's."""
    starts: tuple[int, ...]
    """For each number of leading steps of the answer, with how many of its own the solution goes on
    after: ``solution[starts[k]:]`` completes the answer's first k steps."""
    similarity: float
    """How similar the programs are, from 0 to 1: twice the similarity of corresponding lines over the
    number of all. Comments, docstrings and what a module does beside its definitions (models add an
    example of use) do not count."""


def align(answer: Sequence[str], solution: Sequence[str]) -> Alignment:
    """Align an answer's steps with a solution's, and rename the solution's variables to the answer's.

    Names correspond where they are at the same places of corresponding lines.
    """
    pairs = _pairs(answer, solution)
    renamed = tuple(_renamed(solution, _mapping(answer, solution, pairs)))
    pairs = _pairs(answer, renamed)
    starts, at = [], 0
    partner = dict(pairs)
    for index in range(len(answer)):
        starts.append(at)
        at = partner[index] + 1 if index in partner else at
    total = sum(_line_similarity(answer[a], renamed[b]) for a, b in pairs if _counts(answer[a]))
    lines = sum(map(_counts, answer)) + sum(map(_counts, renamed))
    similarity = min(1.0, 2 * total / max(1, lines))
    return Alignment(renamed, (*starts, at), similarity)


def _counts(step: str) -> bool:
    return not is_remark(step) and (step[0].isspace() or DEFINITION.match(step) is not None)


def _pairs(answer: Sequence[str], solution: Sequence[str]) -> list[tuple[int, int]]:
    """Return the pairs of corresponding lines, in order, whose similarity is the largest in all."""
    rows, columns = len(answer), len(solution)
    score = [[_likeness(a, b) for b in solution] for a in answer]
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows - 1, -1, -1):
        for j in range(columns - 1, -1, -1):
            paired = score[i][j] + best[i + 1][j + 1] if score[i][j] else 0.0
            best[i][j] = max(paired, best[i + 1][j], best[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < rows and j < columns:
        if score[i][j] and best[i][j] == score[i][j] + best[i + 1][j + 1]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def _likeness(a: str, b: str) -> float:
    """Return how much speaks for two lines being the same step; 0 if they begin as other statements."""
    first, second = anonymous(a), anonymous(b)
    if first == second:
        return 1.0 + 0.5 * (a == b)
    if not first or not second or (first[0] != second[0] and NAMES & {first[0], second[0]}):
        return 0.0
    ratio = SequenceMatcher(None, first, second, autojunk=False).ratio()
    return ratio if ratio >= MIN_PAIR else 0.0


def _line_similarity(a: str, b: str) -> float:
    return SequenceMatcher(None, tokens(a), tokens(b), autojunk=False).ratio()


@lru_cache(maxsize=2**12)
def tokens(step: str) -> tuple[str, ...]:
    """Return the tokens of a step without white space and comments."""
    return tuple(t for t in TOKEN.findall(step) if not t.isspace() and not t.startswith("#"))


@lru_cache(maxsize=2**12)
def anonymous(step: str) -> tuple[str, ...]:
    """Return the tokens of a step, every name that the program gives as the same one."""
    words = tokens(step)
    return tuple(NAME if is_given(words, index) else word for index, word in enumerate(words))


def is_given(words: Sequence[str], index: int) -> bool:
    """Return True for a name that the program gives: no built-in, keyword, attribute or argument."""
    word = words[index]
    if not word.isidentifier() or word in NAMES or (index and words[index - 1] == "."):
        return False
    is_keyword = index + 1 < len(words) and words[index + 1] == "=" and "(" in words[:index]
    return not is_keyword or words[0] in ("def", "async", "lambda")


def _mapping(
    answer: Sequence[str], solution: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> dict[str, str]:
    """Return the answer's name for each of the solution's variables, one for one."""
    votes: Counter[tuple[str, str]] = Counter()
    for a, b in pairs:
        first, second = tokens(answer[a]), tokens(solution[b])
        blocks = SequenceMatcher(None, anonymous(answer[a]), anonymous(solution[b]), autojunk=False)
        for block in blocks.get_matching_blocks():
            for offset in range(block.size):
                ours, theirs = block.a + offset, block.b + offset
                if is_given(first, ours) and is_given(second, theirs):
                    votes[second[theirs], first[ours]] += 1
    variables = _variables("\n".join(solution))
    lines = [tokens(step) for step in answer]
    used = {word for line in lines for i, word in enumerate(line) if is_given(line, i)}
    mapping: dict[str, str] = {}
    for (theirs, ours), _ in votes.most_common():
        if theirs in variables and theirs not in mapping and ours not in mapping.values():
            mapping[theirs] = ours
    for name in sorted(variables - mapping.keys()):
        if name in mapping.values():  # another variable has this name now
            mapping[name] = next(
                other for n in range(2, 100) if (other := f"{name}_{n}") not in used | variables
            )
    return mapping


def _variables(program: str) -> set[str]:
    """Return the names that a program gives to values and arguments, those of functions apart."""
    try:
        nodes = [*ast.walk(ast.parse(program))]
    except (SyntaxError, ValueError, RecursionError):
        return set()
    names = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names | {node.arg for node in nodes if isinstance(node, ast.arg)}


def _renamed(steps: Sequence[str], mapping: Mapping[str, str]) -> list[str]:
    """Return steps with names replaced; a name in an f-string stays, and the tests decide then."""
    renamed = []
    for step in steps:
        words, pieces, index = tokens(step), [], 0
        for piece in TOKEN.findall(step):
            if piece.isspace() or piece.startswith("#"):
                pieces.append(piece)
                continue
            pieces.append(mapping.get(piece, piece) if is_given(words, index) else piece)
            index += 1
        renamed.append("".join(pieces))
    return renamed
