"""Servers that speak OpenAI's API in other dialects, fail in the body of a reply, or send odd ones."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Behaviour, Server, completion, errs, raw, says, says_with, serving

from selfteach.config.critic_section import EndpointConfig
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CriticError, SelfteachError
from selfteach.feedback.critics.chat_model import Reply, Request
from selfteach.feedback.critics.critic_healthcheck import require_server
from selfteach.feedback.critics.endpoint import EndpointModel
from selfteach.feedback.critics.endpoint_member import EndpointMember, MemberFailure
from selfteach.feedback.critics.llm import LlmCritic
from selfteach.feedback.critics.parser import CritiqueParser
from selfteach.feedback.critics.rate_limit import RateLimit
from selfteach.feedback.critics.reply_cache import CachedModel, ReplyCache
from selfteach.prompts.template_set import Templates
from selfteach.tasks import segmentation, verifiers
from selfteach.types import Critique, CritiqueFailure, Problem, Rollout

WRONG = "<step_1>2 and 2 make 5 apples.</step_1><answer>5</answer>"
RIGHT = "<step_1>2 and 2 make 4 apples.</step_1><answer>4</answer>"


def config(server: Server, **settings: Any) -> EndpointConfig:
    server.answers_checks = False
    values = {
        "type": "endpoint", "base_url": server.url, "model": "m", "timeout_seconds": 5.0,
        "http_retries": 0, "max_tokens": 64, "max_attempts": 1,
    }  # fmt: skip
    return EndpointConfig.model_validate({**values, **settings})


def judged(*names: str) -> list[Any]:
    problems = [Problem(name, f"{name}: what is 2 + 2?", "4") for name in names]
    return [
        (Rollout(p, 0, (1,), (5,), (-0.5,), WRONG, True, 0), verifiers.exact(p, WRONG))
        for p in problems
    ]


def critic(server: Server, cache: Path, **settings: Any) -> LlmCritic:
    values = config(server, **settings)
    return LlmCritic(
        CachedModel(EndpointModel(values), ReplyCache(cache)),
        Templates("steps"),
        CritiqueParser(segmentation.tags, verifiers.exact),
        values,
    )


def stored(cache: Path) -> int:
    with closing(sqlite3.connect(cache)) as database:
        return database.execute("SELECT count(*) FROM replies").fetchone()[0]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "replies.sqlite"


# -- what is sent ----------------------------------------------------------------------------------


def only_new_parameters(handler: Any, body: dict[str, Any]) -> None:
    """Do as OpenAI's reasoning models do."""
    for name in ("max_tokens", "seed", "temperature"):
        if name in body:
            errs(400, f"Unsupported parameter: '{name}' is not supported with this model.")(
                handler, body
            )
            return
    assert body["max_completion_tokens"] == 64
    says(RIGHT)(handler, body)


def test_parameters_that_a_server_refuses_are_renamed_or_left_out(cache: Path) -> None:
    names = {"max_tokens": "max_completion_tokens", "seed": False, "temperature": False}
    with serving(only_new_parameters) as server:
        server.listing = errs(404, "no")
        require_server(config(server, parameters=names))
        (critique,) = critic(server, cache, parameters=names)(judged("a"))
    assert isinstance(critique, Critique)


@pytest.mark.parametrize("names", [{}, {"seed": False}, {"max_tokens": "max_completion_tokens"}])
def test_the_check_sends_the_request_of_runs_and_shows_the_servers_words(names: dict) -> None:
    with serving(only_new_parameters) as server:
        with pytest.raises(CriticError, match=r"Unsupported parameter: '\w+'.*critic\.parameters"):
            require_server(config(server, parameters=names))
        checked = dict(server.requests[-1])
        server.behaviours = [says(RIGHT)]
        sent = Request((("user", "x"),), 0.0, 64)
        EndpointModel(config(server, parameters=names)).complete([sent], lambda *_: None)
        (run,) = server.requests[-1:]
    for body in (checked, run):
        del body["messages"], body["headers"]
    assert checked == run


def test_the_check_sends_the_temperature_of_retries_too() -> None:
    def only_one(handler: Any, body: dict[str, Any]) -> None:
        (says("1") if body["temperature"] == 1 else errs(400, "only 1"))(handler, body)

    with serving(only_one) as server:
        require_server(config(server, max_attempts=1, temperature=1.0))
        require_server(config(server, max_attempts=2, temperature=1.0, retry_temperature=1.0))
        with pytest.raises(CriticError, match="only 1"):
            require_server(config(server, max_attempts=2, temperature=1.0))
        with pytest.raises(CriticError, match="only 1"):
            require_server(config(server))


def test_parameters_that_are_left_out_change_the_identity_and_new_names_do_not() -> None:
    with serving(says("1")) as server:
        plain, renamed, without = (
            EndpointModel(config(server, parameters=names)).identity
            for names in ({}, {"max_tokens": "max_completion_tokens"}, {"temperature": False})
        )
    assert plain == renamed == "endpoint:m:{}" != without


def test_an_address_may_name_an_api_version_and_a_key_have_a_header(monkeypatch) -> None:
    monkeypatch.setenv("AZURE_KEY", "azure-secret-1")
    seen = []

    def azure(handler: Any, body: dict[str, Any]) -> None:
        seen.append(handler.path)
        says(RIGHT)(handler, body)

    with serving(azure) as server:
        url = f"{server.url}/openai/deployments/m?api-version=2024-10-21"
        settings = {"base_url": url, "api_key_env": "AZURE_KEY", "api_key_header": "api-key"}
        model = EndpointModel(config(server, **settings))
        (reply,) = model.complete([Request((("user", "x"),), 0.0, 64)], lambda *_: None)
        headers = server.requests[0]["headers"]
    assert isinstance(reply, Reply) and headers["api-key"] == "azure-secret-1"
    assert "authorization" not in headers
    assert seen == ["/v1/openai/deployments/m/chat/completions?api-version=2024-10-21"]


@pytest.mark.parametrize(
    "url",
    [
        "http://u:secret@h/v1", "http://secret@h/v1", "http://h/v1?key=secret",
        "http://h/v1?api-version=1&code=secret", "http://h/v1#secret", "http://h/v1?secret",
        "http://h/v1?api-version=" + "secret" * 9, "localhost/v1?k=secret", "http://u:secret@[::1/v1",
    ],
)  # fmt: skip
def test_credentials_in_an_address_are_refused_when_the_recipe_is_read(url: str) -> None:
    base = {"context": {"type": "step_aligned"}, "critic": {"type": "endpoint", "model": "m"}}
    with pytest.raises(SelfteachError, match=r"critic\.base_url") as caught:
        validate(Recipe, merge(base, {"critic": {"base_url": url}}), where="r.toml")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


# -- refusals of one request, and failures of a provider ------------------------------------------


def refuses_b(status: int, words: str) -> Behaviour:
    def behave(handler: Any, body: dict[str, Any]) -> None:
        bad = "b: what" in body["messages"][-1]["content"]
        (errs(status, words) if bad else says(RIGHT))(handler, body)

    return behave


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "This model's maximum context length is 4096 tokens"),
        (400, "whatever"),
        (413, "payload"),
        (422, "unprocessable"),
        (403, "Your input was flagged by moderation"),
        (500, "the prompt exceeds the context window"),
        (429, "Request too large for model m on tokens per minute (TPM): Limit 100"),
    ],
)
def test_a_permanent_refusal_of_one_request_has_a_policy(
    cache: Path, status: int, words: str
) -> None:
    with serving(refuses_b(status, words)) as server:
        one, two, three = critic(server, cache)(judged("a", "b", "c"))
        assert isinstance(one, Critique) and isinstance(three, Critique)
        assert isinstance(two, CritiqueFailure) and two.reason == "refused"
        assert words in two.detail and two.usage.requests == 0
        stops = critic(server, cache, on_failure={"refused": "stop"})
        with pytest.raises(CriticError, match="refused"):
            stops(judged("b"))


@pytest.mark.parametrize(
    ("status", "words"), [(500, "overloaded"), (429, "quota"), (402, "pay"), (409, "busy")]
)
def test_an_outage_is_no_refusal(cache: Path, status: int, words: str) -> None:
    with serving(errs(status, words)) as server:
        with pytest.raises(CriticError, match=f"unavailable: .*{words}"):
            critic(server, cache)(judged("a"))
        dropping = critic(server, cache, on_failure={"unavailable": "drop"})
        (critique,) = dropping(judged("a"))
    assert isinstance(critique, CritiqueFailure) and critique.reason == "unavailable"


@pytest.mark.parametrize("reason", ["content_filter", "SAFETY"])
def test_a_withheld_reply_is_refused_paid_and_stored(cache: Path, reason: str) -> None:
    with serving(says_with(content=RIGHT, finish_reason=reason)) as server:
        for paid in (1, 0):
            (critique,) = critic(server, cache)(judged("a"))
            assert isinstance(critique, CritiqueFailure) and critique.reason == "refused"
            assert reason.lower() in critique.detail
            assert (critique.usage.requests, critique.usage.cached) == (paid, 1 - paid)
        assert len(server.requests) == 1


def test_a_models_refusal_is_refused(cache: Path) -> None:
    with serving(says_with(content=None, refusal="I cannot help with that")) as server:
        (critique,) = critic(server, cache)(judged("a"))
    assert isinstance(critique, CritiqueFailure) and critique.reason == "refused"
    assert "I cannot help" in critique.detail


@pytest.mark.parametrize(
    "failure",
    [
        says_with(content="<step_1>half", finish_reason="error"),
        says_with(content="<step_1>half", finish_reason="insufficient_system_resource"),
        says_with(content="<step_1>half", finish_reason="abort"),
        raw(json.dumps({"error": {"code": 502, "message": "upstream"}}).encode()),
        raw(json.dumps({"error": "upstream", "choices": []}).encode()),
    ],
    ids=["error", "resource", "abort", "502 in the body", "error in the body"],
)
def test_a_providers_failure_is_tried_again_and_never_stored(
    cache: Path, failure: Behaviour
) -> None:
    with serving(failure, says(RIGHT)) as server:
        (critique,) = critic(server, cache)(judged("a"))
        assert isinstance(critique, Critique) and len(server.requests) == 2 and stored(cache) == 1
    with serving(failure) as server:
        (critique,) = critic(server, cache, on_failure={"unavailable": "drop"})(judged("b"))
    assert isinstance(critique, CritiqueFailure) and critique.reason == "unavailable"
    assert stored(cache) == 1


def test_a_refusal_in_the_body_of_a_reply_is_refused(cache: Path) -> None:
    body = {"error": {"code": 400, "message": "maximum context length is 10"}}
    with serving(raw(json.dumps(body).encode())) as server:
        (critique,) = critic(server, cache)(judged("a"))
        assert len(server.requests) == 1
    assert isinstance(critique, CritiqueFailure) and critique.reason == "refused"


def test_an_outage_while_the_critic_solves_stops_too(cache: Path) -> None:
    with (
        serving(errs(503, "down"), says(RIGHT)) as server,
        pytest.raises(CriticError, match="unavailable"),
    ):
        critic(server, cache, solves_first=True)(judged("a"))


# -- odd replies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": RIGHT}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "5?"}]}, {"text": RIGHT}],
        [{"type": "text", "text": RIGHT[:9]}, {"type": "output_text", "text": RIGHT[9:]}],
        [RIGHT[:9], RIGHT[9:]],
        {"type": "text", "text": RIGHT},
    ],
)
def test_content_may_be_a_list_of_parts(cache: Path, content: object) -> None:
    with serving(says_with(content=content)) as server:
        (critique,) = critic(server, cache)(judged("a"))
    assert isinstance(critique, Critique)
    assert [step.text for step in critique.steps] == ["2 and 2 make 4 apples."]


def test_backslashes_in_parts_stay_single(cache: Path) -> None:
    text = RIGHT.replace("4 apples", r"\frac{8}{2} apples")
    with serving(says_with(content=[{"type": "text", "text": text}])) as server:
        (critique,) = critic(server, cache)(judged("a"))
    assert isinstance(critique, Critique) and critique.steps[0].text.count("\\") == 1


def with_usage(tokens: str) -> Behaviour:
    whole = json.dumps(completion(RIGHT)).replace(
        '"prompt_tokens": 20', f'"prompt_tokens": {tokens}'
    )
    return raw(whole.encode())


USELESS: dict[str, Behaviour] = {
    "step of 5,000 digits": says(f"<step_{'1' * 5000}>a</step_1><answer>4</answer>"),
    "content is a number": says_with(content=7),
    "content is a dictionary": says_with(content={"a": [1, {"b": None}]}),
    "content is a nested list": says_with(content=[[1], {"type": "text", "text": 7}]),
    "nul": says("\0\0"),
    "surrogates alone": says("\ud800\udc00\ud800"),
}


@pytest.mark.parametrize("name", USELESS)
def test_a_useless_reply_is_a_typed_outcome_and_stored(cache: Path, name: str) -> None:
    with serving(USELESS[name]) as server:
        (critique,) = critic(server, cache)(judged("a"))
        assert isinstance(critique, CritiqueFailure) and critique.reason == "malformed"
        assert stored(cache) == 1 == len(server.requests)
    json.dumps([critique.detail, critique.reply], ensure_ascii=False).encode()


ODD: dict[str, Behaviour] = {
    "surrogate in the text": says(RIGHT.replace("apples", "\ud800 apples")),
    "infinite usage": with_usage("Infinity"),
    "usage of NaN": with_usage("NaN"),
    "usage beyond 64 bits": with_usage(str(2**63)),
    "usage of 5,000 digits": with_usage("9" * 5000),
    "negative usage": with_usage("-5"),
    "usage in words": with_usage('"many"'),
    "usage is a list": says_with(content=RIGHT, usage=[1, 2]),
    "usage is a number": says_with(content=RIGHT, usage=3),
    "usage is null": says_with(content=RIGHT, usage=None),
    "finish reason is a list": says_with(content=RIGHT, finish_reason=[]),
    "no finish reason": says_with(content=RIGHT, finish_reason=None),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_reply_is_a_critique_and_stored(cache: Path, name: str) -> None:
    with serving(ODD[name]) as server:
        (critique,) = critic(server, cache, price_prompt=1.0)(judged("a"))
    assert isinstance(critique, Critique) and stored(cache) == 1
    assert 0 <= critique.usage.prompt_tokens <= 20 and 0 <= critique.usage.cost < 1
    json.dumps([step.text for step in critique.steps], ensure_ascii=False).encode()


def test_nothing_in_flight_is_lost_when_one_request_ends_the_run(cache: Path) -> None:
    started = threading.Barrier(4)

    def behave(handler: Any, body: dict[str, Any]) -> None:
        started.wait(10)  # all are in flight
        if "b: what" in body["messages"][-1]["content"]:
            errs(401, "no")(handler, body)
            return
        time.sleep(0.5)
        says(RIGHT)(handler, body)

    with serving(behave) as server:
        with pytest.raises(CriticError, match="401"):
            critic(server, cache, concurrency=4)(judged("a", "b", "c", "d", "e", "f", "g"))
        assert stored(cache) == 3
        assert len(server.requests) == 4, "no request was sent after the error"


def test_nothing_in_flight_is_lost_when_one_reply_cannot_be_stored(cache: Path) -> None:
    arrived: list[int] = []

    def save(index: int, reply: Reply) -> None:
        if index == 0:
            raise OSError("no space left")
        arrived.append(index)

    def behave(handler: Any, body: dict[str, Any]) -> None:
        time.sleep(0.0 if body["messages"][0]["content"] == "0" else 0.4)
        says(RIGHT)(handler, body)

    with serving(behave) as server:
        requests = [Request((("user", str(i)),), 0.0, 64) for i in range(4)]
        with pytest.raises(OSError, match="no space"):
            EndpointModel(config(server, concurrency=4)).complete(requests, save)
    assert sorted(arrived) == [1, 2, 3]


def test_a_prompt_with_a_lone_surrogate_is_sent(cache: Path) -> None:
    problem = Problem("s", "What is 2 + \ud800 2?", "4")
    rollout = Rollout(problem, 0, (1,), (5,), (-0.5,), WRONG, True, 0)
    with serving(says(RIGHT)) as server:
        (critique,) = critic(server, cache)([(rollout, verifiers.exact(problem, WRONG))])
    assert isinstance(critique, Critique)


# -- limits per minute -----------------------------------------------------------------------------


def seconds_of(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def test_tokens_per_minute_are_a_limit() -> None:
    """27 tokens a reply at 5,400 a minute: 0.3 s each, and more until the first replies are counted."""
    with serving(says(RIGHT)) as server:
        requests = [Request((("user", str(i)),), 0.0, 27) for i in range(6)]
        limited = EndpointModel(config(server, tokens_per_minute=5400, concurrency=6))
        assert seconds_of(lambda: limited.complete(requests, lambda *_: None)) > 1.4


def test_tokens_that_were_reserved_and_not_used_are_returned() -> None:
    with serving(says(RIGHT)) as server:
        requests = [Request((("user", str(i)),), 0.0, 100_000) for i in range(4)]
        limited = EndpointModel(config(server, tokens_per_minute=60_000, concurrency=1))
        assert (
            seconds_of(lambda: limited.complete(requests, lambda *_: None)) < 60
        )  # without: 300 s


def test_tokens_of_a_request_without_a_reply_are_returned() -> None:
    with serving(says(RIGHT)) as server:
        member = EndpointMember(config(server, tokens_per_minute=60_000), retries=0)
    request = Request((("user", "x"),), 0.0, 100_000)

    async def fails_twice() -> None:
        for _ in range(2):
            reserved = await member.admit(request)
            with pytest.raises(MemberFailure):
                await member.reply(request, reserved)

    with ThreadPoolExecutor(1) as thread:  # tests in a browser leave a loop running in this one
        work = thread.submit(asyncio.run, fails_twice())
        assert seconds_of(work.result) < 60  # without: 100 s


def test_a_request_larger_than_the_limit_is_sent() -> None:
    with serving(says(RIGHT)) as server:
        limited = EndpointModel(config(server, tokens_per_minute=1))
        (reply,) = limited.complete([Request((("user", "x"),), 0.0, 64)], lambda *_: None)
    assert isinstance(reply, Reply)


def test_requests_per_minute_are_spaced() -> None:
    with serving(says(RIGHT)) as server:
        requests = [Request((("user", str(i)),), 0.0, 64) for i in range(5)]
        limited = EndpointModel(config(server, requests_per_minute=300))
        assert seconds_of(lambda: limited.complete(requests, lambda *_: None)) > 0.75
    assert RateLimit(None) is not None
