"""HTTP with a vLLM server: what it answers, and what becomes of what it refuses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import openai

from selfteach.config.engine_section import VllmServerConfig
from selfteach.errors import EngineError
from selfteach.rollout.vllm.vllm_engine import EngineUnavailable

BUSY = (408, 409, 429)


class Http:
    """OpenAI's client, for addresses that OpenAI does not have too.

    Raises `EngineError` when built without the key that is named.
    """

    def __init__(self, config: VllmServerConfig, timeout_s: float | None = None) -> None:
        self.url, self._key_env = config.url, config.api_key_env
        self._timeout_s = timeout_s or config.timeout_seconds
        self._client = openai.OpenAI(
            base_url=config.url, api_key=_key(config), timeout=self._timeout_s, max_retries=0
        )

    def get(self, path: str) -> Any:
        """What is said there. Raises what `post` raises."""
        return self._said(path, None, passing=True)

    def post(self, path: str, body: Mapping[str, Any], *, passing: bool = False) -> Any:
        """What a server says to this body.

        Raises `EngineUnavailable` if nobody answers in time, and where errors of the server's own (5xx) may be
        ``passing``; `Missing` for an address or a model that is not there; else `EngineError`.
        """
        return self._said(path, body, passing=passing)

    def _said(self, path: str, body: Mapping[str, Any] | None, *, passing: bool) -> Any:
        try:
            if body is None:
                return self._client.get(path, cast_to=object)
            return self._client.post(path, cast_to=object, body=dict(body))
        except openai.APITimeoutError:
            raise EngineUnavailable(f"no reply within {self._timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            raise EngineUnavailable(_one_line(str(error.__cause__ or error))) from None
        except openai.APIStatusError as error:
            said = _one_line(_message(error))
            if error.status_code in (401, 403):
                how = f"the key in {self._key_env} is wrong" if self._key_env else "name your key"
                raise EngineError(f"engine: {self.url}: {how} (engine.api_key_env)") from None
            if error.status_code == 404:
                raise Missing(f"engine: {self.url}{path}: {said}") from None
            if error.status_code in BUSY or (passing and error.status_code >= 500):
                raise EngineUnavailable(said) from None
            raise EngineError(f"engine: {self.url}{path} refuses: {said}") from None
        except (openai.OpenAIError, ValueError) as error:
            raise EngineUnavailable(_one_line(f"a reply that cannot be read: {error}")) from None


class Missing(EngineError):
    """An address, a model or an adapter that a server does not have."""


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
    return f"{error.status_code}, {body.get('message') or error.response.text or 'nothing more'}"


def _one_line(reason: str) -> str:
    return " ".join(reason.split())[:240]
