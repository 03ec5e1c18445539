"""Generates, verifies and critiques chain sums: reasoning-gym's ``chain_sum``, checked step by step.

The questions are reasoning-gym's, and its scorer judges the final answer. The solver's style is one
step per line from left to right, then the answer::

    8 + 2 = 10
    10 - 7 = 3
    Answer: 3
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, Any

from selfteach.config.data_section import SplitName
from selfteach.errors import DataError
from selfteach.tasks.segmentation import nonblank_lines
from selfteach.types import Case, Critique, CritiqueStep, Problem, Verdict

if TYPE_CHECKING:
    import numpy as np
    from reasoning_gym.arithmetic.chain_sum import ChainSumDataset

PREFIX = "State the final answer to the following arithmetic problem: "
"""The beginning of every question of the generator."""

SHOTS = ("8 + 5 - 6", "9 - 2 + 4", "7 - 3 - 1", "6 + 9 + 3", "5 + 0 - 2")
"""The few-shot examples of the template set; no problem set holds them."""

SPLIT_TENTHS: dict[SplitName, range] = {
    "test": range(1),
    "validation": range(1, 2),
    "train": range(2, 10),
}
"""The tenths of all questions that belong to each split."""

DRAWS_PER_PROBLEM = 200
"""Questions drawn per requested problem before the generator counts as exhausted."""

SEED_STRIDE = 10**9
"""Distance between the generator's seeds: it seeds question i with seed + i."""

CRITIC_OFFSETS = (-10, -2, -1, 1, 2, 10)
"""What a critic that errs adds to the true value of a step."""

MAX_LINE = 1_000
"""Characters of a line that is parsed; a longer one is neither a step nor an answer."""

_NUMBER = r"[-+−]?\d[\d,]*(?:\.\d+)?"
_TERM = rf"\s*[-+−–]\s*(?:{_NUMBER}|\({_NUMBER}\))"
_EQUATION = re.compile(rf"({_NUMBER})((?:{_TERM})+)\s*=\s*({_NUMBER})(?![\d.,]*\d)")
_OPERATION = re.compile(rf"([-+−–])\s*\(?({_NUMBER})\)?")
_FILLER = re.compile(
    r"step\s*\d+\s*[:.)]?|\d+[.)](?=\s)|[•-](?=\s)|\b(?:so|then|and|next|first)\b|[\s.,;:`*$\\]+",
    re.IGNORECASE,
)
_ANSWER = re.compile(
    rf"^[\s*#>-]*(?:so,?\s+)?(?:the\s+)?(?:final\s+)?(?:answer|result)"
    rf"(?:\s+to\b[^\d:=]*?)?(?:\s+is)?\s*[:=]?[\s*$`]*({_NUMBER})[\s*$`.]*$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Chain:
    """Holds the terms of a chain sum: ``8 + 2 - 7`` is ``Chain((8, 2, 7), "++-")``."""

    terms: tuple[int, ...]
    signs: str
    """The sign before each term, ``+`` or ``-``; the first is always ``+``."""

    def value(self, count: int | None = None) -> int:
        """Return the sum of the first ``count`` terms, by default of all."""
        return sum(self.signed(0, count))

    def signed(self, start: int, stop: int | None) -> list[int]:
        """Return the signed values of the terms from ``start`` to ``stop``."""
        signed = [t if s == "+" else -t for t, s in zip(self.terms, self.signs, strict=True)]
        return signed[start:stop]

    def __len__(self) -> int:
        return len(self.terms)


@dataclass(frozen=True, slots=True)
class CheckedLine:
    """Holds one line of an answer, and what is wrong with it."""

    text: str
    is_answer: bool
    """True if the line states the final answer."""
    error: str | None
    """``form`` (not a step), ``operands`` (a true or false sum, but not the next one) or ``value``
    (the right sum with a wrong result); None if the line is right."""
    terms_done: int
    """Number of terms added up after this line if it is right, else before it."""


@dataclass(frozen=True, slots=True)
class CheckedChainSum:
    """Holds an answer, checked line by line."""

    lines: tuple[CheckedLine, ...]
    answer: str | None
    """The final answer in canonical form, None if none is stated."""

    @property
    def first_error(self) -> int | None:
        """Return the index of the first wrong line, None if every line is right."""
        return next((i for i, line in enumerate(self.lines) if line.error), None)

    @property
    def terms_done(self) -> int:
        """Return the number of terms that the lines before the first error have added up."""
        right = self.lines[: self.first_error]
        return right[-1].terms_done if right else 1


def problem_sets(
    *, seed: int, min_terms: int, max_terms: int, max_digits: int,
    train: int, validation: int, test: int, allow_negative: bool = False,
) -> tuple[tuple[Problem, ...], tuple[Problem, ...], tuple[Problem, ...]]:  # fmt: skip
    """Generate train, validation and test problems, the same for the same arguments.

    A question's text alone decides its split, so no two splits share a question, whatever the seed.
    Unless ``allow_negative``, questions whose running value falls below zero are left out. Raises
    `DataError` if reasoning-gym is missing or has too few distinct questions of this kind.
    """
    sizes: dict[SplitName, int] = {"train": train, "validation": validation, "test": test}
    splits: dict[SplitName, list[Problem]] = {split: [] for split in sizes}
    for question, answer in _distinct(seed, min_terms, max_terms, max_digits, sum(sizes.values())):
        chain, split = parse_question(question), split_of(question)
        lowest = min(chain.value(count) for count in range(1, len(chain) + 1))
        if len(splits[split]) == sizes[split] or (lowest < 0 and not allow_negative):
            continue
        splits[split].append(_problem(f"{split}-{len(splits[split])}", question, answer, chain))
        if all(len(splits[name]) == size for name, size in sizes.items()):
            return tuple(splits["train"]), tuple(splits["validation"]), tuple(splits["test"])
    short = ", ".join(f"{len(splits[name])} of {size} {name}" for name, size in sizes.items())
    raise DataError(
        f"chain sums of {min_terms}-{max_terms} terms with up to {max_digits} digits: too few "
        f"distinct questions ({short}); request fewer problems, or more terms or digits"
    )


def split_of(question: str) -> SplitName:
    """Return the split of a question, from a hash of its text."""
    tenth = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big") % 10
    return next(split for split, tenths in SPLIT_TENTHS.items() if tenth in tenths)


def parse_question(question: str) -> Chain:
    """Parse the terms of a question. Raises `DataError` if it is no chain sum."""
    expression = question.removeprefix(PREFIX).removesuffix("=").strip()
    if not re.fullmatch(r"\d+(?: [-+] \d+)*", expression):
        raise DataError(f"not a chain sum: {question!r}")
    words = expression.split()
    return Chain(tuple(map(int, words[::2])), "".join(["+", *words[1::2]]))


def split_spans(text: str) -> list[tuple[int, int]]:
    """Return one step per line that is not blank, as spans of characters; the answer is a step too."""
    return nonblank_lines(text)


def parse_answer(text: str) -> str | None:
    """Parse the last final answer that a text states, as a plain number; None if it states none."""
    for start, end in reversed(split_spans(text)):
        if match := _ANSWER.match(_compact(text[start:end])):
            return _canonical(match.group(1))
    return None


def write_answer(answer: str) -> str:
    """Return the shortest text that states an answer."""
    return f"Answer: {answer}"


def verify(problem: Problem, text: str) -> Verdict:
    """Return the verdict on a text: right if reasoning-gym's scorer gives the answer a score of 1."""
    parsed = parse_answer(text)
    score = _scorer().score_answer(parsed, {"answer": problem.answer})
    return Verdict.of_final(score == 1.0, parsed)


def check(problem: Problem, text: str) -> CheckedChainSum:
    """Check every line of an answer against the true running values.

    A line is right if it continues the sum from the last right line, with one or more further terms,
    to the true value. The operands of an addition may be swapped; numbering and bullets are ignored.
    The answer line is right if its value is. After a wrong line the check continues from the true
    value before it.
    """
    chain = _chain(problem)
    lines: list[CheckedLine] = []
    done = 1
    for start, end in split_spans(text):
        line = text[start:end].strip()
        stated = _ANSWER.match(_compact(line))
        if stated:
            error = None if _canonical(stated.group(1)) == problem.answer else "value"
        else:
            error, done = _check_step(line, chain, done)
        lines.append(CheckedLine(line, stated is not None, error, done))
    return CheckedChainSum(tuple(lines), parse_answer(text))


def critique_rollout(
    problem: Problem,
    text: str,
    *,
    finished: bool,
    error_rate: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Critique:
    """Repeat an answer's right lines verbatim, correct the earliest error, continue from there.

    Case A: all right; B: a right answer with steps missing; C: truncated at the token limit; D: wrong.
    With probability ``error_rate`` the critic errs instead: it writes a wrong value for the step it
    corrects (of a right answer: for a random step) and continues from the wrong value.
    """
    checked = check(problem, text)
    stop, offset = checked.first_error, 0
    if error_rate > 0:
        assert rng is not None, "a critic that errs needs a random stream"
        if rng.random() < error_rate:
            offset = int(rng.choice(CRITIC_OFFSETS))
            stop = _random_step(checked, rng) if stop is None else stop
    return _trace(problem, checked, stop, offset, finished)


def _trace(
    problem: Problem, checked: CheckedChainSum, stop: int | None, offset: int, finished: bool
) -> Critique:
    """Build the critique that repeats the lines before ``stop`` and is off by ``offset`` after them."""
    chain = _chain(problem)
    prefix = checked.lines[:stop]
    done = prefix[-1].terms_done if prefix else 1
    steps = [CritiqueStep(line.text, "kept", line.text) for line in prefix if not line.is_answer]
    added = _steps_from(chain, done, offset)
    wrong = checked.lines[stop] if stop is not None and stop < len(checked.lines) else None
    if wrong is not None and not wrong.is_answer and added:
        steps.append(CritiqueStep(added.pop(0), "fixed", wrong.text))
    steps += [CritiqueStep(step, "new") for step in added]
    return Critique(
        _case(problem, checked, finished), tuple(steps), str(chain.value() + offset), stop
    )


def _case(problem: Problem, checked: CheckedChainSum, finished: bool) -> Case:
    if not finished:
        return "C"
    if checked.first_error is not None or checked.answer != problem.answer:
        return "D"
    return "A" if checked.terms_done == len(_chain(problem)) else "B"


def _random_step(checked: CheckedChainSum, rng: np.random.Generator) -> int:
    """Draw the index of a step of a right answer, or return the index past its end if it has none."""
    steps = [i for i, line in enumerate(checked.lines) if not line.is_answer]
    return int(rng.choice(steps)) if steps else len(checked.lines)


def _check_step(line: str, chain: Chain, done: int) -> tuple[str | None, int]:
    """Return what is wrong with a line of equations, and how many terms are added up after it."""
    line = _compact(line)
    equations = list(_EQUATION.finditer(line))
    if not equations or _FILLER.sub("", _EQUATION.sub(" ", line)):
        return "form", done
    now = done
    for equation in equations:
        first, operations, result = equation.groups()
        numbers = _signed(first, operations)
        following = chain.signed(now, now + len(numbers) - 1)
        expected = [chain.value(now), *following]
        swapped = expected[::-1] if len(expected) == 2 else expected
        if len(expected) < len(numbers) or numbers not in (expected, swapped):
            return "operands", done
        now += len(following)
        if _canonical(result) != str(chain.value(now)):
            return "value", done
    return None, now


def _compact(line: str) -> str:
    """Return a line with runs of white space as one space; "" if it is too long to be parsed.

    The patterns take quadratic time in a line's length, so they see short lines only.
    """
    return "" if len(line) > MAX_LINE else " ".join(line.split())


def _signed(first: str, operations: str) -> list[Decimal]:
    """Return the signed numbers of an equation's left side."""
    numbers = [Decimal(_canonical(first))]
    for sign, number in _OPERATION.findall(operations):
        value = Decimal(_canonical(number))
        numbers.append(value if sign == "+" else -value)
    return numbers


def _steps_from(chain: Chain, done: int, offset: int = 0) -> list[str]:
    """Write the steps after the first ``done`` terms in the solver's style, off by ``offset``."""
    steps, before = [], chain.value(done)
    for count in range(done, len(chain)):
        after = chain.value(count + 1) + offset
        steps.append(f"{before} {chain.signs[count]} {chain.terms[count]} = {after}")
        before = after
    return steps


def _canonical(number: str) -> str:
    """Strip thousands separators, superfluous signs and zeros: ``+1,010.0`` becomes ``1010``."""
    value = Decimal(number.replace(",", "").replace("−", "-"))
    return str(int(value)) if value == value.to_integral_value() else str(value.normalize())


def _problem(name: str, question: str, answer: str, chain: Chain) -> Problem:
    references = {
        "reference": _grouped(chain),
        "aligned_reference": "\n".join([*_steps_from(chain, 1), f"Answer: {answer}"]),
    }
    meta = {"terms": list(chain.terms), "signs": chain.signs}
    return Problem(name, question, answer, references, meta)


def _grouped(chain: Chain) -> str:
    """Write another derivation in other words: the sum of what is added less the sum of what is not."""
    pairs = list(zip(chain.terms, chain.signs, strict=True))
    added = [term for term, sign in pairs if sign == "+"]
    taken = [term for term, sign in pairs if sign == "-"]
    lines = [_group("added", added), _group("taken away", taken)]
    lines.append(f"{sum(added)} less {sum(taken)} leaves {chain.value()}.")
    return "\n".join([*lines, f"Answer: {chain.value()}"])


def _group(what: str, numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers)) if numbers else "none"
    return f"Numbers {what}: {listed}. Their total is {sum(numbers)}."


def _chain(problem: Problem) -> Chain:
    terms, signs = problem.meta.get("terms"), problem.meta.get("signs")
    if not isinstance(terms, list | tuple) or not isinstance(signs, str):
        raise DataError(f"problem {problem.id!r} is no chain sum: its meta has no terms and signs")
    return Chain(tuple(map(int, terms)), signs)


def _distinct(
    seed: int, min_terms: int, max_terms: int, max_digits: int, problem_count: int
) -> Iterator[tuple[str, str]]:
    """Yield distinct questions and answers in the generator's order, without the few-shot examples."""
    if min_terms > max_terms:
        raise DataError(f"data.min_terms = {min_terms} is larger than data.max_terms = {max_terms}")
    draws = DRAWS_PER_PROBLEM * problem_count
    source = _generator(
        seed=seed * SEED_STRIDE, size=draws,
        min_terms=min_terms, max_terms=max_terms, max_digits=max_digits,
    )  # fmt: skip
    seen = {f"{PREFIX}{shot} =" for shot in SHOTS}
    for index in range(draws):
        item = source[index]
        if item["question"] not in seen:
            seen.add(item["question"])
            yield item["question"], item["answer"]


@cache
def _scorer() -> ChainSumDataset:
    return _generator(size=1)


def _generator(**settings: Any) -> ChainSumDataset:
    try:
        from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset
    except ImportError:
        raise DataError(
            'data.type = "chain_sums" needs reasoning-gym: pip install "selfteach[problems]"'
        ) from None
    return ChainSumDataset(ChainSumConfig(**settings))
