"""Defines the keys that all language models have in common that critique or judge rollouts."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from selfteach.config.schema import Section
from selfteach.config.server_address import is_http, refuse_credentials
from selfteach.errors import CriticError

ParameterName = Annotated[str, Field(min_length=1)] | Literal[False]
"""The name of a parameter in a request's body, or ``false`` to leave it out."""


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


class ChatModelConfig(Section):
    """Holds how a chat model is asked, and where its replies are kept."""

    thinking: bool | None = None
    """``enable_thinking`` of the model's chat template; unset: the template's default. Thoughts are
    stripped from replies."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of the first request; 0 is greedy."""
    max_tokens: int = Field(default=4096, ge=1)
    """Longest reply in tokens, thought included."""
    max_attempts: int = Field(default=2, ge=1)
    """Requests for one rollout, the first included: a reply that failed is requested again where
    ``on_failure`` says ``retry``."""
    retry_temperature: float = Field(default=0.7, gt=0)
    """Sampling temperature of repeated requests: a greedy model would repeat itself."""
    reply_cache: str | None = None
    """SQLite file of all replies; unset: ``selfteach/critiques.sqlite`` in the user's cache folder."""

    @property
    def repeats_requests(self) -> bool:
        """Return True if a reply that is of no use is requested again."""
        return self.max_attempts > 1


class ServedModelConfig(ChatModelConfig):
    """Holds how a model at an OpenAI-compatible server is reached."""

    role: ClassVar[str] = "critic"
    """What the model is to the run, for error messages."""

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

    @model_validator(mode="after")
    def _no_credentials(self) -> Self:
        refuse_credentials(self.base_url, self.key("base_url"), CriticError)
        if not is_http(self.base_url):
            raise CriticError(
                f"{self.key('base_url')} = {self.base_url!r}: write it like http://localhost:8000/v1"
            )
        return self

    @property
    def label(self) -> str:
        """Return what the model is to the run, for error messages."""
        return self.role

    def key(self, name: str) -> str:
        """Return how an error names one of these keys: ``critic.model``."""
        return f"{self.role}.{name}"

    @property
    def request_extras(self) -> dict[str, Any]:
        """Return what a request body holds beyond OpenAI's parameters, ``thinking`` included."""
        if self.thinking is None:
            return self.extra_body
        return {"chat_template_kwargs": {"enable_thinking": self.thinking}, **self.extra_body}
