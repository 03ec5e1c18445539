"""The records of one training step, one per stage.

    Problem -> Rollout -> Verdict -> Critique -> TrainingSample -> Batch

What is said of an answer stays with the answer: stages add a record, none rewrites an earlier one.

Axis letters, used as suffixes everywhere (``logp_NV`` is indexed by answer token, then vocabulary):

    B  answers in a batch            T  positions of a padded sequence (prompt and answer)
    N  answer tokens of a batch, answers one after another (ragged, no padding)
    V  vocabulary                    H  hidden width               K  entries kept by top-K
    C  answer tokens in one chunk of N
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # who only reads what runs have written does not wait for it
    import torch
    from torch import Tensor

StepStatus = Literal["kept", "fixed", "new"]
Case = Literal["A", "B", "C", "D"]
CritiqueFailureKind = Literal[
    "empty", "truncated", "malformed", "misaligned", "wrong_answer", "unavailable"
]
"""Why a critic's text is no critique: nothing was written; it was cut at the token limit; it has not
the form of an answer; it is about something else; its own final answer is wrong; or there was no
reply at all."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its checkable answer.

    Example (the lab)::

        Problem(id="test-17", question="c a f f e d", answer="k",
                references={"reference": "1 < f f : b ...", "aligned_reference": "0 + c a = d ..."})
    """

    id: str
    question: str
    answer: str
    references: Mapping[str, str] = field(default_factory=dict)
    """Worked solutions by name: ``reference`` is the data set's own; a source may offer others."""
    meta: Mapping[str, object] = field(default_factory=dict)
    """Whatever the source's verifier or critic needs to know; must survive JSON."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer: the token ids that were sampled are the truth, the text is a view."""

    problem: Problem
    sample: int
    """Which of the group's answers this is, from 0."""
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Sampled ids, the end token included when the answer ended by itself."""
    logps: tuple[float, ...]
    """Log-probability of each sampled token under the sampling distribution (nats)."""
    text: str
    """The answer decoded, without special tokens and without a thought before it."""
    finished: bool
    """False if the answer was cut at the token limit."""
    policy_version: int
    """Number of weight updates behind the weights that sampled this answer."""

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.logps) > 0

    @property
    def key(self) -> tuple[str, int]:
        """Which answer of a step this is: problem id and sample."""
        return self.problem.id, self.sample


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to answer: how often, how freely, how long; and the seed of the random streams."""

    samples: int
    """Answers per problem."""
    temperature: float
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of an answer."""

    correct: bool
    formatted: bool
    """True if an answer could be parsed at all."""
    parsed: str | None
    """The final answer in canonical form, for majority votes; None when there is none."""
    feedback: str | None = None
    """What the environment says of a refused answer, without giving the right one away; None of an
    accepted one, and where it says nothing."""

    @classmethod
    def of_final(cls, correct: bool, parsed: str | None) -> Verdict:
        """The verdict of a verifier that looks at nothing but the final answer."""
        if correct:
            return cls(True, True, parsed)
        said = f"The final answer {parsed} is wrong." if parsed else "There is no final answer."
        return cls(False, parsed is not None, parsed, said)


@dataclass(frozen=True, slots=True)
class CritiqueStep:
    """One step of the critic's trace."""

    text: str
    """The step as it should stand, in the solver's words and order."""
    status: StepStatus
    """``kept`` (verbatim), ``fixed`` (the first error, corrected) or ``new`` (the continuation)."""
    original: str | None = None
    """The solver's own words for this step, where it wrote one."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a critique took; every field is zero for a critic that is a program."""

    requests: int = 0
    """Requests that were sent and answered, repeated ones too."""
    cached: int = 0
    """Requests whose reply was already in the store."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Tokens of the requests that were sent; a reply from the store costs nothing again."""
    cost: float = 0.0
    """At the recipe's prices, in their currency."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, f) + getattr(other, f) for f in self.__slots__))


@dataclass(frozen=True, slots=True)
class Critique:
    """A critic's corrected trace of one answer (paper, step-aligned feedback)."""

    case: Case
    """A all correct, B justification missing, C truncated, D wrong."""
    steps: tuple[CritiqueStep, ...]
    answer: str
    first_error: int | None
    """Index of the answer's first wrong step; None when no step is wrong."""
    usage: Usage = Usage()


Blend = Callable[[Critique, str, Sequence[bool]], Critique]
"""From a critique, a reference and which steps are kept to the critique with the others replaced."""


@dataclass(frozen=True, slots=True)
class CritiqueFailure:
    """Why there is no critique of an answer."""

    reason: str
    """One of a few, counted as a metric; `CritiqueFailureKind` for what a critic wrote."""
    detail: str = ""
    """What exactly was wrong, for a person to read."""
    usage: Usage = Usage()
    said: str = ""
    """The beginning of what the critic wrote, for a person to read."""
    answer: str | None = None
    """The critic's own final answer, where it gave one."""


@dataclass(frozen=True, slots=True)
class CritiquedRollout:
    """An answer with what verifier and critic say of it."""

    rollout: Rollout
    verdict: Verdict
    critique: Critique | CritiqueFailure | None
    """None when no critic was asked."""


@dataclass(frozen=True, slots=True)
class FirstChange:
    """Where a critique departs from the answer that it marks.

    Example: an answer of steps of 5, 5, 5 tokens whose second step is repeated for three tokens and
    then changed gives ``FirstChange(step=1, token=8, fidelity=8 / 15)``.
    """

    step: int | None
    """Index of the first step that is not repeated verbatim; None when all are."""
    token: int | None
    """Index of the first token that is not; None when all are."""
    fidelity: float
    """Share of the answer's tokens that stand before it, from 0 to 1; 1 when all are repeated."""


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """A marked answer, ready to learn from.

    With ``teacher_prompt_ids`` it teaches by distillation; with ``dropped`` it does not, and the reason
    is counted; GRPO learns from its verdict either way.
    """

    critiqued: CritiquedRollout
    context: str | None = None
    """What the self-teacher is shown, as text."""
    teacher_prompt_ids: tuple[int, ...] | None = None
    dropped: str | None = None
    first_error_token: int | None = None
    """Index into ``token_ids`` where the first wrong step begins; None when there is none."""
    change: FirstChange | None = None
    """Where the critique departs from the answer; None without a critique."""
    changed_spans: tuple[tuple[int, int], ...] = ()
    """The steps that the critique does not repeat, as half-open ranges of ``token_ids``."""
    scored_from: int = 0
    """Index into ``token_ids`` of the first token that counts: behind a thought that is not scored."""
    steps: tuple[tuple[int, int], ...] = ()
    """The answer's steps as half-open ranges of characters of its text, the final answer last."""

    @property
    def rollout(self) -> Rollout:
        """The answer itself."""
        return self.critiqued.rollout


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """How much each token of one sample counts in the loss of the step.

    ``weights`` has one entry per answer token, with every denominator in it: the loss is the sum of
    weights times losses. A token of weight 0 is as if it were absent.
    """

    weights: tuple[float, ...]
    advantage: float = 0.0
    """The answer's group-relative advantage (GRPO); unused by distillation."""
    shares: tuple[float, ...] | None = None
    """What part of each token's weight is distillation's where two objectives meet, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class TokenTree:
    """U places that hold every distinct beginning of B sequences once.

    Tokens that all sequences share and that are run before (`prefixes`) are not among the places.
    """

    ids_1U: Tensor
    positions_1U: Tensor
    path_BL: Tensor
    """The places of each sequence's tokens; behind its end any."""
    first_U: Tensor
    """Where in the flattened paths each place stands first."""
    columns_N: Tensor
    """The places whose states predict the answers' tokens."""

    def to(self, device: torch.device) -> TokenTree:
        """The same branches on another device."""
        return TokenTree(*(getattr(self, name).to(device) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Sequences:
    """Prompts with their answers appended, right-padded, and where the answers' tokens are.

    ``hidden[rows_N, columns_N]`` is the state that *predicts* answer token n: the column is one
    before the token's own. There is no mask: under causal attention nothing that is read stands to
    the right of padding.
    """

    ids_BT: Tensor
    rows_N: Tensor
    columns_N: Tensor
    shared: int = 0
    """Leading tokens that are the same in every row, before any that is read: run once."""
    branches: TokenTree | None = None
    """The same sequences as paths of a tree, no beginning twice, where that pays."""

    def to(self, device: torch.device) -> Sequences:
        """The same sequences on another device."""
        ids, rows, columns = (x.to(device) for x in (self.ids_BT, self.rows_N, self.columns_N))
        folded = self.branches.to(device) if self.branches else None
        return Sequences(ids, rows, columns, self.shared, folded)


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch: student and teacher sequences around the same answer tokens."""

    student: Sequences
    teacher: Sequences | None
    ids_N: Tensor
    """The answers' token ids, the same for student and teacher."""
    weight_N: Tensor
    """What each token's loss is multiplied by; denominators included."""
    advantage_N: Tensor
    sampled_logp_N: Tensor
    """The engine's log-probability of each token under the sampling distribution (nats)."""
    old_logp_N: Tensor | None = None
    """The trainer's own, before the first of several updates; None while that one is made."""
    share_N: Tensor | None = None
    """Distillation's part of each token's weight; None where there is one objective."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""

        def move(part: Any) -> Any:
            return part if part is None else part.to(device)

        return Batch(**{name: move(getattr(self, name)) for name in self.__slots__})
