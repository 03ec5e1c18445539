"""`selfteach export-dataset` writes what TRL, ms-swift and verl read."""

from __future__ import annotations

import json
import shutil
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_line import Call
from datasets import Dataset, load_dataset
from model_families import byte_level

from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.models.loading import build_renderer, load_tokenizer
from selfteach.prompts.template_set import Templates
from selfteach.runtime.run_folder import RunFolder
from selfteach.tasks import chain_sums
from selfteach.trainer.loop import run_to_end
from selfteach.types import Problem

RUN = Path(__file__).parents[1] / "fixtures" / "run_folders" / "2885fa2"
"""Three steps of the lab, written by an early version: ``lessons/`` and ``answers/``."""
FORMATS = ("trl", "ms-swift", "verl")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def samples(run: Path) -> list[dict[str, Any]]:
    lines = [path.read_text().splitlines() for path in sorted(run.glob("lessons/step_*.jsonl"))]
    return [json.loads(line) for step in lines for line in step]


def loaded(path: Path) -> Dataset:
    kind = {".parquet": "parquet", ".jsonl": "json"}[path.suffix]
    cache = str(path.parent / "cache")
    return load_dataset(kind, data_files=str(path), split="train", cache_dir=cache)  # type: ignore[return-value]


def messages(value: Any) -> list[dict[str, str]]:
    return [dict(message) for message in value]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("form", FORMATS)
def test_rows_of_a_run_load_and_hold_what_the_run_has(
    run: Path, tmp_path: Path, call: Call, form: str, suffix: str
) -> None:
    out = tmp_path / f"data{suffix}"
    status, printed, errors = call("export-dataset", run, "--format", form, "--out", out)
    assert status == 0, errors
    stored = [row for row in samples(run) if row["context"] is not None]
    rows = loaded(out)
    assert len(rows) == len(stored) > 20
    assert f"{len(stored)} rows of" in printed
    for row, sample in zip(rows, stored, strict=True):
        about = row["extra_info"] if form == "verl" else row
        assert row["privileged_context"] == sample["context"]
        assert (about["problem_id"], about["sample"]) == (sample["problem_id"], sample["sample"])
        assert about["correct"] == sample["correct"]
        critique = sample["critique"]
        if "steps" in critique:
            texts = [step["text"] for step in about["critique"]["steps"]]
            assert texts == [step["text"] for step in critique["steps"]]
        else:
            assert about["critique"] is None and about["critique_failure"] == critique["reason"]


def test_the_messages_are_the_prompts_of_the_run(run: Path, tmp_path: Path, call: Call) -> None:
    """With the run's chat template they are the ids that student and teacher were shown."""
    out = tmp_path / "data.parquet"
    assert call("export-dataset", run, "--format", "trl", "--out", out)[0] == 0
    recipe = validate(Recipe, RunFolder(run).config())
    tokenizer = load_tokenizer(recipe.model)
    renderer = build_renderer(recipe.model, tokenizer, Templates("lab"))

    def ids(prompt: Any) -> tuple[int, ...]:
        chat = tokenizer.apply_chat_template(
            messages(prompt), add_generation_prompt=True, return_dict=False
        )
        return tuple(chat)

    for row in loaded(out):
        problem = Problem(row["problem_id"], row["question"], row["solution"])
        assert ids(row["prompt"]) == renderer.solver_prompt(problem)
        teacher = renderer.teacher_prompt(problem, row["privileged_context"])
        assert ids(row["teacher_prompt"]) == teacher


def test_ms_swift_builds_the_teachers_prompt(run: Path, tmp_path: Path, call: Call) -> None:
    """Its rule: the content of the last user message is replaced by ``teacher_prompt``."""
    swift, trl = tmp_path / "swift.parquet", tmp_path / "trl.parquet"
    assert call("export-dataset", run, "--format", "ms-swift", "--out", swift)[0] == 0
    assert call("export-dataset", run, "--format", "trl", "--out", trl)[0] == 0
    reserved = {"images", "videos", "audios", "tools", "objects", "label", "channel", "margin"}
    assert not reserved & set(loaded(swift).column_names)
    for row, ours in zip(loaded(swift), loaded(trl), strict=True):
        view = messages(row["messages"])
        assert view[-1]["role"] == "user" and view == messages(ours["prompt"])
        view[-1]["content"] = row["teacher_prompt"]
        assert view == messages(ours["teacher_prompt"])
        assert ours["privileged_context"] in row["teacher_prompt"]


def test_verl_finds_what_its_reward_managers_read(run: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "data.parquet"
    words = ("--format", "verl", "--out", out, "--data-source", "ours")
    assert call("export-dataset", run, *words)[0] == 0
    rows = [dict(row) for row in loaded(out)]
    assert [row["extra_info"]["index"] for row in rows] == list(range(len(rows)))
    for row in rows:
        assert row["data_source"] == "ours" and isinstance(row["ability"], str)
        assert messages(row["prompt"])[-1]["role"] == "user"
        assert row["reward_model"]["style"] == "rule" and row["reward_model"]["ground_truth"]
        assert row["extra_info"]["privileged_context"] == row["privileged_context"]
    for key in rows[0]:  # its collation
        column = np.fromiter((row[key] for row in rows), dtype=object, count=len(rows))
        assert column.shape == (len(rows),)


def test_trl_composes_a_teacher_prompt_of_every_row(run: Path, tmp_path: Path, call: Call) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trl", reason="TRL is not installed")
        sdft = import_module("trl.experimental.sdft.sdft_trainer")
        data_utils = import_module("trl.data_utils")
    out = tmp_path / "data.parquet"
    assert call("export-dataset", run, "--format", "trl", "--out", out)[0] == 0
    template = "{prompt}\n\n{privileged_context}"
    trainer = SimpleNamespace(args=SimpleNamespace(teacher_prompt_template=template))
    builder = sdft.DemonstrationTeacherContextBuilder(trainer)
    for row in loaded(out):
        assert data_utils.is_conversational({"prompt": row["prompt"]})
        composed = builder._compose_teacher_prompt(row["prompt"], row["privileged_context"])
        assert row["question"] in composed[-1]["content"]
        assert row["privileged_context"] in composed[-1]["content"]


def test_rollouts_without_a_context_are_counted_and_written_if_asked(
    run: Path, tmp_path: Path, call: Call
) -> None:
    path = run / "lessons" / "step_000001.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, reason in zip(rows, ["malformed", "malformed", "refused"], strict=False):
        row |= {"context": None, "dropped": reason, "critique": {"reason": reason}}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    total = len(samples(run))
    few, whole = tmp_path / "few.parquet", tmp_path / "whole.parquet"
    _, printed, _ = call("export-dataset", run, "--format", "trl", "--out", few)
    assert "left out (--all writes them): " in printed
    assert "2 malformed" in printed and "1 refused" in printed
    _, printed, _ = call("export-dataset", run, "--format", "trl", "--all", "--out", whole)
    assert "without a teacher context: " in printed and "2 malformed" in printed
    assert len(loaded(whole)) == total and len(loaded(few)) < total - 2
    swift = tmp_path / "swift.parquet"
    assert call("export-dataset", run, "--format", "ms-swift", "--all", "--out", swift)[0] == 0
    row = loaded(swift)[0]  # its batches hold rows that all have a teacher prompt, or none
    assert row["privileged_context"] is None
    assert row["teacher_prompt"] == messages(row["messages"])[-1]["content"]
    first = loaded(whole)[0]
    assert (first["privileged_context"], first["teacher_prompt"]) == (None, None)
    assert first["critique_failure"] == "malformed" and first["critique"] is None


def test_a_step_without_samples_is_read_from_rollouts_and_critiques(
    run: Path, tmp_path: Path, call: Call
) -> None:
    """As after a kill between critique and training: verified again, in the recipe's context."""
    before, after = tmp_path / "before.parquet", tmp_path / "after.parquet"
    assert call("export-dataset", run, "--format", "trl", "--all", "--out", before)[0] == 0
    path = run / "lessons" / "step_000003.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    (run / "critiques").mkdir()
    (run / "critiques" / "step_000003.000.jsonl").write_text("".join(
        json.dumps({key: row[key] for key in ("problem_id", "sample", "critique")}) + "\n"
        for row in rows
    ))  # fmt: skip
    assert call("export-dataset", run, "--format", "trl", "--all", "--out", after)[0] == 0
    key = ("problem_id", "sample", "step", "correct", "parsed", "privileged_context", "completion")
    ours = sorted(str([row[name] for name in key]) for row in loaded(after))
    assert ours == sorted(str([row[name] for name in key]) for row in loaded(before))


TINY = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 6, "validation": 2, "test": 2},
    "sampling": {"max_tokens": 40, "batch_size": 4},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "train": {"steps": 2, "problems_per_step": 2, "group_size": 4, "threads": 1},
    "evaluation": {"every": 2, "validation_k": 1, "test_k": 1},
}


def test_a_run_of_this_version_whole_killed_and_damaged(tmp_path: Path, call: Call) -> None:
    run = tmp_path / "run"
    run_to_end(validate(Recipe, TINY), run)
    key = ("problem_id", "sample", "step", "correct", "privileged_context", "completion")

    def exported(name: str) -> list[str]:
        out = tmp_path / f"{name}.parquet"
        status, _, errors = call("export-dataset", run, "--format", "trl", "--all", "--out", out)
        assert status == 0, errors
        return sorted(str([row[column] for column in key]) for row in loaded(out))

    whole, path = exported("whole"), run / "samples" / "step_000002.jsonl"
    assert len(whole) == 16  # two steps of eight rollouts; evaluations have more
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])  # cut off by a power cut
    assert exported("cut_off") == whole and path.read_bytes() == content[: len(content) // 2]
    path.unlink()  # killed between critique and training
    assert exported("killed") == whole
    path.write_bytes(content.replace(b'"sample": 1', b'"sample": 7', 1))
    out = tmp_path / "damaged.parquet"
    status, _, errors = call("export-dataset", run, "--format", "trl", "--out", out)
    assert status == 2 and "step_000002.jsonl is damaged: its checksum" in errors
    assert not out.exists()


def test_another_context_is_rendered_from_the_same_critiques(
    run: Path, tmp_path: Path, call: Call
) -> None:
    out, other = tmp_path / "a.parquet", tmp_path / "b.parquet"
    assert call("export-dataset", run, "--format", "trl", "--out", out)[0] == 0
    words = ("--format", "trl", "--context", "answer_only", "--out", other)
    status, _, errors = call("export-dataset", run, *words, "--set", "context.fallback=answer_only")
    assert status == 0, errors
    for row in loaded(other):
        assert row["privileged_context"] == f"# {row['critique']['answer']}"
    assert loaded(out)["privileged_context"] != loaded(other)["privileged_context"]


CHAIN_SUMS = """
model = {{ path = "{model}", system = "Be brief." }}
critic = {{ type = "oracle" }}
context = {{ type = "step_aligned" }}
[data]
type = "chain_sums"
seed = 0
min_terms = 3
max_terms = 3
max_digits = 1
train = 4
validation = 1
test = 1
"""


@pytest.fixture
def critiques(tmp_path: Path, call: Call) -> tuple[Path, Path]:
    """A file that `selfteach critique` has written, and its recipe."""
    problems = chain_sums.problem_sets(
        seed=0, min_terms=3, max_terms=3, max_digits=1, train=4, validation=1, test=1
    )[0]
    path, model, recipe = (tmp_path / name for name in ("file.jsonl", "tokenizer", "recipe.toml"))
    texts = [problem.references["aligned_reference"] for problem in problems]
    texts[1] = texts[1].replace("Answer: ", "Answer: 9<|im_end|>")
    path.write_text("".join(
        json.dumps({"question": p.question, "text": text, "answer": p.answer}) + "\n"
        for p, text in zip(problems, texts, strict=True)
    ))  # fmt: skip
    byte_level().save_pretrained(model)
    recipe.write_text(CHAIN_SUMS.format(model=model))
    out = tmp_path / "critiques.jsonl"
    assert call("critique", path, "--recipe", recipe, "--out", out)[0] == 0
    return out, recipe


def test_a_file_of_critiques_is_exported_with_the_recipes_context(
    critiques: tuple[Path, Path], tmp_path: Path, call: Call
) -> None:
    file, recipe = critiques
    for form in FORMATS:
        out = tmp_path / f"{form}.parquet"
        words = (file, "--recipe", recipe, "--format", form, "--out", out)
        status, printed, errors = call("export-dataset", *words)
        assert (status, errors) == (0, "") and "4 rows of 4 problems" in printed
        # The teacher of chain sums has worked examples with contexts; its student, without.
        assert ("ms-swift replaces" in printed) == (form == "ms-swift")
    row = loaded(tmp_path / "trl.parquet")[1]
    assert row["step"] is None and row["correct"] is False
    prompt, teacher = messages(row["prompt"]), messages(row["teacher_prompt"])
    assert prompt[0] == teacher[0] == {"role": "system", "content": "Be brief."}
    assert row["question"] in prompt[-1]["content"] and len(prompt) > 3
    assert row["question"] in teacher[-1]["content"]
    assert row["privileged_context"] in teacher[-1]["content"]
    assert f"Answer: {row['solution']}" in row["privileged_context"]
    assert "<|im_end|>" not in row["completion"][0]["content"]  # text, not the end of a turn
    assert "<\u2060|im_end|>" in row["completion"][0]["content"]


def test_wrong_input_is_one_line_and_leaves_nothing(
    critiques: tuple[Path, Path], run: Path, tmp_path: Path, call: Call
) -> None:
    file, recipe = critiques
    out, text, empty, bare = (tmp_path / n for n in ("o.parquet", "t.jsonl", "e.jsonl", "b.jsonl"))
    text.write_text("no JSON\n")
    empty.write_text("")
    bare.write_text(json.dumps({"question": "q", "text": "t", "answer": "a"}) + "\n")
    odd = tmp_path / "odd.jsonl"
    row = json.loads(file.read_text().splitlines()[0])
    odd.write_text(json.dumps({**row, "critique": {"case": 3}}) + "\n")
    study = tmp_path / "study"
    study.mkdir()
    (study / "study.json").write_text("{}")
    with_recipe = ("--recipe", recipe, "--format", "trl", "--out", out)
    wrong = {
        ("nowhere", "--format", "trl", "--out", out): "no such run folder or file of critiques",
        (file, "--format", "trl", "--out", out): "name a recipe with a critic, --recipe RECIPE",
        (run, "--format", "csv", "--out", out): "--format 'csv': one of trl, ms-swift, verl",
        (run, "--format", "trl", "--out", tmp_path / "o.csv"): "must end in .parquet or .jsonl",
        (run, "--format", "trl", "--out", file): "exists: name a new file",
        (run, "--format", "trl", "--context", "magic", "--out", out): "--context 'magic': one of",
        (run, "--recipe", recipe, "--format", "trl", "--out", out): "which has its recipe",
        (study, "--format", "trl", "--out", out): "is a study: name the folder of one of its runs",
        (tmp_path / "tokenizer", "--format", "trl", "--out", out): "is no run folder",
        (text, *with_recipe): "line 1 is damaged",
        (empty, *with_recipe): "the file is empty",
        (bare, *with_recipe): "as selfteach critique FILE --out CRITIQUES writes them",
        (odd, *with_recipe): "odd.jsonl:1: not a row of critiques",
    }
    for words, line in wrong.items():
        status, printed, errors = call("export-dataset", *words)
        assert status == 2 and printed == "" and errors.count("\n") == 1, (words, errors)
        assert line in errors, errors
        assert not out.exists() and not list(tmp_path.glob("*.tmp"))


def test_damage_in_a_run_is_named_and_nothing_is_written(
    run: Path, tmp_path: Path, call: Call
) -> None:
    path = run / "lessons" / "step_000002.jsonl"
    path.write_text(path.read_text().replace('"problem_id"', '"problem"', 1))
    out = tmp_path / "o.parquet"
    status, _, errors = call("export-dataset", run, "--format", "verl", "--out", out)
    assert status == 2 and "step_000002.jsonl is damaged" in errors and not out.exists()
