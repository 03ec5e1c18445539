"""Defines the keys that all language models have in common that critique or judge rollouts."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from selfteach.config.schema import Section
from selfteach.config.server_address import (
    is_http,
    refuse_credentials,
    require_distinct,
    require_list,
)
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

    base_url: str | None = None
    """Address of the server, like ``http://localhost:8000/v1``; ``?api-version=`` may follow."""
    base_urls: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Addresses of several servers of the same model, instead of ``base_url``: each request goes to the
    least loaded of them, if possible to one that has the beginning of its prompt in its cache."""
    model: str
    """Name of the model at the server."""
    api_key_env: str | None = None
    """Environment variable that holds the key; the key itself is never written anywhere."""
    api_key_envs: tuple[str, ...] | None = None
    """With ``base_urls``: a variable for each address, in their order, instead of ``api_key_env``. The
    same address may be listed with several keys."""
    api_key_header: str = Field(default="Authorization", pattern=r"^[A-Za-z0-9-]+$")
    """Header of the key; ``Authorization`` carries it as a bearer token, any other alone, like Azure's
    ``api-key``."""
    concurrency: int = Field(default=16, ge=1)
    """Requests in flight at a time, at each address."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest time for one exchange: connection, headers and body of one reply, whatever its status."""
    http_retries: int = Field(default=16, ge=0)
    """Retries of an HTTP request that found no server, timed out, was cut off, or got 408, 409, 429 or
    5xx; pauses grow from half a second to eight (76 to 104 s in all by default) or follow
    Retry-After. With ``base_urls`` the retries go to other members."""
    patience_seconds: float = Field(default=120.0, ge=0)
    """With ``base_urls``: longest time that a request waits while no member is available; then it has
    no reply."""
    hedge_after: float | None = Field(default=None, gt=1)
    """With ``base_urls``: a request that takes longer than so many times the median is sent to a second
    member too; the first reply counts, and both are paid for. Unset: never."""
    healthcheck: bool = True
    """Check at the start that the server is up and takes the request that runs send, with a prompt of a
    few tokens; false for a run whose replies are all cached."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Most requests per minute, evenly spaced, at each address; unset: no limit."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Most tokens per minute, prompt and reply, at each address; ``max_tokens`` of a reply count until
    it is there. Unset: no limit."""
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

    @field_validator("base_urls", mode="before")
    @classmethod
    def _is_list(cls, urls: Any) -> Any:
        require_list(urls, f"{cls.role}.base_urls", CriticError)
        return urls

    @model_validator(mode="after")
    def _addresses(self) -> Self:
        one, several = self.key("base_url"), self.key("base_urls")
        for setting, url in [
            (one, self.base_url),
            *((several, url) for url in self.base_urls or ()),
        ]:
            if url is not None:
                refuse_credentials(url, setting, CriticError)
                if not is_http(url):
                    raise CriticError(
                        f"{setting} = {url!r}: write it like http://localhost:8000/v1"
                    )
        if (self.base_url is None) == (self.base_urls is None):
            has = "neither is set" if self.base_url is None else "both are set"
            raise ValueError(f"{has}: set {one} for one server, or {several} for several")
        if self.base_urls is None:
            for key in ("api_key_envs", "hedge_after"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{self.key(key)} is for several servers: it needs {several}")
            return self
        if self.api_key_envs is not None:
            if self.api_key_env is not None:
                raise ValueError(
                    f"set {self.key('api_key_env')} or {self.key('api_key_envs')}, not both"
                )
            if len(self.api_key_envs) != len(self.base_urls):
                raise ValueError(
                    f"{self.key('api_key_envs')} has {len(self.api_key_envs)} variables for "
                    f"{len(self.base_urls)} addresses in {several}: name one for each"
                )
        require_distinct(self.base_urls, several, keys=self.api_key_envs)
        return self

    @property
    def members(self) -> tuple[Self, ...]:
        """Return the settings of each server: these, with one address and its key."""
        if self.base_urls is None:
            return (self,)
        keys = self.api_key_envs or (self.api_key_env,) * len(self.base_urls)
        one = {"base_urls": None, "api_key_envs": None, "hedge_after": None}
        return tuple(
            self.model_copy(update={**one, "base_url": url, "api_key_env": key})
            for url, key in zip(self.base_urls, keys, strict=True)
        )

    @property
    def address(self) -> str:
        """Return the address of the server, or all of them, for messages."""
        return self.base_url or ", ".join(self.base_urls or ())

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
