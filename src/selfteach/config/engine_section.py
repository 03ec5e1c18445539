"""Defines ``[engine]``: what samples the rollouts."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field, field_validator

from selfteach.config.schema import Section
from selfteach.config.server_address import is_http, refuse_credentials
from selfteach.errors import EngineError


class TransformersEngineConfig(Section):
    """Samples with the model that trains, in the trainer's process."""

    type: Literal["transformers"] = "transformers"
    """The model that trains."""


class VllmEngineConfig(Section):
    """Holds what both vLLM engines have in common."""

    tolerance: float = Field(default=0.5, gt=0)
    """Largest difference, in nats, between the engine's and the trainer's log-probabilities of a fixed
    prompt after a weight sync; beyond it the run ends. 0.001 where both compute in float32."""


class VllmServerConfig(VllmEngineConfig):
    """Samples with a vLLM server over HTTP, on this machine or another."""

    type: Literal["vllm_server"]
    """A vLLM server."""
    url: str = "http://127.0.0.1:8000"
    """Address of the server, without ``/v1``."""
    model: str
    """Name of the model at the server (``--served-model-name``)."""
    api_key_env: str | None = None
    """Environment variable that holds the key; the key itself is never written anywhere."""
    folder: str | None = None
    """Folder through which new weights reach the server, which must see it under the same path; unset:
    a folder for temporary files on this machine."""
    concurrency: int = Field(default=64, ge=1)
    """Requests in flight at a time."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest wait for one rollout, or for a weight sync."""
    patience_seconds: float = Field(default=120.0, ge=0)
    """Longest time that the server may be unreachable during a batch before the run ends."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        refuse_credentials(url, "engine.url", EngineError)
        if not is_http(url):
            raise ValueError("write it like http://127.0.0.1:8000")
        if url.rstrip("/").endswith("/v1"):
            raise ValueError("leave out /v1: the weight sync uses other paths of the server")
        return url.rstrip("/")


class VllmProcessConfig(VllmEngineConfig):
    """Samples with vLLM in the trainer's process, on the trainer's device."""

    type: Literal["vllm"]
    """An engine in this process."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the engine; ``auto``: the checkpoint's."""
    gpu_memory_utilization: float = Field(default=0.4, gt=0, le=1)
    """Share of the device's memory that the engine takes while it is awake."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Rollouts decoded at a time."""
    enforce_eager: bool = False
    """Use neither CUDA graphs nor compilation: slower sampling, faster start."""
    sleep: bool = True
    """On CUDA: free the engine's memory while the trainer trains (weights move to the host, the KV
    cache is dropped)."""


EngineConfig = Annotated[
    Union[TransformersEngineConfig, VllmServerConfig, VllmProcessConfig],  # noqa: UP007
    Field(discriminator="type"),
]
