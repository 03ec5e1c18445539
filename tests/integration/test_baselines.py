"""The committed recipes: every one is accepted offline, and a twin of each learns in the lab."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfteach.commands.check import sizes
from selfteach.commands.check.describe_recipe import (
    FLOAT32_UNDER_ADAPTERS,
    NOTHING_TO_TEACH,
    SLOW_BF16,
    describe_study,
    notes,
)
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import load_study, study_from
from selfteach.config.schema import merge, validate
from selfteach.errors import DataError, EngineError, RecipeError
from selfteach.models import matmul, model_path
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.loop import run_to_end, train

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    path
    for path in [*ROOT.glob("src/selfteach/recipes/**/*.toml"), *ROOT.glob("experiments/*/*.toml")]
    if path.name != "published.toml"
)
BASELINES = sorted(ROOT.glob("src/selfteach/recipes/baselines/*.toml"))
PAPER = ROOT / "src/selfteach/recipes/paper.toml"
VARIED = {"extends", "critic", "context", "teacher", "objective", "train"}
"""What a baseline may set; everything else is inherited from the paper's recipe."""

TWIN = {
    "model": {
        "path": "lab:two_styles", "weights_dtype": "float32", "autocast": None, "lora": False,
        "gradient_checkpointing": False, "thinking": {"student": None, "teacher": None},
    },
    "data": {"type": "lab", "train": 8, "validation": 2, "test": 2},
    "sampling": {"temperature": 1.0, "max_tokens": 40, "batch_size": 16},
    "optimizer": {"lr": 1e-3},
    "train": {
        "steps": 2, "problems_per_step": 4, "max_length": None,
        "checkpoint_every": 1, "threads": 1,
    },
    "evaluation": {"every": 2, "validation_k": 1, "test_k": 1, "temperature": 1.0},
}  # fmt: skip
"""The lab in place of the paper's model, data and sizes."""


def twin(path: Path, arm: str | None = None, **changes: object) -> Recipe:
    """A recipe with everything but context, teacher and objective scaled down to the lab."""
    study = load_study(path)
    values = study.recipe(arm or path.stem, seed=0).model_dump(mode="json")
    small = merge(merge(values, TWIN), {"critic": {"type": "oracle"}} if values["critic"] else {})
    return validate(Recipe, merge(small, changes), where=path.stem)


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model of a hub is here, whatever this machine's cache holds."""
    real = sizes.cached_config
    monkeypatch.setattr(
        sizes, "cached_config", lambda m: None if model_path.HUB_ID.fullmatch(m.path) else real(m)
    )


def offline(path: Path) -> str:
    study = load_study(path)
    made = study.recipe(next(iter(study.arms)), seed=0).data.type not in ("files", "hub")
    few = ["data.train=4", "data.validation=2", "data.test=2"] if made else []  # made here, slowly
    if path.parent.name == "what_in_the_feedback_matters":  # its bases are not in the package
        few = ["data.train=4", "data.validation=2", "data.test=2", "model.path=lab:two_styles"]
        study = load_study(path, few).model_copy(update={"variants": {}})
        return "\n".join(describe_study(study, offline=True))
    return "\n".join(describe_study(load_study(path, few), offline=True))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_recipe_is_accepted_offline_with_its_budget(path: Path) -> None:
    described = offline(path)
    assert (
        "tokens at most (expected): per step" in described and "nothing has been spent" in described
    )
    for arm in load_study(path).arms:
        assert f"# {arm}, per seed" in described
    if path in (PAPER, *BASELINES):
        assert (
            "model Qwen/Qwen3-1.7B: not in the local cache; sizes from its known shape" in described
        )
        assert "1,720,574,976 parameters, 69,730,304 trained" in described
        assert "problems problems/openmath/train.jsonl: " in described
        assert "memory of one device at its peak: " in described


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_differs_from_the_paper_only_in_its_method(path: Path) -> None:
    recipe = tomllib.loads(path.read_text())
    assert set(recipe) <= VARIED
    assert set(recipe.get("train", {})) <= {"problems_per_step", "group_size"}
    baseline, paper = load_study(path).recipe(path.stem), load_study(PAPER).recipe("step_aligned")
    for section in ("model", "data", "sampling", "optimizer", "evaluation"):
        assert getattr(baseline, section) == getattr(paper, section)
    sampled = [r.train.problems_per_step * r.train.group_size for r in (baseline, paper)]
    assert sampled == [32, 32]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Return a function that trains a small copy of a baseline, once."""
    folders: dict[Path, Path] = {}

    def trained(path: Path) -> Path:
        if path not in folders:
            folders[path] = tmp_path_factory.mktemp(path.stem) / "whole"
            run_to_end(twin(path), folders[path])
        return folders[path]

    return trained


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_small_copy_of_every_baseline_learns(path: Path, whole: Callable[[Path], Path]) -> None:
    folder = whole(path)
    rows = [row for row in RunFolder(folder).metrics() if row["kind"] == "step"]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert sum(row["tokens_trained"] for row in rows) > 0
    assert sum(row["teacher_tokens"] for row in rows) > 0, "something was taught with a context"
    if path.stem in ("rosd", "opsd", "sdft", "vopd"):
        assert rows[0]["dropped"] == 0
    assert_moved(folder)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem == "sdpo" else pytest.mark.slow)
        for path in BASELINES
    ],
)
def test_a_small_copy_of_every_baseline_resumes(
    path: Path, whole: Callable[[Path], Path], tmp_path: Path
) -> None:
    stopped = train(twin(path), tmp_path / "stopped")
    for _ in range(2):  # the first evaluation and the first step
        next(stopped)
    stopped.close()
    run_to_end(twin(path), tmp_path / "stopped")
    assert_same_weights(whole(path), tmp_path / "stopped")


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/step_000002/weights.safetensors")


def assert_moved(run: Path) -> None:
    initial = load_file(Path("src/selfteach/tasks/lab/bases/two_styles/model.safetensors"))
    assert any(not torch.equal(value, initial[name]) for name, value in weights_of(run).items())


def assert_same_weights(one: Path, other: Path) -> None:
    assert_moved(one)
    ours, theirs = weights_of(one), weights_of(other)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_the_weight_of_an_annealed_run_falls_and_a_resume_repeats_it(tmp_path: Path) -> None:
    weight = {"start": 1.0, "end": 0.0, "steps": 2}
    path = ROOT / "src" / "selfteach" / "recipes" / "baselines" / "trace.toml"
    recipe = twin(path, objective={"weight": weight, "distillation": {"changed_steps_fraction": 1.0}},
                  data={"max_solve_rate": 1.0}, train={"num_iterations": 2})  # fmt: skip
    run_to_end(recipe, tmp_path / "whole")
    rows = [row for row in RunFolder(tmp_path / "whole").metrics() if row["kind"] == "step"]
    assert rows[0]["distillation_share"] > 0 and rows[1]["distillation_share"] == 0
    stopped = train(recipe, tmp_path / "stopped")
    for _ in range(2):
        next(stopped)
    stopped.close()
    run_to_end(recipe, tmp_path / "stopped")
    again = [row for row in RunFolder(tmp_path / "stopped").metrics() if row["kind"] == "step"]
    assert [row["distillation_share"] for row in again] == [
        row["distillation_share"] for row in rows
    ]
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_sdpo_shows_peers_and_what_the_environment_says(tmp_path: Path) -> None:
    recipe = twin(
        ROOT / "src" / "selfteach" / "recipes" / "baselines" / "sdpo.toml",
        data={"max_solve_rate": 1.0},
    )
    run_to_end(recipe, tmp_path)
    samples = [
        json.loads(line)
        for file in sorted((tmp_path / "samples").glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    right = {(row["problem_id"], row["answer"]) for row in samples if row["correct"]}
    peers = [row for row in samples if (row["problem_id"], row["context"]) in right]
    with_feedback = [row for row in samples if row["context"] and row["context"] == row["feedback"]]
    assert peers and with_feedback
    assert all(row["context"] != row["answer"] for row in peers)
    rest = [row for row in samples if row not in peers and row not in with_feedback]
    assert {row["dropped"] for row in rest} <= {"no other answer is right"}


def test_offline_forgives_what_is_absent_and_not_what_is_named_wrongly(tmp_path: Path) -> None:
    def study(*settings: str):
        return load_study(PAPER, settings)

    made = [f"data.{split}={tmp_path}/{split}.jsonl" for split in ("validation", "test")]
    for settings, error, message in (
        (["model.path=./modls/qwen"], EngineError, "no such folder"),
        (["model.path=lab:two_stiles"], EngineError, "no such base model"),
        ([f"model.path={tmp_path}"], EngineError, "no config.json"),
        ([f"data.train={tmp_path}/trian.jsonl", *made], DataError, "no such problem set"),
        (["train.max_length=50000"], RecipeError, "supports 40960 tokens"),
    ):
        with pytest.raises(error, match=message):
            list(describe_study(study(*settings), offline=True))
    described = "\n".join(describe_study(study("model.path=acme/unheard-of"), offline=True))
    assert "model acme/unheard-of: not in the local cache; its size is unknown" in described
    assert "memory of one device" not in described and "sampled: 65,536" in described
    with pytest.raises((EngineError, DataError)):
        list(describe_study(study()))


def test_check_says_where_float32_weights_under_adapters_waste_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def noted(**model: object) -> bool:
        raw = {"context": {"type": "reference"}, "model": {"lora": {"rank": 4}, **model}}
        return FLOAT32_UNDER_ADAPTERS in notes([study_from(raw).recipe("run")])

    monkeypatch.setattr(matmul, "has_fast_bf16", lambda _: True)
    assert noted() and noted(device="cuda")
    assert not noted(weights_dtype="auto") and not noted(weights_dtype="bfloat16")
    assert not noted(lora=False)
    monkeypatch.setattr(matmul, "has_fast_bf16", lambda _: False)
    assert not noted()


def test_check_says_when_a_teacher_has_nothing_to_teach() -> None:
    def noted(**changes: object) -> bool:
        raw = {"context": {"type": "none"}, **changes}
        return NOTHING_TO_TEACH in notes([study_from(raw).recipe("run")])

    assert noted() and noted(teacher={"type": "ema"})
    assert not noted(context={"type": "reference"})
    assert not noted(model={"teacher_system": "Check every sum."})
    assert not noted(model={"thinking": {"student": False, "teacher": True}})
    assert not noted(objective={"type": "grpo"}) and not noted(train={"steps": 0})


def test_check_warns_of_feedback_that_the_lab_cannot_read() -> None:
    few = {"train": 2, "validation": 1, "test": 1}
    descriptions = [
        "\n".join(
            describe_study(study_from({"context": {"type": name}, "data": few}), offline=True)
        )
        for name in ("environment", "peer")
    ]
    assert "do not read environment feedback" in descriptions[0]
    assert "do not read" not in descriptions[1], "a peer is like an aligned reference"


@pytest.mark.parametrize("halves", [True, False])
def test_a_processor_without_products_of_halves_is_told_of(
    monkeypatch: pytest.MonkeyPatch, halves: bool
) -> None:
    monkeypatch.setattr(matmul, "has_fast_bf16", lambda _: halves)

    def warned(model: dict[str, object], **where: bool) -> bool:
        study = study_from({"context": {"type": "reference"}, "model": {"device": "cpu", **model}})
        return SLOW_BF16 in notes([study.recipe("run")], **where)

    for model in ({"autocast": "bfloat16"}, {"weights_dtype": "bfloat16"}):
        assert warned(model) == (not halves)
        assert not warned(model, here=False), "it may run elsewhere"
        assert not warned({**model, "device": "cuda"})
    assert not warned({"autocast": "auto"}) and not warned({})


def test_check_says_what_fits_the_ratio_of_a_whole_rollout() -> None:
    def described(**grpo: object) -> str:
        few = {"train": 4, "validation": 1, "test": 1}
        raw = {"objective": {"type": "grpo", "importance_level": "sequence", **grpo}, "data": few}
        return "\n".join(describe_study(study_from(raw), offline=True))

    assert "hardly ever clips" in (text := described()) and "weights the ratio" in text
    gspo = described(loss_type="grpo", clip_low=3e-4, clip_high=4e-4)
    assert "hardly ever clips" not in gspo and "weights the ratio" not in gspo
