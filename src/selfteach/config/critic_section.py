"""Defines ``[critic]``: what critiques the rollouts, and what happens where it fails.

A critic is a frozen program or language model that writes critiques; it is no value function.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, Union

from pydantic import Field, Tag, field_validator, model_validator

from selfteach.config.part_section import OWN, OwnPart, own_or
from selfteach.config.schema import Section
from selfteach.config.server_address import is_http, refuse_credentials
from selfteach.errors import CriticError

FailurePolicy = Literal["retry", "drop", "fallback"]
"""What happens to a rollout without a usable critique: request another one (and then drop the rollout),
drop it at once, or train on it with the context that ``fallback`` names."""


ParameterName = Annotated[str, Field(min_length=1)] | Literal[False]
"""The name of a parameter in a request's body, or ``false`` to leave it out."""


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
    """Critiques with a program that checks every step (the lab, chain sums)."""

    type: Literal["oracle"] = "oracle"
    """A program that comes with the problems."""
    error_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of critiques in which the program makes an error on purpose."""


class LlmCriticConfig(Section):
    """Holds what all language-model critics have in common; ``critic.jinja`` is their prompt."""

    sees_reference: bool = False
    """Show the critic the problem's reference solution."""
    solves_first: bool = False
    """Ask the critic for a solution of the question first, and show it beside the rollout in the place
    of a reference: a small critic copies the errors of a rollout whose question it can solve. One
    request per problem, cached like every reply."""
    thinking: bool | None = None
    """``enable_thinking`` of the critic's chat template; unset: the template's default. Thoughts are
    stripped from replies."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of the first request; 0 is greedy."""
    max_tokens: int = Field(default=4096, ge=1)
    """Longest reply in tokens, thought included."""
    max_attempts: int = Field(default=2, ge=1)
    """Requests for one critique, the first included: a critique that failed is requested again where
    ``on_failure`` says ``retry``."""
    retry_temperature: float = Field(default=0.7, gt=0)
    """Sampling temperature of repeated requests: a greedy critic would repeat itself."""
    min_similarity: float = Field(default=0.3, ge=0, le=1)
    """A critique that repeats no step is ``misaligned`` if its first step is less similar than this to
    the rollout's first step (ratio of words in common)."""
    on_failure: FailurePolicies = FailurePolicies()
    """What happens to a rollout for each kind of failure."""
    fallback: Literal["reference", "aligned_reference"] = "reference"
    """Context of rollouts whose failure policy is ``fallback``."""
    reply_cache: str | None = None
    """SQLite file of all replies; unset: ``selfteach/critiques.sqlite`` in the user's cache folder."""

    @model_validator(mode="after")
    def _one_solution(self) -> Self:
        if self.sees_reference and self.solves_first:
            raise ValueError(
                "critic.sees_reference and critic.solves_first are both true, and the critic is shown "
                "one solution: set one of them"
            )
        return self


class RequestParameters(Section):
    """Names the parameters of a request as the server knows them; ``false`` leaves one out.

    For servers that refuse one of OpenAI's: newer models of OpenAI want
    ``max_tokens = "max_completion_tokens"`` and ``temperature = false``.
    """

    max_tokens: ParameterName = "max_tokens"
    """Name of the limit of a reply; left out, the server's own limit holds."""
    temperature: ParameterName = "temperature"
    """Name of the sampling temperature; left out, the server's default is used."""
    seed: ParameterName = "seed"
    """Name of the seed, which is the number of the attempt."""


class EndpointConfig(LlmCriticConfig):
    """Critiques with any OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, hosted APIs."""

    type: Literal["endpoint"]
    """A chat-completions server."""
    base_url: str
    """Address of the server, like ``http://localhost:8000/v1``; ``?api-version=`` may follow."""
    model: str
    """Name of the model at the server."""
    api_key_env: str | None = None
    """Environment variable that holds the key; the key itself is never written anywhere."""
    api_key_header: str = Field(default="Authorization", pattern=r"^[A-Za-z0-9-]+$")
    """Header of the key; ``Authorization`` carries it as a bearer token, any other alone, like Azure's
    ``api-key``."""
    concurrency: int = Field(default=16, ge=1)
    """Requests in flight at a time."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest time for one exchange: connection, headers and body of one reply, whatever its status."""
    http_retries: int = Field(default=16, ge=0)
    """Retries of an HTTP request that found no server, timed out, was cut off, or got 408, 409, 429 or
    5xx; pauses grow from half a second to eight (76 to 104 s in all by default) or follow
    Retry-After."""
    healthcheck: bool = True
    """Check at the start that the server is up and takes the request that runs send, with a prompt of a
    few tokens; false for a run whose replies are all cached."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Most requests per minute, evenly spaced; unset: no limit."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Most tokens per minute, prompt and reply; ``max_tokens`` of a reply count until it is there.
    Unset: no limit."""
    price_prompt: float = Field(default=0.0, ge=0)
    """Price per million prompt tokens, for the cost in the budget."""
    price_completion: float = Field(default=0.0, ge=0)
    """Price per million completion tokens, for the cost in the budget."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the request body beyond OpenAI's, like ``chat_template_kwargs``."""
    parameters: RequestParameters = RequestParameters()
    """Names of OpenAI's parameters at this server."""
    control_tokens: tuple[Annotated[str, Field(min_length=2)], ...] = ()
    """Control tokens of the served model beyond those of the common families (``<|…|>``, ``[INST]``,
    ``<start_of_turn>``, …): where a rollout quotes one, it is escaped with a zero-width character."""

    @field_validator("base_url")
    @classmethod
    def _no_credentials(cls, url: str) -> str:
        refuse_credentials(url, "critic.base_url", CriticError)
        if not is_http(url):
            raise CriticError(f"critic.base_url = {url!r}: write it like http://localhost:8000/v1")
        return url

    @property
    def request_extras(self) -> dict[str, Any]:
        """Return what a request body holds beyond OpenAI's parameters, ``thinking`` included."""
        if self.thinking is None:
            return self.extra_body
        return {"chat_template_kwargs": {"enable_thinking": self.thinking}, **self.extra_body}


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


class OwnCriticConfig(OwnPart):
    """Critiques with a class or function of one's own, a `Critic` of `selfteach.protocols`."""


CriticConfig = Annotated[
    Union[  # noqa: UP007
        Annotated[OracleConfig, Tag("oracle")],
        Annotated[EndpointConfig, Tag("endpoint")],
        Annotated[LocalCriticConfig, Tag("local")],
        Annotated[PolicyCriticConfig, Tag("policy")],
        Annotated[RecordedConfig, Tag("recorded")],
        Annotated[OwnCriticConfig, Tag(OWN)],
    ],
    own_or("critic", ("oracle", "endpoint", "local", "policy", "recorded")),
]
