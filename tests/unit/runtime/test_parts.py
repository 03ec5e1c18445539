"""Parts of one's own: imports, options, errors of one line, sources that are recorded."""

from __future__ import annotations

import json
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from selfteach.config.part_section import CustomPart
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import study_from
from selfteach.errors import CheckpointError, PartError, RunStopped
from selfteach.runtime.part_calls import reported
from selfteach.runtime.part_sources import (
    accept_sources,
    portable,
    require_given,
    require_same_sources,
    require_same_sources_of_all,
    source_of,
    with_copies,
)
from selfteach.runtime.parts import build_part, given_parts, require_part

PARTS = """
import dataclasses
import helper

@dataclasses.dataclass
class Critic:
    seed: int
    share: float = 0.5
    names: tuple[str, ...] = ()

    def __call__(self, judged):
        if self.share > 1:
            raise ValueError("a share above 1")
        return [self.seed] * len(judged)

def verify(problem, text, *, strict: bool = False, limit=3):
    return (problem, text, strict, limit)

def short(problem):
    return None

class Closed:
    def __init__(self, path):
        raise OSError("no such port")

class Silent:
    pass

ready = Critic(7)
"""
VERIFIER, CRITIC = "verifier", "critic"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("value = 1\n")
    (tmp_path / "parts.py").write_text(PARTS)
    return tmp_path / "parts.py"


def part(file: Path, name: str, **options: Any) -> CustomPart:
    return CustomPart(type=f"{file}:{name}", options=options)


def test_classes_are_constructed_functions_are_bound_and_objects_are_as_they_are(
    file: Path,
) -> None:
    offered = {"seed": 5, "task": None}
    critic = build_part(CRITIC, part(file, "Critic", share=1, names=["a"]), offered)
    assert critic([1, 2]) == [5, 5] and (critic.share, critic.names) == (1.0, ("a",))
    assert build_part(CRITIC, part(file, "ready"))([1]) == [7]
    verify = build_part(VERIFIER, part(file, "verify", limit=9))
    assert verify("p", "t") == ("p", "t", False, 9)


@pytest.mark.parametrize(
    ("kind", "name", "options", "line"),
    [
        (CRITIC, "Critic", {"shere": 1}, "parts.py:Critic: no option 'shere'; did you mean 'share'?"),
        (CRITIC, "Critic", {"share": "x"}, "option share = 'x': input should be a valid number"),
        (CRITIC, "ready", {"share": 1}, "it takes no options"),
        (VERIFIER, "verify", {"strict": 7}, "option strict = 7: input should be a valid boolean"),
        (VERIFIER, "short", {}, "takes (problem), and is called with (problem, text)"),
        (VERIFIER, "Verify", {}, "no 'Verify' in it; did you mean 'verify'?"),
        (CRITIC, "Closed", {}, "option 'path' is missing"),
        (CRITIC, "Closed", {"path": 1}, "with (path) raised OSError: no such port (parts.py:24)"),
        (CRITIC, "Silent", {}, "cannot be called: define __call__(self, judged)"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_part_is_one_line(
    file: Path, kind: Any, name: str, options: dict, line: str
) -> None:
    with pytest.raises(PartError) as error:
        build_part(kind, part(file, name, **options), {"seed": 0})
    message = str(error.value)
    assert message.startswith(f"{kind} ") and line in message and "\n" not in message


def test_a_module_that_cannot_be_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("x = 1\nraise RuntimeError('no key')\n")
    for name, line in (
        (f"{tmp_path}/absent.py:f", "no such file; a relative path is relative to the recipe"),
        (f"{tmp_path}/broken.py:f", "its import raised SyntaxError: invalid syntax"),
        (f"{tmp_path}/raises.py:f", "raised RuntimeError: no key (raises.py:2)"),
        ("no_such_package.parts:f", "no module 'no_such_package'; install its package"),
        ("nobodys", "no installed package offers it in the group selfteach.critics"),
    ):
        with pytest.raises(PartError, match=r"^critic ") as error:
            require_part(CRITIC, CustomPart(type=name))
        assert line in str(error.value)


def test_an_error_inside_a_part_names_the_part_and_the_call(file: Path) -> None:
    critic = build_part(CRITIC, part(file, "Critic", share=2.0), {"seed": 1})
    with pytest.raises(
        PartError, match=r"parts.py:Critic: its call\(3 items\) raised ValueError: a share"
    ) as error:
        critic([1, 2, 3])
    assert "(parts.py:13)" in str(error.value) and isinstance(error.value.__cause__, ValueError)


def test_a_reported_part_is_otherwise_itself() -> None:
    class Part:
        size = 3

        def solve(self, n: int) -> int:
            if n > 9:
                raise RunStopped("enough")
            return n

    part = reported(
        Part(), "critic x", {"solve": lambda result, n: "returned 2" if result == 2 else None}
    )
    assert (part.size, part.solve(1), callable(part), hasattr(part, "absent")) == (
        3,
        1,
        False,
        False,
    )
    with pytest.raises(PartError, match=r"critic x: solve\(int\) returned 2"):
        part.solve(2)
    with pytest.raises(RunStopped):
        part.solve(10)
    assert pickle.loads(pickle.dumps(reported([1], "list x", {}))).count(1) == 1


def test_a_plugin_offers_a_part_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "someones-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someones\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[selfteach.critics]\nterse = someones_parts:Terse\n")
    (tmp_path / "someones_parts.py").write_text(
        "class Terse:\n    def __call__(self, judged): return []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = study_from({"context": {"type": "step_aligned"}, "critic": {"type": "terse"}}).recipe(
        "run"
    )
    assert isinstance(recipe.critic, CustomPart)
    assert build_part(CRITIC, recipe.critic)([]) == []
    assert list(source_of(CRITIC, recipe.critic).files) == ["someones_parts.py"]
    sys.modules.pop("someones_parts")


def recipe_with(file: Path, name: str = "Critic") -> Recipe:
    critic = {"type": f"{file}:{name}"}
    return study_from({"context": {"type": "step_aligned"}, "critic": critic}).recipe("run")


def test_the_source_of_a_part_and_of_what_it_imports_beside_it_is_recorded(file: Path) -> None:
    run, recipe = file.parent / "run", recipe_with(file)
    run.mkdir()
    require_same_sources(run, recipe)
    row = json.loads((run / "parts.json").read_text())["parts"]["critic"]
    assert row["name"] == "parts.py:Critic" and list(row["files"]) == ["helper.py", "parts.py"]
    assert (run / "parts" / "critic" / "helper.py").read_text() == "value = 1\n"
    require_same_sources(run, recipe)
    (file.parent / "helper.py").write_text("value = 2\n")
    with pytest.raises(CheckpointError) as error:
        require_same_sources(run, recipe)
    line = str(error.value)
    assert "its critic parts.py:Critic has changed since this run began (helper.py)" in line
    assert f"selfteach resume {run} --accept-parts" in line
    accept_sources(run)
    require_same_sources(run, recipe)
    stored = json.loads((run / "parts.json").read_text())
    assert (
        stored["earlier"] == [{"critic": row}]
        and stored["parts"]["critic"]["sha256"] != row["sha256"]
    )


def test_runs_of_a_study_that_begin_later_have_the_source_of_the_earlier_ones(file: Path) -> None:
    recipes = [recipe_with(file), recipe_with(file, "ready")]
    require_same_sources_of_all(file.parent, recipes)
    file.write_text(PARTS + "# other\n")
    with pytest.raises(CheckpointError, match=r"its critic parts.py:Critic has changed"):
        require_same_sources_of_all(file.parent, recipes[:1])
    accept_sources(file.parent)
    require_same_sources_of_all(file.parent, recipes[:1])


def test_a_run_goes_on_with_the_copy_of_a_file_that_is_gone(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, recipe = file.parent / "run", recipe_with(file)
    run.mkdir()
    require_same_sources(run, recipe)
    assert with_copies(recipe, run, only_missing=True) is recipe
    config = portable(recipe.model_dump(mode="json"))
    assert config["critic"]["type"] == "./parts/critic/parts.py:Critic"
    file.unlink()
    with caplog.at_level(logging.WARNING):
        copied = with_copies(recipe, run, only_missing=True)
    assert "is not there: the copy in" in caplog.text
    assert copied.critic is not None and copied.critic.type == f"{run}/parts/critic/parts.py:Critic"
    require_same_sources(run, copied)


def test_an_object_from_python_is_required_again(tmp_path: Path) -> None:
    class Mine:
        def __call__(self, judged: list) -> list:
            return judged

    recipe = recipe_with(tmp_path / "none.py", "Mine")
    assert recipe.critic is not None
    with given_parts({(CRITIC, recipe.critic.type): Mine()}):
        require_same_sources(tmp_path, recipe)
        require_given(tmp_path, recipe)
        assert build_part(CRITIC, CustomPart(type=recipe.critic.type))([1]) == [1]
    with pytest.raises(
        CheckpointError, match=r"began with a critic from Python.*components=\{\"critic\": …\}"
    ):
        require_given(tmp_path, recipe)
