"""Sections of a recipe that say who marks the answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import Field

from selfteach.config.schema import Section

FailurePolicy = Literal["retry", "drop", "fallback"]
"""What becomes of an answer without a usable critique: ask again (and then drop it), drop it, or
teach it with the context that ``fallback`` names."""


class FailurePolicies(Section):
    """A policy for everything that can come back instead of a critique."""

    empty: FailurePolicy = "retry"
    truncated: FailurePolicy = "drop"
    malformed: FailurePolicy = "retry"
    misaligned: FailurePolicy = "retry"
    """The critique is about something else."""
    wrong_answer: FailurePolicy = "drop"
    """The critic's own final answer is wrong."""
    unavailable: Literal["stop", "drop", "fallback"] = "stop"
    """No reply after all retries; ``stop`` ends the run, which a resume takes up."""


class OracleConfig(Section):
    """A program that can check every step (the lab, chain sums)."""

    type: Literal["oracle"] = "oracle"
    error_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of critiques in which the critic errs."""


class TextCriticConfig(Section):
    """What all critics that write have in common; they are asked with ``critic.jinja``."""

    sees_reference: bool = False
    """Show the critic the problem's reference solution."""
    thinking: bool | None = None
    """Passed to the critic's chat template; by default its own. A thought is stripped."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    max_tokens: int = Field(default=4096, ge=1)
    max_attempts: int = Field(default=2, ge=1)
    """Requests for one critique, the first included: a critique that failed is requested again where
    ``on_failure`` says ``retry``."""
    retry_temperature: float = Field(default=0.7, gt=0)
    min_similarity: float = Field(default=0.3, ge=0, le=1)
    """A critique that keeps no step is misaligned if its first step is less like the answer's."""
    on_failure: FailurePolicies = FailurePolicies()
    fallback: Literal["reference", "aligned_reference"] = "reference"
    reply_cache: str | None = None
    """SQLite file of all replies ever paid for; by default one in the user's cache folder."""


class EndpointConfig(TextCriticConfig):
    """Any OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, hosted APIs."""

    type: Literal["endpoint"]
    base_url: str
    """Like ``http://localhost:8000/v1``."""
    model: str
    api_key_env: str | None = None
    """The environment variable that holds the key; the key itself is never written anywhere."""
    concurrency: int = Field(default=16, ge=1)
    timeout_seconds: float = Field(default=600.0, gt=0)
    http_retries: int = Field(default=16, ge=0)
    """Enough for a server that is gone for a minute: pauses of 76 to 104 s in all."""
    healthcheck: bool = True
    """Ask at the start whether the server is there; false for a run whose replies are all stored."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    price_prompt: float = Field(default=0.0, ge=0)
    """Per million tokens sent, for the budget."""
    price_completion: float = Field(default=0.0, ge=0)
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """What the server takes beyond OpenAI's parameters, like ``chat_template_kwargs``."""
    control_tokens: tuple[Annotated[str, Field(min_length=2)], ...] = ()
    """Control tokens of the served model beyond those of the common families (``<|…|>``, ``[INST]``,
    ``<start_of_turn>``, …): its tokenizer would obey them in an answer, so they are broken by a
    character without width before they are sent."""


class LocalCriticConfig(TextCriticConfig):
    """A transformers model in this process."""

    type: Literal["local"]
    path: str
    """As in ``model.path``."""
    gguf_file: str | None = None
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = False
    batch_size: int = Field(default=16, ge=1)
    prompt_lookup: int | None = Field(default=None, ge=1)
    """Guess so many tokens at a time from what stands in the prompt after the same words: a critique
    repeats the answer. A greedy critique stays the same; requests are then taken one by one, so it pays
    where ``batch_size`` would be small."""


class PolicyCriticConfig(TextCriticConfig):
    """The solver's own initial weights."""

    type: Literal["policy"]
    batch_size: int = Field(default=16, ge=1)


class RecordedConfig(Section):
    """Critiques of an earlier run, by question and answer text."""

    type: Literal["recorded"]
    run: str
    """A run folder; or a study's folder, whose runs are all read."""


CriticConfig = Annotated[
    Union[OracleConfig, EndpointConfig, LocalCriticConfig, PolicyCriticConfig, RecordedConfig],  # noqa: UP007
    Field(discriminator="type"),
]
