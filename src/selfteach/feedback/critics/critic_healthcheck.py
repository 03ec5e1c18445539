"""Whether a served critic is there, before anything is spent: one question at the start."""

from __future__ import annotations

import difflib

import openai

from selfteach.errors import CriticError
from selfteach.feedback.critics.endpoint import Endpoint, key_of_server

PATIENCE_S = 10.0
"""A server that has not answered by then is taken to be slow, not gone."""


def require_server(endpoint: Endpoint) -> None:
    """Ask a server once whether it is there, knows the model and takes the key.

    It is asked for its list of models; where it has none, or the model is not in it (some servers
    take names that they do not list), for one token. A server that is slow or busy (no answer in
    time, 429, 5xx) is there. Raises `CriticError` in one line.
    """
    client = openai.OpenAI(
        base_url=endpoint.base_url,
        api_key=key_of_server(endpoint),
        timeout=min(endpoint.timeout_s, PATIENCE_S),
        max_retries=0,
    )
    with client:
        try:
            listed = _listed(client, endpoint)
            if listed is None or endpoint.model not in listed:
                _ask_for_a_token(client, endpoint, listed)
        except openai.APITimeoutError:
            return
        except openai.APIConnectionError as error:
            raise CriticError(
                f"critic: nobody answers at {endpoint.base_url} "
                f"({error.__cause__ or error}): start the server, or mend critic.base_url"
            ) from None


def _listed(client: openai.OpenAI, endpoint: Endpoint) -> list[str] | None:
    """The models that a server says it has; None where it does not say."""
    try:
        return [str(model.id) for model in client.models.list().data]
    except openai.APIStatusError as error:
        _refuse_a_wrong_key(error, endpoint)
        return [endpoint.model] if _is_busy(error) else None
    except openai.APIConnectionError:
        raise
    except (openai.OpenAIError, AttributeError, TypeError, ValueError):
        return None  # something else is said there


def _ask_for_a_token(client: openai.OpenAI, endpoint: Endpoint, listed: list[str] | None) -> None:
    try:
        client.chat.completions.create(
            model=endpoint.model, messages=[{"role": "user", "content": "1"}], max_tokens=1,
            extra_body=dict(endpoint.extra_body) or None,
        )  # fmt: skip
    except openai.APIStatusError as error:
        _refuse_a_wrong_key(error, endpoint)
        if error.status_code in (404, 405) or (error.status_code == 400 and listed):
            raise CriticError(
                f"critic.model = {endpoint.model!r}: {endpoint.base_url} does not serve it "
                f"(it says {error.status_code}){_hint(endpoint.model, listed)}"
            ) from None
    except openai.APIConnectionError:
        raise
    except (openai.OpenAIError, ValueError):
        return  # what it writes is not the question here


def _refuse_a_wrong_key(error: openai.APIStatusError, endpoint: Endpoint) -> None:
    if error.status_code in (401, 403):
        named = endpoint.api_key_env
        how = f"the key in {named} is wrong" if named else "name your key in critic.api_key_env"
        raise CriticError(
            f"critic: {endpoint.base_url} lets us not in (it says {error.status_code}): {how}"
        ) from None


def _is_busy(error: openai.APIStatusError) -> bool:
    # 501 is a server that has no such list.
    return error.status_code in (408, 409, 429) or (
        error.status_code >= 500 and error.status_code != 501
    )


def _hint(model: str, listed: list[str] | None) -> str:
    if not listed:
        return ": check critic.model and critic.base_url"
    close = difflib.get_close_matches(model, listed, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(listed[:5])}"
