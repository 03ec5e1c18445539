"""Recipes and run folders with old names load as if they had been written with the new ones."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path
from typing import Any

import pytest

from selfteach.config import migrations
from selfteach.config.migrations import (
    METRIC_PREFIXES,
    METRICS,
    RECIPE_KEYS,
    RECIPE_VALUES,
    SELECT_KEYS,
    RenamedKey,
    migrate_config,
    migrate_metrics,
    migrate_recipe_file,
    migrate_results,
    migrate_rollout,
    migrate_select,
    migrate_study,
    migrate_usage,
    run_subfolder,
)
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import Study, load_study, study_from
from selfteach.errors import RecipeError

ORACLE = {"critic": {"type": "oracle"}, "context": {"type": "step_aligned"}}
ENDPOINT = {
    "critic": {"type": "endpoint", "base_url": "http://localhost:1/v1", "model": "m"},
    "context": {"type": "step_aligned"},
}
HYBRID = {**ORACLE, "objective": {"type": "hybrid"}}
GRPO = {"objective": {"type": "grpo"}}
FILES = {**ORACLE, "data": {"type": "files", "train": "x.jsonl"}}

EXAMPLES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    # old key: its value, today's value, and a recipe in which the key makes sense
    "train.answers_per_problem": (4, 4, ORACLE),
    "train.updates_per_batch": (2, 2, ORACLE),
    "sampling.batch_answers": (32, 32, ORACLE),
    "sampling.own_weights": (True, True, ORACLE),
    "context.fall_back": ("reference", "reference", ORACLE),
    "teacher.live_share": (0.25, 0.25, {**ORACLE, "teacher": {"type": "trust_region"}}),
    "objective.gate": ("wrong", "incorrect", ORACLE),
    "objective.spans": (0.25, 0.25, ORACLE),
    "objective.normalise": ("std", "group", GRPO),
    "objective.kl_weight": (0.1, 0.1, GRPO),
    "objective.distillation.gate": ("right", "correct", HYBRID),
    "objective.distillation.spans": (0.5, 0.5, HYBRID),
    "objective.grpo.normalise": ("none", "none", HYBRID),
    "objective.grpo.kl_weight": (0.0, 0.0, HYBRID),
    "critic.retries": (0, 1, ENDPOINT),
    "critic.max_retries": (3, 3, ENDPOINT),
    "critic.on": ({"malformed": "fall_back"}, {"malformed": "fallback"}, ENDPOINT),
    "critic.fall_back": ("aligned_reference", "aligned_reference", ENDPOINT),
    "critic.ask_first": (False, False, ENDPOINT),
    "critic.store": ("replies.sqlite", "replies.sqlite", ENDPOINT),
    "critic.batch": (2, 2, {**ENDPOINT, "critic": {"type": "local", "path": "m"}}),
    "data.unsound": ("drop", "drop", FILES),
    "data.chance_below": (0.5, 0.5, {**ORACLE, "data": {"type": "lab"}}),
    "data.only": ({"level": [4, 5]}, {"level": [4, 5]}, FILES),
    "model.thinking.marks": (["<a>", "</a>"], ("<a>", "</a>"), ORACLE),
    "model.thinking.boundary": ("own", "teacher", ORACLE),
}

KEYS = {f"{key.section}.{key.old}": key for key in (*RECIPE_KEYS, *RECIPE_VALUES)}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of one test, with nothing reported before."""
    migrations.report.cache_clear()
    caplog.set_level(logging.WARNING, logger="selfteach")
    return caplog


def with_key(values: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    first, *inner = dotted.split(".")
    if not inner:
        return {**values, first: value}
    return {**values, first: with_key(dict(values.get(first, {})), ".".join(inner), value)}


def lookup(recipe: Recipe, key: RenamedKey) -> Any:
    holder: Any = recipe
    for name in (*key.section.split("."), key.new):
        holder = getattr(holder, name)
    return holder


def assert_value(recipe: Recipe, key: RenamedKey, expected: Any) -> None:
    value = lookup(recipe, key)
    if key.new == "on_failure":
        assert {name: getattr(value, name) for name in expected} == expected
    else:
        assert value == expected


def assert_one_line(log: pytest.LogCaptureFixture, where: str, key: RenamedKey) -> None:
    (line,) = log.messages
    assert line.startswith(f"{where}: {key.section}.{key.old}")
    assert f" is now {key.section}.{key.new}" in line and "\n" not in line


def test_every_renamed_key_has_an_example() -> None:
    assert EXAMPLES.keys() == KEYS.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_old_key_of_a_recipe_is_read_and_reported_once(
    name: str, log: pytest.LogCaptureFixture
) -> None:
    value, expected, recipe = EXAMPLES[name]
    study = study_from(with_key(recipe, name, value), where="my.toml")
    assert_value(study.recipe("run"), KEYS[name], expected)
    assert_one_line(log, "my.toml", KEYS[name])
    study_from(with_key(recipe, name, value), where="my.toml")
    assert len(log.messages) == 1, "once for each file"


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("layer", ["arm", "variant", "arm_overrides"])
def test_an_old_key_of_an_arm_or_a_variant_is_read(
    name: str, layer: str, log: pytest.LogCaptureFixture
) -> None:
    value, expected, recipe = EXAMPLES[name]
    kind = {"type": recipe[section]["type"]} if (section := name.split(".")[0]) in recipe else {}
    override = with_key({section: kind} if kind else {}, name, value)
    variant: dict[str, Any] = {"title": "v", "seeds": [0]}
    if layer == "variant":
        variant["set"] = override
    if layer == "arm_overrides":
        variant["arm_overrides"] = {"a": override}
    raw = {**recipe, "arms": {"a": override if layer == "arm" else {}}, "variants": {"v": variant}}
    study = study_from(raw, where="my.toml")
    assert_value(study.recipe("a", variant="v"), KEYS[name], expected)
    assert_one_line(log, "my.toml", KEYS[name])


@pytest.mark.parametrize(
    ("setting", "name", "expected"),
    [
        ("train.answers_per_problem=4", "train.answers_per_problem", 4),
        ("critic.retries=2", "critic.retries", 3),
        ("objective.gate=wrong", "objective.gate", "incorrect"),
    ],
)
@pytest.mark.parametrize("table", ["", "arms.a."])
def test_an_old_key_of_a_setting_is_read(
    setting: str, name: str, expected: Any, table: str, log: pytest.LogCaptureFixture
) -> None:
    study = study_from({**ENDPOINT, "arms": {"a": {}}}, [table + setting])
    assert_value(study.recipe("a"), KEYS[name], expected)
    assert_one_line(log, "--set", KEYS[name])


def test_a_new_name_in_one_layer_overrides_an_old_name_in_another(tmp_path: Path) -> None:
    old = {**ORACLE, "train": {"answers_per_problem": 4}}
    assert study_from(old, ["train.group_size=6"]).recipe("run").train.group_size == 6
    new = {**ORACLE, "train": {"group_size": 4}}
    assert study_from(new, ["train.answers_per_problem=6"]).recipe("run").train.group_size == 6
    (tmp_path / "old.toml").write_text(
        "critic = { type = 'oracle' }\ncontext = { type = 'step_aligned' }\n"
        "[train]\nanswers_per_problem = 4\n"
    )
    (tmp_path / "new.toml").write_text("extends = 'old.toml'\n[train]\ngroup_size = 6\n")
    assert load_study(tmp_path / "new.toml").recipe("new").train.group_size == 6


def test_a_file_that_is_extended_is_named_in_the_line(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "old.toml").write_text("[train]\nsteps = 0\nanswers_per_problem = 4\n")
    (tmp_path / "new.toml").write_text("extends = 'old.toml'\n")
    load_study(tmp_path / "new.toml")
    assert_one_line(log, str(tmp_path / "old.toml"), KEYS["train.answers_per_problem"])


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.old != key.new])
def test_a_key_under_both_names_is_an_error_that_names_them(name: str) -> None:
    key, (value, expected, recipe) = KEYS[name], EXAMPLES[name]
    both = with_key(with_key(recipe, name, value), f"{key.section}.{key.new}", expected)
    with pytest.raises(RecipeError) as caught:
        study_from(both, where="my.toml")
    assert str(caught.value) == (
        f"my.toml: {name} is now {key.section}.{key.new}, and both are set: remove {key.old}"
    )


@pytest.mark.parametrize(
    ("toml", "error"),
    [
        ("[train]\nanswers_per_problm = 4", "unknown key 'train.answers_per_problm'"),
        ("[train]\nanswers_per_problem = 0", "train.group_size: input should be greater than"),
        ("[critic]\ntype = 'oracle'\nretries = 2", "unknown key 'critic.max_attempts'"),
        ("[objective]\ngate = 'none'", "objective.train_on: input should be 'all'"),
        ("[objective]\ntrain_on = 'wrong'", "objective.train_on: input should be 'all'"),
        ("[critic]\non = 3", "critic.on_failure"),
        ("train = 3", "train: "),
        ("arms = 3", "arms: "),
    ],
)
def test_what_no_rename_explains_is_an_error_of_validation(toml: str, error: str) -> None:
    with pytest.raises(RecipeError, match=r"^my\.toml: ") as caught:
        study_from(tomllib.loads(toml), where="my.toml")
    assert error in str(caught.value) and "\n" not in str(caught.value)


def test_new_names_are_read_without_a_word(log: pytest.LogCaptureFixture) -> None:
    for name, (_, expected, recipe) in EXAMPLES.items():
        study_from(with_key(recipe, f"{KEYS[name].section}.{KEYS[name].new}", expected))
    assert log.messages == []


def test_old_keys_of_select_are_read(log: pytest.LogCaptureFixture) -> None:
    old = {"avg_below": 0.25, "format_from": 0.75}
    assert old.keys() == {key.old for key in SELECT_KEYS}
    study = study_from({**ORACLE, "select": old}, where="my.toml")
    assert (study.select.max_solve_rate, study.select.min_format_rate) == (0.25, 0.75)
    assert log.messages == [
        "my.toml: select.avg_below is now select.max_solve_rate",
        "my.toml: select.format_from is now select.min_format_rate",
    ]
    with pytest.raises(RecipeError, match=r"select\.avg_below is now select\.max_solve_rate, and"):
        migrate_select({"avg_below": 0.1, "max_solve_rate": 0.1})


def test_a_folder_s_config_is_read(log: pytest.LogCaptureFixture) -> None:
    recipe = {"train": {"answers_per_problem": 4}}
    new = {"train": {"group_size": 4}}
    assert migrate_config(recipe) == new
    both = {"recipe": recipe, "select": {"avg_below": 0.1}}
    assert migrate_config(both) == {"recipe": new, "select": {"max_solve_rate": 0.1}}
    assert recipe == {"train": {"answers_per_problem": 4}}, "what was read is not changed"


def test_a_study_s_json_is_read() -> None:
    old = {
        "common": {**ENDPOINT, "train": {"answers_per_problem": 4}},
        "arms": {"a": {"critic": {"retries": 0}}, "b": {"critic": False, "context": {"type": "peer"}}},
        "variants": {"v": {"title": "v", "seeds": [0], "set": {"objective": {"gate": "right"}}}},
        "select": {"avg_below": 0.1},
    }  # fmt: skip
    study = Study.model_validate(migrate_study(old))
    recipe = study.recipe("a", variant="v")
    assert (recipe.train.group_size, recipe.objective.train_on) == (4, "correct")  # type: ignore[union-attr]
    assert recipe.critic.max_attempts == 1  # type: ignore[union-attr]
    assert study.recipe("b").critic is None and study.select.max_solve_rate == 0.1


def test_a_key_keeps_its_place() -> None:
    old = {"train": {"steps": 1, "answers_per_problem": 4, "threads": 1}}
    assert list(migrate_config(old)["train"]) == ["steps", "group_size", "threads"]


def test_metrics_and_budgets_get_new_names_and_keep_their_values() -> None:
    row = {name: i for i, name in enumerate(METRICS)} | {"loss": -1.0, "step": 3}
    new = migrate_metrics(row)
    assert [new[name] for name in METRICS.values()] == list(range(len(METRICS)))
    assert (new["loss"], new["step"], len(new)) == (-1.0, 3, len(row))
    assert METRIC_PREFIXES == {"no_critique/": "critique_failure/"}
    assert migrate_metrics({"no_critique/empty": 0.5}) == {"critique_failure/empty": 0.5}
    assert migrate_metrics(new) == new


def test_budgets_of_results_get_new_names_in_every_variant() -> None:
    arm = {"avg": 1.0, "budget": {"answers_sampled": 8, "critic_asked": 2, "critic_reused": 1}}
    new_arm = {
        "avg": 1.0, "budget": {"rollouts_sampled": 8, "critic_requests": 2, "critic_cached": 1}
    }  # fmt: skip
    old = {"title": "t", "arms": {"a": arm}, "variants": {"v": {"arms": {"a": arm, "b": {}}}}}
    made = {"intervals": "bootstrap"}
    assert migrate_results(old) == {
        "title": "t", **made, "arms": {"a": new_arm},
        "variants": {"v": {**made, "arms": {"a": new_arm, "b": {}}}},
    }  # fmt: skip


def test_differences_of_old_results_say_over_how_many_seeds_they_are() -> None:
    value = {"mean": 1.0, "ci95": [0.5, 1.5]}
    old = {"seeds": [0, 1], "paired": {"b-a": {"avg": value}}}
    old["variants"] = {"v": {"seeds": [0], "paired": {"b-a": {"avg": value}}}}
    new = migrate_results(old)
    assert new["paired"]["b-a"]["avg"] == {**value, "seeds": 2}
    assert new["variants"]["v"]["paired"]["b-a"]["avg"]["seeds"] == 1
    current = {**new, "intervals": "student"}
    assert migrate_results(current) == current


def test_resamples_of_an_old_study_are_ignored_with_a_line(caplog) -> None:
    old = {"study": {"bootstrap": 200, "seeds": [0, 1]}, "arms": {}}
    for migrate in (migrate_study, migrate_recipe_file):
        assert migrate(old, f"{migrate.__name__}.toml")["study"] == {"seeds": [0, 1]}
    assert "study.bootstrap is now ignored" in caplog.text


def test_rows_of_rollouts_and_usages_get_new_names() -> None:
    assert migrate_rollout({"answer_ids": [1], "text": "a"}) == {"token_ids": [1], "text": "a"}
    assert migrate_usage({"asked": 1, "reused": 2, "cost": 0.5}) == {
        "requests": 1, "cached": 2, "cost": 0.5,
    }  # fmt: skip


def test_an_old_run_folder_keeps_its_subfolders(tmp_path: Path) -> None:
    assert run_subfolder(tmp_path, "rollouts") == tmp_path / "rollouts"
    (tmp_path / "answers").mkdir()
    assert run_subfolder(tmp_path, "rollouts") == tmp_path / "answers"
    (tmp_path / "rollouts").mkdir()
    assert run_subfolder(tmp_path, "rollouts") == tmp_path / "rollouts"
    assert run_subfolder(tmp_path, "evaluations") == tmp_path / "evaluations"
