"""Chain sums: reasoning-gym's ``chain_sum`` as a task whose every step a program can check.

The question is reasoning-gym's own text, the final answer goes to reasoning-gym's own scorer. The
solver's style is one step per line from left to right, then the answer::

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
from typing import TYPE_CHECKING, Any, Literal

from selfteach.errors import DataError
from selfteach.types import Case, Critique, CritiqueStep, Problem, Verdict

if TYPE_CHECKING:
    import numpy as np
    from reasoning_gym.arithmetic.chain_sum import ChainSumDataset

SplitName = Literal["train", "validation", "test"]

PREFIX = "State the final answer to the following arithmetic problem: "
"""What every question of the generator begins with."""

SHOTS = ("8 + 5 - 6", "9 - 2 + 4", "7 - 3 - 1", "6 + 9 + 3", "5 + 0 - 2")
"""The worked examples of the template set; no problem set holds them."""

SPLIT_PARTS: dict[SplitName, range] = {
    "test": range(1),
    "validation": range(1, 2),
    "train": range(2, 10),
}
"""Which tenths of all questions belong to which split."""

DRAWS_PER_PROBLEM = 200
"""Questions drawn per problem wanted before the generator counts as exhausted."""

SEED_STRIDE = 10**9
"""Between the generator's seeds: it seeds question i with seed + i."""

SLIPS = (-10, -2, -1, 1, 2, 10)
"""By how much a critic that errs misses the value of a step."""

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
    """The terms of a chain sum: ``8 + 2 - 7`` is ``Chain((8, 2, 7), "++-")``."""

    terms: tuple[int, ...]
    signs: str
    """``+`` or ``-`` before each term; the first is always ``+``."""

    def value(self, count: int | None = None) -> int:
        """The sum of the first ``count`` terms, by default of all."""
        return sum(self.signed(0, count))

    def signed(self, start: int, stop: int | None) -> list[int]:
        """Terms from ``start`` to ``stop`` with their signs in their values."""
        signed = [t if s == "+" else -t for t, s in zip(self.terms, self.signs, strict=True)]
        return signed[start:stop]

    def __len__(self) -> int:
        return len(self.terms)


@dataclass(frozen=True, slots=True)
class CheckedLine:
    """One line of an answer, and what is wrong with it."""

    text: str
    is_answer: bool
    """True if the line states the final answer."""
    error: str | None
    """``form`` (not a step), ``operands`` (a true or false sum, but not the next one) or ``value``
    (the right sum with a wrong result); None if the line is right."""
    terms_done: int
    """Terms that are added up once this line is read, if it is right; else those before it."""


@dataclass(frozen=True, slots=True)
class CheckedChainSum:
    """An answer line by line."""

    lines: tuple[CheckedLine, ...]
    answer: str | None
    """The final answer in canonical form, None if none is stated."""

    @property
    def first_error(self) -> int | None:
        """Index of the first wrong line, None if every line is right."""
        return next((i for i, line in enumerate(self.lines) if line.error), None)

    @property
    def terms_done(self) -> int:
        """Terms that the right lines before the first error have added up."""
        right = self.lines[: self.first_error]
        return right[-1].terms_done if right else 1


def problem_sets(
    *, seed: int, min_terms: int, max_terms: int, max_digits: int,
    train: int, validation: int, test: int, allow_negative: bool = False,
) -> tuple[tuple[Problem, ...], tuple[Problem, ...], tuple[Problem, ...]]:  # fmt: skip
    """Train, validation and test problems, the same for the same arguments.

    A question's text alone decides its split, so no two splits share a question, whatever the seed.
    Unless ``allow_negative``, questions whose running value falls below zero are left out. Raises
    `DataError` if reasoning-gym is missing or has too few distinct questions of this kind.
    """
    wanted: dict[SplitName, int] = {"train": train, "validation": validation, "test": test}
    found: dict[SplitName, list[Problem]] = {split: [] for split in wanted}
    for question, answer in _distinct(seed, min_terms, max_terms, max_digits, sum(wanted.values())):
        chain, split = parse_question(question), split_of(question)
        lowest = min(chain.value(count) for count in range(1, len(chain) + 1))
        if len(found[split]) == wanted[split] or (lowest < 0 and not allow_negative):
            continue
        found[split].append(_problem(f"{split}-{len(found[split])}", question, answer, chain))
        if all(len(found[name]) == count for name, count in wanted.items()):
            return tuple(found["train"]), tuple(found["validation"]), tuple(found["test"])
    short = ", ".join(f"{len(found[name])} of {count} {name}" for name, count in wanted.items())
    raise DataError(
        f"chain sums of {min_terms}-{max_terms} terms with up to {max_digits} digits: too few "
        f"distinct questions ({short}); ask for fewer problems, or for more terms or digits"
    )


def split_of(question: str) -> SplitName:
    """The split a question belongs to, from a hash of its text."""
    tenth = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big") % 10
    return next(split for split, parts in SPLIT_PARTS.items() if tenth in parts)


def parse_question(question: str) -> Chain:
    """The terms of a question. Raises `DataError` if it is no chain sum."""
    expression = question.removeprefix(PREFIX).removesuffix("=").strip()
    if not re.fullmatch(r"\d+(?: [-+] \d+)*", expression):
        raise DataError(f"not a chain sum: {question!r}")
    words = expression.split()
    return Chain(tuple(map(int, words[::2])), "".join(["+", *words[1::2]]))


def split_spans(text: str) -> list[tuple[int, int]]:
    """One step per line that is not blank, as spans of characters; the answer is a step too."""
    return [match.span() for match in re.finditer(r"[^\n]*\S[^\n]*", text)]


def parse_answer(text: str) -> str | None:
    """The last final answer that a text states, as a plain number; None if it states none."""
    stated = [
        found for start, end in split_spans(text) if (found := _ANSWER.match(text[start:end]))
    ]
    return _canonical(stated[-1].group(1)) if stated else None


def write_answer(answer: str) -> str:
    """The shortest text that states an answer."""
    return f"Answer: {answer}"


def verify(problem: Problem, text: str) -> Verdict:
    """Right if reasoning-gym's scorer gives the stated answer full marks."""
    parsed = parse_answer(text)
    score = _scorer().score_answer(parsed, {"answer": problem.answer})
    return Verdict.of_final(score == 1.0, parsed)


def check(problem: Problem, text: str) -> CheckedChainSum:
    """Check every line of an answer against the true running values.

    A line is right if it takes the sum on from the last right line, with the next term or several,
    to the true value. The operands of an addition may be swapped; numbering and bullets don't
    count. The line of the answer is right if its value is. After a wrong line the check goes on
    from the true value before it.
    """
    chain = _chain(problem)
    lines: list[CheckedLine] = []
    done = 1
    for start, end in split_spans(text):
        line = text[start:end].strip()
        stated = _ANSWER.match(line)
        if stated:
            error = None if _canonical(stated.group(1)) == problem.answer else "value"
        else:
            error, done = _check_step(line, chain, done)
        lines.append(CheckedLine(line, stated is not None, error, done))
    return CheckedChainSum(tuple(lines), parse_answer(text))


def criticise(
    problem: Problem,
    text: str,
    *,
    finished: bool,
    error_rate: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Critique:
    """Repeat an answer's right lines verbatim, correct the earliest error, continue from there.

    Case A: all right; B: a right answer with steps missing; C: cut at the token limit; D: wrong.
    With probability ``error_rate`` the critic errs instead: it misses the value of the step it
    corrects (of a right answer: of a random step) and goes on from the wrong value.
    """
    checked = check(problem, text)
    stop, slip = checked.first_error, 0
    if error_rate > 0:
        assert rng is not None, "a critic that errs needs a random stream"
        if rng.random() < error_rate:
            slip = int(rng.choice(SLIPS))
            stop = _random_step(checked, rng) if stop is None else stop
    return _trace(problem, checked, stop, slip, finished)


def _trace(
    problem: Problem, checked: CheckedChainSum, stop: int | None, slip: int, finished: bool
) -> Critique:
    """The critique that keeps the lines before ``stop`` and is off by ``slip`` from there on."""
    chain = _chain(problem)
    kept = checked.lines[:stop]
    done = kept[-1].terms_done if kept else 1
    steps = [CritiqueStep(line.text, "kept", line.text) for line in kept if not line.is_answer]
    added = _steps_from(chain, done, slip)
    wrong = checked.lines[stop] if stop is not None and stop < len(checked.lines) else None
    if wrong is not None and not wrong.is_answer and added:
        steps.append(CritiqueStep(added.pop(0), "fixed", wrong.text))
    steps += [CritiqueStep(step, "new") for step in added]
    return Critique(
        _case(problem, checked, finished), tuple(steps), str(chain.value() + slip), stop
    )


def _case(problem: Problem, checked: CheckedChainSum, finished: bool) -> Case:
    if not finished:
        return "C"
    if checked.first_error is not None or checked.answer != problem.answer:
        return "D"
    return "A" if checked.terms_done == len(_chain(problem)) else "B"


def _random_step(checked: CheckedChainSum, rng: np.random.Generator) -> int:
    """Index of a random step of a right answer, or past its end if it has none."""
    steps = [i for i, line in enumerate(checked.lines) if not line.is_answer]
    return int(rng.choice(steps)) if steps else len(checked.lines)


def _check_step(line: str, chain: Chain, done: int) -> tuple[str | None, int]:
    """What is wrong with a line of equations, and how many terms are added up after it."""
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


def _signed(first: str, operations: str) -> list[Decimal]:
    """The numbers of an equation's left side, with their signs."""
    numbers = [Decimal(_canonical(first))]
    for sign, number in _OPERATION.findall(operations):
        value = Decimal(_canonical(number))
        numbers.append(value if sign == "+" else -value)
    return numbers


def _steps_from(chain: Chain, done: int, slip: int = 0) -> list[str]:
    """The steps from the first ``done`` terms on, in the solver's style, off by ``slip``."""
    steps, before = [], chain.value(done)
    for count in range(done, len(chain)):
        after = chain.value(count + 1) + slip
        steps.append(f"{before} {chain.signs[count]} {chain.terms[count]} = {after}")
        before = after
    return steps


def _canonical(number: str) -> str:
    """A number without thousands separators, superfluous signs and zeros: ``+1,010.0`` is 1010."""
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
    """Another derivation in other words: all that is added, all that is taken away, the rest."""
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
    seed: int, min_terms: int, max_terms: int, max_digits: int, wanted: int
) -> Iterator[tuple[str, str]]:
    """Distinct questions and answers in the generator's order, without the templates' examples."""
    if min_terms > max_terms:
        raise DataError(f"data.min_terms = {min_terms} is larger than data.max_terms = {max_terms}")
    draws = DRAWS_PER_PROBLEM * wanted
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
