"""Dynamic sampling: a step samples further problems while groups with mixed verdicts are missing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from forked import kill_when
from safetensors.torch import load_file
from same_run import timeless_rows

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge
from selfteach.runtime.run_folder import load_result
from selfteach.trainer.loop import run_to_end

STEPS, PROBLEMS, GROUP = 3, 4, 3
VALUES = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 30, "validation": 2, "test": 2},
    "sampling": {"max_tokens": 40, "batch_size": 6, "dynamic_rounds": 3},
    "objective": {"type": "grpo", "loss_type": "dapo", "clip_high": 0.28},
    "train": {
        "steps": STEPS, "problems_per_step": PROBLEMS, "group_size": GROUP,
        "checkpoint_every": 1, "threads": 1, "num_iterations": 2,
    },
    "evaluation": {"every": 10, "validation_k": 1, "test_k": 1, "temperature": 0.0},
}  # fmt: skip


def recipe(**changes: object) -> Recipe:
    return Recipe.model_validate(merge(VALUES, changes))


def verdicts(folder: Path, step: int) -> Mapping[str, list[bool]]:
    """Return each group's verdicts, in the order of the step."""
    groups: defaultdict[str, list[bool]] = defaultdict(list)
    for line in (folder / f"samples/step_{step:06d}.jsonl").read_text().splitlines():
        row = json.loads(line)
        groups[row["problem_id"]].append(row["correct"])
    return groups


def is_mixed(group: list[bool]) -> bool:
    return len(set(group)) > 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dynamic") / "run"
    run_to_end(recipe(), folder)
    return folder


def test_each_round_samples_as_many_problems_as_mixed_groups_are_missing(whole: Path) -> None:
    plain = [row for row in timeless_rows(whole) if row["kind"] == "step"]
    assert max(row["sampling_rounds"] for row in plain) > 2, "the case must need several rounds"
    for row in plain:
        groups = list(verdicts(whole, row["step"]).values())
        assert all(len(group) == GROUP for group in groups)
        at, rounds, mixed = PROBLEMS, 1, sum(map(is_mixed, groups[:PROBLEMS]))
        while mixed < PROBLEMS and rounds <= 3:
            missing = PROBLEMS - mixed
            mixed += sum(map(is_mixed, groups[at : at + missing]))
            at, rounds = at + missing, rounds + 1
        assert (row["sampling_rounds"], row["mixed_groups"]) == (rounds, mixed)
        assert len(groups) == at and mixed <= PROBLEMS
        assert row["rollouts_sampled"] == at * GROUP, "the budget counts every rollout"
        assert row["frac_in_loss"] == pytest.approx(mixed / at)
    total = load_result(whole)["budget"]["rollouts_sampled"]
    assert total == sum(row["rollouts_sampled"] for row in plain)


def test_the_first_round_s_problems_are_those_without_dynamic_sampling(
    whole: Path, tmp_path: Path
) -> None:
    run_to_end(recipe(sampling={"dynamic_rounds": 0}, train={"steps": 1}), tmp_path / "run")
    first = list(verdicts(tmp_path / "run", 1).items())
    assert list(verdicts(whole, 1).items())[:PROBLEMS] == first
    (row,) = [row for row in timeless_rows(tmp_path / "run") if row["kind"] == "step"]
    assert "sampling_rounds" not in row


@pytest.mark.parametrize(
    "moment",
    [
        "000001.001", "000002.002",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("000001.002", "000002.000")),
    ],
)  # fmt: skip
def test_kill_9_between_rounds_and_resume(moment: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    file = folder / f"rollouts/step_{moment}.jsonl"
    assert (whole / "rollouts" / file.name).exists(), "the whole run takes this round"
    kill_when(file.exists, run_to_end, recipe(), folder)
    on_disk = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob("rollouts/*.jsonl")}
    run_to_end(recipe(), folder)
    for path, (written, content) in on_disk.items():
        assert path.stat().st_mtime_ns == written, f"{path.name} was sampled twice"
        assert path.read_bytes() == content
    assert timeless_rows(folder) == timeless_rows(whole)
    last = f"checkpoints/step_{STEPS:06d}/weights.safetensors"
    ours, theirs = load_file(folder / last), load_file(whole / last)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rounds_end_with_the_problems(tmp_path: Path) -> None:
    few = recipe(
        data={"train": 5},
        train={"steps": 1, "problems_per_step": 4},
        sampling={"dynamic_rounds": 50},
    )
    run_to_end(few, tmp_path / "run")
    assert 4 <= len(verdicts(tmp_path / "run", 1)) <= 5
