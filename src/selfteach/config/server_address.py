"""Checks addresses of servers in recipes, which are written into every run and so hold no secret."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from selfteach.errors import SelfteachError

PUBLIC_PARAMETERS = re.compile(r"(?:.*[-_])?version|deployment|region|location|beta|preview", re.I)
"""Names of parameters of an address that hold no secret, like Azure's ``api-version``."""
SERVED_TYPES = ("endpoint", "judge", "vllm_server")
"""Values of ``type`` of sections that name servers."""
ADDRESS_KEYS = {
    "url", "urls", "base_url", "base_urls", "api_key_env", "api_key_envs", "patience_seconds",
    "hedge_after",
}  # fmt: skip
"""Keys of these sections that say which servers are used, and for how long they are waited for."""
MAX_PUBLIC_VALUE = 40
"""Characters of such a parameter's value; longer ones may be keys."""


def refuse_credentials(url: str, setting: str, error: type[SelfteachError]) -> None:
    """Raise ``error`` if a URL may hold a key; the message does not repeat it.

    To be called before anything else that might print the URL. Raised is no ValueError, which pydantic
    would report with the value that it found.
    """
    try:
        holds_a_key = _holds_a_key(url)
    except ValueError:
        raise error(f"{setting} is no address: write it like http://127.0.0.1:8000") from None
    if holds_a_key:
        raise error(
            f"{setting} holds a key, which would be written into the run (a user name, a fragment, or "
            "a parameter that is not known to be public): put it into an environment variable and name "
            f"that in {setting.partition('.')[0]}.api_key_env"
        )


def is_http(url: str) -> bool:
    """Return True for a whole URL of HTTP, without white space and control characters."""
    parts = urlsplit(url)
    printable = all(letter.isprintable() and not letter.isspace() for letter in url)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and printable


def require_list(urls: object, setting: str, error: type[SelfteachError]) -> None:
    """Raise ``error`` or ValueError if addresses are written as one text, which may hold a key."""
    if isinstance(urls, str):
        refuse_credentials(urls, setting, error)
        raise ValueError(f"{setting} is a list of addresses: write {setting} = [{urls!r}]")


def require_distinct(
    urls: Sequence[str], setting: str, *, keys: Sequence[str] | None = None
) -> None:
    """Raise ValueError if two members of a fleet are the same server (and use the same key)."""
    members = [url.rstrip("/") for url in urls]
    pairs = list(zip(members, keys or [""] * len(members), strict=True))
    for pair in pairs:
        if pairs.count(pair) > 1:
            raise ValueError(f"{setting} lists {pair[0]} twice: name each server once")


def split_address(url: str) -> tuple[str, dict[str, str]]:
    """Return a URL without its parameters, and the parameters, which every request gets."""
    parts = urlsplit(url)
    return parts._replace(query="").geturl(), dict(parse_qsl(parts.query, keep_blank_values=True))


def without_addresses(values: Any) -> Any:
    """Return a recipe without the addresses of its servers and the variables of their keys.

    Which servers of a model reply changes no result.
    """
    if isinstance(values, Mapping):
        served = values.get("type") in SERVED_TYPES
        return {
            key: without_addresses(value)
            for key, value in values.items()
            if not (served and key in ADDRESS_KEYS)
        }
    return [without_addresses(one) for one in values] if isinstance(values, list) else values


def _holds_a_key(url: str) -> bool:
    """Return True if a URL may hold a key. Raises ValueError if it cannot be read."""
    parts = urlsplit(url)
    _ = parts.port  # raises for a port that is no number
    parameters = parse_qsl(parts.query, keep_blank_values=True)
    public = all(
        PUBLIC_PARAMETERS.fullmatch(name) and len(value) <= MAX_PUBLIC_VALUE
        for name, value in parameters
    )
    unnamed = bool(parts.query) and not parameters
    return "@" in parts.netloc or bool(parts.fragment) or unnamed or not public
