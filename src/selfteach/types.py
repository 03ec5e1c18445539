"""Define the records of one training step, one per stage.

    Problem -> Rollout -> Verdict -> Critique -> TrainingSample -> Batch

Each stage adds a record that holds the earlier one; none changes an earlier record.

Axis letters, used as suffixes everywhere (``logp_NV`` is indexed by rollout token, then vocabulary):

    B  rollouts in a batch           T  positions of a padded sequence (prompt and rollout)
    N  sampled tokens of a batch, one rollout after another (ragged, no padding)
    V  vocabulary                    H  hidden width               K  entries kept by top-K
    C  rollout tokens in one chunk of N
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from selfteach.episodes import Segment, Segmented

if TYPE_CHECKING:  # torch takes seconds to import, and analysis does without it
    import torch
    from torch import Tensor

StepStatus = Literal["kept", "fixed", "new"]
Case = Literal["A", "B", "C", "D"]
CritiqueFailureKind = Literal[
    "empty", "truncated", "malformed", "misaligned", "wrong_answer", "refused", "unavailable"
]
"""Why a critic's reply is not a usable critique: it is empty; it was truncated at the token limit; it
does not have the format of a rollout; it is about something else; its final answer is wrong; the server
refuses this request for good; or there was no reply."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Holds a question and its verifiable answer.

    Example (the lab)::

        Problem(id="test-17", question="c a f f e d", answer="k",
                references={"reference": "1 < f f : b ...", "aligned_reference": "0 + c a = d ..."})
    """

    id: str
    question: str
    answer: str
    references: Mapping[str, str] = field(default_factory=dict)
    """Worked solutions by name: ``reference`` is the dataset's; a source may offer others."""
    meta: Mapping[str, object] = field(default_factory=dict)
    """Extra values for the source's verifier or critic; JSON-serialisable."""
    place: str = field(default="", compare=False, repr=False)
    """File and row, like ``problems-17``, of a problem whose row has no id, or the row's id if it names
    another problem too: what its id was in earlier versions. Empty for a problem with an id."""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The row that the problem was read from, for rewards, with the question's value as ``prompt``;
    empty if the recipe has no ``[reward]``, or there is no row."""
    history: tuple[tuple[str, str], ...] = ()
    """Messages before the question, as (role, content): a system message, earlier turns of user and
    assistant. Empty for a question alone."""

    @property
    def transcript(self) -> str:
        """Return the conversation that ends in the question as one text; a lone question as it is."""
        if not self.history:
            return self.question
        turns = (*self.history, ("user", self.question))
        return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in turns)

    @property
    def label(self) -> str:
        """Return what a person finds the problem by: its place, or its id."""
        return self.place or self.id


@dataclass(frozen=True, slots=True)
class Rollout(Segmented):
    """Holds one sampled completion or episode: its token ids, and the text decoded from them."""

    problem: Problem
    sample: int
    """Index in its group, from 0."""
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """All ids after the prompt: sampled ones with the end token, and an environment's, as rendered."""
    logps: tuple[float, ...]
    """Log-probability of each sampled token under the sampling distribution (nats); 0 elsewhere."""
    text: str  # without special tokens and thoughts; of an episode, `episode_text`
    finished: bool
    """False if a limit ended the rollout: a token limit, or an event among `LIMITS`."""
    policy_version: int
    """Optimizer updates of the weights that sampled this rollout."""
    segments: tuple[Segment, ...] = ()
    """Who wrote which tokens, in order; empty: a single answer, all of it the model's."""
    observation: str = ""
    """What an environment showed behind the question."""
    verdict: Verdict | None = None
    """An environment's verdict; None: the task's verifier gives one."""

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.logps) > 0
        self.require_tiling()

    @property
    def key(self) -> tuple[str, int]:
        """Identifies a rollout within a step: problem id and sample."""
        return self.problem.id, self.sample


@dataclass(frozen=True, slots=True)
class Sampling:
    """Holds the sampling settings: group size, temperature, length, seed, cuts of the distribution."""

    samples: int
    """Rollouts per problem (group size)."""
    temperature: float
    """Divides the logits; 0 is greedy."""
    max_tokens: int
    seed: int
    top_p: float = 1.0
    """Smallest total probability of the likeliest tokens to sample from; 1: all tokens."""
    top_k: int = 0
    """Number of likeliest tokens to sample from; 0: all tokens."""
    min_p: float = 0.0
    """Smallest probability to sample, as a share of the likeliest token's; 0: all tokens."""

    @property
    def is_cut(self) -> bool:
        """Return True if some tokens cannot be sampled."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Holds a verifier's result for one rollout."""

    correct: bool
    formatted: bool
    """True if a final answer could be parsed."""
    parsed: str | None
    """The final answer in canonical form, for majority votes; None if there is none."""
    feedback: str | None = None
    """The environment's message about a wrong answer, without the right one; None for a right answer or
    an environment without messages."""
    timed_out: bool = False
    """True if the verifier gave up on the comparison, which then counts as wrong."""
    evidence: Mapping[str, object] | None = None
    """What a run of the answer has shown, for critics: which test, which line; JSON-serialisable."""
    rewards: Rewards | None = None
    """The rewards of the recipe; None without ``[reward]``."""

    @property
    def reward(self) -> float | None:
        """Return the total reward: without ``[reward]`` 1 or 0; None if no reward applies."""
        return float(self.correct) if self.rewards is None else self.rewards.total

    @classmethod
    def of_final(cls, correct: bool, parsed: str | None) -> Verdict:
        """Build the verdict of a verifier that reads the final answer alone."""
        if correct:
            return cls(True, True, parsed)
        feedback = f"The final answer {parsed} is wrong." if parsed else "There is no final answer."
        return cls(False, parsed is not None, parsed, feedback)


@dataclass(frozen=True, slots=True)
class CritiqueStep:
    """Holds one step of the critic's corrected trace."""

    text: str
    """The corrected step, in the policy's words and order."""
    status: StepStatus
    """``kept`` (verbatim), ``fixed`` (the first error, corrected) or ``new`` (the continuation)."""
    original: str | None = None
    """The policy's text of this step, where it wrote one."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts what a critique cost; every field is zero for a critic that is a program."""

    requests: int = 0
    """Requests that got a reply from the critic, repeated ones included."""
    cached: int = 0
    """Requests whose reply was in the reply cache."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Tokens of the requests that were sent; a cached reply costs nothing."""
    cost: float = 0.0
    """Cost at the recipe's prices, in their currency."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, f) + getattr(other, f) for f in self.__slots__))


@dataclass(frozen=True, slots=True)
class Rewards:
    """Holds the rewards of one rollout by their names; None where a reward does not apply."""

    total: float | None
    """Weighted sum of the rewards that apply; None if none does."""
    values: Mapping[str, float | None]
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why a judge gave no number, by its name."""
    usage: Usage = field(default_factory=Usage)
    """What the judges cost."""
    logged: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """What functions logged with ``log_metric``, in the record of the first rollout of their batch."""


@dataclass(frozen=True, slots=True)
class CriticSolution:
    """Holds a critic's own solution of a question, written without sight of a rollout."""

    text: str | None
    """None if there is no reply, or an empty or truncated one."""
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class Critique:
    """Holds a critic's corrected trace of one rollout (paper, step-aligned feedback)."""

    case: Case
    """A all correct, B justification missing, C truncated, D wrong."""
    steps: tuple[CritiqueStep, ...]
    answer: str
    first_error: int | None
    """Index of the rollout's first wrong step; None if no step is wrong."""
    usage: Usage = Usage()


ReplaceSteps = Callable[[Critique, str, Sequence[bool]], Critique]
"""Maps (critique, reference, whether each step is retained) to a critique whose other steps are the
reference's."""


@dataclass(frozen=True, slots=True)
class CritiqueFailure:
    """Describes why a rollout has no critique."""

    reason: str
    """Counted as a metric; a `CritiqueFailureKind` for critics that write text."""
    detail: str = ""
    """What was wrong, for a person to read."""
    usage: Usage = Usage()
    reply: str = ""
    """The beginning of the critic's reply, for a person to read."""
    answer: str | None = None
    """The critic's final answer, where it gave one."""


@dataclass(frozen=True, slots=True)
class CritiquedRollout:
    """Holds a rollout with its verdict and its critique."""

    rollout: Rollout
    verdict: Verdict
    critique: Critique | CritiqueFailure | None
    """None without a critic."""


@dataclass(frozen=True, slots=True)
class FirstChange:
    """Describes where a critique departs from its rollout.

    Example: for a rollout of steps of 5, 5, 5 tokens whose second step is repeated for three tokens
    and then changed, it is ``FirstChange(step=1, token=8, fidelity=8 / 15)``.
    """

    step: int | None
    """Index of the first step that is not repeated verbatim; None if all are."""
    token: int | None
    """Index of the first token that is not repeated; None if all are."""
    fidelity: float
    """Share of the answer's tokens (without the thought) before that token; 1 if all are repeated."""


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """Holds a critiqued rollout with its teacher prompt, ready for the loss.

    With ``teacher_prompt_ids`` it is distilled; with ``dropped`` it is not, and the reason is counted.
    GRPO uses its verdict either way.
    """

    critiqued: CritiquedRollout
    context: str | None = None
    """What the teacher is shown, as text."""
    teacher_prompt_ids: tuple[int, ...] | None = None
    dropped: str | None = None
    first_error_token: int | None = None
    """Index into ``token_ids`` where the first wrong step begins; None if there is none."""
    change: FirstChange | None = None
    """Where the critique departs from the rollout; None without a critique."""
    changed_spans: tuple[tuple[int, int], ...] = ()
    """The solution steps that the critique changes, as half-open ranges of ``token_ids``."""
    scored_from: int = 0
    """Index into ``token_ids`` of the first scored token; later than 0 if a thought is not scored."""
    unscored: tuple[tuple[int, int], ...] = ()
    """Ranges of ``token_ids`` with later turns' thoughts, if these are not scored."""
    steps: tuple[tuple[int, int], ...] = ()
    """The solution steps as half-open ranges of characters of the text, the final answer last."""

    @property
    def rollout(self) -> Rollout:
        """Return the rollout itself."""
        return self.critiqued.rollout


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """Holds the weight of each token of one sample in the loss of the step.

    ``weights`` has one entry per rollout token, denominators included: the loss is the sum of weights
    times losses. A token of weight 0 is treated as absent, and so are an environment's tokens.
    """

    weights: tuple[float, ...]
    advantage: float = 0.0
    """The rollout's group-relative advantage (GRPO); unused by distillation."""
    shares: tuple[float, ...] | None = None
    """Distillation's share of each token's weight in a hybrid objective, from 0 to 1."""


class OnDevice:
    """Is a record of tensors, some of which may be None, numbers or records of tensors."""

    __slots__ = ()

    def to(self, device: torch.device) -> Self:
        """Move the record to another device."""
        values = [getattr(self, name) for name in self.__slots__]
        return type(self)(*(x.to(device) if hasattr(x, "to") else x for x in values))


@dataclass(frozen=True, slots=True)
class TokenTree(OnDevice):
    """Holds B sequences as the paths of a tree of U nodes: each distinct prefix is there once.

    Tokens that all sequences share and that are run before (`models.prefix_cache`) are not in the tree.
    """

    ids_1U: Tensor
    positions_1U: Tensor
    path_BL: Tensor
    """The node of each sequence's tokens; arbitrary beyond its end."""
    first_U: Tensor
    """Index into the flattened paths where each node appears first."""
    columns_N: Tensor
    """The nodes whose hidden states predict the rollouts' tokens."""
    keys_K: Tensor
    """The nodes of the paths, end to end. A path's queries are the nodes that it adds, its last."""
    query_starts: Tensor
    key_starts: Tensor
    """Where each path that adds nodes begins among these and in ``keys_K``; then their number."""
    longest: tuple[int, int]
    """Most queries and most keys of a path."""


@dataclass(frozen=True, slots=True)
class Sequences(OnDevice):
    """Holds prompts with their rollouts appended, right-padded, and where the sampled tokens are.

    ``hidden[rows_N, columns_N]`` is the state that *predicts* rollout token n: the column before the
    token. There is no attention mask: under causal attention no state that is read sees padding.
    """

    ids_BT: Tensor
    rows_N: Tensor
    columns_N: Tensor
    shared: int = 0
    """Number of leading tokens that are the same in every row, before any that is read: run once."""
    tree: TokenTree | None = None
    """The same sequences as paths of a tree, where that saves work."""


@dataclass(frozen=True, slots=True)
class Batch(OnDevice):
    """Holds a micro-batch: student and teacher sequences with the same rollout tokens."""

    student: Sequences
    teacher: Sequences | None
    ids_N: Tensor
    """The rollouts' token ids, the same for student and teacher."""
    weight_N: Tensor
    """Factor of each token's loss, denominators included."""
    advantage_N: Tensor
    sampled_logp_N: Tensor
    """The engine's log-probability of each token under the sampling distribution (nats)."""
    old_logp_N: Tensor | None = None
    """The trainer's log-probability before the first of several updates; None during the first."""
    share_N: Tensor | None = None
    """Distillation's share of each token's weight; None for a single objective."""
    sequence_logratio_N: Tensor | None = None
    """Mean log-ratio to the old policy over the tokens of each token's rollout; None: per token."""
    sequence_weight_N: Tensor | None = None
    """Mean importance weight over the tokens of each token's rollout; None: per token."""
