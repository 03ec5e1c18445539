"""Rewards and a judge on two ranks: each rollout once, and the run is that of one process."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from on_ranks import on_ranks
from runs_on_ranks import assert_same_run, in_double, recipe, train_rows
from scripted_server import says, serving

from selfteach.config.recipe import Recipe
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.loop import run_to_end

pytestmark = pytest.mark.slow

REWARDS = """
import json, os, pathlib, zlib

CALLS = pathlib.Path(__file__).with_name("calls.jsonl")

def note(name, ids):
    with CALLS.open("a") as file:
        file.write(json.dumps([name, os.environ.get("RANK"), ids]) + "\\n")

def value(ids):
    return zlib.crc32(str(ids).encode()) % 11 / 10

def length(completion_ids, log_metric, log_extra, trainer_state, **kwargs):
    note("length", completion_ids)
    log_metric("tokens", sum(map(len, completion_ids)))
    log_extra("step", [trainer_state.global_step] * len(completion_ids))
    return [value(ids) if value(ids) < 0.9 else None for ids in completion_ids]

async def tone(completion_ids, **kwargs):
    note("tone", completion_ids)
    return [value(ids[::-1]) for ids in completion_ids]
"""


@pytest.fixture(autouse=True, scope="module")
def _double() -> Any:
    yield from in_double()


def rewarded(folder: Path, url: str, **changes: Any) -> Recipe:
    judge = {
        "type": "judge", "base_url": url, "model": "m", "weight": 0.1, "http_retries": 0,
        "healthcheck": False,
        "reply_cache": str(folder / "replies.sqlite"), "prompt": "{{ question }}|{{ completion }}",
        "on_failure": {"malformed": "skip"},
    }  # fmt: skip
    functions = [f"{folder}/rewards.py:length", f"{folder}/rewards.py:tone", judge, "verifier"]
    return recipe(
        critic=False, context={"type": "none"}, teacher={"type": "initial"},
        objective={"type": "grpo"}, reward={"functions": functions, "success": 1.2},
        train={"steps": 2, "problems_per_step": 3}, evaluation={"every": 2}, **changes,
    )  # fmt: skip


def reply(body: dict[str, Any]) -> str:
    """A number for most rollouts, none for some."""
    number = sum(body["messages"][-1]["content"].encode()) % 14
    return f"Score: {number}" if number <= 10 else "no idea"


def samples(run: Path) -> list[dict[str, Any]]:
    lines = [p.read_text().splitlines() for p in sorted((run / "samples").glob("step_*.jsonl"))]
    return [json.loads(line) for step in lines for line in step]


def calls(folder: Path) -> Counter[str]:
    """Count how often each function was given a rollout."""
    rows = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    return Counter(name for name, _, ids in rows for _ in ids)


@pytest.mark.parametrize("staleness", [0, 1])
def test_two_ranks_reward_as_one_process_does(tmp_path: Path, staleness: int) -> None:
    folders, requests = {}, {}
    for ranks in (1, 2):
        folder = folders[ranks] = tmp_path / str(ranks)
        folder.mkdir()
        (folder / "rewards.py").write_text(REWARDS)
        with serving(says(reply)) as server:
            made = rewarded(folder, server.url)
            made = made.model_copy(
                update={"train": made.train.model_copy(update={"staleness": staleness})}
            )
            if ranks == 1:
                run_to_end(made, folder / "run")
            else:
                on_ranks(2, train_rows, made, folder / "run")
            requests[ranks] = sorted(body["messages"][-1]["content"] for body in server.requests)
    one, two = (folders[ranks] / "run" for ranks in (1, 2))
    assert_same_run(two, one, step=2)
    assert samples(one) == samples(two)
    assert any(sample.get("reward_failures") for sample in samples(one))
    rows = [json.loads(x) for x in (folders[2] / "calls.jsonl").read_text().splitlines()]
    assert {rank for _, rank, _ in rows} == {"0", "1"}, "both ranks reward"
    rollouts = 2 * 3 * 2 + 2 * (4 * 2) + 4 * 2  # steps, validations, test
    assert calls(folders[1]) == calls(folders[2]) == {"length": rollouts, "tone": rollouts}
    assert requests[1] == requests[2] and len(set(requests[2])) == len(requests[2])
    names = [sorted(path.name for path in (run / "rewards").iterdir()) for run in (one, two)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (one / "rewards" / name).read_text() == (two / "rewards" / name).read_text()

    # Two ranks go on where one process has rewarded: nothing is called or bought again.
    for name in ("result.json", "checkpoints"):
        path = one / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    first_row = [row for row in RunFolder(one).metrics() if row["step"] < 1]
    (one / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first_row))
    before = calls(folders[1])
    made = Recipe.model_validate(json.loads((one / "config.json").read_text()))
    on_ranks(2, train_rows, made, one)  # its server is gone
    assert calls(folders[1]) == before and samples(one) == samples(two)
