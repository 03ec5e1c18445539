"""Whole runs with fleets of samplers and critics: the run of one server, whoever fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from critiqued_runs import ORACLE, critiqued_by, run_with_oracle, served_critic
from same_run import assert_same, step_rows
from scripted_server import Server, refuses, says, serving
from scripted_vllm import ScriptedVllm, serving_fleet

from selfteach import cli
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CriticError, EngineError
from selfteach.feedback.critics import endpoint
from selfteach.rollout.vllm import vllm_engine, vllm_fleet
from selfteach.trainer.build import build
from selfteach.trainer.loop import run_to_end

SAMPLED: dict[str, Any] = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 6, "validation": 1, "test": 1},
    "sampling": {"max_tokens": 8, "batch_size": 6},
    "context": {"type": "reference"},
    "train": {
        "steps": 3, "problems_per_step": 3, "group_size": 2, "threads": 1,
        "checkpoint_every": 1, "max_length": 96,
    },
    "evaluation": {"every": 3, "validation_k": 1, "test": False},
}  # fmt: skip
LORA = {"model": {"lora": {"rank": 2, "alpha": 4.0}}, "teacher": {"type": "initial"}}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "RETRY_INTERVAL_S", 0.01)
    monkeypatch.setattr(vllm_fleet, "RESTORE_INTERVAL_S", 0.02)
    monkeypatch.setattr(vllm_fleet, "MAX_RESTORE_INTERVAL_S", 0.05)
    monkeypatch.setattr(endpoint, "PROBE_INTERVAL_S", 0.02)
    monkeypatch.setattr(endpoint, "MAX_PROBE_INTERVAL_S", 0.05)


@pytest.fixture
def samplers() -> Iterator[list[ScriptedVllm]]:
    built = build(validate(Recipe, merge(SAMPLED, {"train": {"steps": 0}})))
    model = built.components.policy.model
    with serving_fleet(model, built.tokenizer, 3) as servers:  # type: ignore[arg-type]
        yield servers


def sampled(servers: list[ScriptedVllm], *more: dict[str, Any], **engine: Any) -> Recipe:
    urls = [server.url for server in servers]
    section = {
        "type": "vllm_server", "model": "tiny", "tolerance": 1e-3, "concurrency": 2,
        "patience_seconds": 0.0, **({"urls": urls} if len(urls) > 1 else {"url": urls[0]}), **engine,
    }  # fmt: skip
    values = merge(SAMPLED, {"engine": section})
    for extra in more:
        values = merge(values, extra)
    return validate(Recipe, values, where="test")


def anew(servers: list[ScriptedVllm]) -> None:
    for server in servers:
        server.dies_after = server.restarts_after = None
        server.stale, server.delay_s = False, 0.0
        server.restart()
        server.requests.clear()


def assert_same_rollouts(a: Path, b: Path) -> None:
    names = sorted(path.name for path in (a / "rollouts").glob("*.jsonl"))
    assert names == sorted(path.name for path in (b / "rollouts").glob("*.jsonl"))
    for name in names:
        assert (a / "rollouts" / name).read_bytes() == (b / "rollouts" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_a_run_on_any_fleet_of_samplers_is_the_run_on_one(
    samplers: list[ScriptedVllm], tmp_path: Path, more: dict[str, Any]
) -> None:
    run_to_end(sampled(samplers[:1], more), tmp_path / "one")

    def same(name: str, servers: list[ScriptedVllm], **engine: Any) -> list[dict[str, Any]]:
        run_to_end(sampled(servers, more, **engine), tmp_path / name)
        if not more:
            assert_same(tmp_path / "one", tmp_path / name)
        assert_same_rollouts(tmp_path / "one", tmp_path / name)
        return step_rows(tmp_path / name)

    anew(samplers)
    rows = same("three", samplers)
    requests = [[row[f"engine_member/{i}/requests"] for i in range(3)] for row in rows]
    assert sum(map(sum, requests)) == 3 * 6 + 1  # the first row has those of the first validation
    assert all(row["engine_member/0/seconds"] > 0 for row in rows)
    anew(samplers)
    samplers[0].dies_after = 4  # in the middle of the first step, for good
    samplers[1].delay_s = 0.2  # slow
    rows = same("killed and slow", samplers)
    assert sum(row["engine_member/0/failures"] for row in rows) > 0
    anew(samplers)
    samplers[2].stale = True  # acknowledges updates, and keeps its weights
    same("stale", samplers)
    versions = [b for b in samplers[2].requests if b["max_tokens"] > 1]
    assert len(versions) <= 6 + 2  # none after the first update
    anew(samplers)
    samplers[0].restarts_after, samplers[1].restarts_after = 3, 5  # and come back
    same("restarted", samplers)


@pytest.mark.slow
def test_a_run_without_samplers_ends_in_one_line_and_goes_on_with_another_fleet(
    samplers: list[ScriptedVllm], tmp_path: Path
) -> None:
    run_to_end(sampled(samplers[:1]), tmp_path / "one")
    anew(samplers)
    for server in samplers[:2]:
        server.dies_after = 5
    with pytest.raises(EngineError, match=r"is unavailable .*selfteach resume") as raised:
        run_to_end(sampled(samplers[:2]), tmp_path / "run")
    assert "\n" not in str(raised.value)
    anew(samplers)
    run_to_end(sampled(samplers[2:]), tmp_path / "run")
    assert_same(tmp_path / "one", tmp_path / "run")
    assert_same_rollouts(tmp_path / "one", tmp_path / "run")


def critiqued(folder: Path, servers: list[Server], **settings: Any) -> Recipe:
    urls = [server.url for server in servers]
    members = {"base_urls": urls, "http_retries": 2, "patience_seconds": 0.0, "concurrency": 1}
    return critiqued_by(served_critic(folder, **members, **settings))


@pytest.mark.slow
def test_a_run_on_any_fleet_of_critics_is_the_run_with_the_oracle(tmp_path: Path) -> None:
    run_with_oracle(tmp_path / "oracle")
    with serving(ORACLE) as first, serving(ORACLE) as second, serving(ORACLE) as third:
        servers = [first, second, third]

        def same(name: str, **settings: Any) -> list[dict[str, Any]]:
            (tmp_path / name).mkdir()
            recipe = critiqued(tmp_path / name, servers, **settings)
            result = run_to_end(recipe, tmp_path / name / "run")
            assert_same(tmp_path / "oracle", tmp_path / name / "run")
            assert result["budget"]["critic_requests"] == 18
            return step_rows(tmp_path / name / "run")

        rows = same("three")
        sent = [row[f"critic_member/{i}/requests"] for row in rows for i in range(3)]
        assert sum(sent) == 18 and sum(len(server.requests) for server in servers) == 18

        def slow(handler: Any, body: dict[str, Any]) -> None:
            time.sleep(0.3)
            ORACLE(handler, body)

        first.behaviours, second.behaviours = [slow], [ORACLE, ORACLE, refuses(503)]
        second.answers_checks = False
        rows = same("slow and broken")
        assert sum(row["critic_member/1/failures"] for row in rows) > 0
        second.behaviours, second.answers_checks = [ORACLE, refuses(500), ORACLE], True
        same("comes back")


@pytest.mark.slow
def test_a_run_without_critics_ends_and_pays_for_nothing_twice(tmp_path: Path) -> None:
    run_with_oracle(tmp_path / "oracle")
    with serving(ORACLE) as first, serving(ORACLE) as second:
        servers = [first, second]

        def ends(handler: Any, body: dict[str, Any]) -> None:
            alive = sum(len(server.requests) for server in servers) <= 8
            (ORACLE if alive else refuses(503))(handler, body)

        for server in servers:
            server.behaviours, server.answers_checks = [ends], True
        with pytest.raises(CriticError, match="requests only the rest") as raised:
            run_to_end(critiqued(tmp_path, servers), tmp_path / "run")
        assert "\n" not in str(raised.value)
        for server in servers:
            server.behaviours = [ORACLE]
            server.requests.clear()
        result = run_to_end(critiqued(tmp_path, [second]), tmp_path / "run")
        assert_same(tmp_path / "oracle", tmp_path / "run")
        assert result["budget"]["critic_requests"] == 18
        assert len(second.requests) == 10 and not first.requests


def test_check_prints_members_and_their_state(
    samplers: list[ScriptedVllm],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samplers[1].stop()
    with serving(says("1")) as critic, serving(refuses(503)) as busy:
        busy.listing = refuses(503)
        engines = ", ".join(f'"{server.url}"' for server in samplers[:2])
        path = tmp_path / "recipe.toml"
        path.write_text(
            f'[model]\npath = "lab:two_styles"\n[context]\ntype = "step_aligned"\n'
            f'[engine]\ntype = "vllm_server"\nmodel = "tiny"\nurls = [{engines}]\n'
            f'[critic]\ntype = "endpoint"\nmodel = "m"\nbase_urls = ["{critic.url}", "{busy.url}"]\n'
            "[data]\ntrain = 4\nvalidation = 1\ntest = 1\n[sampling]\nmax_tokens = 8\n"
            "[train]\nmax_length = 96\n"
        )
        monkeypatch.setattr("sys.argv", ["selfteach", "check", str(path)])
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:] == [
        f"critic m at {critic.url}: replies",
        f"critic m at {busy.url}: busy",
        f"engine at {samplers[0].url}: replies",
        f"engine at {samplers[1].url}: down, left out until it replies",
    ]
