"""A fleet of vLLM servers: the rollouts of one server, whichever of its members fail or lie."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from eventually import eventually
from scripted_vllm import ScriptedVllm, serving_fleet
from served_policies import KINDS, SAMPLING, TINY, move, publish

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import EngineError, RecipeError
from selfteach.rollout.journaled_engine import JournaledEngine, SamplingInterrupted
from selfteach.rollout.vllm import fleet_batch, vllm_engine, vllm_fleet
from selfteach.rollout.vllm.vllm_fleet import VllmFleet
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.build import Built, build
from selfteach.trainer.build_engine import require_engine
from selfteach.types import Rollout


@pytest.fixture(scope="module")
def base() -> Built:
    return build(validate(Recipe, TINY))


@pytest.fixture
def servers(base: Built) -> Iterator[list[ScriptedVllm]]:
    model = base.components.policy.model
    with serving_fleet(model, base.tokenizer, 2) as servers:  # type: ignore[arg-type]
        yield servers


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "RETRY_INTERVAL_S", 0.01)
    monkeypatch.setattr(vllm_fleet, "RESTORE_INTERVAL_S", 0.02)
    monkeypatch.setattr(vllm_fleet, "MAX_RESTORE_INTERVAL_S", 0.05)
    monkeypatch.setattr(fleet_batch, "NAP_S", 0.02)


def recipe(servers: Sequence[ScriptedVllm], *more: dict[str, Any], **engine: Any) -> Recipe:
    section = {
        "type": "vllm_server", "urls": [server.url for server in servers], "model": "tiny",
        "tolerance": 1e-3, "concurrency": 2, "patience_seconds": 0.0, **engine,
    }  # fmt: skip
    values: dict[str, Any] = merge(TINY, {"engine": section})
    for extra in more:
        values = merge(values, extra)
    return validate(Recipe, values, where="test")


def sampled(built: Built) -> list[Rollout]:
    return built.components.engine.generate(built.task.train, SAMPLING)


def rollout_requests(server: ScriptedVllm) -> list[dict[str, Any]]:
    return [body for body in server.requests if body["max_tokens"] > 1]


def fleet_of(built: Built) -> VllmFleet:
    return built.components.engine.engine._sampler  # type: ignore[attr-defined]


def published(servers: Sequence[ScriptedVllm], more: dict[str, Any], **engine: Any) -> Built:
    """Return a trainer that has moved once and has published both versions."""
    torch.manual_seed(7)
    built = build(recipe(servers, more, **engine))
    publish(built, 0)
    move(built, 0.3, seed=7)
    publish(built, 1)
    return built


def from_one_server(servers: Sequence[ScriptedVllm], more: dict[str, Any]) -> list[Rollout]:
    """Return the rollouts of version 1 from the first server alone, and start both anew."""
    expected = sampled(published(servers[:1], more))
    for server in servers:
        server.restart()
        server.requests.clear()
    return expected


@KINDS
def test_any_fleet_samples_what_one_server_samples(
    servers: list[ScriptedVllm], more: dict[str, Any]
) -> None:
    expected = from_one_server(servers, more)
    loads = [server.loads for server in servers]
    built = published(servers, more)
    assert sampled(built) == expected
    counts = [len(rollout_requests(server)) for server in servers]
    assert min(counts) > 0 and sum(counts) == len(expected)
    assert [server.loads - before for server, before in zip(servers, loads, strict=True)] == [2, 2]


def test_rollouts_of_one_problem_share_a_server(servers: list[ScriptedVllm]) -> None:
    built = build(recipe(servers, concurrency=64))
    sampled(built)
    prompts = [{tuple(body["prompt"]) for body in rollout_requests(s)} for s in servers]
    assert not prompts[0] & prompts[1] and all(prompts)


@KINDS
def test_a_member_that_dies_in_the_middle_of_a_batch_is_replaced_by_others(
    servers: list[ScriptedVllm], more: dict[str, Any]
) -> None:
    expected = from_one_server(servers, more)
    built = published(servers, more)
    servers[1].dies_after = 2
    assert sampled(built) == expected
    assert fleet_of(built).fleet.out.keys() == {1}
    # What it sampled before its label was read again does not count.
    assert len(rollout_requests(servers[0])) == len(expected)


@pytest.mark.slow
@KINDS
def test_a_member_comes_back_with_the_newest_weights(
    servers: list[ScriptedVllm], more: dict[str, Any]
) -> None:
    built = published(servers, more)
    servers[1].dies_after = 0
    sampled(built)
    move(built, 0.3, seed=7)
    publish(built, 2)  # the member that is out misses it
    servers[1].restart()
    loads = servers[1].loads
    servers[1].dies_after = None
    eventually(lambda: not fleet_of(built).fleet.out)
    assert servers[1].loads == loads + 1
    servers[1].requests.clear()
    both = sampled(built)
    assert rollout_requests(servers[1])
    servers[0].dies_after = 0  # the member that is back samples the same
    assert sampled(built) == both


@KINDS
def test_a_member_that_keeps_old_weights_samples_nothing(
    servers: list[ScriptedVllm], more: dict[str, Any]
) -> None:
    expected = from_one_server(servers, more)
    torch.manual_seed(7)
    built = build(recipe(servers, more, tolerance=5.0))  # only the movement shows it
    publish(built, 0)
    servers[1].stale = True
    move(built, 0.3, seed=7)
    publish(built, 1)
    assert "is stale" in fleet_of(built).fleet.out[1]
    assert sampled(built) == expected
    assert not rollout_requests(servers[1])
    servers[0].stale = True
    move(built, 0.3, seed=7)
    with pytest.raises(EngineError, match=r"is stale.*is stale") as raised:
        publish(built, 2)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_restarted_member_that_ignores_its_weights_stays_out(
    servers: list[ScriptedVllm],
) -> None:
    built = published(servers, {}, tolerance=5.0)
    servers[1].dies_after = 0
    sampled(built)
    servers[1].stale = True
    servers[1].restart()
    loads = servers[1].loads
    servers[1].dies_after = None
    eventually(lambda: servers[1].loads > loads + 1)
    assert fleet_of(built).fleet.out.keys() == {1}
    servers[1].stale = False
    eventually(lambda: not fleet_of(built).fleet.out)


@pytest.mark.slow
def test_a_member_that_another_run_uses_is_left_to_it(servers: list[ScriptedVllm]) -> None:
    expected = from_one_server(servers, {})
    built = published(servers, {})
    servers[1].other_run_loads_after = 1
    loads = servers[1].loads
    assert sampled(built) == expected
    assert "another run uses it" in fleet_of(built).fleet.out[1]
    time.sleep(0.2)
    assert servers[1].loads == loads and fleet_of(built).fleet.out


@pytest.mark.slow
@KINDS
def test_finished_problems_are_saved_when_all_members_are_down(
    servers: list[ScriptedVllm], more: dict[str, Any], tmp_path: Path
) -> None:
    expected = from_one_server(servers, more)
    built = published(servers, more)
    engine, run = built.components.engine, RunFolder(tmp_path)
    for server in servers:
        server.dies_after = 2
    with pytest.raises(SamplingInterrupted, match=r"is unavailable .*selfteach resume") as raised:
        JournaledEngine(engine, run, "s").generate(built.task.train, SAMPLING)
    assert all(server.url in str(raised.value) for server in servers)
    assert "\n" not in str(raised.value)
    for server in servers:
        server.dies_after = None
    eventually(lambda: not fleet_of(built).fleet.out)
    assert JournaledEngine(engine, run, "s").generate(built.task.train, SAMPLING) == expected


@pytest.mark.slow
def test_all_members_are_waited_for(servers: list[ScriptedVllm]) -> None:
    expected = from_one_server(servers, {})
    built = published(servers, {}, patience_seconds=60.0)
    for server in servers:
        server.restarts_after = 2
    assert sampled(built) == expected


@pytest.mark.slow
def test_a_slow_member_gets_fewer_requests(servers: list[ScriptedVllm]) -> None:
    expected = from_one_server(servers, {})
    built = published(servers, {}, concurrency=1)
    servers[1].delay_s = 0.5
    assert sampled(built) == expected
    assert len(rollout_requests(servers[1])) <= 3 < len(rollout_requests(servers[0]))


@pytest.mark.slow
def test_a_rollout_that_takes_long_is_sampled_by_a_second_member_too(
    servers: list[ScriptedVllm],
) -> None:
    expected = from_one_server(servers, {})
    built = published(servers, {}, concurrency=1, hedge_after=2.0)
    servers[1].delay_s = 20.0
    for _ in range(2):  # the first batch makes the median
        assert sampled(built) == expected
    twice = len(rollout_requests(servers[0])) + len(rollout_requests(servers[1]))
    assert twice > 2 * len(expected) and not fleet_of(built).fleet.out


def test_a_request_that_all_members_reject_is_an_error_in_one_line(
    servers: list[ScriptedVllm],
) -> None:
    built = published(servers, {})
    poison = list(built.components.renderer.solver_prompt(built.task.train[3]))
    for server in servers:
        server.rejects = lambda body: body["max_tokens"] > 1 and body["prompt"] == poison
    with pytest.raises(EngineError, match=r"rejected the request: 400") as raised:
        sampled(built)
    assert "\n" not in str(raised.value)


def test_each_member_is_checked_before_a_run(servers: list[ScriptedVllm]) -> None:
    states = [f"{server.url}: replies" for server in servers]
    assert require_engine(recipe(servers)) == states
    servers[1]._tokenizer = lambda text: {"input_ids": [len(text)]}  # type: ignore[assignment]
    with pytest.raises(EngineError, match=f"{servers[1].url} tokenizes text differently"):
        require_engine(recipe(servers))
    servers[1].stop()
    down = f"{servers[1].url}: down, left out until it replies"
    assert require_engine(recipe(servers)) == [states[0], down]
    servers[0].stop()
    with pytest.raises(EngineError, match=r"no server replies .*no server replies"):
        require_engine(recipe(servers))


@pytest.mark.parametrize(
    ("engine", "line"),
    [
        ({"url": "http://a:1", "urls": ["http://b:1"]}, "both are set: set engine.url for one"),
        ({"urls": []}, r"urls"),
        ({"hedge_after": 2.0}, "engine.hedge_after is for several servers: it needs engine.urls"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "engine.urls lists http://a:1 twice"),
        ({"urls": ["http://a:1", "http://a:1/v1"]}, r"engine.urls = .*leave out /v1"),
        ({"urls": "http://a:1"}, r"engine.urls is a list of addresses: write engine.urls = \['"),
    ],
)
def test_addresses_that_are_no_fleet_are_refused(engine: dict[str, Any], line: str) -> None:
    section = {"type": "vllm_server", "model": "m", **engine}
    with pytest.raises(RecipeError, match=line) as raised:
        validate(Recipe, {"engine": section})
    assert "\n" not in str(raised.value)


def test_keys_in_addresses_are_refused_and_not_repeated() -> None:
    for urls in ("http://me:secret@a:1", ["http://b:1", "http://me:secret@a:1"]):
        section = {"type": "vllm_server", "model": "m", "urls": urls}
        with pytest.raises(EngineError, match=r"engine.urls holds a key") as raised:
            validate(Recipe, {"engine": section})
        assert "secret" not in str(raised.value)


def test_one_address_is_read_as_before() -> None:
    old = validate(Recipe, merge(TINY, {"engine": {"type": "vllm_server", "model": "m"}})).engine
    assert old.model_dump()["url"] == "http://127.0.0.1:8000" and old.model_dump()["urls"] is None
