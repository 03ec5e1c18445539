"""A start that has spent nothing occupies no folder; what is stored stays with its problems."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from covering import covering
from forked import kill_when
from jobs_here import jobs_in_this_process

from selfteach.commands.actions import summarize_inspection
from selfteach.commands.study.run_study import run_study
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import study_from
from selfteach.config.schema import merge, validate
from selfteach.errors import CheckpointError, SelfteachError
from selfteach.runtime.run_folder import RunFolder, load_result
from selfteach.tasks.sources import load
from selfteach.trainer.loop import run_to_end, train

TINY = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 6, "validation": 2, "test": 2},
    "sampling": {"max_tokens": 40, "batch_size": 8},
    "objective": {"type": "grpo"},
    "train": {"steps": 2, "problems_per_step": 2, "group_size": 3, "threads": 1},
    "evaluation": {"every": 2, "validation_k": 1, "test_k": 1},
}  # fmt: skip


def recipe(**changes: object) -> Recipe:
    return validate(Recipe, merge(TINY, changes), where="test")


WRONG = {"model": {"path": "/no/such/model"}}


def test_a_failed_start_does_not_occupy_the_folder(tmp_path: Path) -> None:
    with pytest.raises(SelfteachError, match="/no/such/model"):
        run_to_end(recipe(**WRONG), tmp_path / "run")
    run_to_end(recipe(), tmp_path / "run")
    assert RunFolder(tmp_path / "run").config()["model"]["path"] == "lab:two_styles"
    with pytest.raises(CheckpointError, match="holds another run"):
        run_to_end(recipe(seed=1), tmp_path / "run")


def test_a_start_that_has_sampled_does_occupy_it(tmp_path: Path) -> None:
    run = train(recipe(), tmp_path / "run")
    next(run)
    run.close()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="holds another run"):
        run_to_end(recipe(seed=1), tmp_path / "run")


@pytest.mark.parametrize("name", ["environment.json", "config.json.tmp", "environment.json.tmp"])
def test_a_start_that_was_killed_before_its_config_is_repeated(tmp_path: Path, name: str) -> None:
    RunFolder(tmp_path / "first").create(recipe().model_dump(mode="json"), {"versions": {}})
    folder = tmp_path / "run"
    folder.mkdir()
    source = tmp_path / "first" / name.removesuffix(".tmp")
    shutil.copy(source, folder / name)
    if name == "environment.json":
        with pytest.raises(CheckpointError, match="repeat the command"):
            RunFolder(folder).config()
    run_to_end(recipe(), folder)
    assert load_result(folder)["step"] == 2


@pytest.mark.parametrize("failing", ["environment.json.tmp", "config.json.tmp"])
def test_a_full_disk_before_the_config_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    write = Path.write_text

    def full(path: Path, *args: object, **kwargs: object) -> int:
        if path.name == failing:
            raise OSError(28, "No space left on device", str(path))
        return write(path, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
        patch.setattr(Path, "write_text", full)
        run_to_end(recipe(), tmp_path / "run")
    run_to_end(recipe(), tmp_path / "run")


def test_another_s_file_of_that_name_is_no_start(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"dependencies": {"numpy": "2"}}')
    with pytest.raises(CheckpointError, match="not empty"):
        run_to_end(recipe(), tmp_path)
    (tmp_path / "environment.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SelfteachError):
        run_to_end(recipe(), tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


def study(**changes: object) -> Callable[[Path], object]:
    common = merge({**TINY, "study": {"workers": 1, "inspect_answers": 0}}, changes)

    def run(folder: Path) -> object:
        return run_study(
            study_from(common), folder, command="test", progress=lambda _: None,
            summarize=summarize_inspection,
        )  # fmt: skip

    return run


@pytest.mark.slow
def test_a_failed_study_does_not_occupy_its_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SelfteachError, match="/no/such/model"):
        study(**WRONG)(out)
    # As a kill leaves it in the middle of writing: none of these blocks the next start.
    (out / "study.json.tmp").write_text("{")
    half = out / "runs" / "run" / "seed_0"
    half.mkdir(parents=True, exist_ok=True)
    (half / "config.json").unlink(missing_ok=True)
    (half / "environment.json.tmp").write_text("{")
    study()(out)
    assert (out / "results.json").exists()
    with pytest.raises(CheckpointError, match="holds another study"):
        study(seed=1)(out)


def test_a_kill_while_study_json_is_written_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs_in_this_process(monkeypatch)
    (tmp_path / "study.json.tmp").write_text("{")
    study()(tmp_path)
    assert (tmp_path / "results.json").exists()


ROWS = [{"question": f"c a f {x} e d", "answer": x} for x in "abcdefghijkl"]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def files(folder: Path) -> Recipe:
    data = {
        "type": "files", "train": str(folder / "train.jsonl"), "verifier": "exact",
        "validation": str(folder / "validation.jsonl"),
    }  # fmt: skip
    values = {**TINY, "data": data, "model": {"path": "lab:two_styles", "templates": "lab"}}
    values["evaluation"] = {**TINY["evaluation"], "test": False}
    return validate(Recipe, values, where="test")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder with problems in files, without ids."""
    write_rows(tmp_path / "train.jsonl", ROWS[:8])
    write_rows(tmp_path / "validation.jsonl", ROWS[8:])
    return tmp_path


CHANGES: dict[str, Callable[[list[dict]], list[dict]]] = {
    "reordered": lambda rows: rows[::-1],
    "inserted": lambda rows: [{"question": "a a a a a a", "answer": "b"}, *rows],
    "removed": lambda rows: rows[1:],
    "another answer": lambda rows: [{**rows[0], "answer": "z"}, *rows[1:]],
    "another reference": lambda rows: [{**rows[0], "reference": "see above"}, *rows[1:]],
}


@pytest.mark.parametrize(
    ("change", "split", "ids"), covering(list(CHANGES), ["train", "validation"], [False, True])
)
def test_a_run_whose_data_has_changed_is_refused(
    data: Path, change: str, split: str, ids: bool
) -> None:
    rows = {"train": ROWS[:8], "validation": ROWS[8:]}[split]
    rows = [{"id": f"p{n}", **row} for n, row in enumerate(rows)] if ids else rows
    write_rows(data / f"{split}.jsonl", rows)
    run = train(files(data), data / "run")
    next(run)
    run.close()
    before = {p: p.read_bytes() for p in (data / "run").rglob("*") if p.is_file()}
    write_rows(data / f"{split}.jsonl", CHANGES[change](rows))
    with pytest.raises(CheckpointError, match=f"the {split} problems are not those") as error:
        run_to_end(files(data), data / "run")
    assert "\n" not in str(error.value)
    assert before == {p: p.read_bytes() for p in (data / "run").rglob("*") if p.is_file()}
    write_rows(data / f"{split}.jsonl", rows)
    run_to_end(files(data), data / "run")


def test_a_run_of_a_version_that_let_ids_clash_is_continued(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(data / "train.jsonl", [{"id": n, **row} for n, row in enumerate(ROWS[:8])])
    write_rows(data / "validation.jsonl", [{"id": n, **row} for n, row in enumerate(ROWS[8:])])
    with monkeypatch.context() as earlier:
        earlier.setattr(load, "_with_distinct_ids", lambda splits: (splits, 0))
        run = train(files(data), data / "run")
        while not list((data / "run" / "rollouts").glob("step_*.jsonl")):
            next(run)
        run.close()
    first = next((data / "run" / "rollouts").glob("step_*.jsonl")).read_text()
    assert json.loads(first.splitlines()[0])["problem_id"] in "01234567"
    run_to_end(files(data), data / "run")
    assert load_result(data / "run")["step"] == 2
    rows = [p.read_text() for p in (data / "run" / "rollouts").glob("*.jsonl")]
    assert not any('"problem_id": "q_' in text for text in rows)
    run_to_end(files(data), data / "new")
    first = next((data / "new" / "rollouts").glob("step_*.jsonl")).read_text()
    assert json.loads(first.splitlines()[0])["problem_id"].startswith("q_")


def as_earlier_version(folder: Path, data: Path) -> None:
    """Rewrite a run's files as a version wrote them that named problems by file and line."""
    places = {}
    for split in ("train", "validation"):
        from selfteach.tasks.sources.load import read_file

        for problem in read_file(data / f"{split}.jsonl"):
            places[problem.id] = problem.place
    for name in ("problems.json", "checksums.jsonl"):
        (folder / name).unlink()
    for path in folder.rglob("*"):
        if path.suffix in (".jsonl", ".json") and path.parent.name != "model":
            text = path.read_text()
            for id_, place in places.items():
                text = text.replace(f'"{id_}"', f'"{place}"')
            lines = text.splitlines(keepends=True)
            if path.parent.name == "rollouts":
                rows = map(json.loads, lines)
                drop = "problem_sha256"
                lines = [json.dumps({k: v for k, v in r.items() if k != drop}) + "\n" for r in rows]
            path.write_text("".join(lines))


def test_a_run_with_the_ids_of_an_earlier_version_is_continued(data: Path) -> None:
    run = train(files(data), data / "run")
    for row in run:
        if row["kind"] == "step":
            break
    run.close()
    as_earlier_version(data / "run", data)
    sampled = (data / "run" / "rollouts" / "step_000001.000.jsonl").read_bytes()
    shutil.copytree(data / "run", data / "changed")
    run_to_end(files(data), data / "run")
    assert (data / "run" / "rollouts" / "step_000001.000.jsonl").read_bytes() == sampled
    later = (data / "run" / "rollouts" / "step_000002.000.jsonl").read_text()
    assert json.loads(later.splitlines()[0])["problem_id"].startswith("train-")
    run_to_end(files(data), data / "run")
    write_rows(data / "train.jsonl", ROWS[:8][::-1])
    with pytest.raises(CheckpointError, match="has another question or answer now"):
        run_to_end(files(data), data / "changed")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="asks for a fork")
def test_rollouts_are_not_copied_from_a_run_with_other_data(data: Path) -> None:
    batch = Path("rollouts", "validation_000000.000.jsonl")
    kill_when((data / "first" / batch).exists, run_to_end, files(data), data / "first")
    write_rows(data / "validation.jsonl", ROWS[8:][::-1])
    run = train(files(data), data / "second", same_start=[data / "first"])
    next(run)
    run.close()
    first, second = (
        [json.loads(line)["problem_id"] for line in (data / run / batch).read_text().splitlines()]
        for run in ("first", "second")
    )
    assert first == second[::-1]
