"""Sections of a recipe that say who samples the answers."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field, field_validator

from selfteach.config.schema import Section


class TransformersEngineConfig(Section):
    """The very model that trains, in this process."""

    type: Literal["transformers"] = "transformers"


class VllmEngineConfig(Section):
    """What both ways to vLLM have in common."""

    tolerance: float = Field(default=0.5, gt=0)
    """How far the engine's log-probabilities of a fixed prompt may be from the trainer's after new
    weights, in nats: more, and the run ends. 0.001 where both compute in float32."""


class VllmServerConfig(VllmEngineConfig):
    """A vLLM server over HTTP, on this machine or another."""

    type: Literal["vllm_server"]
    url: str = "http://127.0.0.1:8000"
    """Where it listens, without ``/v1``."""
    model: str
    """What the server calls the model (``--served-model-name``)."""
    api_key_env: str | None = None
    """The environment variable that holds the key; the key itself is never written anywhere."""
    folder: str | None = None
    """Where new weights are left for the server, which must see it under this name; by default one in
    this machine's folder for temporary files."""
    concurrency: int = Field(default=64, ge=1)
    """Answers that are asked for at a time."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Of one answer, and of loading new weights."""
    patience_seconds: float = Field(default=120.0, ge=0)
    """How long a server may be gone in the middle of a batch."""

    @field_validator("url")
    @classmethod
    def _an_address(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("write it like http://127.0.0.1:8000")
        if url.rstrip("/").endswith("/v1"):
            raise ValueError("leave out /v1: weights go to addresses beside it")
        return url.rstrip("/")


class VllmProcessConfig(VllmEngineConfig):
    """vLLM in this process, on the trainer's own device."""

    type: Literal["vllm"]
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the engine computes in; ``auto`` is the checkpoint's own."""
    gpu_memory_utilization: float = Field(default=0.4, gt=0, le=1)
    """Share of the device's memory that is the engine's while it is awake."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Answers decoded side by side."""
    enforce_eager: bool = False
    """No CUDA graphs, no compiling: slower, and ready sooner."""
    sleep: bool = True
    """On CUDA: give memory back while others work (weights go to the host, the cache is dropped)."""


EngineConfig = Annotated[
    Union[TransformersEngineConfig, VllmServerConfig, VllmProcessConfig],  # noqa: UP007
    Field(discriminator="type"),
]
