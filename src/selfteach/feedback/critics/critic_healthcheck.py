"""Checks that a served critic is up before anything is spent."""

from __future__ import annotations

import difflib

import openai

from selfteach.config.critic_section import EndpointConfig
from selfteach.errors import CriticError
from selfteach.feedback.critics.endpoint import api_key

PATIENCE_S = 10.0
"""A server that has not replied within this time counts as slow, not as down."""


def require_server(config: EndpointConfig) -> None:
    """Check once that a server is up, serves the model and accepts the key.

    Requests its list of models; where it has none, or the model is not listed (some servers accept
    names that they do not list), requests one token. A slow or busy server (timeout, 429, 5xx) passes.
    Raises `CriticError` in one line.
    """
    client = openai.OpenAI(
        base_url=config.base_url,
        api_key=api_key(config),
        timeout=min(config.timeout_seconds, PATIENCE_S),
        max_retries=0,
    )
    with client:
        try:
            listed = _listed(client, config)
            if listed is None or config.model not in listed:
                _request_one_token(client, config, listed)
        except openai.APITimeoutError:
            return
        except openai.APIConnectionError as error:
            raise CriticError(
                f"critic: no server at {config.base_url} "
                f"({error.__cause__ or error}): start the server, or fix critic.base_url"
            ) from None


def _listed(client: openai.OpenAI, config: EndpointConfig) -> list[str] | None:
    """Return the models that a server lists; None if it has no such list."""
    try:
        return [str(model.id) for model in client.models.list().data]
    except openai.APIStatusError as error:
        _refuse_a_wrong_key(error, config)
        return [config.model] if _is_busy(error) else None
    except openai.APIConnectionError:
        raise
    except (openai.OpenAIError, AttributeError, TypeError, ValueError):
        return None  # no list of models at that address


def _request_one_token(
    client: openai.OpenAI, config: EndpointConfig, listed: list[str] | None
) -> None:
    try:
        client.chat.completions.create(
            model=config.model, messages=[{"role": "user", "content": "1"}], max_tokens=1,
            extra_body=config.request_extras or None,
        )  # fmt: skip
    except openai.APIStatusError as error:
        _refuse_a_wrong_key(error, config)
        if error.status_code in (404, 405) or (error.status_code == 400 and listed):
            raise CriticError(
                f"critic.model = {config.model!r}: {config.base_url} does not serve it "
                f"(HTTP {error.status_code}){_hint(config.model, listed)}"
            ) from None
    except openai.APIConnectionError:
        raise
    except (openai.OpenAIError, ValueError):
        return  # the content of the reply does not matter here


def _refuse_a_wrong_key(error: openai.APIStatusError, config: EndpointConfig) -> None:
    if error.status_code in (401, 403):
        variable = config.api_key_env
        fix = f"the key in {variable} is wrong" if variable else "name a key in critic.api_key_env"
        raise CriticError(
            f"critic: {config.base_url} denied access (HTTP {error.status_code}): {fix}"
        ) from None


def _is_busy(error: openai.APIStatusError) -> bool:
    # 501: the server has no list of models.
    return error.status_code in (408, 409, 429) or (
        error.status_code >= 500 and error.status_code != 501
    )


def _hint(model: str, listed: list[str] | None) -> str:
    if not listed:
        return ": check critic.model and critic.base_url"
    close = difflib.get_close_matches(model, listed, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; it serves {', '.join(listed[:5])}"
