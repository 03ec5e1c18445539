"""Read recipe files: TOML in, the resolved recipe of every run out.

A recipe file holds the sections of one run (`config.recipe.Recipe`). A study adds ``[study]``, one
table of overrides per arm (``[arms.NAME]``), optionally per variant (``[variants.NAME]``), a
``[sweep]`` and a ``[select]``. What differs between arms is written in the arms; everything else is
written once.

``extends = "../base.toml"`` starts from the common sections of another file (a path relative to
this one, or the name of a shipped recipe); that file's study, arms, variants and sweep are not
inherited.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import Field

from selfteach.config.data_section import SelectConfig
from selfteach.config.migrations import migrate_config, migrate_recipe_file, migrate_study
from selfteach.config.part_names import anchored
from selfteach.config.recipe import Recipe
from selfteach.config.schema import Section, merge, nearest, parse_setting, validate
from selfteach.config.shipped_recipes import find_recipe, shipped_file
from selfteach.errors import RecipeError

BASE = "base"
"""Name of the row of the untrained model; no arm can have it."""

MAIN = "main"
"""Name of the main setting, beside variants."""

NAME = re.compile(r"\w+")
"""Names of arms and variants: they become folders, and ``a-b`` is a difference of two."""

TABLES = ("study", "arms", "variants", "sweep", "select")
"""Tables of a recipe file besides the common sections of its runs."""


class VariantConfig(Section):
    """Compares the arms in another setting, reported beside the main one."""

    title: str
    """Title of the setting in the report."""
    seeds: tuple[int, ...]
    """Seeds of its runs."""
    arms: tuple[str, ...] | None = None
    """Names of the arms that are compared; unset: all."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the common sections, nested like the recipe."""
    arm_overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Overrides of single arms by name, such as rates chosen by this variant's sweep."""


class SweepConfig(Section):
    """Sets the grid of ``selfteach sweep``: the same for every arm, compared on validation problems."""

    lr: tuple[float, ...] = Field(min_length=1)
    """Learning rates to try."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """Seeds of the sweep's runs; none of them can be in ``study.seeds``."""
    variants: tuple[str, ...] = ()
    """Names of variants that are swept too; the others take the main setting's rates."""


class StudyConfig(Section):
    """Sets what a study compares, and how."""

    title: str = ""
    """Title of the report."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Seeds of each arm's runs."""
    headline: tuple[str, ...] = ()
    """Differences of arms to print first, like ``step_aligned-grpo``."""
    workers: int | None = Field(default=None, ge=1)
    """Runs at a time, one process each; unset: one per core, as far as they fit the memory;
    on a GPU one."""
    axis: str = ""
    """Label of the quantity by which arms (or variants) differ, for a figure over it."""
    at: dict[str, float] = Field(default_factory=dict)
    """Value of that quantity for each arm; or for each variant and ``main``, the main setting."""
    inspect_answers: int | None = Field(default=None, ge=0)
    """Number of the untrained model's rollouts to validation problems that are scored token by token
    under the arms' contexts and some controls when the study ends; 0 for none. Unset: 512 with an
    oracle critic, none with a language model."""


class Study(Section):
    """Holds a recipe file: the common sections and what each arm changes."""

    common: dict[str, Any]
    study: StudyConfig = StudyConfig()
    arms: dict[str, dict[str, Any]]
    variants: dict[str, VariantConfig] = Field(default_factory=dict)
    sweep: SweepConfig | None = None
    select: SelectConfig = SelectConfig()

    def recipe(
        self, arm: str, *, seed: int | None = None, variant: str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Recipe:  # fmt: skip
        """Return the resolved recipe of one run.

        Overrides apply in this order: common sections, variant, arm, the variant's overrides of the
        arm, ``overrides``. Raises `RecipeError`.
        """
        if arm not in self.arms:
            raise RecipeError(f"no arm {arm!r}; {nearest(arm, self.arms)}")
        layers: list[Mapping[str, Any]] = [self.common]
        if variant is not None:
            layers.append(self.variants[variant].set)
        layers.append(self.arms[arm])
        if variant is not None:
            layers.append(self.variants[variant].arm_overrides.get(arm, {}))
        layers.append(overrides or {})
        if seed is not None:
            layers.append({"seed": seed})
        merged: dict[str, Any] = {}
        for layer in layers:
            merged = merge(merged, layer)
        return validate(Recipe, merged, where=f"arm {arm!r}")

    def base_recipe(self, *, seed: int, variant: str | None = None) -> Recipe:
        """Return the recipe of the base row: the untrained model under the arms' evaluation."""
        first = next(iter(self.arms))
        untrained = {"seed": seed, "train": {"steps": 0}, "context": {"type": "none"},
                     "objective": {"type": "distillation"}, "critic": None}  # fmt: skip
        merged = merge(self.common, self.variants[variant].set if variant else {})
        merged = merge(merged, {"model": self.arms[first].get("model", {})})
        return validate(Recipe, merge(merged, untrained), where="base")


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run folder's config.json with today's keys and defaults.

    It is a recipe, or a selection with its recipe. Raises `RecipeError` if it is not valid.
    """
    config, where = migrate_config(config), "config.json"
    if "recipe" in config and "select" in config:
        select = validate(SelectConfig, config["select"], where=where)
        return {"select": select.model_dump(mode="json"), "recipe": _complete(config["recipe"])}
    return _complete(config)


def complete_study(study: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return study.json's study with today's keys and defaults; None if it is not a valid study."""
    try:
        return validate(Study, migrate_study(study)).model_dump(mode="json")
    except RecipeError:
        return None


def _complete(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return validate(Recipe, recipe, where="config.json").model_dump(mode="json")


def load_study(path_or_name: str | Path, settings: Sequence[str] = ()) -> Study:
    """Read a recipe file, or a shipped recipe by its name, as a study.

    A file without arms is a study of one arm, named like the file. Raises `RecipeError`, in one line,
    if anything is wrong with the file.
    """
    path = find_recipe(path_or_name)
    return study_from(_read(path), settings, where=str(path_or_name), default_arm=path.stem)


def _read(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Merge a file over the common sections of the file it extends; ``extending`` extend this one."""
    raw = _parse(path)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends must name another recipe file, found {base!r}")
    chain = (*extending, path.resolve())
    extended = path.parent / base
    if not extended.is_file():
        extended = shipped_file(Path(base)) or extended
    if extended.resolve() in chain:
        raise RecipeError(f"{path}: extends = {base!r} leads back to itself")
    inherited = _read(extended, chain)
    return merge({k: v for k, v in inherited.items() if k not in TABLES}, raw)


def _parse(path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        return migrate_recipe_file(anchored(tables, path.parent), str(path))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except IsADirectoryError:
        raise RecipeError(
            f"{path} is a folder; name the recipe file, {path / 'recipe.toml'}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None


def study_from(
    raw: Mapping[str, Any],
    settings: Sequence[str] = (),
    *,
    where: str = "recipe",
    default_arm: str = "run",
) -> Study:
    """Return a study from parsed TOML, with ``key=value`` settings applied to the common sections.

    A setting whose key begins with the name of a table of `TABLES` changes that table; any other one
    overrides every arm. Raises `RecipeError`.
    """
    overrides = [parse_setting(setting) for setting in settings]
    try:
        tables = anchored(deepcopy(dict(raw)), Path.cwd())
        values = _override(migrate_recipe_file(tables, where), overrides)
        tables = {key: values.pop(key) for key in TABLES if key in values}
        tables.setdefault("arms", {default_arm: {}})
        study = validate(Study, {"common": values, **tables})
        _check(study)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    return study


def _override(values: dict[str, Any], settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    for setting in settings:
        values = merge(values, setting)
        if setting.keys().isdisjoint(TABLES) and isinstance(arms := values.get("arms"), Mapping):
            values["arms"] = {name: _override_arm(arm, setting) for name, arm in arms.items()}
    return values


def _override_arm(arm: Any, setting: Mapping[str, Any]) -> Any:
    """Merge a setting into an arm; a section that it removes (``critic = false``) stays removed."""
    removed = {name for name, value in setting.items() if isinstance(value, Mapping)}
    removed &= {name for name in arm if arm[name] is False} if isinstance(arm, Mapping) else set()
    return merge(arm, {name: value for name, value in setting.items() if name not in removed})


def _check(study: Study) -> None:
    """Check all that can be checked before a model is loaded. Raises `RecipeError`."""
    if not study.arms:
        raise RecipeError("[arms] is empty")
    for kind, names in (("arm", study.arms), ("variant", study.variants)):
        for name in names:
            if not NAME.fullmatch(name) or name == BASE:
                raise RecipeError(
                    f"{kind} {name!r}: a name is letters, digits and underscores, and not {BASE!r}"
                )
    for variant in (None, *study.variants):
        chosen = study.variants[variant].arms if variant else None
        _require_names(f"variants.{variant}.arms", chosen or (), study.arms)
        for arm in chosen or study.arms:
            study.recipe(arm, seed=0, variant=variant)
    _require_names("study.headline", study.study.headline, pairs([*study.arms]))
    _check_axis(study)
    if study.sweep is not None:
        _require_names("sweep.variants", study.sweep.variants, study.variants)
        if shared := set(study.sweep.seeds) & set(study.study.seeds):
            raise RecipeError(f"sweep.seeds and study.seeds share {sorted(shared)}")


def _check_axis(study: Study) -> None:
    axis, at = study.study.axis, study.study.at
    if bool(axis) != bool(at):
        raise RecipeError("study.axis labels the values in [study.at]: give both, or neither")
    if not at.keys() <= study.arms.keys():
        _require_names("study.at", tuple(at), [MAIN, *study.variants])


def _require_names(
    key: str, names: Sequence[str], defined: Mapping[str, Any] | Sequence[str]
) -> None:
    for name in names:
        if name not in defined:
            raise RecipeError(f"{key}: {name!r}; {nearest(name, defined)}")


def pairs(arms: Sequence[str]) -> list[str]:
    """Return the names of the paired differences: each arm minus each arm before it, and minus base."""
    between = [f"{b}-{a}" for i, a in enumerate(arms) for b in arms[i + 1 :]]
    return [*between, *(f"{arm}-base" for arm in arms)]
