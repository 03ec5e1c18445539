"""A run with a served critic equals one with the oracle in process, also when it is interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from critiqued_runs import CRITIQUED, ORACLE, critiqued_by, run_with_oracle, served_critic
from same_run import assert_same
from scripted_server import Server, refuses, says, serving

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CriticError
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.loop import run_to_end


def served(server: Server, folder: Path, **settings: Any) -> Recipe:
    drops = {"http_retries": 0, "on_failure": {"wrong_answer": "drop"}, **settings}
    return critiqued_by(served_critic(folder, base_url=server.url, **drops))


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_with_oracle(tmp_path_factory.mktemp("oracle") / "run")


def test_a_run_with_a_served_oracle_equals_one_with_the_oracle(
    oracle: Path, tmp_path: Path
) -> None:
    with serving(ORACLE) as server:
        result = run_to_end(served(server, tmp_path), tmp_path / "served")
        assert_same(oracle, tmp_path / "served")
        assert len(server.requests) == result["budget"]["critic_requests"] <= 18
        assert result["budget"]["critic_prompt_tokens"] == 20 * len(server.requests)
        steps = [row for row in RunFolder(tmp_path / "served").metrics() if row["kind"] == "step"]
        assert all(0 < row["fidelity"] <= 1 for row in steps)
        # Another run with the same rollouts pays for nothing.
        again = run_to_end(served(server, tmp_path), tmp_path / "again")
        assert again["budget"]["critic_requests"] == 0 and again["budget"]["critic_cached"] == 18
        assert_same(tmp_path / "served", tmp_path / "again")
    recorded = critiqued_by({"type": "recorded", "run": str(tmp_path / "served")})
    run_to_end(recorded, tmp_path / "recorded")
    assert_same(tmp_path / "served", tmp_path / "recorded")


def test_a_run_whose_server_dies_resumes_without_paying_twice(oracle: Path, tmp_path: Path) -> None:
    with serving(ORACLE) as server:

        def dies_after_eight(handler, body) -> None:
            alive = len(server.requests) <= 8
            (ORACLE if alive else refuses(503))(handler, body)

        server.behaviours = [dies_after_eight]
        with pytest.raises(CriticError, match="requests only the rest"):
            run_to_end(served(server, tmp_path), tmp_path / "run")
        server.behaviours = [ORACLE]
        paid = [body["messages"] for body in server.requests[:8]]
        server.requests.clear()
        run_to_end(served(server, tmp_path), tmp_path / "run")
        after = [body["messages"] for body in server.requests]
        assert not [messages for messages in after if messages in paid]
        assert len({json.dumps(m) for m in [*paid, *after]}) == len(paid) + len(after)
    assert_same(oracle, tmp_path / "run")


def test_the_fallback_context_is_used_where_the_critic_fails(tmp_path: Path) -> None:
    with serving(says("I have nothing to add.")) as server:
        with_fallback = served(
            server, tmp_path, on_failure={"malformed": "fallback"}, fallback="reference"
        )
        run_to_end(with_fallback, tmp_path / "fallback")
    reference = validate(Recipe, merge(CRITIQUED, {"context": {"type": "reference"}}), where="test")
    run_to_end(reference, tmp_path / "reference")
    assert_same(tmp_path / "fallback", tmp_path / "reference")
    rows = [row for row in RunFolder(tmp_path / "fallback").metrics() if row["kind"] == "step"]
    assert all(row["critique_failure/malformed"] == 1.0 and row["dropped"] == 0.0 for row in rows)
