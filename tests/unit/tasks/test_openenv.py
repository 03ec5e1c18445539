"""Episodes on a server of OpenEnv's protocol, which a thread of the test runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pydantic import ValidationError

from selfteach.config.environment_section import OpenEnvEnvironmentConfig
from selfteach.episodes import EnvironmentReply, Turn
from selfteach.errors import DataError
from selfteach.tasks.environments import openenv_client
from selfteach.tasks.environments.openenv_client import (
    OpenEnvEnvironment,
    ServerIsFull,
    require_server,
)
from selfteach.types import Problem

serving = pytest.importorskip("websockets.sync.server")
PROBLEM = Problem("p", "q", "")


def session(socket: Any) -> None:
    """Count up to the seed's last digit: each right number is a reward of 0.5."""
    goal = number = 0
    for message in socket:
        request = json.loads(message)
        data, reward = request["data"], 0.0
        if request["type"] == "reset":
            goal, number, shown = 2 + data["seed"] % 2, 0, "count"
        elif "say" not in data:
            socket.send(json.dumps({"type": "error", "data": {"message": "no field say"}}))
            continue
        else:
            right = data["say"] == str(number + 1)
            number, reward = number + right, 0.5 * right
            shown = "right" if right else "wrong"
        result = {
            "observation": {"shown": shown, "n": number},
            "reward": reward,
            "done": number == goal,
        }
        socket.send(json.dumps({"type": "observation", "data": result}))


class Limited:
    """Runs at most so many sessions at a time, as OpenEnv's HTTPEnvServer does."""

    def __init__(self, most: int) -> None:
        self._most, self._running, self._lock = most, 0, threading.Lock()

    def __call__(self, socket: Any) -> None:
        with self._lock:
            begins = self._running < self._most
            self._running += begins
        if not begins:
            data = {"message": "Server at capacity: 1/1", "code": "CAPACITY_REACHED"}
            socket.send(json.dumps({"type": "error", "data": data}))
            return
        try:
            session(socket)
        finally:
            with self._lock:
                self._running -= 1


def over(socket: Any) -> None:
    """Reset to an episode that is over."""
    for _ in socket:
        result = {"observation": {"shown": "the end"}, "reward": 0.0, "done": True}
        socket.send(json.dumps({"type": "observation", "data": result}))


@contextmanager
def served(handler: Any) -> Iterator[str]:
    with serving.serve(handler, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(session) as url:
        yield url


def environment(url: str, **keys: Any) -> OpenEnvEnvironment:
    settings = {"action": "say", "observation": "shown", **keys}
    return OpenEnvEnvironment(OpenEnvEnvironmentConfig(type="openenv", url=url, **settings))


def test_an_episode_is_a_session_of_its_own(url: str) -> None:
    first, second = environment(url), environment(url, observation=None)
    assert first.reset(PROBLEM, 2**40) == "count"
    assert second.reset(PROBLEM, 1) == '{"shown": "count", "n": 0}'
    assert first.step(Turn("1")) == EnvironmentReply(("right",), "observation")
    assert second.step(Turn("7")).texts == ('{"shown": "wrong", "n": 0}',)
    assert first.step(Turn("2")) == EnvironmentReply(("right",), "observation", done=True)
    verdict, wrong = first.verdict(), second.verdict()
    assert verdict is not None and (verdict.correct, verdict.reward) == (True, 1.0)
    assert wrong is not None and (wrong.correct, wrong.reward) == (False, 0.0)
    assert wrong.feedback == '{"shown": "wrong", "n": 0}'
    first.close()
    second.close()


def test_what_a_server_refuses_is_raised_in_one_line(url: str) -> None:
    wrong = environment(url, action="text")
    wrong.reset(PROBLEM, 1)
    with pytest.raises(RuntimeError, match="no field say"):
        wrong.step(Turn("1"))
    wrong.close()


@pytest.mark.parametrize(
    ("address", "observation", "why"),
    [
        ("http://127.0.0.1:9", "shown", "no OpenEnv server"),
        ("", "text", "'text' is not in the obs"),
    ],
)
def test_a_server_is_tried_before_a_run(url: str, address: str, observation: str, why: str) -> None:
    config = OpenEnvEnvironmentConfig(
        type="openenv", url=address or url, action="say", observation=observation
    )
    with pytest.raises(DataError) as error:
        require_server(config, 2)
    assert why in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValidationError, match="no address"):
        OpenEnvEnvironmentConfig(type="openenv", url="localhost:8000")


def test_a_server_must_run_a_batch_s_sessions_side_by_side(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenEnv's server runs one session by default, and each episode of a batch holds one."""
    monkeypatch.setattr(openenv_client, "PATIENCE_S", 0.2)
    require_server(OpenEnvEnvironmentConfig(type="openenv", url=url, action="say"), 4)
    with served(Limited(1)) as one, pytest.raises(DataError) as error:
        require_server(OpenEnvEnvironmentConfig(type="openenv", url=one, action="say"), 4)
    line = str(error.value)
    assert "it has begun 1 of 4 sessions" in line and "Server at capacity" in line
    assert "max_concurrent_envs = 4" in line and "\n" not in line


def test_a_full_server_may_be_ending_the_sessions_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(Limited(1)) as one:
        first, second = environment(one), environment(one)
        first.reset(PROBLEM, 1)
        threading.Timer(0.3, first.close).start()
        assert second.reset(PROBLEM, 1) == "count"
        monkeypatch.setattr(openenv_client, "PATIENCE_S", 0.0)
        with pytest.raises(ServerIsFull):
            environment(one).reset(PROBLEM, 1)
        second.close()


def test_an_episode_that_is_over_at_its_reset_is_a_failure() -> None:
    with served(over) as url, pytest.raises(DataError, match=r"the episode is over \(done\)"):
        require_server(OpenEnvEnvironmentConfig(type="openenv", url=url, action="say"), 2)


def test_the_seed_of_a_server_is_by_problem() -> None:
    config = OpenEnvEnvironmentConfig(type="openenv", url="http://h:1")
    assert config.seed_by == "problem"
