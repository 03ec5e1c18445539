"""Checks addresses of servers in recipes: recipes are written into every run, so they hold no secret."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

from selfteach.errors import SelfteachError

PUBLIC_PARAMETERS = re.compile(r"(?:.*[-_])?version|deployment|region|location|beta|preview", re.I)
"""Names of parameters of an address that hold no secret, like Azure's ``api-version``."""
MAX_PUBLIC_VALUE = 40
"""Characters of such a parameter's value; longer ones may be keys."""


def require_address(url: str, setting: str, error: type[SelfteachError], example: str) -> None:
    """Raise ``error`` unless a URL is one of HTTP, whole, and without credentials.

    The message names the setting and does not repeat the parts of the URL that may be secret.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise error(f"{setting} is no address: write it like {example}") from None
    # Checked first: a message about another fault would print the address.
    if _holds_credentials(url):
        raise error(
            f"{setting} holds credentials, which would be written into the run (a user, a fragment, or a "
            "parameter that is not known to be public): put the key into an environment variable and "
            f"name it in {setting.partition('.')[0]}.api_key_env"
        )
    odd = any(character.isspace() or not character.isprintable() for character in url)
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or odd:
        raise error(f"{setting} = {url!r}: write it like {example}")


def split_address(url: str) -> tuple[str, dict[str, str]]:
    """Return a URL without its parameters, and the parameters, which every request gets."""
    parts = urlsplit(url)
    return parts._replace(query="").geturl(), dict(parse_qsl(parts.query, keep_blank_values=True))


def _holds_credentials(url: str) -> bool:
    parts = urlsplit(url)
    parameters = parse_qsl(parts.query, keep_blank_values=True)
    public = all(
        PUBLIC_PARAMETERS.fullmatch(name) and len(value) <= MAX_PUBLIC_VALUE
        for name, value in parameters
    )
    unnamed = bool(parts.query) and not parameters
    return "@" in parts.netloc or bool(parts.fragment) or unnamed or not public
