"""Runs episodes on a server of OpenEnv's protocol: a session per episode over a web socket."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from selfteach.config.environment_section import OpenEnvEnvironmentConfig
from selfteach.episodes import EnvironmentReply, Turn
from selfteach.errors import DataError
from selfteach.runtime.deadline_calls import CallFailure, call_all
from selfteach.types import Problem, Rewards, Verdict

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection  # pyright: ignore[reportMissingImports]

OPEN_S = 20.0
"""Time limit for opening a session, in seconds."""
MAX_BYTES = 16 << 20
"""Longest message of a server."""
PATIENCE_S = 5.0
"""Seconds that a full server has to end the sessions of earlier episodes."""
FULL = "CAPACITY_REACHED"
"""A server's code for a session that it refuses because of its number."""
PROBE = Problem("probe", "", "")


class ServerIsFull(RuntimeError):
    """Raised for a session that a server refuses: it has as many as it may."""


class OpenEnvEnvironment:
    """Implements `Environment` on a server: an action is a turn's text, a reply an observation.

    The sum of the rewards is the episode's reward, and a success if it reaches ``success``.
    """

    tools: Sequence[Mapping[str, Any]] = ()

    def __init__(self, config: OpenEnvEnvironmentConfig) -> None:
        self._config, self._total, self._last = config, 0.0, ""
        self._session: ClientConnection | None = None
        self._opened, self._is_closed = ExitStack(), False

    def reset(self, problem: Problem, seed: int) -> str:
        """Open a session with a seed of 31 bits; return the first observation.

        Raises `ServerIsFull`, and `RuntimeError` for an episode that is over before its first turn.
        """
        until = time.monotonic() + PATIENCE_S
        while True:
            self._session = connect(self._config, self._opened)
            try:
                text, done = self._request("reset", {"seed": seed % 2**31})
            except ServerIsFull:
                self._opened.close()
                if self._is_closed or time.monotonic() > until:
                    raise
                time.sleep(0.1)
                continue
            if self._is_closed:  # by an engine that has waited for too long
                self._opened.close()
            if done:
                raise RuntimeError("the server's reset says that the episode is over (done)")
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
        self._is_closed = True
        self._opened.close()

    def _request(self, kind: str, data: Mapping[str, Any]) -> tuple[str, bool]:
        """Return an observation as text, and whether the episode is over; add up the reward."""
        from websockets.exceptions import (  # pyright: ignore[reportMissingImports]
            ConnectionClosed,
        )

        assert self._session is not None, "reset opens the session"
        with suppress(ConnectionClosed):  # what it said before is still to be read
            self._session.send(json.dumps({"type": kind, "data": data}))
        reply = json.loads(self._session.recv())
        result = reply.get("data", {})
        if result.get("code") == FULL:
            raise ServerIsFull(str(result.get("message", FULL)))
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


def require_server(config: OpenEnvEnvironmentConfig, sessions: int) -> None:
    """Open as many sessions at a time as a batch has episodes, and reset each once.

    Raises `DataError` if the server does not take part, or refuses one of them.
    """
    first, *others = (OpenEnvEnvironment(config) for _ in range(max(2, sessions)))
    calls = [partial(environment.reset, PROBE, 0) for environment in others]
    try:
        first.reset(PROBE, 0)
        begun = call_all(calls, deadline_s=config.deadline_s, threads=config.concurrency)
    except DataError:
        raise
    except Exception as error:  # a server of others replies anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"environment.url = {config.url!r}: a reset failed: {reason}") from None
    finally:
        for environment in (first, *others):
            environment.close()
    failed = [one for one in begun if isinstance(one, CallFailure)]
    if failed:
        count = 1 + len(others)
        raise DataError(
            f"environment.url = {config.url!r}: it has begun {count - len(failed)} of {count} sessions "
            f"at the same time, one per episode of a batch ({failed[0].detail}): start the server with "
            f"max_concurrent_envs = {count} (OpenEnv's default is 1), or lower sampling.batch_size"
        )
