"""An inspection scores a model and writes a folder; tests of its contents and of the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest

from selfteach import cli
from selfteach.commands.inspect import folder as inspection_folder
from selfteach.commands.inspect.inspection import InspectionRequest, inspect_model
from selfteach.commands.inspect.labelled import read_labelled
from selfteach.commands.inspect.token_table import SCHEMA
from selfteach.commands.study.run_study import inspection_of
from selfteach.config.recipe import CONTEXTS, Recipe
from selfteach.config.recipe_file import study_from
from selfteach.errors import CheckpointError, DataError, RecipeError
from selfteach.trainer.loop import run_to_end

EVERY = tuple(name for name in CONTEXTS if name != "none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspection") / "out"
    inspect_model("lab:two_styles", InspectionRequest(EVERY, k=2, limit=12), out)
    return out


@pytest.fixture(scope="module")
def tokens(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "tokens.parquet")


@pytest.fixture(scope="module")
def answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_pandas_polars_and_duckdb_read_the_same(folder: Path, tokens: pd.DataFrame) -> None:
    path = str(folder / "tokens.parquet")
    by_context = pl.read_parquet(path).group_by("context").agg(pl.col("advantage").mean())
    query = f"select context, avg(advantage) from '{path}' group by context"
    expected = tokens.groupby("context").advantage.mean()
    for rows in (by_context.rows(), duckdb.sql(query).fetchall()):
        assert dict(rows) == pytest.approx(expected.to_dict(), abs=1e-5)
    assert list(tokens.columns) == SCHEMA.names == pl.read_parquet_schema(path).names()


def test_every_column_has_a_description(folder: Path) -> None:
    schema = pq.read_schema(folder / "tokens.parquet")
    for field in schema:
        assert field.metadata[b"description"]
    in_nats = {field.name for field in schema if field.metadata.get(b"unit") == b"nats"}
    assert in_nats == {
        "student_logp", "teacher_logp", "advantage", "kl_forward", "kl_reverse",
        "student_entropy", "teacher_entropy",
    }  # fmt: skip
    assert schema.metadata[b"temperature"] == b"1"


def test_one_row_per_answer_context_and_token(tokens: pd.DataFrame, answers: list[dict]) -> None:
    assert len(answers) == 24 and set(tokens.context) == set(EVERY)
    keys = ["answer", "context", "position"]
    assert not tokens.duplicated(keys).any()
    shown = [(len(EVERY) - len(row["dropped"])) * row["tokens"] for row in answers]
    assert len(tokens) == sum(shown)
    for number, row in enumerate(answers):
        rows = tokens[(tokens.answer == number) & (tokens.context == "reference")]
        assert set(rows.problem_id) == {row["problem_id"]} and set(rows["sample"]) == {
            row["sample"]
        }
        assert " ".join(rows.text[:-1]) == row["text"] and rows.text.iloc[-1] == "<eos>"
        for index, (start, stop) in enumerate(row["step_spans"]["tokens"]):
            assert (rows.step[start:stop] == index).all()


def test_scores_are_consistent(tokens: pd.DataFrame) -> None:
    difference = tokens.teacher_logp - tokens.student_logp
    np.testing.assert_allclose(tokens.advantage, difference, atol=1e-5)
    for name in ("kl_forward", "kl_reverse", "student_entropy", "teacher_entropy"):
        assert (tokens[name] >= 0).all()
    student = tokens.groupby(["answer", "position"]).student_logp
    assert student.nunique().max() == 1, "the student sees no context"


def test_regions_are_relative_to_the_first_error(tokens: pd.DataFrame, answers: list[dict]) -> None:
    kinds = set()
    for number, row in enumerate(answers):
        rows = tokens[(tokens.answer == number) & (tokens.context == "reference")]
        error = row["first_error"]
        kinds.add((row["correct"], error is None))
        if error is None:
            assert row["correct"] and set(rows.region) == {"right"}
        else:
            expected = np.select(
                [rows.step < error, rows.step == error], ["before", "failing"], "after"
            )
            assert (rows.region == expected).all()
    assert {(True, True), (False, False)} <= kinds
    assert set(tokens[tokens.kind == "style"].text) <= set("+=-><:!")


def test_verbatim_is_the_fraction_of_repeated_steps(answers: list[dict]) -> None:
    wrong = [row for row in answers if row["first_error"]]
    assert wrong
    for row in wrong:
        assert row["verbatim"]["step_aligned"] == row["verbatim"]["shuffled_lines"] == 1
        assert row["verbatim"]["omission"] == row["verbatim"]["reference"] == 0
    correct = next(row for row in answers if row["first_error"] is None)
    assert set(correct["verbatim"].values()) == {None} and correct["fidelity"] == 1


def test_an_erring_critic_does_not_change_the_regions(answers: list[dict], tmp_path: Path) -> None:
    request = InspectionRequest(("step_aligned",), k=2, limit=12)
    inspect_model("lab:two_styles", request, tmp_path / "out", settings=["critic.error_rate=1.0"])
    rows = list(map(json.loads, (tmp_path / "out" / "answers.jsonl").read_text().splitlines()))
    assert [r["first_error"] for r in rows] == [r["first_error"] for r in answers]
    assert {r["first_error_from"] for r in rows} == {"oracle"}
    correct = [r for r in rows if r["first_error"] is None]
    assert correct and all(r["critique"]["first_error"] is not None for r in correct)


def test_labelled_steps_get_the_scores_of_the_same_rollouts(
    folder: Path, tokens: pd.DataFrame, answers: list[dict], tmp_path: Path
) -> None:
    lines = [
        {
            "id": f"{row['problem_id']}-{row['sample']}", "problem": row["question"],
            "steps": [row["text"][a:b].strip() for a, b in row["step_spans"]["characters"]],
            "label": -1 if row["first_error"] is None else row["first_error"],
            "final_answer_correct": row["correct"],
            "reference": row["contexts"]["reference"], "answer": row["gold_answer"],
        }
        for row in answers
    ]  # fmt: skip
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    request = InspectionRequest(("reference", "answer_only", "holistic"), labelled=path)
    about = inspect_model("lab:two_styles", request, tmp_path / "out")
    assert (about["answers_are"], about["first_error_from"]) == ("labelled", "label")
    scored = pd.read_parquet(tmp_path / "out" / "tokens.parquet")
    for context in request.contexts:
        ours, theirs = (t[t.context == context] for t in (scored, tokens))
        assert (ours.token_id.values == theirs.token_id.values).all()
        assert (ours.region.values == theirs.region.values).all()
        np.testing.assert_allclose(ours.advantage, theirs.advantage, atol=1e-4)
    samples = [(row.problem.id, row.sample) for row in read_labelled(path)]
    assert samples[:3] == [("validation-0-0", 0), ("validation-0-0", 1), ("validation-1-0", 0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"labelled\.jsonl:1: not valid JSON"),
        ('{"problem": "p", "steps": ["a"]}', "needs the fields problem, steps, label"),
        ('{"problem": "p", "steps": [], "label": 0}', "label 0 is neither an index of its 0 steps"),
        ('{"problem": "p", "steps": ["a", " "], "label": 0}', "list of non-empty strings"),
        (
            '{"problem": "p", "steps": ["a"], "label": 1}',
            "label 1 is neither an index of its 1 steps nor -1",
        ),
        ("", "holds no labelled rollout"),
    ],
)
def test_a_malformed_labelled_file_is_one_line(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "labelled.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        read_labelled(tmp_path / "labelled.jsonl")


@pytest.mark.parametrize(("encoding", "end"), [("utf-8", "\n"), ("utf-8-sig", "\r\n")])
def test_a_labelled_line_ends_in_a_line_feed_alone(encoding: str, end: str, tmp_path: Path) -> None:
    row = {"problem": "p\u2028q", "steps": ["a\u0085b"], "label": 0}
    text = json.dumps(row, ensure_ascii=False) + end
    (tmp_path / "labelled.jsonl").write_bytes((text + text).encode(encoding))
    first, second = read_labelled(tmp_path / "labelled.jsonl")
    assert first.problem.question == "p\u2028q" and second.steps == ("a\u0085b",)


def test_labelled_steps_lack_what_a_context_needs(tmp_path: Path) -> None:
    path = tmp_path / "labelled.jsonl"
    path.write_text('{"problem": "a b c d e f", "steps": ["0 + a b = c"], "label": -1}')
    with pytest.raises(RecipeError, match="'step_aligned' needs a critique"):
        request = InspectionRequest(("step_aligned",), labelled=path)
        inspect_model("lab:two_styles", request, tmp_path / "a")
    with pytest.raises(DataError, match="answer_only: the file has no answer"):
        request = InspectionRequest(("answer_only",), labelled=path)
        inspect_model("lab:two_styles", request, tmp_path / "b")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = {
        "data": {"type": "lab", "train": 4, "validation": 2, "test": 1},
        "sampling": {"max_tokens": 40},
        "critic": {"type": "oracle"},
        "context": {"type": "step_aligned"},
        "optimizer": {"lr": 3e-3},
        "train": {"steps": 2, "problems_per_step": 2, "group_size": 2, "threads": 1},
        "evaluation": {"every": 2, "validation_k": 1, "test": False},
    }
    out = tmp_path_factory.mktemp("run") / "run"
    run_to_end(Recipe.model_validate(recipe), out)
    return out


def test_recorded_rollouts_of_a_run_are_scored(run: Path, tmp_path: Path) -> None:
    request = InspectionRequest(("step_aligned",), recorded="step_000002", teacher="initial")
    about = inspect_model(str(run), request, tmp_path / "out")
    assert (about["answers"], about["answers_are"]) == (4, "recorded")
    scored = pd.read_parquet(tmp_path / "out" / "tokens.parquet")
    saved = [json.loads(line) for path in sorted((run / "rollouts").glob("step_000002.*"))
             for line in path.read_text().splitlines()]  # fmt: skip
    assert scored.token_id.tolist() == [token for row in saved for token in row["token_ids"]]
    assert set(scored.policy_version) == {1}
    with pytest.raises(CheckpointError, match=r"no rollouts 'step_9'; it has: step_000001"):
        inspect_model(
            str(run), InspectionRequest(("reference",), recorded="step_9"), tmp_path / "none"
        )


def test_the_initial_teacher_has_the_weights_before_training(run: Path, tmp_path: Path) -> None:
    """A trained student under both teachers: the student's scores agree, the teacher's do not."""
    scored = {}
    for teacher in ("given", "initial"):
        request = InspectionRequest(("reference",), recorded="step_000001", teacher=teacher)  # type: ignore[arg-type]
        inspect_model(str(run), request, tmp_path / teacher)
        scored[teacher] = pd.read_parquet(tmp_path / teacher / "tokens.parquet")
    given, initial = scored["given"], scored["initial"]
    np.testing.assert_allclose(given.student_logp, initial.student_logp, atol=1e-5)
    assert np.abs(given.teacher_logp - initial.teacher_logp).max() > 1e-2
    sampled = [json.loads(line) for path in sorted((run / "rollouts").glob("step_000001.*"))
               for line in path.read_text().splitlines()]  # fmt: skip
    logps = np.concatenate([row["logps"] for row in sampled])
    assert np.abs(initial.student_logp - logps).max() > 1e-2, "the student has learned since"


def test_an_interrupted_inspection_leaves_no_partial_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection_folder, "score_rollouts", broken)
    with pytest.raises(KeyboardInterrupt):
        inspect_model(
            "lab:two_styles", InspectionRequest(("reference",), k=1, limit=1), tmp_path / "out"
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_a_study_inspects_the_contexts_of_its_arms() -> None:
    arms = {
        "grpo": {"objective": {"type": "grpo"}},
        "omission": {"context": {"type": "omission"}, "critic": {"type": "oracle", "error_rate": 0.5}},
    }  # fmt: skip
    inspection = inspection_of(study_from({"arms": arms, "evaluation": {"validation_k": 4}}))
    assert inspection is not None
    recipe, request = inspection
    assert {"omission", "aligned_reference", "other_answer"} <= set(request.contexts)
    assert request.k * (request.limit or 0) == 512 and recipe.data.validation >= 128
    assert recipe.critic.error_rate == 0.5, "what its arms are shown"  # type: ignore[union-attr]
    assert inspection_of(study_from({"arms": {"grpo": arms["grpo"]}})) is None
    assert inspection_of(study_from({"arms": arms, "study": {"inspect_answers": 0}})) is None
    written = {**arms["omission"], "critic": {"type": "policy"}, "data": {"type": "files"}}
    assert inspection_of(study_from({"arms": {"omission": written}})) is None
    paid = inspection_of(
        study_from({"arms": {"omission": written}, "study": {"inspect_answers": 9}})
    )
    assert paid is not None and paid[0].critic.type == "policy"  # type: ignore[union-attr]
    assert paid[1].contexts == ("omission",), "each context costs a pass over all rollouts"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["selfteach", "inspect", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_writes_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "out"
    words = ("lab:two_styles", "--contexts", "reference, step_aligned", "-k", 1, "--limit", 8)
    assert call(monkeypatch, *words, "--out", out) == 0
    printed = capsys.readouterr().out
    for word in ("concentration", "step_aligned", "student_entropy", "F1, %", str(out)):
        assert word in printed
    localisation = json.loads((out / "localisation.json").read_text())
    assert set(localisation["contexts"]) == {"reference", "step_aligned"}
    assert {path.suffix for path in (out / "figures").iterdir()} == {".svg", ".png"}
    for wrong, message in [
        ((*words, "--out", out), "is not empty"),
        (("lab:two_styles", "--contexts", "refrence", "--out", tmp_path / "x"), "did you mean"),
        (("lab:two_styles", "--contexts", "none", "--out", tmp_path / "x"), "shows nothing"),
        ((*words, "--teacher", "ema", "--out", tmp_path / "x"), "given or initial"),
    ]:
        assert call(monkeypatch, *wrong) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
