"""Defines ``[critic]``: what critiques the rollouts, and what happens where it fails.

A critic is a frozen program or language model that writes critiques; it is no value function.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, Union

from pydantic import Field, Tag, model_validator

from selfteach.config.part_section import CUSTOM, CustomPart, custom_or
from selfteach.config.schema import Section
from selfteach.config.served_model import ChatModelConfig, ServedModelConfig

FailurePolicy = Literal["retry", "drop", "fallback"]
"""What happens to a rollout without a usable critique: request another one (and then drop the rollout),
drop it at once, or train on it with the context that ``fallback`` names."""


class FailurePolicies(Section):
    """Sets what happens to a rollout for each way in which a critique can fail.

    ``retry`` requests another critique up to ``max_attempts`` and then drops the rollout, ``drop``
    drops it at once, ``fallback`` uses the context named by ``critic.fallback``.
    """

    empty: FailurePolicy = "retry"
    """The critic returned no text, or nothing after its thought."""
    truncated: FailurePolicy = "drop"
    """The critique was cut at the critic's ``max_tokens``."""
    malformed: FailurePolicy = "retry"
    """The critique has no steps, misnumbered steps or no final answer."""
    misaligned: FailurePolicy = "retry"
    """The critique does not follow the rollout's steps (see ``min_similarity``)."""
    wrong_answer: FailurePolicy = "drop"
    """The verifier rejects the final answer of the critique."""
    refused: Literal["retry", "drop", "fallback", "stop"] = "drop"
    """The server refuses this one request for good: it is too long for the model's context, against a
    content policy, or any other HTTP 400; or the provider withheld the reply."""
    unavailable: Literal["stop", "drop", "fallback"] = "stop"
    """No reply after all HTTP retries; ``stop`` ends the run, which ``selfteach resume`` continues."""


class OracleConfig(Section):
    """Critiques with a program that checks every step (the lab, chain sums, code with solutions)."""

    type: Literal["oracle"] = "oracle"
    """A program that comes with the problems."""
    error_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of critiques in which the program makes an error on purpose."""


class LlmCriticConfig(ChatModelConfig):
    """Holds what all language-model critics have in common; ``critic.jinja`` is their prompt."""

    sees_reference: bool = False
    """Show the critic the problem's reference solution."""
    solves_first: bool = False
    """Ask the critic for a solution of the question first, and show it beside the rollout in the place
    of a reference: a small critic copies the errors of a rollout whose question it can solve. One
    request per problem, cached like every reply."""
    sees_evidence: bool = False
    """Show the critic what running the rollout's code has shown (``data.verifier = "code"``): the test
    that failed, its call, expected value and value, or the exception with its line. Only template sets
    that show ``evidence`` or ``facts``, as ``code`` does."""
    min_similarity: float = Field(default=0.3, ge=0, le=1)
    """A critique that repeats no step is ``misaligned`` if its first step is less similar than this to
    the rollout's first step (ratio of words in common)."""
    on_failure: FailurePolicies = FailurePolicies()
    """What happens to a rollout for each kind of failure."""
    fallback: Literal["reference", "aligned_reference"] = "reference"
    """Context of rollouts whose failure policy is ``fallback``."""

    @property
    def repeats_requests(self) -> bool:
        """Return True if a reply that is of no use is requested again."""
        return self.max_attempts > 1 and "retry" in self.on_failure.model_dump().values()

    @model_validator(mode="after")
    def _one_solution(self) -> Self:
        if self.sees_reference and self.solves_first:
            raise ValueError(
                "critic.sees_reference and critic.solves_first are both true, and the critic is shown "
                "one solution: set one of them"
            )
        return self


class EndpointConfig(LlmCriticConfig, ServedModelConfig):
    """Critiques with any OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, hosted APIs."""

    type: Literal["endpoint"]
    """A chat-completions server."""


class LocalCriticConfig(LlmCriticConfig):
    """Critiques with a transformers model in the trainer's process."""

    type: Literal["local"]
    """A model in this process."""
    path: str
    """Model id or folder, as in ``model.path``."""
    gguf_file: str | None = None
    """Name of a GGUF file inside ``path``; its weights are dequantised."""
    weights_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Data type of the critic's weights; ``auto`` as in ``model.weights_dtype``."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the critic; ``auto``: CUDA where there is one, else the CPU."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    batch_size: int = Field(default=16, ge=1)
    """Critiques decoded in one batch."""
    prompt_lookup: int | None = Field(default=None, ge=1)
    """Number of tokens that prompt-lookup decoding proposes at a time (a critique repeats the rollout).
    Greedy critiques stay the same; requests are then decoded one by one, so use it where
    ``batch_size`` would be small."""


class PolicyCriticConfig(LlmCriticConfig):
    """Critiques with the policy's initial weights."""

    type: Literal["policy"]
    """The model that trains, as it was before the first step."""
    batch_size: int = Field(default=16, ge=1)
    """Critiques decoded in one batch."""


class RecordedConfig(Section):
    """Replays the critiques of an earlier run, matched by question and rollout text."""

    type: Literal["recorded"]
    """Critiques of an earlier run."""
    run: str
    """A run folder, or a study's folder, all of whose runs are read."""


class CustomCriticConfig(CustomPart):
    """Critiques with a class or function of one's own, a `Critic` of `selfteach.protocols`."""


CriticConfig = Annotated[
    Union[  # noqa: UP007
        Annotated[OracleConfig, Tag("oracle")],
        Annotated[EndpointConfig, Tag("endpoint")],
        Annotated[LocalCriticConfig, Tag("local")],
        Annotated[PolicyCriticConfig, Tag("policy")],
        Annotated[RecordedConfig, Tag("recorded")],
        Annotated[CustomCriticConfig, Tag(CUSTOM)],
    ],
    custom_or("critic", ("oracle", "endpoint", "local", "policy", "recorded")),
]
