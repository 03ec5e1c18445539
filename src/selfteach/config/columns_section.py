"""Defines ``[data.columns]`` and ``[data.split]``: what rows hold, and how a pool of them is split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from selfteach.config.schema import Section

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Columns(Section):
    """Names the columns of a row.

    A column is a dotted path (``extra.answers.0``), optionally followed by rules, each after a
    bar: ``answer | after:####``. Rules: ``after:X`` and ``before:X`` (the last X), ``boxed`` (the
    content of the last ``\\boxed{}``), ``first`` and ``last`` (of a list), ``join:X`` (a list).
    Text with braces is a template: ``{context}\\n\\n{question}``.
    """

    question: str = "question"
    """Column of the question: a text, or a list of messages with ``role`` and ``content`` whose last is
    the user's. Where rows have no ``question``: ``prompt``, ``problem`` or ``messages``."""
    answer: str = "answer"
    """Column of the final answer. Where rows have no ``answer``: ``final_answer``,
    ``expected_answer``, ``ground_truth``, ``reward_model.ground_truth`` or ``solution`` (the content
    of its last ``\\boxed{}``, if it has one). Empty: there is none, and tests decide alone."""
    history: str | None = None
    """Column of messages before the question, a list with ``role`` and ``content``; unset: the column
    ``history``, where it holds such a list."""
    reference: str | None = None
    """Column of a worked solution; unset: the column ``reference``, where there is one."""
    aligned_reference: str | None = None
    """Column of a worked solution in the policy's style; unset: the column of this name, where there is
    one."""
    id: str | None = None
    """Column of the problem's id; unset: the column ``id``, else a hash of question and answer."""
    meta: str | tuple[str, ...] | None = None
    """Column with a table of metadata, or names of columns to keep as metadata; unset: the column
    ``meta``."""


class Splitting(Section):
    """Splits a pool into train, validation and test by a hash of each question and the seed.

    With ``by`` it is a hash of a value of the row, and no two splits share a value. Sizes are all
    counts or all shares. With shares the hash alone decides a question's split, so a pool that grows
    moves no question.
    """

    seed: int = 0
    """Seed of the hash."""
    by: str | None = None
    """Dotted path of a value that no two splits share, such as a column with the document, or
    ``meta.reasoning_gym.metadata.template``; unset: no two splits share a question."""
    train: Count | Share | None = None
    """Size of the training split; unset: all problems that are in no other split."""
    validation: Count | Share | Literal[0] = 0.1
    """Size of the validation split."""
    test: Count | Share | Literal[0] = 0.1
    """Size of the test split."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Splitting:
        sizes = [size for size in (self.train, self.validation, self.test) if size]
        if len({type(size) for size in sizes}) > 1:
            raise ValueError("give validation, test and train all as counts or all as shares")
        if sizes and isinstance(sizes[0], float) and sum(sizes) > 1 + 1e-9:
            raise ValueError(f"the shares add up to {sum(sizes):g}, which is more than 1")
        return self
