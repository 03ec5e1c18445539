"""A fleet of critic servers: the replies of one server, each paid for once, whoever fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from eventually import eventually
from scripted_server import Behaviour, Server, errs, lists, raw, refuses, says, serving

from selfteach.config.critic_section import EndpointConfig
from selfteach.config.schema import validate
from selfteach.errors import CriticError, RecipeError
from selfteach.feedback.critics import endpoint
from selfteach.feedback.critics.chat_model import NoReply, Reply, Request
from selfteach.feedback.critics.critic_healthcheck import require_server
from selfteach.feedback.critics.endpoint import EndpointModel
from selfteach.feedback.critics.llm import usage_of
from selfteach.feedback.critics.reply_cache import CachedModel, ReplyCache

ECHO = says(lambda body: f"reply to {body['messages'][-1]['content']}")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {
        "PROBE_INTERVAL_S": 0.02, "MAX_PROBE_INTERVAL_S": 0.05, "PAUSE_S": 0.01
    }.items():  # fmt: skip
        monkeypatch.setattr(endpoint, name, seconds)


@contextmanager
def fleet(*behaviours: Behaviour) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serving(behaviour)) for behaviour in behaviours]


def config(servers: list[Server], **settings: Any) -> EndpointConfig:
    values = {
        "type": "endpoint", "base_urls": [server.url for server in servers], "model": "m",
        "timeout_seconds": 5.0, "http_retries": 4, "max_tokens": 64, "concurrency": 2,
        "patience_seconds": 0.0, **settings,
    }  # fmt: skip
    return validate(EndpointConfig, values, where="test")


def requests(count: int) -> list[Request]:
    return [Request((("user", f"question {i}"),), 0.0, 64) for i in range(count)]


def texts(replies: list[Reply | NoReply]) -> list[str]:
    return [reply.text if isinstance(reply, Reply) else reply.reason for reply in replies]


def complete(model: EndpointModel, count: int) -> list[Reply | NoReply]:
    return model.complete(requests(count), lambda *_: None)


def expected(count: int) -> list[str]:
    return [f"reply to question {i}" for i in range(count)]


def test_a_fleet_replies_as_one_server_does_and_shares_its_cache(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "replies.sqlite")
    with fleet(ECHO, ECHO) as servers:
        replies = CachedModel(EndpointModel(config(servers)), cache).complete(requests(12))
        assert texts([reply for reply, _ in replies]) == expected(12)
        assert all(server.requests for server in servers)
        assert sum(len(server.requests) for server in servers) == 12
        one = config([], base_urls=None, base_url=servers[0].url)
        again = CachedModel(EndpointModel(one), cache).complete(requests(12))
        assert again == [(reply, True) for reply, _ in replies]
        assert sum(len(server.requests) for server in servers) == 12


def test_a_member_that_is_killed_is_replaced_and_comes_back() -> None:
    with fleet(ECHO, ECHO) as servers:
        model = EndpointModel(config(servers))
        killed = servers[1]
        killed.behaviours = [ECHO, lambda *_: (killed.stop(), time.sleep(0.1))]
        assert texts(complete(model, 20)) == expected(20)
        assert model.fleet.out.keys() == {1}
        back = Server(ECHO, port=killed.port)
        try:
            eventually(lambda: not model.fleet.out)
            assert back.checks and not back.requests  # the probe came first
            assert texts(complete(model, 20)) == expected(20)
            assert back.requests
        finally:
            back.stop()


@pytest.mark.parametrize("status", [500, 503])
def test_a_member_with_errors_is_left_out_until_a_probe_of_it_succeeds(status: int) -> None:
    with fleet(ECHO, refuses(status)) as servers:
        servers[1].answers_checks = False
        model = EndpointModel(config(servers))
        assert texts(complete(model, 20)) == expected(20)
        eventually(lambda: len(servers[1].requests) > 3)  # probes, which fail
        assert model.fleet.out.keys() == {1}
        servers[1].behaviours = [ECHO]
        eventually(lambda: not model.fleet.out)


def test_a_request_that_breaks_every_member_takes_only_one_of_them_out() -> None:
    def breaks(handler: Any, body: dict[str, Any]) -> None:
        poison = body["messages"][-1]["content"] == "question 3"
        (refuses(500) if poison else ECHO)(handler, body)

    with fleet(breaks, breaks) as servers:
        model = EndpointModel(config(servers))
        replies = texts(complete(model, 12))
        assert replies[3] == "the server returned HTTP 500: no"
        assert [*replies[:3], *replies[4:]] == [*expected(12)[:3], *expected(12)[4:]]
        poisoned = [b for s in servers for b in s.requests if "n 3" in b["messages"][-1]["content"]]
        assert len(poisoned) == 5  # one, and as many as http_retries


def test_a_request_that_a_member_refuses_for_good_is_not_sent_to_others() -> None:
    with fleet(errs(400, "too long"), errs(400, "too long")) as servers:
        (reply,) = complete(EndpointModel(config(servers)), 1)
        assert isinstance(reply, NoReply) and reply.permanent
        assert sum(len(server.requests) for server in servers) == 1


def test_a_member_that_serves_another_model_is_left_out() -> None:
    with fleet(ECHO, errs(404, "The model `m` does not exist.")) as servers:
        servers[1].answers_checks = False
        model = EndpointModel(config(servers))
        assert texts(complete(model, 12)) == expected(12)
        assert "does not exist" in model.fleet.out[1]
        servers[0].answers_checks = False
        servers[0].behaviours = list(servers[1].behaviours)
        with pytest.raises(CriticError, match=r"does not exist.*; .*does not exist") as raised:
            complete(model, 1)
        assert "\n" not in str(raised.value)


def test_without_a_member_a_request_waits_and_has_no_reply() -> None:
    with fleet(ECHO, ECHO) as servers:
        model = EndpointModel(config(servers, patience_seconds=0.2))
        ports = [server.port for server in servers]
        for server in servers:
            server.stop()
        (reply,) = complete(model, 1)
        assert isinstance(reply, NoReply) and not reply.permanent
        assert reply.reason.startswith("no server for 0.2 s (http://127.0.0.1:")
        assert all(server.url in reply.reason for server in servers)
        back = Server(ECHO, port=ports[0])
        try:
            waits = EndpointModel(config(servers, patience_seconds=30.0))
            assert texts(complete(waits, 3)) == expected(3)
        finally:
            back.stop()


def test_a_busy_member_rests_and_others_get_its_requests() -> None:
    with fleet(refuses(429, Retry_After="60"), ECHO) as servers:
        model = EndpointModel(config(servers))
        assert texts(complete(model, 8)) == expected(8)
        assert len(servers[0].requests) <= 2 and not model.fleet.out


def slow(seconds: float) -> Behaviour:
    def behave(handler: Any, body: dict[str, Any]) -> None:
        time.sleep(seconds)
        ECHO(handler, body)

    return behave


def test_a_slow_request_is_sent_to_a_second_member_and_both_are_paid_for(tmp_path: Path) -> None:
    with fleet(ECHO, ECHO) as servers:
        settings = config(servers, hedge_after=4.0, price_prompt=1.0, price_completion=2.0)
        model, path = EndpointModel(settings), tmp_path / "replies.sqlite"
        assert texts(complete(model, 10)) == expected(10)
        for server in servers:
            server.requests.clear()
            server.behaviours = [slow(3.0), ECHO] if server is servers[0] else [ECHO]
        cached = CachedModel(model, ReplyCache(path))
        hedged = [Request((("user", f"hedged {i}"),), 0.0, 64) for i in range(2)]
        replies = cached.complete(hedged)
        assert texts([reply for reply, _ in replies]) == ["reply to hedged 0", "reply to hedged 1"]
        sent = [b["messages"][-1]["content"] for s in servers for b in s.requests]
        assert len(sent) == 3 and set(sent) == {"hedged 0", "hedged 1"}
        usage = [usage_of(reply, paid, settings) for reply, paid in replies]
        assert sum(one.prompt_tokens for one in usage) == 3 * 20
        assert sum(one.completion_tokens for one in usage) == 3 * 7
        assert sum(one.cost for one in usage) == pytest.approx(3 * (20 + 2 * 7) / 1e6)
        # What it cost is in the file too, for a buyer that was killed before it could count.
        stored = [ReplyCache(path).get(key) for key in keys_of(path)]
        assert sorted(r.hedge_prompt_tokens for r in stored if r) == [0, 20]


def keys_of(path: Path) -> list[str]:
    return [reply.key for reply in ReplyCache(path).stored()]


def test_a_member_that_hangs_is_taken_out_after_lost_hedges() -> None:
    with fleet(ECHO, ECHO) as servers:
        model = EndpointModel(config(servers, hedge_after=2.0, concurrency=1))
        complete(model, 10)
        servers[1].answers_checks = False
        servers[1].behaviours = [slow(4.0)]
        assert texts(complete(model, 80)) == expected(80)
        assert "faster elsewhere" in model.fleet.out[1]


def test_limits_hold_for_each_member() -> None:
    with fleet(ECHO, ECHO) as servers:
        # A second request to the same member would wait for an hour.
        model = EndpointModel(config(servers, requests_per_minute=1 / 60))
        assert texts(complete(model, 2)) == expected(2)
        assert [len(server.requests) for server in servers] == [1, 1]


def test_each_member_gets_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRST", "key-number-one")
    monkeypatch.setenv("SECOND", "key-number-two")
    with serving(ECHO) as server:
        twice = config([server, server], api_key_envs=["FIRST", "SECOND"])
        complete(EndpointModel(twice), 8)
        sent = {body["headers"]["authorization"] for body in server.requests}
    assert sent == {"Bearer key-number-one", "Bearer key-number-two"}


def test_requests_that_share_their_beginning_share_a_member() -> None:
    with fleet(ECHO, ECHO) as servers:
        model = EndpointModel(config(servers, concurrency=1))
        for i in range(6):  # one after the other
            prompt = f"problem {'ab'[i % 2]} " * 100 + f"rollout {i}"
            model.complete([Request((("user", prompt),), 0.0, 64)], lambda *_: None)
        starts = [{b["messages"][-1]["content"][:9] for b in s.requests} for s in servers]
        by_start = {
            start: [s for s in starts if start in s] for start in ("problem a", "problem b")
        }
        assert all(len(members) == 1 for members in by_start.values())


def test_the_check_asks_every_member_and_names_those_that_serve_another_model() -> None:
    with fleet(says("1"), says("1"), says("1")) as servers:
        states = require_server(config(servers))
        assert states == [f"{server.url}: replies" for server in servers]
        for server in servers[1:]:
            server.listing, server.answers_checks = lists("another"), False
            server.behaviours = [refuses(404)]
        with pytest.raises(CriticError, match=r"does not serve it.*does not serve it") as raised:
            require_server(config(servers))
        line = str(raised.value)
        assert "\n" not in line and servers[0].url not in line
        assert all(server.url in line for server in servers[1:])


def test_the_check_passes_while_one_member_replies() -> None:
    with fleet(says("1"), says("1"), raw(b"?")) as servers:
        servers[1].stop()
        servers[2].listing = refuses(503)
        assert require_server(config(servers)) == [
            f"{servers[0].url}: replies",
            f"{servers[1].url}: down, left out until it replies",
            f"{servers[2].url}: busy",
        ]
        servers[0].stop()
        with pytest.raises(CriticError, match=r"no server at .*; .*no server at "):
            require_server(config(servers[:2]))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "neither is set: set critic.base_url for one server, or critic.base_urls for several"),
        ({"base_url": "http://a/v1", "base_urls": ["http://b/v1"]}, "both are set"),
        ({"base_urls": ["http://a/v1", "http://a/v1/"]}, "lists http://a/v1 twice"),
        ({"base_urls": "http://a/v1"}, r"critic.base_urls is a list of addresses: write .* = \['"),
        ({"base_urls": ["http://a/v1"], "api_key_envs": ["A", "B"]}, "2 variables for 1 addresses"),
        (
            {"base_url": "http://a/v1", "hedge_after": 3},
            "critic.hedge_after is for several servers",
        ),
        (
            {"base_urls": ["http://a/v1"], "api_key_env": "A", "api_key_envs": ["B"]},
            "critic.api_key_env or critic.api_key_envs, not both",
        ),
    ],
)
def test_settings_that_are_no_fleet_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(RecipeError, match=line) as raised:
        validate(EndpointConfig, {"type": "endpoint", "model": "m", **settings})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "urls", ["http://me:secret@a/v1", ["http://b/v1", "http://a/v1?key=secret"]]
)
def test_keys_in_addresses_are_refused_and_not_repeated(urls: object) -> None:
    with pytest.raises(CriticError, match=r"critic.base_urls holds a key") as raised:
        EndpointConfig.model_validate({"type": "endpoint", "model": "m", "base_urls": urls})
    assert "secret" not in str(raised.value)


def test_a_fleet_without_an_owner_stops_probing() -> None:
    def use(servers: list[Server]) -> None:
        model = EndpointModel(config(servers))
        complete(model, 4)
        eventually(lambda: bool(model.fleet.out) and len(servers[1].requests) > 1)

    with fleet(ECHO, refuses(503)) as servers:
        servers[1].answers_checks = False
        use(servers)
        time.sleep(0.3)
        before = len(servers[1].requests)
        time.sleep(0.3)
        assert len(servers[1].requests) == before
