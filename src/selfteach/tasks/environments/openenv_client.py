"""Runs episodes on a server of OpenEnv's protocol: a session per episode over a web socket."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from selfteach.config.environment_section import OpenEnvEnvironmentConfig
from selfteach.episodes import EnvironmentReply, Turn
from selfteach.errors import DataError
from selfteach.types import Problem, Rewards, Verdict

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection  # pyright: ignore[reportMissingImports]

OPEN_S = 20.0
"""Time limit for opening a session, in seconds."""
MAX_BYTES = 16 << 20
"""Longest message of a server."""


class OpenEnvEnvironment:
    """Implements `Environment` on a server: an action is a turn's text, a reply an observation.

    The sum of the rewards is the episode's reward, and a success if it reaches ``success``.
    """

    tools: Sequence[Mapping[str, Any]] = ()

    def __init__(self, config: OpenEnvEnvironmentConfig) -> None:
        self._config, self._total, self._last = config, 0.0, ""
        self._session: ClientConnection | None = None
        self._opened = ExitStack()

    def reset(self, problem: Problem, seed: int) -> str:
        """Open a session with a seed of 31 bits; return the first observation."""
        self._session = connect(self._config, self._opened)
        text, _ = self._request("reset", {"seed": seed % 2**31})
        return text

    def step(self, turn: Turn) -> EnvironmentReply:
        """Send a turn as an action; reply with the observation."""
        text, done = self._request("step", {self._config.action: turn.text})
        return EnvironmentReply((text,), "observation", done)

    def verdict(self) -> Verdict | None:
        """Return a success if the rewards suffice; the last observation is the feedback otherwise."""
        right = self._total >= self._config.success
        rewards = Rewards(self._total, {"environment": self._total})
        return Verdict(right, True, None, None if right else self._last or None, rewards=rewards)

    def close(self) -> None:
        """End the session."""
        self._opened.close()

    def _request(self, kind: str, data: Mapping[str, Any]) -> tuple[str, bool]:
        """Return an observation as text, and whether the episode is over; add up the reward."""
        assert self._session is not None, "reset opens the session"
        self._session.send(json.dumps({"type": kind, "data": data}))
        reply = json.loads(self._session.recv())
        result = reply.get("data", {})
        if reply.get("type") != "observation":
            raise RuntimeError(f"the server replied: {result.get('message', reply)}"[:300])
        reward = float(result.get("reward") or 0.0)
        if not math.isfinite(reward):
            raise ValueError(f"the server gave a reward of {reward}")
        self._total += reward
        self._last = self._shown(result.get("observation", {}))
        return self._last, bool(result.get("done"))

    def _shown(self, observation: Mapping[str, Any]) -> str:
        key = self._config.observation
        if key is None:
            return json.dumps(observation, ensure_ascii=False)
        if key not in observation:
            raise KeyError(f"{key!r} is not in the observation: {', '.join(observation)}")
        value = observation[key]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def connect(config: OpenEnvEnvironmentConfig, opened: ExitStack) -> ClientConnection:
    """Open a session, which ``opened`` closes.

    Raises `DataError` without the package, or if there is no such server.
    """
    try:
        from websockets.exceptions import (  # pyright: ignore[reportMissingImports]
            WebSocketException,
        )
        from websockets.sync import client  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            'environment.type = "openenv" needs the package websockets: '
            'pip install "selfteach[openenv]"'
        ) from None
    scheme, _, rest = config.url.partition("://")
    address = f"{'wss' if scheme in ('https', 'wss') else 'ws'}://{rest}/ws"
    try:
        return opened.enter_context(
            client.connect(address, open_timeout=OPEN_S, max_size=MAX_BYTES, proxy=None)
        )
    except (OSError, WebSocketException) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"environment.url = {config.url!r}: no OpenEnv server: {reason}") from None


def require_server(config: OpenEnvEnvironmentConfig) -> None:
    """Open a session and reset it once. Raises `DataError` if the server does not take part."""
    environment = OpenEnvEnvironment(config)
    try:
        environment.reset(Problem("probe", "", ""), 0)
    except DataError:
        raise
    except Exception as error:  # a server of others replies anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"environment.url = {config.url!r}: a reset failed: {reason}") from None
    finally:
        environment.close()
