"""A run whose critic is served: the same as with the oracle in process, and stopped anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from same_run import assert_same
from scripted_critic import criticises
from scripted_server import Server, refuses, says, serving

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CriticError
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.loop import run_to_end

TINY = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 12, "validation": 2, "test": 2},
    "sampling": {"max_tokens": 40, "batch_size": 4},
    "context": {"type": "step_aligned"},
    "train": {
        "steps": 3, "problems_per_step": 3, "group_size": 2,
        "checkpoint_every": 2, "threads": 1,
    },
    "evaluation": {"every": 3, "validation_k": 1, "test_k": 1},
}  # fmt: skip


def recipe(critic: dict[str, Any]) -> Recipe:
    return validate(Recipe, merge(TINY, {"critic": critic}), where="test")


def served(server: Server, store: Path, **settings: Any) -> Recipe:
    own = {
        "type": "endpoint", "base_url": server.url, "model": "oracle", "max_tokens": 64,
        "http_retries": 0, "reply_cache": str(store / "replies.sqlite"), "min_similarity": 0.0,
        "on_failure": {"wrong_answer": "drop"},
    }  # fmt: skip
    return recipe({**own, **settings})


def test_a_served_oracle_teaches_what_the_oracle_teaches(tmp_path: Path) -> None:
    run_to_end(recipe({"type": "oracle"}), tmp_path / "oracle")
    with serving(says(criticises)) as server:
        result = run_to_end(served(server, tmp_path), tmp_path / "served")
        assert_same(tmp_path / "oracle", tmp_path / "served")
        assert len(server.asked) == result["budget"]["critic_requests"] <= 18
        assert result["budget"]["critic_prompt_tokens"] == 20 * len(server.asked)
        steps = [row for row in RunFolder(tmp_path / "served").metrics() if row["kind"] == "step"]
        assert all(0 < row["fidelity"] <= 1 for row in steps)
        # Another run of the same answers pays for nothing.
        again = run_to_end(served(server, tmp_path), tmp_path / "again")
        assert again["budget"]["critic_requests"] == 0 and again["budget"]["critic_cached"] == 18
        assert_same(tmp_path / "served", tmp_path / "again")
    recorded = recipe({"type": "recorded", "run": str(tmp_path / "served")})
    run_to_end(recorded, tmp_path / "recorded")
    assert_same(tmp_path / "served", tmp_path / "recorded")


def test_a_server_that_dies_in_the_middle_costs_nothing_twice(tmp_path: Path) -> None:
    run_to_end(recipe({"type": "oracle"}), tmp_path / "oracle")
    with serving(says(criticises)) as server:

        def dies_after_eight(handler, body) -> None:
            alive = len(server.asked) <= 8
            (says(criticises) if alive else refuses(503))(handler, body)

        server.behaviours = [dies_after_eight]
        with pytest.raises(CriticError, match="asks only for the rest"):
            run_to_end(served(server, tmp_path), tmp_path / "run")
        server.behaviours = [says(criticises)]
        paid = [body["messages"] for body in server.asked[:8]]
        server.asked.clear()
        run_to_end(served(server, tmp_path), tmp_path / "run")
        later = [body["messages"] for body in server.asked]
        assert not [messages for messages in later if messages in paid]
        assert len({json.dumps(m) for m in [*paid, *later]}) == len(paid) + len(later)
    assert_same(tmp_path / "oracle", tmp_path / "run")


def test_where_the_critic_fails_another_context_teaches(tmp_path: Path) -> None:
    with serving(says("I have nothing to add.")) as server:
        falls = served(server, tmp_path, on={"malformed": "fallback"}, fallback="reference")
        run_to_end(falls, tmp_path / "falls")
    reference = validate(Recipe, merge(TINY, {"context": {"type": "reference"}}), where="test")
    run_to_end(reference, tmp_path / "reference")
    assert_same(tmp_path / "falls", tmp_path / "reference")
    rows = [row for row in RunFolder(tmp_path / "falls").metrics() if row["kind"] == "step"]
    assert all(row["critique_failure/malformed"] == 1.0 and row["dropped"] == 0.0 for row in rows)
