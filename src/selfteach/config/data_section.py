"""Defines ``[data]`` and ``[select]``: problem sources, parsing of rollouts, selection."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import Field, Tag, field_validator, model_validator

from selfteach.config.code_section import CodeConfig
from selfteach.config.columns_section import Columns, Splitting
from selfteach.config.part_names import is_custom
from selfteach.config.part_section import (
    BUILT_IN,
    CUSTOM,
    CustomPart,
    CustomSplitter,
    CustomVerifier,
    custom_name_or,
    custom_or,
    spelled_out,
)
from selfteach.config.schema import Section

SplitName = Literal["train", "validation", "test"]
Steps = Literal["tags", "lines", "paragraphs", "sentences", "code"]
VerifierName = Literal["exact", "math", "code", "reasoning_gym", "lab", "chain_sums"]
GymVerifierName = Literal["reasoning_gym", "exact", "math"]
VERIFIERS: tuple[VerifierName, ...] = get_args(VerifierName)
ENVIRONMENT_ID = re.compile(r"([\w.-]+/)?[A-Za-z_][\w-]*(@[\w.+-]+)?")
"""Matches the id of an environment package, with or without its owner and its version."""
VerifierConfig = Annotated[
    Annotated[VerifierName, Tag(BUILT_IN)] | Annotated[CustomPart, Tag(CUSTOM)],
    custom_name_or("verifier", VERIFIERS),
    spelled_out("verifier", VERIFIERS),
]
GymVerifierConfig = Annotated[
    Annotated[GymVerifierName, Tag(BUILT_IN)] | Annotated[CustomPart, Tag(CUSTOM)],
    custom_name_or("verifier", VERIFIERS),
    spelled_out("verifier", VERIFIERS),
]
TextVerifierConfig = Annotated[
    Annotated[Literal["exact", "math"], Tag(BUILT_IN)] | Annotated[CustomPart, Tag(CUSTOM)],
    custom_name_or("verifier", VERIFIERS),
    spelled_out("verifier", VERIFIERS),
]
StepsConfig = Annotated[
    Annotated[Steps, Tag(BUILT_IN)] | Annotated[CustomPart, Tag(CUSTOM)],
    custom_name_or("splitter", get_args(Steps)),
    spelled_out("splitter", get_args(Steps)),
]


class ProgramData(Section):
    """Holds what problems have in common that bring a verifier and a splitter."""

    verifier: CustomVerifier = None
    """A verifier of one's own in place of the problems' own."""
    steps: CustomSplitter = None
    """A splitter into solution steps of one's own in place of the problems' own."""


class LabData(ProgramData):
    """Takes problems from the lab, a synthetic world with a small pretrained model."""

    type: Literal["lab"] = "lab"
    """Problems of the lab."""
    world: str | None = None
    """Name of the lab's world; unset: the one that the model was pretrained in."""
    max_solve_rate: float = Field(default=1.0, gt=0, le=1)
    """Keep only problems that the simulated writers of the pretraining corpus solve with a probability
    below this (the paper keeps those with an Avg@16 of its solver below 5/16)."""
    train: int = Field(default=2048, ge=1)
    """Number of training problems."""
    validation: int = Field(default=96, ge=1)
    """Number of validation problems."""
    test: int = Field(default=192, ge=1)
    """Number of test problems."""


class ChainSumsData(ProgramData):
    """Generates ``chain_sum`` of reasoning-gym: sums from left to right, one step per line."""

    type: Literal["chain_sums"] = "chain_sums"
    """Generated sums."""
    seed: int = 0
    """Seed of the generator."""
    min_terms: int = Field(default=3, ge=2)
    """Smallest number of terms."""
    max_terms: int = Field(default=4, ge=2)
    """Largest number of terms."""
    max_digits: int = Field(default=2, ge=1)
    """Largest number of digits of a term."""
    shots: int = Field(default=2, ge=0)
    """Number of worked examples before every question."""
    train: int = Field(default=512, ge=1)
    """Number of training problems."""
    validation: int = Field(default=32, ge=1)
    """Number of validation problems."""
    test: int = Field(default=64, ge=1)
    """Number of test problems."""


class CodeTasksData(ProgramData):
    """Generates small functions to write in Python, with hidden tests and worked solutions."""

    type: Literal["code_tasks"] = "code_tasks"
    """Generated functions to write; answers are run, as with ``verifier = "code"``."""
    seed: int = 0
    """Seed of the generator."""
    min_level: int = Field(default=1, ge=1, le=4)
    """Easiest level: 1 is a line or two, 2 a loop with a rule, 3 carries state along, 4 is a small
    simulation with several rules. All levels are drawn equally often."""
    max_level: int = Field(default=4, ge=1, le=4)
    """Hardest level."""
    functions: tuple[str, ...] = ()
    """Names of the functions to generate, of those levels; empty: all."""
    code: CodeConfig = CodeConfig()
    """Limits of the process that runs an answer; its names of columns are for rows alone."""
    train: int = Field(default=512, ge=1)
    """Number of training problems."""
    validation: int = Field(default=32, ge=1)
    """Number of validation problems."""
    test: int = Field(default=64, ge=1)
    """Number of test problems."""

    @model_validator(mode="after")
    def _no_columns(self) -> CodeTasksData:
        for name in ("tests", "entry_point", "setup", "prelude"):
            if getattr(self.code, name) is not None:
                raise ValueError(
                    f"data.code.{name} names a column, and generated problems have none: leave it out"
                )
        return self


class AnswerReading(Section):
    """Sets how a rollout's text is parsed and verified."""

    steps: StepsConfig = "tags"
    """What a solution step is: a tag ``<step_1>…</step_1>``, or for models that do not write tags
    (template set ``free``) a line, a paragraph or a sentence; ``code``: a statement of Python, which
    ``tags`` stand for with ``verifier = "code"``; or a splitter of one's own."""
    answer_in: Literal["tag", "boxed", "tag_or_boxed"] = "tag"
    """Where the final answer is: in ``<answer>…</answer>``, in the last ``\\boxed{…}``, or in the tag
    and, where there is none, in the box."""
    invalid_problems: Literal["warn", "drop", "stop"] = "warn"
    """What happens to a problem whose gold answer the verifier rejects, or whose corrupted gold answer
    it accepts: ``selfteach check`` names it, or it is dropped and counted, or the command stops."""
    overlong: Literal["stop", "drop"] = "stop"
    """What happens to a problem whose prompt leaves no room for a rollout of ``sampling.max_tokens`` in
    the context: the command stops, or the problem is dropped and counted. Prompts are never cut."""


class RowsData(AnswerReading):
    """Holds what sources of rows (files and Hugging Face datasets) have in common."""

    verifier: VerifierConfig = "exact"
    """How final answers are compared; ``code`` runs unit tests on an answer's code; ``reasoning_gym``,
    ``lab`` and ``chain_sums`` are for problems that were generated there; or one's own verifier."""
    code: CodeConfig = CodeConfig()
    """Tests and limits of ``verifier = "code"``."""
    mapping: str | None = None
    """A built-in mapping of columns by name (``gsm8k``, ``math``, ``openmathreasoning``, …)."""
    columns: Columns | None = None
    """Columns of a row; they override ``mapping``."""
    filter: dict[str, Any] = Field(default_factory=dict)
    """Keep rows whose column has this value, or one of these: ``{ level = [4, 5] }``."""
    limit: int | None = Field(default=None, ge=1)
    """Largest number of rows read from each source, after ``filter``; unset: all."""
    bad_rows: Literal["stop", "drop"] = "stop"
    """What happens at a row without a question or an answer: name it and stop, or drop and count it."""
    split: Splitting = Splitting()
    """How ``pool`` is split; a split that has a source (``train``, ``validation``, ``test``) gets none
    of it."""


class FilesData(RowsData):
    """Reads problems from files (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``, ``.arrow``),
    also folders of ``save_to_disk``, of whose splits each source reads the one of its name."""

    type: Literal["files"]
    """Files on disk."""
    train: str | tuple[str, ...] | None = None
    """File or files of training problems."""
    validation: str | tuple[str, ...] | None = None
    """File or files of validation problems."""
    test: str | tuple[str, ...] | None = None
    """File or files of test problems."""
    pool: str | tuple[str, ...] | None = None
    """File or files that ``split`` divides."""
    world: str | None = None
    """Name of the lab's world, for problems of the lab; unset: the one that the model was pretrained
    in."""


class HubData(RowsData):
    """Reads a Hugging Face dataset, by its id or from a local folder (also one of ``save_to_disk``)."""

    type: Literal["hub"]
    """A Hugging Face dataset."""
    path: str | None = None
    """Dataset id or folder; unset: the one of ``mapping``."""
    name: str | None = None
    """Configuration of the dataset, like ``main``."""
    revision: str | None = None
    """Branch, tag or commit of the dataset; name a commit to make a study repeatable."""
    streaming: bool = False
    """Stream rows instead of downloading all of them first; with ``limit``."""
    train: str | tuple[str, ...] | None = None
    """Dataset split or splits of training problems."""
    validation: str | tuple[str, ...] | None = None
    """Dataset split or splits of validation problems."""
    test: str | tuple[str, ...] | None = None
    """Dataset split or splits of test problems."""
    pool: str | tuple[str, ...] | None = None
    """Dataset split or splits that ``split`` divides."""


class GymData(AnswerReading):
    """Generates problems with any task of reasoning-gym."""

    type: Literal["reasoning_gym"]
    """Problems generated by reasoning-gym."""
    task: str
    """Name of the reasoning-gym task."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Settings of the task."""
    seed: int = 0
    """Seed of the generator."""
    reference: str | None = None
    """Dotted path of a worked solution in the generator's metadata; unset: built in for some tasks."""
    split_by: str | None = None
    """Dotted path in the generator's metadata: no two splits share a value of it, as ``template`` of
    ``gsm_symbolic`` (85 templates of questions); unset: no two splits share a question."""
    verifier: GymVerifierConfig = "reasoning_gym"
    """How final answers are compared; ``reasoning_gym`` is the task's scorer; or a verifier of one's
    own."""
    train: int = Field(default=512, ge=1)
    """Number of training problems."""
    validation: int = Field(default=32, ge=1)
    """Number of validation problems."""
    test: int = Field(default=64, ge=1)
    """Number of test problems."""


class EnvironmentData(AnswerReading):
    """Takes problems from an environment of the library `verifiers` (Prime Intellect).

    Its rewards are ``reward.functions = [{ type = "environment" }]``; those of several turns belong to
    the episodes of ``environment.type = "verifiers"``.
    """

    type: Literal["verifiers"]
    """An environment of `verifiers`."""
    environment: str
    """Id of an installed environment package (``gsm8k``, ``owner/gsm8k``), or the name of what makes
    one: ``./file.py:load_environment``, ``package.module:MyTaskset``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of ``load_environment``, or settings of the taskset."""
    test_options: dict[str, Any] | None = None
    """Options of a second load, over ``options``, whose problems are the test split."""
    limit: int | None = Field(default=None, ge=1)
    """Largest number of problems read from each load; unset: all."""
    split: Splitting = Splitting()
    """How problems are split; the environment's evaluation set, or ``test_options``, replaces its
    test."""
    steps: StepsConfig = "paragraphs"
    """What a solution step is, as for files."""
    answer_in: Literal["tag", "boxed", "tag_or_boxed"] = "tag_or_boxed"
    """Where the final answer is, for majority votes, contexts and critiques, as for files."""
    verifier: TextVerifierConfig | None = None
    """How final answers are compared where rewards do not decide: those of critiques, and those of
    rollouts without ``reward.success``, which then must be named; unset: as texts."""

    @property
    def part(self) -> CustomPart | None:
        """Return what makes the environment, if it is named; None for the id of a package."""
        if ":" not in self.environment:
            return None
        return CustomPart(type=self.environment, options=self.options)

    @field_validator("environment")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not (is_custom("hub_environment", name) or ENVIRONMENT_ID.fullmatch(name)):
            raise ValueError(
                f"{name!r} is no environment: name an installed package (gsm8k, owner/gsm8k), "
                "./file.py:load_environment, or package.module:name"
            )
        return name


class CustomData(AnswerReading, CustomPart):
    """Takes problems from a function or class of one's own, called with the name of each split.

    It returns `Problem` records, or rows with the columns of a file.
    """

    verifier: VerifierConfig = "exact"
    """How final answers are compared, as for files."""
    code: CodeConfig = CodeConfig()
    """Tests and limits of ``verifier = "code"``."""
    columns: Columns | None = None
    """Columns of a row, where the part returns rows."""


DataConfig = Annotated[
    Union[  # noqa: UP007
        Annotated[LabData, Tag("lab")],
        Annotated[ChainSumsData, Tag("chain_sums")],
        Annotated[CodeTasksData, Tag("code_tasks")],
        Annotated[FilesData, Tag("files")],
        Annotated[HubData, Tag("hub")],
        Annotated[GymData, Tag("reasoning_gym")],
        Annotated[EnvironmentData, Tag("verifiers")],
        Annotated[CustomData, Tag(CUSTOM)],
    ],
    custom_or(
        "problems",
        ("lab", "chain_sums", "code_tasks", "files", "hub", "reasoning_gym", "verifiers"),
    ),
]


class SelectConfig(Section):
    """Sets which problems ``selfteach select`` keeps; defaults are the paper's where it gives them."""

    pool: tuple[SplitName, ...] = ("train",)
    """Splits of ``data`` from which problems are selected; leave out a benchmark's test split."""
    samples: int = Field(default=16, ge=1)
    """Rollouts of each problem: the k of Avg@k."""
    temperature: float | None = Field(default=None, gt=0)
    """Sampling temperature; unset: that of ``sampling``."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest rollout in tokens; unset: that of ``sampling``."""
    max_solve_rate: float = Field(default=5 / 16, gt=0, le=1)
    """Keep problems whose share of correct rollouts is below this."""
    min_format_rate: float = Field(default=0.5, ge=0, le=1)
    """Keep problems of which at least this share of rollouts could be parsed. The paper
    requires well-formatted answers and gives no number."""
    critic: bool = True
    """Keep problems that the recipe's critic solves."""
    critic_test: Literal["critique", "solution"] = "critique"
    """How the critic shows that it solves a problem: by a critique of an incorrect rollout that ends in
    the right answer, or by its own solution of the question (see ``critic.solves_first``)."""
    critic_answers: int = Field(default=1, ge=1)
    """Largest number of incorrect rollouts that the critic critiques, one after another until one
    critique ends in the right answer."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampled rollouts."""
    split: Splitting = Splitting()
    """How the selected problems are split."""


ORACLE_DATA = ("lab", "chain_sums", "code_tasks")
"""Types of data with an oracle, a program that can critique rollouts."""
