"""Two real servers as a fleet: the rollouts of one, whichever is killed, stale or slow.

The model is a tiny Llama with random weights, so that both servers fit beside the trainer.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from http_proxy import Proxy, proxied
from served_policies import mismatch, move, publish

import vllm_server
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.rollout.vllm.vllm_fleet import VllmFleet
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.build import Built, build
from selfteach.trainer.loop import run_to_end
from selfteach.types import Rollout, Sampling
from vllm_server import Server

TOLERANCE = 1e-3
LONGER = Sampling(samples=4, temperature=0.7, max_tokens=64, seed=5)
FAILURES = ("empty", "truncated", "malformed", "misaligned", "wrong_answer")


@pytest.fixture(scope="module")
def servers(
    tiny_model: Path, no_shared_server: None, print_line: Callable[[str], None]
) -> Iterator[list[Server]]:
    flags = (*vllm_server.SMALL_FLAGS, "--max-model-len", "4096")
    with ExitStack() as stack:
        started = []
        for _ in range(2):
            port = vllm_server.free_port()
            server = Server(port, print_line, model=tiny_model, engine=True, flags=flags)
            stack.callback(server.stop)
            started.append(server)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Server.start, started))
        yield started


@pytest.fixture
def model(tiny_model: Path) -> Path:
    return tiny_model


@pytest.fixture(autouse=True)
def _both_run(servers: list[Server]) -> None:
    for server in servers:
        if not server.running:
            server.start()


@pytest.fixture
def proxies(servers: list[Server]) -> Iterator[list[Proxy]]:
    with ExitStack() as stack:
        yield [stack.enter_context(proxied(server.address)) for server in servers]


def recipe(model: Path, urls: Sequence[str], *more: dict[str, Any], **engine: Any) -> Recipe:
    section = {
        "type": "vllm_server", "model": vllm_server.NAME, "tolerance": TOLERANCE,
        "patience_seconds": 900.0, "concurrency": 2,
        **({"urls": list(urls)} if len(urls) > 1 else {"url": urls[0]}), **engine,
    }  # fmt: skip
    values: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {
            "type": "chain_sums", "seed": 3, "min_terms": 3, "max_terms": 3, "max_digits": 1,
            "train": 6, "validation": 1, "test": 1,
        },
        "sampling": {"max_tokens": 24, "batch_size": 12, "temperature": 0.7},
        "train": {
            "steps": 3, "problems_per_step": 3, "group_size": 4, "checkpoint_every": 1,
            "threads": 1, "max_length": 4096,
        },
        "context": {"type": "reference"},
        "objective": {"importance_cap": 2.0},
        "optimizer": {"lr": 1e-4},
        "evaluation": {"every": 3, "validation_k": 1, "test": False},
        "engine": section,
    }  # fmt: skip
    for extra in more:
        values = merge(values, extra)
    return validate(Recipe, values, where="test")


def sampled(built: Built) -> list[Rollout]:
    return built.components.engine.generate(built.task.train, LONGER)


def fleet_of(built: Built) -> VllmFleet:
    return built.components.engine.engine._sampler  # type: ignore[attr-defined]


def eventually(holds: Callable[[], bool], within_s: float = 900.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def rollouts_of(run: Path) -> list[dict[str, Any]]:
    paths = sorted((run / "rollouts").glob("step_*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_a_run_on_two_servers_is_the_run_on_one(
    model: Path, proxies: list[Proxy], tmp_path: Path, print_line: Callable[[str], None]
) -> None:
    urls = [proxy.address for proxy in proxies]
    run_to_end(recipe(model, urls[:1]), tmp_path / "one")
    one = rollouts_of(tmp_path / "one")
    counts = {}
    for way in ("stream", "folder"):
        for proxy in proxies:
            proxy.bodies.clear()
        run_to_end(recipe(model, urls, weight_transfer=way), tmp_path / way)
        two = rollouts_of(tmp_path / way)
        counts[way] = [proxy.rollouts for proxy in proxies]
        same = sum(a["token_ids"] == b["token_ids"] for a, b in zip(one, two, strict=True))
        pairs = [
            abs(x - y) for a, b in zip(one, two, strict=True)
            if a["token_ids"] == b["token_ids"]
            for x, y in zip(a["logps"], b["logps"], strict=True)
        ]  # fmt: skip
        print_line(
            f"{way}: {same} of {len(one)} rollouts have the same tokens, their log-probabilities "
            f"differ by up to {max(pairs):.1e} nats; requests {counts[way]}"
        )
        assert same == len(one) and max(pairs) < TOLERANCE
        assert min(counts[way]) > 0
        rows = [row for row in RunFolder(tmp_path / way).metrics() if row["kind"] == "step"]
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert all(row["tokens_trained"] > 0 for row in rows), "the weights move"
        print_line(f"{way}: mismatch_max {max(row['mismatch_max'] for row in rows):.1e}")
        assert all(row["mismatch_max"] < TOLERANCE for row in rows)


def test_a_member_that_keeps_old_weights_is_taken_out_and_samples_nothing(
    model: Path, proxies: list[Proxy], caplog: pytest.LogCaptureFixture
) -> None:
    urls = [proxy.address for proxy in proxies]
    built = build(recipe(model, urls))
    publish(built, 0)
    proxies[1].swallows = lambda _, body: (
        b'{"results": [{}]}' if b"selfteach_commit" in body else None
    )
    move(built, 0.02, seed=7)
    proxies[1].bodies.clear()
    publish(built, 1)
    assert "is stale: it still has the weights before" in fleet_of(built).fleet.out[1]
    assert mismatch(built, sampled(built)) < TOLERANCE and proxies[1].rollouts == 0
    proxies[1].swallows = lambda path, body: None
    eventually(lambda: not fleet_of(built).fleet.out)
    assert mismatch(built, sampled(built)) < TOLERANCE and proxies[1].rollouts > 0


def test_a_slow_member_gets_fewer_requests_and_its_last_ones_are_sampled_elsewhere(
    model: Path, proxies: list[Proxy], print_line: Callable[[str], None]
) -> None:
    built = build(recipe(model, [proxy.address for proxy in proxies], hedge_after=3.0))
    publish(built, 0)
    expected = sampled(built)
    proxies[1].delay_s = 20.0
    for proxy in proxies:
        proxy.bodies.clear()
    began = time.monotonic()
    assert [r.token_ids for r in sampled(built)] == [r.token_ids for r in expected]
    counts = [proxy.rollouts for proxy in proxies]
    print_line(f"one delays by 20 s: {time.monotonic() - began:.1f} s, requests {counts}")
    assert counts[1] < counts[0] and sum(counts) > len(expected), "the last are sampled twice"


def test_a_member_that_is_killed_in_a_batch_comes_back_with_newer_weights(
    model: Path, servers: list[Server], proxies: list[Proxy], caplog: pytest.LogCaptureFixture
) -> None:
    urls = [proxy.address for proxy in proxies]
    alone = build(recipe(model, urls[:1]))
    move(alone, 0.02, seed=7)
    publish(alone, 1)
    expected = sampled(alone)
    built = build(recipe(model, urls))
    publish(built, 0)
    move(built, 0.02, seed=7)
    publish(built, 1)
    proxies[1].bodies.clear()
    results: list[list[Rollout]] = []
    batch = threading.Thread(target=lambda: results.append(sampled(built)))
    batch.start()
    eventually(lambda: proxies[1].rollouts >= 1)
    servers[1].stop(kill=True)
    batch.join(timeout=900)
    assert [r.token_ids for r in results[0]] == [r.token_ids for r in expected], "none is lost"
    assert mismatch(built, results[0]) < TOLERANCE
    assert fleet_of(built).fleet.out.keys() == {1}
    move(built, 0.02, seed=7)
    publish(built, 2)  # the killed one misses it
    servers[1].start()
    eventually(lambda: not fleet_of(built).fleet.out)
    proxies[1].bodies.clear()
    assert mismatch(built, sampled(built)) < TOLERANCE and proxies[1].rollouts > 0
    lines = [record.getMessage() for record in caplog.records if urls[1] in record.getMessage()]
    assert "is taken out until it has the newest weights" in lines[0] and "is back" in lines[-1]


def test_a_run_with_two_critics_goes_on_when_one_is_killed(
    model: Path, servers: list[Server], proxies: list[Proxy], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Random weights write no critique: what counts is that each rollout gets its one reply."""
    critic = {
        "type": "endpoint", "base_urls": [f"{proxy.address}/v1" for proxy in proxies],
        "model": vllm_server.NAME, "max_tokens": 24, "http_retries": 0, "max_attempts": 1,
        "concurrency": 1, "on_failure": dict.fromkeys(FAILURES, "fallback"),
        "reply_cache": str(tmp_path / "replies.sqlite"), "patience_seconds": 900.0,
    }  # fmt: skip
    critiqued = {"critic": critic, "context": {"type": "step_aligned"}, "train": {"steps": 2}}
    transformers = {**recipe(model, ["http://a:1"], critiqued).model_dump(mode="json")}
    transformers["engine"] = {"type": "transformers"}
    results: list[dict[str, Any]] = []
    run = threading.Thread(
        target=lambda: results.append(
            run_to_end(validate(Recipe, transformers, where="test"), tmp_path / "run")
        )
    )
    with caplog.at_level(logging.WARNING):
        run.start()
        eventually(lambda: sum("/chat/" in path for path, _ in proxies[1].bodies) >= 2)
        servers[1].stop(kill=True)
        run.join(timeout=900)
    budget = results[0]["budget"]
    assert budget["critic_requests"] + budget["critic_cached"] == 2 * 12
    rows = [row for row in RunFolder(tmp_path / "run").metrics() if row["kind"] == "step"]
    assert sum(row["critic_member/1/failures"] for row in rows) > 0
    assert rows[-1]["critic_member/0/requests"] > 0
