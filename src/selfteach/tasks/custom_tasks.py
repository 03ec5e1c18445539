"""Builds the problems, verifier and splitter of a user's own that a recipe names, with their checks."""

from __future__ import annotations

import dataclasses
import json
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from selfteach.config.data_section import AnswerReading, Columns, CustomData
from selfteach.config.part_section import CustomPart
from selfteach.errors import DataError, PartError
from selfteach.runtime.parts import Offered, build_part, shown
from selfteach.tasks import verifiers
from selfteach.tasks.code.code_tests import with_tests
from selfteach.tasks.segmentation import Splitter
from selfteach.tasks.sources.columns import SOURCES, problem_from
from selfteach.tasks.sources.recognised import ColumnsRead
from selfteach.tasks.sources.source_row import MissingValue, Row
from selfteach.tasks.sources.splits import Splits
from selfteach.types import Problem, Verdict

SPLITS = tuple(name for name in SOURCES if name != "pool")


def broken_verdict(result: object, *_: object) -> str | None:
    """Return what is broken about a verifier's result; None if nothing is."""
    if not isinstance(result, Verdict):
        return f"returned {_named(result)} and not a Verdict (Verdict.of_final(correct, parsed))"
    fields = {
        "correct": bool, "formatted": bool, "parsed": str | None, "feedback": str | None,
    }  # fmt: skip
    for name, kind in fields.items():
        if not isinstance(value := getattr(result, name), kind):
            return f"returned a Verdict whose {name} is {_named(value)}"
    return None


def broken_spans(result: object, text: str, *_: object) -> str | None:
    """Return what is broken about a splitter's result; None if nothing is."""
    if not isinstance(result, Sequence) or isinstance(result, str):
        return f"returned {_named(result)} and not a list of (begin, end)"
    end = 0
    for span in result:
        if not (isinstance(span, Sequence) and [type(at) for at in span] == [int, int]):
            return f"returned {span!r} among its spans: each is (begin, end), two ints"
        if not end <= span[0] <= span[1] <= len(text):
            return (
                f"returned the span {tuple(span)} after {end}: spans are in order, within the text"
            )
        end = span[1]
    return None


def build_custom_verifier(
    part: CustomPart, reading: AnswerReading | None, replaced: Any, equivalent: Any = operator.eq
) -> tuple[Any, verifiers.AnswerFormat]:
    """Build a verifier, and the format of its answers.

    It may ask for ``verify`` (``replaced``, the verifier in whose place it is), and where rollouts are
    read as the recipe says for ``answer_in`` and ``read_answer``. Its methods ``write(answer)`` and
    ``equivalent(a, b)``, where it has them, write a gold answer and compare two parsed ones.
    """
    offered: dict[str, Any] = {"verify": replaced}
    answer_in = reading.answer_in if reading is not None else "tag"
    if reading is not None:
        offered |= {"answer_in": answer_in, "read_answer": verifiers.READERS[answer_in]}
    verify = build_part("verifier", part, offered, {"__call__": broken_verdict})

    def write(answer: str) -> str:
        return verifiers.write_answer(answer, answer_in)

    return verify, verifiers.AnswerFormat(
        getattr(verify, "write", write), getattr(verify, "equivalent", equivalent)
    )


def build_custom_splitter(part: CustomPart, replaced: Splitter) -> Splitter:
    """Build a splitter; it may ask for ``split_steps``, the splitter in whose place it is."""
    offered = {"split_steps": replaced}
    return build_part("splitter", part, offered, {"__call__": broken_spans})


def custom_functions(config: Any, functions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Task` with the verifier and splitter that a section names."""
    changed = dict(functions)
    verifier, steps = config.verifier, config.steps
    reading = config if isinstance(config, AnswerReading) else None
    if isinstance(verifier, CustomPart):
        usual = functions["answer_format"]
        verify, form = build_custom_verifier(
            verifier, reading, functions["verify"], usual.equivalent
        )
        if reading is None and not hasattr(verify, "write"):
            form = dataclasses.replace(form, write=usual.write)
        changed |= {"verify": verify, "answer_format": form}
    if isinstance(steps, CustomPart):
        changed["split_steps"] = build_custom_splitter(steps, functions["split_steps"])
    return changed


def custom_problems(
    config: CustomData, offered: Offered | None = None, *, need_answers: bool = True
) -> tuple[Splits, ColumnsRead]:
    """Call the part with the name of each split; rows are read like those of a file.

    Raises `PartError` or `DataError`, in one line, for what is neither a problem nor a row of one.
    """
    part = CustomPart(type=config.type, options=config.options)
    make = build_part("problems", part, offered)
    label, read = f"problems {shown(config.type)}", ColumnsRead()
    return {name: _problems(make, label, name, config, read, need_answers) for name in SPLITS}, read


def _problems(
    make: Any, label: str, split: str, config: CustomData, read: ColumnsRead, need_answers: bool
) -> list[Problem]:
    made = make(split)
    if not isinstance(made, Iterable) or isinstance(made, str | Mapping):
        raise PartError(
            f"{label}: its call({split!r}) returned {_named(made)} and not a list of problems or rows"
        )
    problems = [
        _problem(one, label, f"{split}-{i}", config, read, need_answers)
        for i, one in enumerate(made)
    ]
    id_, count = Counter(p.id for p in problems).most_common(1)[0] if problems else ("", 1)
    if count > 1:
        raise PartError(
            f"{label}: {count} problems of {split} have the id {id_!r}: each needs its own"
        )
    return problems


def _problem(
    value: Any, label: str, place: str, config: CustomData, read: ColumnsRead, need_answers: bool
) -> Problem:
    if isinstance(value, Mapping):
        row = Row(dict(value), place, place)
        try:
            problem = problem_from(
                row, config.columns or Columns(), read, keep_row=True, need_answer=need_answers
            )
            return with_tests(problem, row, config.code) if config.verifier == "code" else problem
        except MissingValue as missing:
            raise DataError(f"{label}: {place}: {missing}") from None
    if not isinstance(value, Problem):
        raise PartError(f"{label}: {place} is {_named(value)} and neither a Problem nor a row")
    for name in ("id", "question", "answer"):
        if not isinstance(text := getattr(value, name), str):
            raise PartError(f"{label}: {place}: its {name} is {_named(text)} and not a text")
    try:
        json.dumps(dict(value.meta))
    except (TypeError, ValueError) as error:
        raise PartError(f"{label}: {place}: its meta cannot be written as JSON: {error}") from None
    return value


def _named(value: object) -> str:
    if value is None:
        return "None"
    module = type(value).__module__.partition(".")[0]
    return f"a {'numpy ' if module == 'numpy' else ''}{type(value).__name__}"
