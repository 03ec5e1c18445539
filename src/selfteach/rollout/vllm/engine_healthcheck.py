"""Checks before a run that a served engine is reachable and can do what the recipe needs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from selfteach.config.engine_section import VllmServerConfig
from selfteach.errors import EngineError
from selfteach.rollout.vllm.http_client import HttpClient, NotFound
from selfteach.rollout.vllm.vllm_engine import EngineUnavailable
from selfteach.rollout.vllm.weight_channel import require_transfer
from selfteach.runtime.fleet_states import states_of_members

TIMEOUT_S = 10.0
TEXT = "Question: 12 + 7 = ?\nÄnswer → <|im_end|></s> 19 \t\t ½ 数"
"""Different tokenizers encode it differently: digits, accents, spaces, control tokens of several model
families."""
ADAPTER = "selfteach-healthcheck"
"""An adapter that does not exist."""
NO_SUCH_PATH = "/nowhere/selfteach"
LORA_FLAGS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora --max-lora-rank"


@dataclass(frozen=True, slots=True)
class EngineRequirements:
    """Describes what a recipe needs of its engine."""

    adapters: bool
    """True if LoRA adapters are loaded, False if full weights are."""
    max_tokens: int
    encode: Callable[[str], Sequence[int]]
    """The trainer's tokenizer."""


def require_engine_server(config: VllmServerConfig, requirements: EngineRequirements) -> list[str]:
    """Check each server's model, its tokenizer, and that it accepts new weights; return their states.

    A member of a fleet that is down passes if another one is not. Raises `EngineError` in one line:
    what is wrong, and how to start the server.
    """
    return states_of_members(
        config.members, partial(_state, requirements=requirements),
        error=EngineError, unreachable=EngineUnavailable,
    )  # fmt: skip


def _state(config: VllmServerConfig, requirements: EngineRequirements) -> str:
    """Return the state of one server. Raises `EngineError`, `EngineUnavailable` if there is none."""
    try:
        return _require_member(config, requirements)
    except EngineUnavailable as error:
        raise EngineUnavailable(
            f"engine: no server replies at {config.address} ({error}): start the server "
            "(docs/vllm.md), or correct engine.url"
        ) from None


def _require_member(config: VllmServerConfig, requirements: EngineRequirements) -> str:
    """Check one server; return its state. Raises `EngineError`, or `EngineUnavailable` without one."""
    http = HttpClient(config, min(TIMEOUT_S, config.timeout_seconds))
    _require_model(http, config, requirements)
    _require_tokenizer(http, config, requirements)
    if requirements.adapters:
        _require_adapters(http)
    else:
        _require_developer_mode(http)
    require_transfer(config, adapters=requirements.adapters)
    return _batch_invariance(http) if config.batch_invariant else "replies"


def _batch_invariance(http: HttpClient) -> str:
    """Return the state of a server that must be batch-invariant. Raises `EngineError` if it is not."""
    try:
        is_set = http.get("/server_info")["vllm_env"]["VLLM_BATCH_INVARIANT"]
    except (NotFound, KeyError, TypeError):
        return (
            "replies; whether it is batch-invariant cannot be read: start it with "
            "VLLM_BATCH_INVARIANT=1, and with VLLM_SERVER_DEV_MODE=1 to have that checked"
        )
    if not is_set:
        raise EngineError(
            f"engine.batch_invariant = true, and {http.url} is not: start it with "
            "VLLM_BATCH_INVARIANT=1, or remove the key"
        )
    return "replies, batch-invariant"


def _require_model(
    http: HttpClient, config: VllmServerConfig, requirements: EngineRequirements
) -> None:
    try:
        cards: list[dict[str, Any]] = http.get("/v1/models")["data"]
        served = {str(card["id"]): card.get("max_model_len") for card in cards}
    except (NotFound, AttributeError, KeyError, TypeError, ValueError):
        raise EngineError(f"engine: the server at {config.address} is not vLLM") from None
    if config.model not in served:
        close = difflib.get_close_matches(config.model, list(served), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(list(served)[:5])}"
        raise EngineError(
            f"engine.model = {config.model!r}: {config.address} does not serve it; {hint}"
        )
    context = served[config.model]
    if isinstance(context, int) and context <= requirements.max_tokens:
        raise EngineError(
            f"engine: {config.address} has a context of {context} tokens, which is no more than a "
            f"rollout of {requirements.max_tokens} (sampling.max_tokens): start it with a larger "
            "--max-model-len"
        )


def _require_tokenizer(
    http: HttpClient, config: VllmServerConfig, requirements: EngineRequirements
) -> None:
    body = {"model": config.model, "prompt": TEXT, "add_special_tokens": False}
    try:
        server_ids = list(http.post("/tokenize", body, transient_5xx=True)["tokens"])
    except (NotFound, KeyError, TypeError):
        return  # started without a tokenizer: the weight check decides
    if server_ids != list(requirements.encode(TEXT)):
        raise EngineError(
            f"engine: {config.address} tokenizes text differently from model.path: it serves another "
            "model; ids would mean something else there"
        )


def _require_developer_mode(http: HttpClient) -> None:
    try:
        http.get("/weight_info")
    except NotFound:
        raise EngineError(
            f"engine: {http.url} does not accept full weights: start it with VLLM_SERVER_DEV_MODE=1 "
            "(vLLM 0.32 or newer), or train adapters ([model.lora])"
        ) from None


def _require_adapters(http: HttpClient) -> None:
    """Try to load an adapter that does not exist: the error shows what the server allows."""
    try:
        http.post("/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": NO_SUCH_PATH})
    except NotFound as error:
        if NO_SUCH_PATH in str(error):
            return  # it looked for the folder: adapters can be loaded
        raise EngineError(
            f"engine: {http.url} does not accept adapters: start it with {LORA_FLAGS}"
        ) from None
    except EngineError as error:
        if "not enabled" in str(error):
            raise EngineError(
                f"engine: {http.url} was started without LoRA: start it with {LORA_FLAGS}"
            ) from None
