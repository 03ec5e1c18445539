"""Checks that a served critic is up and takes the requests of runs, before anything is spent."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence

import openai

from selfteach.config.served_model import ServedModelConfig
from selfteach.errors import CriticError
from selfteach.feedback.critics.chat_model import Request
from selfteach.feedback.critics.completion_reader import is_refusal
from selfteach.feedback.critics.endpoint_member import (
    PROMPT,
    post_completion,
    redirected,
    served_api,
)
from selfteach.runtime.bounded_http import ServedApi, is_too_slow
from selfteach.runtime.fleet_states import states_of_members

PATIENCE_S = 10.0
"""A server that has not replied within this time counts as slow, not as down."""


def require_server(config: ServedModelConfig) -> list[str]:
    """Check once that servers are up, serve the model, accept the key and take what runs send.

    Requests each server's list of models, and then a reply with all parameters of the run's requests
    (also those of repeated requests, where a policy is ``retry``). A slow or busy server (time-out,
    429, 5xx) passes, and so does a member of a fleet that is down, if another one is not. Returns the
    state of each server. Raises `CriticError` in one line, with the servers' words.
    """
    return states_of_members(config.members, _state, error=CriticError, unreachable=Unreachable)


def _state(config: ServedModelConfig) -> str:
    """Return the state of one server. Raises `CriticError`, `Unreachable` if there is none."""
    api = served_api(config, min(config.timeout_seconds, PATIENCE_S), retries=0)
    try:
        listed = _listed(api, config)
        for attempt, temperature in _temperatures(config):
            _request(api, config, listed, attempt, temperature)
    except _Busy:
        return "busy"
    except openai.APIConnectionError as error:
        if is_too_slow(error):
            return "slow"
        raise Unreachable(_unreachable(api, error, config)) from None
    return "replies"


class Unreachable(CriticError):
    """Is raised when there is no server at an address."""


def listed_models(config: ServedModelConfig) -> list[str]:
    """Return the models that a server lists; empty if it has no list or no time.

    Raises `CriticError` if there is no server, or it refuses the key.
    """
    api = served_api(config, min(config.timeout_seconds, PATIENCE_S), retries=0)
    try:
        return _listed(api, config) or []
    except _Busy:
        return []
    except openai.APIConnectionError as error:
        raise CriticError(_unreachable(api, error, config)) from None


def _unreachable(
    api: ServedApi, error: openai.APIConnectionError, config: ServedModelConfig
) -> str:
    words = f"no server at {config.address} ({api.words(error)})"
    return f"{config.label}: {words}: start the server, or fix {config.key('base_url')}"


class _Busy(Exception):
    """Is raised when the server is up and has no time."""


def _temperatures(config: ServedModelConfig) -> Sequence[tuple[int, float]]:
    """Return the attempts of which a run sends requests, with their temperatures."""
    attempts = [(0, config.temperature)]
    # Models with a fixed temperature refuse 0, so a server that takes 0 takes any.
    if config.repeats_requests and config.parameters.temperature and config.temperature not in (
        0, config.retry_temperature
    ):  # fmt: skip
        attempts.append((1, config.retry_temperature))
    return attempts


def _listed(api: ServedApi, config: ServedModelConfig) -> list[str] | None:
    """Return the models that a server lists; None if it has no such list."""
    try:
        response = api.call(_get_models(api))
    except openai.APIStatusError as error:
        _refuse_a_wrong_key(api, error, config)
        if _is_busy(error):
            raise _Busy from None
        return None
    try:
        return [str(card["id"])[:200] for card in json.loads(response)["data"]]
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError):
        return None  # no list of models at that address


async def _get_models(api: ServedApi) -> bytes:
    return (await api.client.models.with_raw_response.list()).content


def _request(
    api: ServedApi,
    config: ServedModelConfig,
    listed: list[str] | None,
    attempt: int,
    temperature: float,
) -> None:
    request = Request((("user", PROMPT),), temperature, config.max_tokens, attempt)
    try:
        api.call(post_completion(api, config, request))
    except openai.APIStatusError as error:
        _refuse_a_wrong_key(api, error, config)
        status, words = error.status_code, redirected(error) or api.words(error)
        unknown = listed is not None and config.model not in listed
        if status in (404, 405) or (status == 400 and unknown and listed):
            raise CriticError(
                f"{config.key('model')} = {config.model!r}: {config.address} does not serve it "
                f"(HTTP {status}){_hint(config, listed)} ({words})"
            ) from None
        if is_refusal(status, words) or status < 400 or (status < 500 and not _is_busy(error)):
            raise CriticError(
                f"{config.label}: {config.address} refuses the request that runs send (HTTP {status}: "
                f"{words}): change that setting, or rename the parameter, or leave it out, in "
                f"{config.key('parameters')}"
            ) from None
        if _is_busy(error):
            raise _Busy from None


def _refuse_a_wrong_key(
    api: ServedApi, error: openai.APIStatusError, config: ServedModelConfig
) -> None:
    if error.status_code in (401, 403):
        variable = config.api_key_env
        fix = (
            f"the key in {variable} is wrong"
            if variable
            else f"name a key in {config.key('api_key_env')}"
        )
        raise CriticError(
            f"{config.label}: {config.address} denied access (HTTP {error.status_code}): {fix} "
            f"({api.words(error)})"
        ) from None


def _is_busy(error: openai.APIStatusError) -> bool:
    # 501: the server has no list of models.
    return error.status_code in (408, 409, 425, 429) or (
        error.status_code >= 500 and error.status_code != 501
    )


def _hint(config: ServedModelConfig, listed: list[str] | None) -> str:
    if not listed:
        return f": check {config.key('model')} and {config.key('base_url')}"
    close = difflib.get_close_matches(config.model, listed, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; it serves {', '.join(listed[:5])}"
