"""Defines ``[engine]``: what samples the rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, Union

from pydantic import Field, field_validator, model_validator

from selfteach.config.schema import Section
from selfteach.config.server_address import (
    is_http,
    refuse_credentials,
    require_distinct,
    require_list,
)
from selfteach.errors import EngineError

DEFAULT_URL = "http://127.0.0.1:8000"


class TransformersEngineConfig(Section):
    """Samples with the model that trains, in the trainer's process."""

    type: Literal["transformers"] = "transformers"
    """The model that trains."""


class VllmEngineConfig(Section):
    """Holds what both vLLM engines have in common."""

    tolerance: float = Field(default=0.5, gt=0)
    """Largest difference, in nats, between the engine's and the trainer's log-probabilities of a fixed
    prompt after a weight sync; beyond it the run ends. 0.001 where both compute in float32."""
    batch_invariant: bool = False
    """What is sampled does not depend on what else is in a batch (``VLLM_BATCH_INVARIANT=1``): slower,
    and only on GPUs of compute capability 8.0 or newer. A server must have been started with it, which
    it shows with ``VLLM_SERVER_DEV_MODE=1``; in this process it is set, where nothing is trained."""


class VllmServerConfig(VllmEngineConfig):
    """Samples with vLLM servers over HTTP, on this machine or others."""

    type: Literal["vllm_server"]
    """A vLLM server."""
    url: str | None = DEFAULT_URL
    """Address of the server, without ``/v1``."""
    urls: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Addresses of several servers, instead of ``url``: each rollout is sampled by the least loaded of
    them, if possible by one that has its prompt in its cache. All get each update's weights."""
    model: str
    """Name of the model at the server (``--served-model-name``)."""
    api_key_env: str | None = None
    """Environment variable that holds the key; the key itself is never written anywhere."""
    folder: str | None = None
    """Folder through which new weights reach the server unless they travel in memory; the server must
    see it under the same path. Unset: a folder for temporary files on this machine."""
    weight_transfer: Literal["auto", "nccl", "stream", "folder"] = "auto"
    """How new weights reach the server. ``nccl``: full weights from GPU to GPU, through vLLM's own
    weight transfer; ``stream``: in memory, to a worker extension; ``folder``: through ``folder``;
    ``auto``: the first of these that the servers were started for."""
    concurrency: int = Field(default=64, ge=1)
    """Requests in flight at a time, at each address."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest wait for one rollout, or for a weight sync."""
    patience_seconds: float = Field(default=120.0, ge=0)
    """Longest time that the server, or every server of ``urls``, may be unavailable during a batch
    before the run ends."""

    hedge_after: float | None = Field(default=None, gt=1)
    """With ``urls``: when nothing else waits, a rollout that takes longer than so many times the median
    is sampled by a second member too, from the same seed; the first one counts. Unset: never."""

    @model_validator(mode="before")
    @classmethod
    def _no_default_beside_urls(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("urls") is not None:
            return {"url": None, **values}
        return values

    @field_validator("urls", mode="before")
    @classmethod
    def _is_list(cls, urls: Any) -> Any:
        require_list(urls, "engine.urls", EngineError)
        return urls

    @field_validator("url", "urls")
    @classmethod
    def _no_slash_at_the_end(cls, urls: str | tuple[str, ...] | None) -> Any:
        if isinstance(urls, tuple):
            return tuple(url.rstrip("/") for url in urls)
        return urls if urls is None else urls.rstrip("/")

    @model_validator(mode="after")
    def _check_urls(self) -> Self:
        pairs = [("engine.url", self.url), *(("engine.urls", url) for url in self.urls or ())]
        for setting, url in pairs:
            if url is not None:
                _check_url(setting, url)
        if (self.url is None) == (self.urls is None):
            has = "neither is set" if self.url is None else "both are set"
            raise ValueError(f"{has}: set engine.url for one server, or engine.urls for several")
        if self.urls is None and self.hedge_after is not None:
            raise ValueError("engine.hedge_after is for several servers: it needs engine.urls")
        require_distinct(self.urls or (), "engine.urls")
        return self

    @property
    def members(self) -> tuple[VllmServerConfig, ...]:
        """Return the settings of each server: these, with one address."""
        if self.urls is None:
            return (self,)
        one = {"urls": None, "hedge_after": None}
        return tuple(self.model_copy(update={**one, "url": url}) for url in self.urls)

    @property
    def address(self) -> str:
        """Return the address of the server, or all of them, for messages."""
        return self.url or ", ".join(self.urls or ())


def _check_url(setting: str, url: str) -> None:
    refuse_credentials(url, setting, EngineError)
    if not is_http(url):
        raise ValueError(f"{setting} = {url!r}: write it like {DEFAULT_URL}")
    if url.endswith("/v1"):
        raise ValueError(
            f"{setting} = {url!r}: leave out /v1: the weight sync uses other paths of the server"
        )


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
