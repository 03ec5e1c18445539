"""How a recipe spells a part of one's own, for every kind in one form."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfteach.config.part_names import anchored, unanchored
from selfteach.config.part_section import named_parts
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import load_study, study_from
from selfteach.config.schema import validate
from selfteach.errors import RecipeError

FILES = {"type": "files", "train": "x.jsonl"}
SHOWN = {"context": {"type": "reference"}}


def recipe_of(**sections: object) -> Recipe:
    return study_from({**SHOWN, **sections}).recipe("run")


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"critic": {"type": "p.q:C", "options": {"a": 1}}}, "critic"),
        ({"context": {"type": "p.q:C", "options": {"a": 1}}}, "context"),
        ({"teacher": {"type": "p.q:C", "options": {"a": 1}}}, "teacher"),
        ({"objective": {"type": "p.q:C", "options": {"a": 1}}}, "objective"),
        ({"data": {"type": "p.q:C", "options": {"a": 1}}}, "data"),
        ({"data": {**FILES, "verifier": {"type": "p.q:C", "options": {"a": 1}}}}, "data.verifier"),
        ({"data": {**FILES, "steps": {"type": "p.q:C", "options": {"a": 1}}}}, "data.steps"),
        (
            {"data": {"type": "lab", "verifier": {"type": "p.q:C", "options": {"a": 1}}}},
            "data.verifier",
        ),
        ({"data": {"type": "lab", "steps": {"type": "p.q:C", "options": {"a": 1}}}}, "data.steps"),
    ],
)
def test_every_kind_takes_a_name_with_options(sections: dict, key: str) -> None:
    recipe = recipe_of(**sections)
    ((named, (_, part)),) = named_parts(recipe).items()
    assert (named, part.type, part.options) == (key, "p.q:C", {"a": 1})
    assert validate(Recipe, recipe.model_dump(mode="json")) == recipe


def test_a_verifier_and_a_splitter_may_be_a_name_alone() -> None:
    recipe = recipe_of(data={**FILES, "verifier": "p:v", "steps": "p:s"})
    assert {key: part.type for key, (_, part) in named_parts(recipe).items()} == {
        "data.verifier": "p:v",
        "data.steps": "p:s",
    }


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (
            {"critic": {"type": "oracel"}},
            "critic.type = 'oracel': did you mean 'oracle'?; a part of your",
        ),
        ({"critic": {"type": "p:"}}, "package.module:name or ./file.py:name"),
        (
            {"critic": {"type": "p:C", "keep": 1}},
            "; arguments of a part of your own: critic.options",
        ),
        ({"context": {"type": "step_alined"}}, "or a part of your own, package.module:name"),
        ({"context": {"type": "reference", "options": {"a": 1}}}, '"reference" takes none'),
        ({"data": {**FILES, "verifier": "exakt"}}, "data.verifier: input should be 'exact'"),
        ({"data": {"type": "lab", "verifier": "exact"}}, "these problems have their verifier"),
        (
            {"data": {**FILES, "steps": {"type": "p:s", "option": {}}}},
            "a part of your own: data.steps.options",
        ),
    ],
)
def test_a_wrong_name_is_one_line(sections: dict, line: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_of(**sections)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_files_are_relative_to_the_recipe_that_names_them(tmp_path: Path) -> None:
    for name in ("base", "inner"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "b.toml").write_text(
        '[critic]\ntype = "./c.py:C"\n[data]\ntype = "files"\ntrain = "x"\nverifier = "../v.py:V"\n'
    )
    (tmp_path / "inner" / "r.toml").write_text(
        'extends = "../base/b.toml"\n[arms.a]\ncontext.type = "./d.py:D"\n'
        'context.options.type = "./e.py:E"\n'
    )
    recipe = load_study(tmp_path / "inner" / "r.toml", ["teacher.type=./t.py:T"]).recipe("a")
    names = {key: part.type for key, (_, part) in named_parts(recipe).items()}
    assert names == {
        "critic": f"{tmp_path}/base/c.py:C",
        "data.verifier": f"{tmp_path}/v.py:V",
        "context": f"{tmp_path}/inner/d.py:D",
        "teacher": f"{Path.cwd()}/t.py:T",
    }
    assert recipe.context.options == {"type": "./e.py:E"}  # the part's own affair
    plain = recipe.model_dump(mode="json")
    assert unanchored(plain)["critic"]["type"] == "c.py:C"
    assert anchored(unanchored(plain), tmp_path / "base")["critic"]["type"] == names["critic"]


def test_a_run_with_an_objective_of_ones_own_shows_the_context_that_it_names() -> None:
    objective = {"type": "p:O"}
    assert recipe_of(objective=objective).shows_context
    assert not study_from({"objective": objective}).recipe("run").shows_context
