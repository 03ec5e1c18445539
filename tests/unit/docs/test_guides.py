"""Check the documentation: recipes validate, commands parse, unmarked commands run, links resolve.

A shell block holds commands. Those that begin with ``selfteach``, ``make`` or ``torchrun … -m
selfteach`` are parsed: the command, its options, its recipe and its ``--set`` keys must exist. A
command without a marker is also run. A marker is a comment that contains one of `MARKERS`: behind a
command it holds for that command, on a line of its own for the commands below it up to a blank line.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from selfteach import cli
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import load_study, study_from
from selfteach.config.schema import merge, validate
from selfteach.config.shipped_recipes import shipped_file
from selfteach.errors import RecipeError

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", *ROOT.glob("experiments/*/README.md")])
MARKERS = {
    "needs a GPU": "no recipe need exist",
    "needs a server": "no recipe need exist",
    "needs your files": "no recipe need exist",
    "needs a finished run": "recipes exist",
    "takes minutes": "recipes exist",
}
"""Why a command is not run by this test, and what is checked of its recipe all the same."""
EXPECTED_TO_FAIL = "learning_rate"
"""Part of the one command that a page shows with its error."""
STUDY_TABLES = ("arms", "study", "variants", "sweep", "select")


@dataclass(frozen=True)
class Command:
    """A command of a page, with the marker that applies to it."""

    page: str
    text: str
    marker: str | None

    @property
    def words(self) -> list[str]:
        """The words behind ``selfteach`` or ``make``."""
        return shlex.split(re.sub(r"^torchrun .*-m selfteach", "selfteach", self.text))[1:]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    pattern = r"^```([^\n]*)\n(.*?)^```"
    matches = re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE)
    return [body for info, body in matches if (info.split() or [""])[0] in languages]


def marker_in(comment: str) -> str | None:
    return next((marker for marker in MARKERS if marker in comment), None)


def commands_of(page: Path) -> list[Command]:
    commands: list[Command] = []
    for block in blocks(page, "", "sh", "bash", "console"):
        standing: str | None = None
        for line in block.replace("\\\n", " ").splitlines():
            text, _, comment = line.partition(" # ")
            text = text.strip().removeprefix("$ ")
            if line.lstrip().startswith("#"):
                standing = marker_in(line) or standing
            elif not text:
                standing = None
            elif re.match(r"(\S*/)?selfteach \S|make [\w-]+|torchrun .*-m selfteach ", text):
                text = re.sub(r"^\S*/selfteach ", "selfteach ", text)
                commands.append(Command(name_of(page), text, marker_in(comment) or standing))
    return commands


COMMANDS = [command for page in PAGES for command in commands_of(page)]
OURS = [command for command in COMMANDS if not command.text.startswith("make ")]
USAGE = [c for c in OURS if re.search(r"\b(RECIPE|DIR|FILE|MODEL)\b", c.text)]
"""Lines of a synopsis, with words in capitals for what a user fills in."""
TYPED = [command for command in OURS if command not in USAGE]
SLOW = ("--figure", "--calibrate")
"""Options whose commands are only parsed."""
RUN = [
    command
    for text, command in {command.text: command for command in TYPED}.items()
    if command.marker is None and not any(option in text for option in SLOW)
]


def here_or_shipped(recipe: Path) -> Path | None:
    """The file of a recipe in the repository, or of a shipped one; None if there is neither."""
    file = ROOT / recipe
    return file if file.is_file() else shipped_file(recipe)


def ids(command: Command) -> str:
    return f"{command.page}: {command.text[:60]}"


def click_command(command: Command) -> tuple[Any, list[str]]:
    """Return a command of the command line, also one of a group (``cache export``), and its words."""
    parser, words = typer.main.get_command(cli.app), command.words
    while words and words[0] in getattr(parser, "commands", {}):
        parser, words = parser.commands[words[0]], words[1:]  # type: ignore[attr-defined]
    assert not hasattr(parser, "commands"), f"no such command: {command.text}"
    return parser, words


@pytest.mark.parametrize("command", TYPED, ids=ids)
def test_a_command_parses_and_its_recipe_and_settings_exist(command: Command) -> None:
    if command.words[0].startswith("--"):
        return
    parser, words = click_command(command)
    given = parser.make_context(command.words[0], words).params
    recipe, settings = given.get("recipe"), given.get("settings") or []
    if EXPECTED_TO_FAIL in command.text:
        with pytest.raises(RecipeError, match="unknown key"):
            load_study(here_or_shipped(recipe), settings)
    elif recipe is None:
        for setting in settings:  # of a run's own recipe, or of the lab's default
            study_from({"context": {"type": "reference"}}, [setting])
    elif (file := here_or_shipped(recipe)) is not None:
        load_study(file, settings)
    else:
        required = command.marker is None or MARKERS[command.marker] == "recipes exist"
        assert not required, f"{command.page}: {recipe} does not exist"


@pytest.mark.parametrize("command", USAGE, ids=ids)
def test_a_line_of_a_synopsis_names_a_command_and_its_options(command: Command) -> None:
    options = {option for param in click_command(command)[0].params for option in param.opts}
    given = [word for word in command.words if re.fullmatch(r"-\w|--[\w-]+", word)]
    assert set(given) <= options


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md"]:
        text = page.read_text()
        named = re.findall(r"`make ([\w-]+)", text)
        named += [c.words[0] for c in commands_of(page) if c.text.startswith("make ")]
        assert set(named) <= targets, name_of(page)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_every_make_target_can_be_made_and_none_is_defined_twice() -> None:
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    outside = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    made = subprocess.run(
        ["make", "--dry-run", *targets],
        cwd=ROOT, capture_output=True, text=True, check=False, env=outside,
    )  # fmt: skip
    assert (made.returncode, made.stderr) == (0, "")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with copies of the repository's experiments, where a command may write."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", RUN, ids=ids)
def test_an_unmarked_command_runs(
    command: Command, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if EXPECTED_TO_FAIL in command.text:
        page = (ROOT / command.page).read_text()
        with pytest.raises(RecipeError, match="unknown key") as error:
            cli.app(command.words, standalone_mode=False)
        assert str(error.value)[:90] in page
        return
    cli.app(command.words, standalone_mode=False)
    assert capsys.readouterr().out


TOML = [
    pytest.param(block, id=f"{name_of(page)}:{number}")
    for page in PAGES
    for number, block in enumerate(blocks(page, "toml"))
]


@pytest.mark.parametrize("block", TOML)
def test_recipes_in_the_text_validate(block: str) -> None:
    values = tomllib.loads(block)
    needed = {"context": {"type": "reference"}, "critic": {"type": "oracle"}}
    if "arms" in values:
        needed.pop("context")  # an arm of GRPO takes none
    if any(table in values for table in STUDY_TABLES):
        study_from(merge(needed, values))
    else:
        validate(Recipe, merge(needed, values))


PYTHON = [
    pytest.param(block, id=f"{name_of(page)}:{number}")
    for page in PAGES
    for number, block in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_compile_and_their_imports_resolve(block: str) -> None:
    tree = ast.parse(block)
    for library in ("trl", "inspect_ai"):  # nothing of ours needs them elsewhere
        if re.search(rf"^from {library}", block, re.M):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pytest.importorskip(library, reason=f"{library} is not installed")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            missing = [a.name for a in node.names if not hasattr(module, a.name)]
            assert not missing, f"{node.module} has no {', '.join(missing)}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


CHEAP = ("train_step(", "evaluate_model(", "per_token(", "rewards = reward(")
"""Python blocks that are run: they read no folder of a user's."""
EXECUTED = [block for block in PYTHON if any(name in str(block.values[0]) for name in CHEAP)]


@pytest.mark.parametrize("block", [b for b in EXECUTED if "def train_step" not in str(b.values[0])])
def test_cheap_python_blocks_run(block: str, here: Path) -> None:
    exec(compile(block, "block", "exec"), {"__name__": "block"})


def test_the_api_page_names_what_exists() -> None:
    rows = re.findall(
        r"^\| `(selfteach[\w.]*)` \| (.*) \|$", (ROOT / "docs/api.md").read_text(), re.M
    )
    assert len(rows) > 20
    for module, text in rows:
        loaded = importlib.import_module(module)
        for name in re.findall(r"`(\w+)(?:\.\w+)?(?:\(.*?\))?`", text):
            assert hasattr(loaded, name), f"{module} has no {name}"


def test_the_comparison_names_keys_that_exist() -> None:
    """Dotted keys in the second column of a table are keys of a recipe."""
    from selfteach.config import data_section, objective_section

    sections = {
        name: set(model.model_fields)
        for name, field in Recipe.model_fields.items()
        for model in [field.annotation]
        if hasattr(model, "model_fields")
    }
    sections["objective"] = {
        key
        for model in (
            objective_section.DistillationConfig,
            objective_section.GrpoConfig,
            objective_section.HybridConfig,
        )
        for key in model.model_fields
    }
    sections["data"] = set(data_section.FilesData.model_fields)
    text = (ROOT / "docs/comparison.md").read_text()
    rows = re.findall(r"^\| [^|]* \| ([^|]*) \|$", text, re.M)
    keys = [key for row in rows for key in re.findall(r"`(\w+\.\w+)", row)]
    assert len(keys) > 60
    for key in keys:
        section, name = key.split(".")
        if section in sections:
            assert name in sections[section], key


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_named_files_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)\s]*)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md" and target.exists():
            assert anchor in anchors(target), link
    for path in re.findall(
        r"(?:src/selfteach/recipes|experiments|scripts)/[\w/.]+\.(?:toml|sh|sbatch|yaml)", text
    ):
        assert (ROOT / path).exists(), path


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_kubernetes_is_yaml() -> None:
    text = (ROOT / "scripts" / "kubernetes" / "train.yaml").read_text()
    kinds = ["Deployment", "Service", "Deployment", "Service", "Job"]
    assert [part["kind"] for part in yaml.safe_load_all(text)] == kinds


@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/**/*.s*")), ids=name_of)
def test_launch_scripts_are_valid_shell(script: Path) -> None:
    if script.is_file():
        subprocess.run(["bash", "-n", script], check=True)
