"""Defines `selfteach init`: a first recipe for a model and its problems, and what to run next."""

from __future__ import annotations

import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfteach.analysis.terminal.sanitize import sanitized
from selfteach.config.critic_section import EndpointConfig
from selfteach.config.recipe_file import study_from
from selfteach.config.schema import validate
from selfteach.errors import CriticError, RecipeError
from selfteach.models.model_path import resolve
from selfteach.runtime.atomic_files import write_text
from selfteach.runtime.signals import keeping

if TYPE_CHECKING:
    from selfteach.commands.init.recipe_draft import CriticChoice
    from selfteach.config.recipe import Recipe


Model = Annotated[
    str, typer.Option(help="Folder or hub id of the model to train, or lab:two_styles.")
]
Data = Annotated[
    str,
    typer.Option(
        help="Problems: a .jsonl, .csv, .parquet, … file, a folder of save_to_disk, a hub data "
        "set, a built-in mapping (gsm8k, …), lab, chain_sums or code_tasks."
    ),
]
CriticUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="OpenAI-compatible server that critiques the answers."),
]
CriticModel = Annotated[
    str | None, typer.Option(help="The critic's name at the server; default: what it lists.")
]
KeyVariable = Annotated[
    str | None, typer.Option(help="Environment variable with the critic's key.")
]
Test = Annotated[str | None, typer.Option(help="File of test problems; default: a part of --data.")]
Column = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WHAT=COLUMN", help="Name a column, e.g. --column question=body; repeatable."
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The recipe to write.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file at --out.")]
Answers = Annotated[
    int, typer.Option("--answers", "-k", min=1, help="Answers to each of the 8 problems.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Load no weights, contact no server.")]


def init(
    model: Model,
    data: Data,
    critic: CriticUrl = None,
    critic_model: CriticModel = None,
    critic_key_env: KeyVariable = None,
    test: Test = None,
    column: Column = None,
    out: Out = Path("recipe.toml"),
    force: Force = False,
    answers: Answers = 2,
    offline: Offline = False,
) -> None:
    """Write a first recipe for a model and its problems; show its prompts and the model's answers.

    Reads the model's size and chat template and the problems, chooses defaults for them and says why in
    comments. Then samples 8 training problems, unless --offline. Trains nothing.
    """
    _require_free(out, force)
    folder = resolve(model, "--model")
    address = _critic_address(critic, critic_model, critic_key_env)

    from selfteach.commands.init.model_facts import read_facts
    from selfteach.commands.init.problem_choice import choose_problems
    from selfteach.commands.init.recipe_draft import draft_recipe, recipe_text
    from selfteach.tasks.task import describe_problems

    problems = choose_problems(data, folder, test=test, columns=column or ())
    facts = read_facts(model, offline=offline)
    chosen = _critic(address, critic_model, offline) if address else None
    text = recipe_text(draft_recipe(_command(), facts, problems, chosen))
    recipes = _checked_recipes(text, out, offline)
    lines = [*describe_problems(problems.task), *_prompts(recipes, facts.tokenizer is not None)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    with keeping(f"kept: {out}; go on with selfteach check {shlex.quote(str(out))}"):
        for line in lines:
            typer.echo(sanitized(line))
        if not offline:
            _try(next(iter(recipes.values())), answers)
    for line in _next_steps(out, critic is not None, offline):
        typer.echo(line)


def _checked_recipes(text: str, out: Path, offline: bool) -> dict[str, Recipe]:
    """Return the recipe of each arm; unless offline, their critic has been tried."""
    from selfteach.trainer.preflight import preflight

    study = study_from(tomllib.loads(text), where=str(out))
    recipes = {arm: study.recipe(arm, seed=study.study.seeds[0]) for arm in study.arms}
    if not offline:
        with _options_named():
            preflight(recipes.values(), critic_only=True)
    return recipes


def _require_free(out: Path, force: bool) -> None:
    """Raise `RecipeError` if the file to write is a folder, or exists and is not to be replaced."""
    if out.is_dir():
        raise RecipeError(f"--out {out} is a folder; name the recipe file, {out / 'recipe.toml'}")
    if out.exists() and not force:
        raise RecipeError(f"--out {out} exists; name another file, or overwrite it with --force")
    if blocked := next((parent for parent in out.parents if parent.is_file()), None):
        raise RecipeError(f"--out {out}: {blocked} is a file, not a folder")


def _critic_address(
    url: str | None, name: str | None, key_env: str | None
) -> EndpointConfig | None:
    """Return the settings of the critic's server, checked as far as that needs no request."""
    if url is None:
        if name or key_env:
            raise RecipeError("--critic-model and --critic-key-env need the server: --critic URL")
        return None
    values = {"type": "endpoint", "base_url": url, "model": name or "?", "api_key_env": key_env}
    with _options_named():
        return validate(EndpointConfig, values, where="--critic")


@contextmanager
def _options_named() -> Iterator[None]:
    """Name this command's options, in errors about the critic, instead of a recipe's keys."""
    options = {
        "critic.api_key_env": "--critic-key-env",
        "critic.base_url": "--critic",
        "critic.model": "--critic-model",
    }
    try:
        yield
    except CriticError as error:
        line = str(error)
        for key, option in options.items():
            line = line.replace(key, option)
        raise CriticError(line) from None


def _critic(address: EndpointConfig, name: str | None, offline: bool) -> CriticChoice:
    from selfteach.commands.init.recipe_draft import CriticChoice

    if name is None:
        if offline:
            raise RecipeError(
                "--offline asks no server for its models: name the critic's with --critic-model"
            )
        from selfteach.trainer.build_critic import served_models

        with _options_named():
            served = served_models(address)
        if len(served) != 1:
            names = f"it serves {', '.join(served[:8])}" if served else "it lists no models"
            raise RecipeError(f"--critic {address.address}: {names}; name one with --critic-model")
        name = served[0]
    return CriticChoice(address.address, name, address.api_key_env)


def _prompts(recipes: Mapping[str, Recipe], with_tokenizer: bool) -> Iterator[str]:
    if not with_tokenizer:
        yield "# prompts: not shown, the tokenizer is not on this machine (leave --offline out)"
        return
    from selfteach.commands.check.shown_prompts import shown_prompts

    yield from shown_prompts(recipes)


def _try(recipe: Recipe, answers: int) -> None:
    """Sample a few problems with the untrained model and print what its answers are like."""
    from selfteach.commands.init.trial import PROBLEMS, describe_trial, try_model

    count = answers * PROBLEMS
    typer.echo(f"sampling up to {count} answers; Ctrl-C leaves the recipe as it is", err=True)
    for line in describe_trial(try_model(recipe, answers)):
        typer.echo(sanitized(line))


def _next_steps(out: Path, served: bool, offline: bool) -> Iterator[str]:
    name = shlex.quote(str(out))
    yield f"recipe: {out}"
    yield "next:"
    if offline:
        yield f"  selfteach check --offline {name}       sizes and budget; loads nothing"
    else:
        yield f"  selfteach check {name}                 sizes, memory and budget; runs nothing"
    needs = ", with your critic" if served else ""
    yield f"  selfteach forecast {name}              what each arm can teach{needs}; trains nothing"
    yield f"  selfteach study {name} --out runs/first   trains every arm, then a table and a report"


def _command() -> str:
    return " ".join(shlex.join(["selfteach", *sys.argv[1:]]).split())
