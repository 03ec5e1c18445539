"""Sends HTTP requests to a vLLM server and turns its failures into our errors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import openai

from selfteach.config.engine_section import VllmServerConfig
from selfteach.errors import EngineError
from selfteach.rollout.vllm.vllm_engine import EngineUnavailable

BUSY = (408, 409, 429)
"""Statuses of a server that may accept the same request soon after."""


class HttpClient:
    """Wraps OpenAI's client, for addresses beyond OpenAI's API too.

    Raises `EngineError` when built if the environment variable of the API key is not set.
    """

    def __init__(self, config: VllmServerConfig, timeout_s: float | None = None) -> None:
        self.url, self._key_env = config.url, config.api_key_env
        self._timeout_s = timeout_s or config.timeout_seconds
        self._client = openai.OpenAI(
            base_url=config.url, api_key=_key(config), timeout=self._timeout_s, max_retries=0
        )

    def get(self, path: str) -> Any:
        """Return the parsed reply. Raises what `post` raises, server errors as transient."""
        return self._request(path, None, transient_5xx=True)

    def post(self, path: str, body: Mapping[str, Any], *, transient_5xx: bool = False) -> Any:
        """Return the parsed reply to this body.

        Raises `EngineUnavailable` if there is no reply in time, if the server is busy and, with
        ``transient_5xx``, for server errors; `NotFound` for a missing address or model; `EngineError`
        for anything else.
        """
        return self._request(path, body, transient_5xx=transient_5xx)

    def _request(self, path: str, body: Mapping[str, Any] | None, *, transient_5xx: bool) -> Any:
        try:
            if body is None:
                return self._client.get(path, cast_to=object)
            return self._client.post(path, cast_to=object, body=dict(body))
        except openai.APITimeoutError:
            raise EngineUnavailable(f"no reply within {self._timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            raise EngineUnavailable(_one_line(str(error.__cause__ or error))) from None
        except openai.APIStatusError as error:
            message = _one_line(_message(error))
            if error.status_code in (401, 403):
                fix = (
                    f"the key in {self._key_env} is wrong"
                    if self._key_env
                    else "an API key is needed"
                )
                raise EngineError(f"engine: {self.url}: {fix} (engine.api_key_env)") from None
            if error.status_code == 404:
                raise NotFound(f"engine: {self.url}{path}: {message}") from None
            if error.status_code in BUSY or (transient_5xx and error.status_code >= 500):
                raise EngineUnavailable(message) from None
            raise EngineError(f"engine: {self.url}{path} rejected the request: {message}") from None
        except (openai.OpenAIError, ValueError) as error:
            raise EngineUnavailable(_one_line(f"the reply cannot be parsed: {error}")) from None


class NotFound(EngineError):
    """Is raised when the server does not have this address, model or adapter."""


def _key(config: VllmServerConfig) -> str:
    if "@" in config.url:
        raise EngineError(
            "engine.url holds a key, which would be written into the run: put it into an environment "
            "variable and name that in engine.api_key_env"
        )
    if config.api_key_env is None:
        return "none"
    if not (key := os.environ.get(config.api_key_env, "")):
        raise EngineError(
            f"engine.api_key_env: the environment variable {config.api_key_env} is not set"
        )
    return key


def _message(error: openai.APIStatusError) -> str:
    body = error.body if isinstance(error.body, Mapping) else {}
    return f"{error.status_code}, {body.get('message') or error.response.text or 'no message'}"


def _one_line(reason: str) -> str:
    return " ".join(reason.split())[:240]
