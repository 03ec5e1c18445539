"""Runs whose critic's server misbehaves: they end as the recipe says, and the counts add up."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from forked import kill_when
from same_run import assert_same
from scripted_critic import oracle_critique
from scripted_server import Behaviour, Server, cuts, raw, refuses, says, serving, stalls

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CriticError
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.loop import run_to_end

TINY = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 6, "validation": 1, "test": 1},
    "sampling": {"max_tokens": 40, "batch_size": 2},
    "context": {"type": "step_aligned"},
    "train": {"steps": 1, "problems_per_step": 3, "group_size": 2, "threads": 1},
    "evaluation": {"every": 1, "validation_k": 1, "test": False},
}  # fmt: skip
ROLLOUTS = 6
OTHER_PROBLEM = "0 + a b = c 1 + d e = f 2 + c f = a 3 + b a = d 4 + a d = e # e"
"""A critique of another problem, in the right form."""


def recipe(critic: dict[str, Any]) -> Recipe:
    return validate(Recipe, merge(TINY, {"critic": critic}), where="test")


def served(url: str, cache: Path, **settings: Any) -> Recipe:
    critic = {
        "type": "endpoint", "base_url": url, "model": "m", "max_tokens": 64, "timeout_seconds": 5.0,
        "http_retries": 0, "max_attempts": 2, "min_similarity": 0.0, "reply_cache": str(cache),
    }  # fmt: skip
    return recipe({**critic, **settings})


def step_of(folder: Path) -> dict[str, Any]:
    (row,) = [row for row in RunFolder(folder).metrics() if row["kind"] == "step"]
    return row


def samples_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "samples" / "step_000001.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def cached_replies(cache: Path) -> int:
    with closing(sqlite3.connect(cache)) as database:
        return database.execute("SELECT count(*) FROM replies").fetchone()[0]


def assert_counts(folder: Path, kind: str, policy: str, server: Server, cache: Path) -> None:
    """Check that requests, replies, failures and drops are all in the metrics."""
    row, samples = step_of(folder), samples_of(folder)
    paid = 0 if kind == "unavailable" else len(server.requests)
    attempts = 2 if policy == "retry" else 1
    assert row["critic_requests"] == paid == cached_replies(cache)
    expected = 0 if kind == "unavailable" else ROLLOUTS * attempts
    assert row["critic_requests"] + row["critic_cached"] == expected
    failed = round(row[f"critique_failure/{kind}"] * ROLLOUTS)
    assert row["critiques"] + failed == ROLLOUTS == len(samples) and failed > 0
    shares = [value for key, value in row.items() if key.startswith("critique_failure/")]
    assert row["critiqued"] + sum(shares) == pytest.approx(1)
    assert failed == sum(sample["critique"].get("reason") == kind for sample in samples)
    if policy == "fallback":
        assert row["dropped"] == 0 and all(sample["context"] for sample in samples)
    else:
        assert row["dropped"] == row[f"dropped/{kind}"] == failed / ROLLOUTS


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with a critic that works."""
    folder = tmp_path_factory.mktemp("oracle") / "run"
    run_to_end(recipe({"type": "oracle"}), folder)
    return folder


def ten_megabytes(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    says(("0 + a a = a " * 900_000)[:10_000_000])(handler, body)


USELESS: dict[str, tuple[Behaviour, str, dict[str, Any]]] = {
    "invalid tags": (says("<step_1>I like it.</step_2>"), "malformed", {}),
    "empty": (says(""), "empty", {}),
    "another problem": (says(OTHER_PROBLEM), "misaligned", {"min_similarity": 0.9}),
    "wrong answer": (says(OTHER_PROBLEM), "wrong_answer", {}),
    "cut at its limit": (says(oracle_critique, "length"), "truncated", {}),
    "ten megabytes": (ten_megabytes, "truncated", {}),
}


def each_with_each(names: Iterable[str], policies: Sequence[str]) -> list[Any]:
    """All combinations; each name and each policy occurs in one that is not marked slow."""
    return [
        pytest.param(name, policy, marks=[] if (i - j) % len(policies) == 0 else pytest.mark.slow)
        for i, name in enumerate(names)
        for j, policy in enumerate(policies)
    ]


@pytest.mark.parametrize(("name", "policy"), each_with_each(USELESS, ["drop", "retry", "fallback"]))
def test_useless_critiques(name: str, policy: str, tmp_path: Path) -> None:
    behaviour, kind, settings = USELESS[name]
    cache, folder = tmp_path / "replies.sqlite", tmp_path / "run"
    with serving(behaviour) as server:
        run_to_end(served(server.url, cache, **settings, on_failure={kind: policy}), folder)
        assert_counts(folder, kind, policy, server, cache)
    sizes = [path.stat().st_size for path in folder.rglob("*.jsonl")]
    assert max([*sizes, cache.stat().st_size]) < 200_000, "useless replies are not saved whole"


@contextmanager
def no_server(*_: Behaviour) -> Iterator[Server]:
    """An address without a server."""
    server = Server(says(""))
    server.stop()
    yield server


ABSENT: dict[str, Any] = {
    "refuses": lambda: no_server(),
    "stalls": lambda: serving(stalls(1.0)),
    "429": lambda: serving(refuses(429, Retry_After="0.01")),
    "500": lambda: serving(refuses(500)),
    "cut": lambda: serving(cuts),
    "no json": lambda: serving(raw(b'{"choices": [')),
}


@pytest.mark.parametrize(("name", "policy"), each_with_each(ABSENT, ["stop", "drop", "fallback"]))
def test_no_reply(name: str, policy: str, tmp_path: Path, oracle: Path) -> None:
    cache, folder = tmp_path / "replies.sqlite", tmp_path / "run"
    with ABSENT[name]() as server:
        config = served(
            server.url,
            cache,
            healthcheck=False,
            timeout_seconds=0.7,
            on_failure={"unavailable": policy},
        )
        if policy != "stop":
            run_to_end(config, folder)
            assert_counts(folder, "unavailable", policy, server, cache)
            return
        with pytest.raises(CriticError, match=r"unavailable: .*requests only the rest"):
            run_to_end(config, folder)
        assert cached_replies(cache) == 0 and not (folder / "samples").exists()
    with restarted(server) as again:  # and the run is resumed
        run_to_end(config, folder)
        assert step_of(folder)["critic_requests"] == len(again.requests) == cached_replies(cache)
    assert_same(oracle, folder)


@contextmanager
def restarted(server: Server) -> Iterator[Server]:
    again = Server(says(oracle_critique), port=server.port)
    try:
        yield again
    finally:
        again.stop()


@pytest.mark.parametrize(
    "bad",
    [refuses(429, Retry_After="0.2"), refuses(500), cuts, raw(b"{]"), raw(b'{"a": 1}'), stalls(1)],
    ids=["429", "500", "cut", "no json", "no completion", "stalls"],
)
def test_a_failure_of_each_first_request_changes_nothing(
    bad: Behaviour, tmp_path: Path, oracle: Path
) -> None:
    seen: Counter[str] = Counter()

    def at_first_bad(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        prompt = json.dumps(body["messages"])
        seen[prompt] += 1
        (bad if seen[prompt] == 1 else says(oracle_critique))(handler, body)

    cache, folder = tmp_path / "replies.sqlite", tmp_path / "run"
    with serving(at_first_bad) as server:
        run_to_end(served(server.url, cache, timeout_seconds=0.5, http_retries=2), folder)
    assert set(seen.values()) == {2}
    assert step_of(folder)["critic_requests"] == cached_replies(cache) == len(seen)
    assert step_of(folder)["dropped"] == 0
    assert_same(oracle, folder)


def test_a_server_killed_during_a_step_and_restarted_changes_nothing(
    tmp_path: Path, oracle: Path
) -> None:
    cache, folder = tmp_path / "replies.sqlite", tmp_path / "run"
    servers: list[Server] = []

    def dies_at_the_third(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if len(server.requests) < 3:
            says(oracle_critique)(handler, body)
            return
        handler.connection.close()
        if not servers:
            servers.append(server)
            server.stop()
            time.sleep(0.8)  # the next requests find no server
            servers.append(Server(says(oracle_critique), port=server.port))

    with serving(dies_at_the_third) as server:
        run_to_end(served(server.url, cache, http_retries=6, concurrency=1), folder)
    again = servers[1]
    again.stop()
    assert step_of(folder)["critic_requests"] == cached_replies(cache) == 2 + len(again.requests)
    assert_same(oracle, folder)


def test_a_trainer_killed_while_it_waits_requests_only_the_rest(
    tmp_path: Path, oracle: Path
) -> None:
    cache, folder = tmp_path / "replies.sqlite", tmp_path / "run"
    gone = threading.Event()

    def answers_three(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if len(server.requests) > 3:
            gone.wait(60)
        says(oracle_critique)(handler, body)

    with serving(answers_three) as server:
        config = served(server.url, cache, concurrency=1)
        kill_when(lambda: len(server.requests) >= 4, run_to_end, config, folder)
        gone.set()
        paid = [json.dumps(body["messages"]) for body in server.requests[:3]]
        assert cached_replies(cache) == 3 and not (folder / "samples").exists()
        server.behaviours = [says(oracle_critique)]
        server.requests.clear()
        run_to_end(config, folder)
        resent = [json.dumps(body["messages"]) for body in server.requests]
    assert not set(resent) & set(paid), "paid for twice"
    assert len(set(resent)) == len(resent) and cached_replies(cache) == 3 + len(resent)
    # Each reply is counted as paid once, also the one of a batch whose critiques were not saved yet.
    row = step_of(folder)
    assert row["critic_requests"] + row["critic_cached"] == ROLLOUTS
    assert row["critic_requests"] == 3 + len(resent) == cached_replies(cache)
    assert row["critic_prompt_tokens"] == 20 * cached_replies(cache)
    assert_same(oracle, folder)


def test_the_next_batch_is_sampled_while_a_slow_server_critiques_the_previous_one(
    tmp_path: Path, oracle: Path
) -> None:
    folder = tmp_path / "run"
    second = folder / "rollouts" / "step_000001.001.jsonl"
    waited: list[bool] = []

    def slow(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        deadline = time.monotonic() + 20
        while not second.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        waited.append(second.exists())
        says(oracle_critique)(handler, body)

    with serving(slow) as server:
        config = served(server.url, tmp_path / "s.sqlite", timeout_seconds=60.0)
        run_to_end(config, folder)
    assert waited and all(waited), "the server was waited for before the next batch was sampled"
    assert_same(oracle, folder)
