"""Whether a served engine is there and can do what is wanted of it, before anything is spent."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from selfteach.config.engine_section import VllmServerConfig
from selfteach.errors import EngineError
from selfteach.rollout.vllm.http_client import Http, Missing
from selfteach.rollout.vllm.vllm_engine import EngineUnavailable

PATIENCE_S = 10.0
TEXT = "Question: 12 + 7 = ?\nÄnswer → <|im_end|></s> 19 \t\t ½ 数"
"""What tokenizers that differ read differently: digits, accents, spaces, marks of several families."""
ADAPTER = "selfteach-asks"
NOWHERE = "/nowhere/selfteach"
ENABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora --max-lora-rank"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a recipe wants of its engine."""

    adapters: bool
    max_tokens: int
    encode: Callable[[str], Sequence[int]]
    """The trainer's tokenizer."""


def require_server(config: VllmServerConfig, wanted: Wanted) -> None:
    """Ask for the model, its tokenizer, and the way that new weights will take.

    Raises `EngineError` in one line that says what is wrong and how to start the server.
    """
    http = Http(config, min(PATIENCE_S, config.timeout_seconds))
    try:
        _require_model(http, config, wanted)
        _require_tokenizer(http, config, wanted)
        if wanted.adapters:
            _require_adapters(http)
        else:
            _require_developer_mode(http)
    except EngineUnavailable as gone:
        raise EngineError(
            f"engine: nobody answers at {config.url} ({gone}): start the server (docs/vllm.md), or "
            "mend engine.url"
        ) from None


def _require_model(http: Http, config: VllmServerConfig, wanted: Wanted) -> None:
    try:
        cards: list[dict[str, Any]] = http.get("/v1/models")["data"]
        served = {str(card["id"]): card.get("max_model_len") for card in cards}
    except (Missing, KeyError, TypeError):
        raise EngineError(f"engine: what answers at {config.url} is no vLLM server") from None
    if config.model not in served:
        close = difflib.get_close_matches(config.model, list(served), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(list(served)[:5])}"
        raise EngineError(
            f"engine.model = {config.model!r}: {config.url} does not serve it; {hint}"
        )
    room = served[config.model]
    if room is not None and room <= wanted.max_tokens:
        raise EngineError(
            f"engine: {config.url} has a context of {room} tokens, which is no more than an answer of "
            f"{wanted.max_tokens} (sampling.max_tokens): start it with a larger --max-model-len"
        )


def _require_tokenizer(http: Http, config: VllmServerConfig, wanted: Wanted) -> None:
    asked = {"model": config.model, "prompt": TEXT, "add_special_tokens": False}
    try:
        theirs = list(http.post("/tokenize", asked, passing=True)["tokens"])
    except Missing:
        return  # started without a tokenizer: the fingerprint of its weights has the last word
    if theirs != list(wanted.encode(TEXT)):
        raise EngineError(
            f"engine: {config.url} reads text as other tokens than model.path: it serves another "
            "model; ids would mean something else there"
        )


def _require_developer_mode(http: Http) -> None:
    try:
        http.get("/weight_info")
    except Missing:
        raise EngineError(
            f"engine: {http.url} takes no full weights: start it with VLLM_SERVER_DEV_MODE=1 (vLLM "
            "0.32 or newer), or train adapters ([model.lora])"
        ) from None


def _require_adapters(http: Http) -> None:
    """An adapter that does not exist is refused in three ways, by what the server may do."""
    try:
        http.post("/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": NOWHERE})
    except Missing as missing:
        if NOWHERE in str(missing):
            return  # it looked for it
        raise EngineError(f"engine: {http.url} takes no adapters: start it with {ENABLE}") from None
    except EngineError as refused:
        if "not enabled" in str(refused):
            raise EngineError(
                f"engine: {http.url} was started without LoRA: start it with {ENABLE}"
            ) from None
