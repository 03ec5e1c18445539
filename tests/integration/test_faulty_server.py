"""Whole runs whose critic's server misbehaves: they end as the recipe says, and the counts add up."""

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
from forked import killed
from same_run import assert_same
from scripted_critic import criticises
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
ANSWERS = 6
ELSEWHERE = "0 + a b = c 1 + d e = f 2 + c f = a 3 + b a = d 4 + a d = e # e"
"""A critique of another problem, in the right form."""


def recipe(critic: dict[str, Any]) -> Recipe:
    return validate(Recipe, merge(TINY, {"critic": critic}), where="test")


def served(url: str, store: Path, **settings: Any) -> Recipe:
    own = {
        "type": "endpoint", "base_url": url, "model": "m", "max_tokens": 64, "timeout_seconds": 5.0,
        "http_retries": 0, "max_attempts": 2, "min_similarity": 0.0, "reply_cache": str(store),
    }  # fmt: skip
    return recipe({**own, **settings})


def step_of(folder: Path) -> dict[str, Any]:
    (row,) = [row for row in RunFolder(folder).metrics() if row["kind"] == "step"]
    return row


def lessons_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "samples" / "step_000001.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def stored(store: Path) -> int:
    with closing(sqlite3.connect(store)) as database:
        return database.execute("SELECT count(*) FROM replies").fetchone()[0]


def assert_counts(folder: Path, outcome: str, policy: str, server: Server, store: Path) -> None:
    """Everything that was wanted, asked, answered, refused and dropped is in the metrics."""
    row, samples = step_of(folder), lessons_of(folder)
    paid = 0 if outcome == "unavailable" else len(server.asked)
    attempts = 2 if policy == "retry" else 1
    assert row["critic_requests"] == paid == stored(store)
    wanted = 0 if outcome == "unavailable" else ANSWERS * attempts
    assert row["critic_requests"] + row["critic_cached"] == wanted
    refused = round(row[f"critique_failure/{outcome}"] * ANSWERS)
    assert row["critiques"] + refused == ANSWERS == len(samples) and refused > 0
    assert refused == sum(sample["critique"].get("reason") == outcome for sample in samples)
    if policy == "fallback":
        assert row["dropped"] == 0 and all(sample["context"] for sample in samples)
    else:
        assert row["dropped"] == row[f"dropped/{outcome}"] == refused / ANSWERS


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the run comes to with a critic that works."""
    folder = tmp_path_factory.mktemp("oracle") / "run"
    run_to_end(recipe({"type": "oracle"}), folder)
    return folder


def ten_megabytes(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    says(("0 + a a = a " * 900_000)[:10_000_000])(handler, body)


USELESS: dict[str, tuple[Behaviour, str, dict[str, Any]]] = {
    "invalid tags": (says("<step_1>I like it.</step_2>"), "malformed", {}),
    "empty": (says(""), "empty", {}),
    "another problem": (says(ELSEWHERE), "misaligned", {"min_similarity": 0.9}),
    "wrong answer": (says(ELSEWHERE), "wrong_answer", {}),
    "cut at its limit": (says(criticises, "length"), "truncated", {}),
    "ten megabytes": (ten_megabytes, "truncated", {}),
}


def each_with_each(names: Iterable[str], policies: Sequence[str]) -> list[Any]:
    """All combinations; every name and every policy is in those that are not slow."""
    return [
        pytest.param(name, policy, marks=[] if (i - j) % len(policies) == 0 else pytest.mark.slow)
        for i, name in enumerate(names)
        for j, policy in enumerate(policies)
    ]


@pytest.mark.parametrize(("name", "policy"), each_with_each(USELESS, ["drop", "retry", "fallback"]))
def test_useless_critiques(name: str, policy: str, tmp_path: Path) -> None:
    behaviour, outcome, settings = USELESS[name]
    store, folder = tmp_path / "replies.sqlite", tmp_path / "run"
    with serving(behaviour) as server:
        run_to_end(served(server.url, store, **settings, on={outcome: policy}), folder)
        assert_counts(folder, outcome, policy, server, store)
    sizes = [path.stat().st_size for path in folder.rglob("*.jsonl")]
    assert max([*sizes, store.stat().st_size]) < 200_000, "what is useless is not hoarded"


@contextmanager
def nobody(*_: Behaviour) -> Iterator[Server]:
    """An address at which there is no server (any more)."""
    server = Server(says(""))
    server.stop()
    yield server


ABSENT: dict[str, Any] = {
    "refuses": lambda: nobody(),
    "stalls": lambda: serving(stalls(1.0)),
    "429": lambda: serving(refuses(429, Retry_After="0.01")),
    "500": lambda: serving(refuses(500)),
    "cut": lambda: serving(cuts),
    "no json": lambda: serving(raw(b'{"choices": [')),
}


@pytest.mark.parametrize(("name", "policy"), each_with_each(ABSENT, ["stop", "drop", "fallback"]))
def test_no_reply(name: str, policy: str, tmp_path: Path, oracle: Path) -> None:
    store, folder = tmp_path / "replies.sqlite", tmp_path / "run"
    with ABSENT[name]() as server:
        own = served(
            server.url, store, healthcheck=False, timeout_seconds=0.3, on={"unavailable": policy}
        )
        if policy != "stop":
            run_to_end(own, folder)
            assert_counts(folder, "unavailable", policy, server, store)
            return
        with pytest.raises(CriticError, match=r"unavailable: .*asks only for the rest"):
            run_to_end(own, folder)
        assert stored(store) == 0 and not (folder / "samples").exists()
    with restarted(server) as again:  # and the run is taken up
        run_to_end(own, folder)
        assert step_of(folder)["critic_requests"] == len(again.asked) == stored(store)
    assert_same(oracle, folder)


@contextmanager
def restarted(server: Server) -> Iterator[Server]:
    again = Server(says(criticises), port=server.port)
    try:
        yield again
    finally:
        again.stop()


@pytest.mark.parametrize(
    "bad",
    [refuses(429, Retry_After="0.2"), refuses(500), cuts, raw(b"{]"), raw(b'{"a": 1}'), stalls(1)],
    ids=["429", "500", "cut", "no json", "no completion", "stalls"],
)
def test_what_fails_once_for_every_request_changes_nothing(
    bad: Behaviour, tmp_path: Path, oracle: Path
) -> None:
    seen: Counter[str] = Counter()

    def at_first_bad(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        asked = json.dumps(body["messages"])
        seen[asked] += 1
        (bad if seen[asked] == 1 else says(criticises))(handler, body)

    store, folder = tmp_path / "replies.sqlite", tmp_path / "run"
    with serving(at_first_bad) as server:
        run_to_end(served(server.url, store, timeout_seconds=0.5, http_retries=2), folder)
    assert set(seen.values()) == {2}
    assert step_of(folder)["critic_requests"] == stored(store) == len(seen)
    assert step_of(folder)["dropped"] == 0
    assert_same(oracle, folder)


def test_a_server_that_is_killed_in_the_middle_of_a_step_and_started_again(
    tmp_path: Path, oracle: Path
) -> None:
    store, folder = tmp_path / "replies.sqlite", tmp_path / "run"
    later: list[Server] = []

    def dies_at_the_third(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if len(server.asked) < 3:
            says(criticises)(handler, body)
            return
        handler.connection.close()
        if not later:
            later.append(server)
            server.stop()
            time.sleep(0.8)  # the next requests find nobody
            later.append(Server(says(criticises), port=server.port))

    with serving(dies_at_the_third) as server:
        run_to_end(served(server.url, store, http_retries=6, concurrency=1), folder)
    again = later[1]
    again.stop()
    assert step_of(folder)["critic_requests"] == stored(store) == 2 + len(again.asked)
    assert_same(oracle, folder)


def test_a_trainer_that_is_killed_while_it_waits_asks_only_for_the_rest(
    tmp_path: Path, oracle: Path
) -> None:
    store, folder = tmp_path / "replies.sqlite", tmp_path / "run"
    gone = threading.Event()

    def answers_three(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if len(server.asked) > 3:
            gone.wait(60)
        says(criticises)(handler, body)

    with serving(answers_three) as server:
        own = served(server.url, store, concurrency=1)
        killed(lambda: len(server.asked) >= 4, run_to_end, own, folder)
        gone.set()
        paid = [json.dumps(body["messages"]) for body in server.asked[:3]]
        assert stored(store) == 3 and not (folder / "samples").exists()
        server.behaviours = [says(criticises)]
        server.asked.clear()
        run_to_end(own, folder)
        asked = [json.dumps(body["messages"]) for body in server.asked]
    assert not set(asked) & set(paid), "paid for twice"
    assert len(set(asked)) == len(asked) and stored(store) == 3 + len(asked)
    row = step_of(folder)
    assert (row["critic_requests"], row["critic_cached"]) == (len(asked), ANSWERS - len(asked))
    assert_same(oracle, folder)


def test_the_next_batch_is_sampled_while_a_slow_server_marks_the_one_before(
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
        says(criticises)(handler, body)

    with serving(slow) as server:
        own = served(server.url, tmp_path / "s.sqlite", timeout_seconds=60.0)
        run_to_end(own, folder)
    assert waited and all(waited), "the server was waited for before the next batch was sampled"
    assert_same(oracle, folder)
