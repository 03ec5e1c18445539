"""One deadline and one size limit for every exchange with a server, whatever its status."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scripted_server import (
    Behaviour,
    continues,
    drips_body,
    drips_headers,
    errs,
    floods,
    lists,
    says,
    send,
    serving,
)

from selfteach.config.critic_section import EndpointConfig
from selfteach.config.engine_section import VllmServerConfig
from selfteach.errors import CriticError, EngineError
from selfteach.feedback.critics.chat_model import NoReply, Reply, Request
from selfteach.feedback.critics.critic_healthcheck import require_server
from selfteach.feedback.critics.endpoint import EndpointModel
from selfteach.rollout.vllm.http_client import HttpClient
from selfteach.rollout.vllm.vllm_engine import EngineUnavailable

SLOW: dict[str, Behaviour] = {
    "headers": drips_headers, "100 Continue": continues, "body": drips_body(200),
    "body of a 400": drips_body(400), "body of a 401": drips_body(401),
    "body of a 503": drips_body(503), "body of a redirect": drips_body(302),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_plain_replies_to_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripted_server.PROMPT", "")


def endpoint(url: str, **settings: Any) -> EndpointConfig:
    values = {
        "type": "endpoint", "base_url": url, "model": "m", "http_retries": 0, "max_tokens": 64,
        "timeout_seconds": 0.4, "max_attempts": 1,
    }  # fmt: skip
    return EndpointConfig.model_validate({**values, **settings})


def request() -> Request:
    return Request((("user", "hi"),), 0.0, 64)


def ends_soon(work: Callable[[], object], limit_s: float = 8.0) -> object:
    """Return the result of work, or its error; fails if it does not end."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    assert results, f"no end within {limit_s:g} s"
    return results[0]


@pytest.mark.parametrize("name", SLOW)
def test_a_request_ends_at_its_deadline(name: str) -> None:
    with serving(SLOW[name]) as server:
        model = EndpointModel(endpoint(server.url))
        (reply,) = ends_soon(lambda: model.complete([request()], lambda *_: None))  # type: ignore[misc]
    assert reply == NoReply("no reply within 0.4 s")


@pytest.mark.parametrize("name", SLOW)
def test_a_critics_healthcheck_ends_at_its_deadline(name: str) -> None:
    with serving(SLOW[name]) as server:
        slow = [f"{server.url}: slow"]
        assert ends_soon(lambda: require_server(endpoint(server.url))) == slow
        server.listing = SLOW[name]
        server.behaviours = [says("1")]
        assert ends_soon(lambda: require_server(endpoint(server.url))) == slow


@pytest.mark.parametrize("name", SLOW)
def test_an_engines_request_ends_at_its_deadline(name: str) -> None:
    with serving(SLOW[name]) as server:
        server.listing = SLOW[name]
        config = VllmServerConfig(type="vllm_server", url=server.url[:-3], model="m")
        client = HttpClient(config, 0.4)
        for work in (lambda: client.get("/v1/models"), lambda: client.post("/tokenize", {"a": 1})):
            error = ends_soon(work)
            assert isinstance(error, EngineUnavailable) and "within 0.4 s" in str(error)


@pytest.fixture
def memory() -> Iterator[Callable[[], float]]:
    """The most memory in use since the start, in megabytes, as Python allocates it."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()


@pytest.mark.parametrize("encoding", [None, "gzip"])
@pytest.mark.parametrize("status", [200, 302, 400, 401, 500])
def test_a_body_without_end_is_not_read_to_its_end(
    status: int, encoding: str | None, memory: Callable[[], float]
) -> None:
    sent: list[int] = []
    flood = floods(status, sent, encoding)
    with serving(flood) as server:
        server.listing = flood
        settings = {"timeout_seconds": 20.0}
        model = EndpointModel(endpoint(server.url, **settings))
        checked = ends_soon(lambda: require_server(endpoint(server.url, **settings)), 25)
        result = ends_soon(lambda: model.complete([request()], lambda *_: None), 25)
        wait_until = time.monotonic() + 5
        while server.in_flight and time.monotonic() < wait_until:
            time.sleep(0.01)
        assert server.in_flight == 0, "the connection is closed"
    assert isinstance(checked, list | CriticError)
    if status == 200:
        (reply,) = result  # type: ignore[misc]
        assert isinstance(reply, Reply) and not reply.finished and len(reply.text) <= 2000
    else:
        assert isinstance(result, list | CriticError)
    assert memory() < 60


def test_an_engines_body_has_a_limit() -> None:
    sent: list[int] = []
    with serving(floods(500, sent)) as server:
        config = VllmServerConfig(type="vllm_server", url=server.url[:-3], model="m")
        error = ends_soon(lambda: HttpClient(config, 20.0).post("/tokenize", {}), 25)
    assert isinstance(error, EngineError) and len(sent) < 100


def test_redirects_are_not_followed() -> None:
    def redirect(handler: Any, body: dict[str, Any]) -> None:
        send(handler, 307, b"{}", Location="http://elsewhere.test/v1/chat/completions")

    with serving(redirect) as server:
        model = EndpointModel(endpoint(server.url, timeout_seconds=5.0))
        with pytest.raises(CriticError, match=r"redirects to http://elsewhere\.test"):
            model.complete([request()], lambda *_: None)
        with pytest.raises(CriticError, match=r"redirects to http://elsewhere\.test"):
            require_server(endpoint(server.url, timeout_seconds=5.0))


# -- secrets ---------------------------------------------------------------------------------------

KEY = "sk-live-0123456789"


@pytest.mark.parametrize("written", [f"{KEY}\n", f" {KEY} ", f"\t{KEY}\r\n"])
def test_space_around_a_key_is_stripped(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K", written)
    with serving(says("1")) as server:
        model = EndpointModel(endpoint(server.url, api_key_env="K", timeout_seconds=5.0))
        model.complete([request()], lambda *_: None)
        require_server(endpoint(server.url, api_key_env="K", timeout_seconds=5.0))
        engine = VllmServerConfig(
            type="vllm_server", url=server.url[:-3], model="m", api_key_env="K"
        )
        HttpClient(engine).post("/tokenize", {})
        sent = {body["headers"]["authorization"] for body in server.requests}
    assert sent == {f"Bearer {KEY}"}


@pytest.mark.parametrize(
    "written", [f"{KEY}\nX-Other: 1", f"a {KEY}", f"{KEY}é", "", " \n", "\x7f1"]
)
def test_what_cannot_be_a_key_is_refused_and_not_printed(
    written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K", written)
    engine = VllmServerConfig(type="vllm_server", model="m", api_key_env="K")
    for work in (
        lambda: EndpointModel(endpoint("http://h/v1", api_key_env="K")),
        lambda: require_server(endpoint("http://h/v1", api_key_env="K")),
        lambda: HttpClient(engine),
    ):
        with pytest.raises((CriticError, EngineError), match=r"api_key_env: .* K ") as caught:
            work()
        assert KEY not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 429, 500])
def test_a_key_that_a_server_repeats_is_not_shown(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K", KEY)
    with serving(errs(status, f"Incorrect API key provided: {KEY} ({'x' * 290} {KEY})")) as server:
        server.listing = lists("other")
        config = endpoint(server.url, api_key_env="K", timeout_seconds=5.0)
        engine = VllmServerConfig(
            type="vllm_server", url=server.url[:-3], model="m", api_key_env="K"
        )
        results = [
            ends_soon(lambda: EndpointModel(config).complete([request()], lambda *_: None)),
            ends_soon(lambda: require_server(config)),
            ends_soon(lambda: HttpClient(engine).post("/tokenize", {})),
        ]
    assert KEY not in repr(results) and "sk-live" not in repr(results)


def test_a_key_in_a_reply_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K", KEY)
    with serving(says(f"your key is {KEY}")) as server:
        model = EndpointModel(endpoint(server.url, api_key_env="K", timeout_seconds=5.0))
        (reply,) = model.complete([request()], lambda *_: None)
    assert isinstance(reply, Reply) and KEY not in reply.text


@pytest.mark.parametrize(
    "url", [f"http://{KEY}@h:1", f"http://h:1?key={KEY}", f"http://u:{KEY}@h:1"]
)
def test_credentials_in_an_engines_address_are_refused(url: str) -> None:
    with pytest.raises(EngineError, match=r"engine\.url") as caught:
        VllmServerConfig(type="vllm_server", url=url, model="m")
    assert KEY not in str(caught.value)


def test_headers_that_are_no_ascii_end_typed() -> None:
    def redirects(handler: Any, body: dict[str, Any]) -> None:
        handler.wfile.write(b"HTTP/1.1 302 F\r\nLocation: \xff\xfe\r\nContent-Length: 0\r\n\r\n")

    with serving(redirects) as server:
        with pytest.raises(CriticError, match="HTTP 302"):
            EndpointModel(endpoint(server.url)).complete([request()], lambda *_: None)
        with pytest.raises(CriticError, match="302"):
            require_server(endpoint(server.url))
