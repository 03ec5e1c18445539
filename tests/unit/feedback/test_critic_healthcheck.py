"""The healthcheck of a served critic: which servers pass, and the one line for those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Call, served_critic_recipe
from scripted_server import Behaviour, Server, cuts, lists, raw, refuses, says, serving, stalls

from selfteach.config.critic_section import EndpointConfig, OracleConfig
from selfteach.errors import CriticError
from selfteach.feedback.critics.critic_healthcheck import require_server
from selfteach.trainer.build_critic import require_served_model


def check(server: Server, model: str = "m", **settings: object) -> None:
    server.answers_checks = False
    config = {"type": "endpoint", "base_url": server.url, "model": model, **settings}
    require_server(EndpointConfig.model_validate(config))


def test_a_listed_model_gets_one_request() -> None:
    with serving(says("1")) as server:
        check(server)
        assert [body["model"] for body in server.requests] == ["m"]


@pytest.mark.parametrize(
    "listing",
    [lists("n"), lists(), refuses(404), refuses(501), raw(b"<html>"), raw(b"[1]"), raw(b"{}")],
    ids=["not listed", "empty", "404", "501", "no json", "a list", "an object"],
)
def test_a_reply_is_requested_where_the_list_lacks_the_model(listing: Behaviour) -> None:
    with serving(says("1", "length")) as server:
        server.listing = listing
        check(server)
        assert [body["max_tokens"] for body in server.requests] == [4096]


@pytest.mark.parametrize(
    "listing", [refuses(429, Retry_After="60"), refuses(503), refuses(500), stalls(1)]
)
def test_a_slow_or_busy_server_passes(listing: Behaviour) -> None:
    with serving(says("1")) as server:
        server.listing = listing
        check(server, timeout_seconds=0.2)
        assert server.requests == []


@pytest.mark.parametrize("behaviour", [refuses(429), refuses(503), stalls(1), raw(b"?"), says("")])
def test_a_server_that_is_slow_or_busy_with_the_reply_passes(behaviour: Behaviour) -> None:
    with serving(behaviour) as server:
        server.listing = refuses(404)
        check(server, timeout_seconds=0.2)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("listing", "behaviour", "message"),
    [
        (refuses(401), says("1"), r"denied access \(HTTP 401\): the key in K is wrong"),
        (refuses(404), refuses(403), r"denied access \(HTTP 403\)"),
        (lists("mm", "other"), refuses(404), r"does not serve it .*did you mean 'mm'\?"),
        (lists("other"), refuses(400), r"does not serve it .*it serves other"),
        (refuses(404), refuses(404), r"critic\.model = 'm'.*check critic\.model and"),
        (cuts, says("1"), "no server at"),
    ],
    ids=["key", "key for the token", "unknown", "400", "no such path", "cut"],
)
def test_an_error_is_one_line_without_the_key(
    listing: Behaviour, behaviour: Behaviour, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K", "secret")
    with serving(behaviour) as server:
        server.listing = listing
        with pytest.raises(CriticError, match=message) as caught:
            check(server, api_key_env="K")
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_recipe_can_turn_the_healthcheck_off(tmp_path: Path) -> None:
    gone = {"type": "endpoint", "base_url": "http://127.0.0.1:9/v1", "model": "m"}
    with pytest.raises(CriticError, match=r"no server at http://127\.0\.0\.1:9/v1"):
        require_served_model(EndpointConfig.model_validate(gone))
    require_served_model(EndpointConfig.model_validate({**gone, "healthcheck": False}))
    require_served_model(OracleConfig())
    require_served_model(None)


@pytest.mark.parametrize("command", ["check", "train", "study"])
def test_commands_stop_before_anything_is_spent(command: str, call: Call, tmp_path: Path) -> None:
    recipe = served_critic_recipe(
        tmp_path / "recipe.toml", model="lab:two_styles", url="http://127.0.0.1:9/v1",
        cache=tmp_path / "s.sqlite", data="train = 4\nvalidation = 1\ntest = 1",
    )  # fmt: skip
    out = () if command == "check" else ("--out", tmp_path / "out")
    status, _, message = call(command, recipe, *out)
    assert status == 2 and message.count("\n") == 1 and "no server at" in message
    assert not [*tmp_path.rglob("rollouts/*"), *tmp_path.rglob("evaluations/*")]
    if command == "check":
        status, _, message = call("check", recipe, "--offline")
        assert (status, message) == (0, "")
