"""Sections of a recipe: where problems come from, how answers are read, what is selected."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import Field, model_validator

from selfteach.config.schema import Section

SplitName = Literal["train", "validation", "test"]
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class LabData(Section):
    """Problems of the lab; the world is the model's own unless named."""

    type: Literal["lab"] = "lab"
    world: str | None = None
    max_solve_rate: float = Field(default=1.0, gt=0, le=1)
    """Keep only problems that the solver's authors get right with a probability below this (the
    paper keeps those with an Avg@16 of its solver below 5/16)."""
    train: int = Field(default=2048, ge=1)
    validation: int = Field(default=96, ge=1)
    test: int = Field(default=192, ge=1)


class ChainSumsData(Section):
    """``chain_sum`` of reasoning-gym: add and subtract from left to right, one step per line."""

    type: Literal["chain_sums"] = "chain_sums"
    seed: int = 0
    min_terms: int = Field(default=3, ge=2)
    max_terms: int = Field(default=4, ge=2)
    max_digits: int = Field(default=2, ge=1)
    shots: int = Field(default=2, ge=0)
    """Worked examples that stand before every question."""
    train: int = Field(default=512, ge=1)
    validation: int = Field(default=32, ge=1)
    test: int = Field(default=64, ge=1)


class Columns(Section):
    """Which column of a row is what.

    A column is a dotted path (``extra.answers.0``), optionally with rules behind it, each after a
    bar: ``answer | after:####``. Rules: ``after:X`` and ``before:X`` (the last X), ``boxed`` (what
    stands in the last ``\\boxed{}``), ``first`` and ``last`` (of a list), ``join:X`` (a list).
    Text with braces is a template: ``{context}\\n\\n{question}``.
    """

    question: str = "question"
    answer: str = "answer"
    reference: str | None = None
    """A worked solution; by default the column ``reference``, where there is one."""
    aligned_reference: str | None = None
    """A worked solution in the solver's manner; by default the column of this name."""
    id: str | None = None
    """By default the column ``id``, or the file's name and the line."""
    meta: str | tuple[str, ...] | None = None
    """A column that holds a table, or names of columns to keep; by default the column ``meta``."""


class Splitting(Section):
    """How one pool becomes train, validation and test: by a hash of each question and the seed.

    Counts or shares. With shares a question's split depends on nothing but its text and the seed,
    so a pool that grows moves no question; train is what is left, or its own count or share.
    """

    seed: int = 0
    train: Count | Share | None = None
    validation: Count | Share | Literal[0] = 0.1
    test: Count | Share | Literal[0] = 0.1

    @model_validator(mode="after")
    def _one_kind(self) -> Splitting:
        given = [size for size in (self.train, self.validation, self.test) if size]
        if len({type(size) for size in given}) > 1:
            raise ValueError("give validation, test and train all as counts or all as shares")
        if given and isinstance(given[0], float) and sum(given) > 1 + 1e-9:
            raise ValueError(f"the shares add up to {sum(given):g}, which is more than 1")
        return self


class AnswerReading(Section):
    """How an answer's text is read and judged."""

    steps: Literal["tags", "lines", "paragraphs", "sentences"] = "tags"
    """What a step of an answer is: a tag ``<step_1>…</step_1>``, or for models that will not use tags
    (template set ``free``) a line, a paragraph or a sentence."""
    answer_in: Literal["tag", "boxed", "tag_or_boxed"] = "tag"
    """Where the final answer stands: in ``<answer>…</answer>``, in the last ``\\boxed{…}``, or in the
    tag and, where there is none, in the box."""
    invalid_problems: Literal["warn", "drop", "stop"] = "warn"
    """What becomes of a problem whose own answer the verifier rejects, or whose corrupted answer it
    accepts: ``selfteach check`` names it, or it is left out and counted, or nothing begins."""


class RowsData(AnswerReading):
    """What sources of rows have in common: files and Hugging Face datasets."""

    verifier: Literal["exact", "math", "reasoning_gym", "lab", "chain_sums"] = "exact"
    """``reasoning_gym``, ``lab`` and ``chain_sums`` for problems that came from there."""
    mapping: str | None = None
    """A ready-made mapping by name (``gsm8k``, ``math``, ``openmathreasoning``, …); what ``columns``
    says goes before it."""
    columns: Columns | None = None
    filter: dict[str, Any] = Field(default_factory=dict)
    """Keep rows whose column has this value, or one of these: ``{ level = [4, 5] }``."""
    limit: int | None = Field(default=None, ge=1)
    """Rows read of each source, after ``filter``."""
    bad_rows: Literal["stop", "drop"] = "stop"
    """A row without a question or an answer: name it and stop, or leave it out and count it."""
    split: Splitting = Splitting()
    """For ``pool``: how it becomes the splits that no source of their own is named for."""


class FilesData(RowsData):
    """Problem sets as files: JSON lines (``.jsonl``), a JSON list (``.json``) or ``.parquet``."""

    type: Literal["files"]
    train: str | tuple[str, ...] | None = None
    validation: str | tuple[str, ...] | None = None
    test: str | tuple[str, ...] | None = None
    pool: str | tuple[str, ...] | None = None
    world: str | None = None
    """The lab's world, for problems of the lab; by default the model's own."""


class HubData(RowsData):
    """A Hugging Face dataset, by its id or as a local folder (also one of ``save_to_disk``)."""

    type: Literal["hub"]
    path: str | None = None
    """By default the mapping's own."""
    name: str | None = None
    """The dataset's configuration, like ``main``."""
    revision: str | None = None
    """A branch, tag or commit; name a commit to keep a study repeatable."""
    streaming: bool = False
    """Read rows as they come instead of downloading all of them first; with ``limit``."""
    train: str | tuple[str, ...] | None = None
    """Names of the dataset's splits."""
    validation: str | tuple[str, ...] | None = None
    test: str | tuple[str, ...] | None = None
    pool: str | tuple[str, ...] | None = None


class GymData(AnswerReading):
    """Any generator of reasoning-gym, with its own scorer as verifier."""

    type: Literal["reasoning_gym"]
    task: str
    config: dict[str, Any] = Field(default_factory=dict)
    """The generator's own settings."""
    seed: int = 0
    reference: str | None = None
    """Dotted path of a worked solution in the generator's metadata; known for some generators."""
    verifier: Literal["reasoning_gym", "exact", "math"] = "reasoning_gym"
    train: int = Field(default=512, ge=1)
    validation: int = Field(default=32, ge=1)
    test: int = Field(default=64, ge=1)


DataConfig = Annotated[
    Union[LabData, ChainSumsData, FilesData, HubData, GymData],  # noqa: UP007
    Field(discriminator="type"),
]


class SelectConfig(Section):
    """Which problems ``selfteach select`` keeps; the defaults are the paper's where it gives them."""

    pool: tuple[SplitName, ...] = ("train",)
    """The splits of ``data`` that problems are taken from; a benchmark's own test split stays out."""
    samples: int = Field(default=16, ge=1)
    """The solver's answers to each problem: the k of Avg@k."""
    temperature: float | None = Field(default=None, gt=0)
    """By default as in ``sampling``."""
    max_tokens: int | None = Field(default=None, ge=1)
    max_solve_rate: float = Field(default=5 / 16, gt=0, le=1)
    """Keep problems whose share of right answers is below this."""
    min_format_rate: float = Field(default=0.5, ge=0, le=1)
    """Keep problems of which at least this share of answers could be parsed. The paper asks for
    well-formatted answers and gives no figure."""
    critic: bool = True
    """Keep problems that the recipe's critic solves: asked about a wrong answer, it ends in the
    right one."""
    critic_answers: int = Field(default=1, ge=1)
    """Wrong answers that the critic is asked about at most; one critique that ends right suffices."""
    seed: int = Field(default=0, ge=0)
    """Of the sampling."""
    split: Splitting = Splitting()


MARKED_BY_PROGRAM = ("lab", "chain_sums")
"""Kinds of data whose answers a program can mark."""
