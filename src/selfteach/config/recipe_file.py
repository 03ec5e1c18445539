"""Recipe files: TOML in, the resolved recipe of every run out.

A recipe file holds the sections of one run (`config.Recipe`). A study adds ``[study]``, one table of
overrides per arm (``[arms.NAME]``), optionally per variant (``[variants.NAME]``), a ``[sweep]``
and a ``[select]``.
What differs between arms stands in the arms; everything else is written once and is the same for all.

``extends = "../paper.toml"`` begins with the common sections of another file, named from where
this one is; its study, arms, variants and sweep stay its own.
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
from selfteach.config.migrations import migrate_study
from selfteach.config.recipe import Recipe
from selfteach.config.schema import Section, merge, nearest, parse_setting, validate
from selfteach.errors import RecipeError

BASE = "base"
"""The row of the untrained model; no arm can have this name."""

MAIN = "main"
"""The main setting, beside variants."""

NAME = re.compile(r"\w+")
"""Names of arms and variants: they become folders, and ``a-b`` is a difference of two."""

TABLES = ("study", "arms", "variants", "sweep", "select")
"""What a recipe file holds besides the common sections of its runs."""


class VariantConfig(Section):
    """Another setting in which the arms are compared, reported beside the main one."""

    title: str
    seeds: tuple[int, ...]
    arms: tuple[str, ...] | None = None
    """By default all."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the common sections, nested like the recipe."""
    arm_overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Overrides of single arms, as chosen by this variant's own sweep."""


class SweepConfig(Section):
    """The same small grid for every arm, judged on validation problems with seeds of its own."""

    lr: tuple[float, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    variants: tuple[str, ...] = ()
    """Settings that are swept as well; the others take the main setting's rates."""


class StudyConfig(Section):
    """What a study compares, and how."""

    title: str = ""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    headline: tuple[str, ...] = ()
    """Pairs to print first, like ``step_aligned-grpo``."""
    bootstrap: int = Field(default=10_000, ge=100)
    workers: int | None = Field(default=None, ge=1)
    """Runs side by side, one process each; by default one per core, on a GPU one."""
    axis: str = ""
    """What the arms (or the variants) of a study differ in by degree, for the figure of it."""
    at: dict[str, float] = Field(default_factory=dict)
    """Where arms stand on that axis; or where variants do, and ``main``, the main setting."""
    inspect_answers: int | None = Field(default=None, ge=0)
    """Answers of the untrained model to validation problems that are scored token by token under the
    arms' contexts and some controls when the study ends; 0 for none. By default 512 where a program
    can mark them, none where a critic writes."""


class Study(Section):
    """A recipe with arms: the common sections and what each arm changes."""

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
        """The resolved recipe of one run.

        Overrides apply in this order: common sections, variant, arm, the variant's own overrides of
        the arm, ``overrides``.
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
        """The recipe of the base row: the untrained model under the arms' evaluation."""
        first = next(iter(self.arms))
        untrained = {"seed": seed, "train": {"steps": 0}, "context": {"type": "none"},
                     "objective": {"type": "distillation"}, "critic": None}  # fmt: skip
        merged = merge(self.common, self.variants[variant].set if variant else {})
        merged = merge(merged, {"model": self.arms[first].get("model", {})})
        return validate(Recipe, merge(merged, untrained), where="base")


def load_study(path: Path, settings: Sequence[str] = ()) -> Study:
    """Read a recipe file as a study; a file without arms is a study of one arm, named like the file.

    Raises `RecipeError` in one line for whatever is wrong with the file.
    """
    return study_from(_read(path), settings, where=str(path), default_arm=path.stem)


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file over the common sections of what it extends; ``above`` are the files extending it."""
    raw = _parse(path)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends names another recipe file, found {base!r}")
    chain = (*above, path.resolve())
    extended = path.parent / base
    if extended.resolve() in chain:
        raise RecipeError(f"{path}: extends = {base!r} leads back to itself")
    inherited = _read(extended, chain)
    return merge({k: v for k, v in inherited.items() if k not in TABLES}, raw)


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
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
    """A study from parsed TOML, with ``key=value`` settings applied to the common sections.

    A setting whose key begins with the name of a table of `TABLES` changes that; any other reaches
    every arm, also where an arm has a value of its own. Raises `RecipeError`.
    """
    values = deepcopy(dict(raw))
    for setting in map(parse_setting, settings):
        values = merge(values, setting)
        if setting.keys().isdisjoint(TABLES) and isinstance(arms := values.get("arms"), Mapping):
            values["arms"] = {name: merge(arm, setting) for name, arm in arms.items()}
    tables = {key: values.pop(key) for key in TABLES if key in values}
    tables.setdefault("arms", {default_arm: {}})
    try:
        study = validate(Study, migrate_study({"common": values, **tables}, where))
        _check(study)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    return study


def _check(study: Study) -> None:
    """Whatever can be said against a study before a model is loaded, as `RecipeError`."""
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
        _all_known(f"variants.{variant}.arms", chosen or (), study.arms)
        for arm in chosen or study.arms:
            study.recipe(arm, seed=0, variant=variant)
    _all_known("study.headline", study.study.headline, pairs([*study.arms]))
    _check_axis(study)
    if study.sweep is not None:
        _all_known("sweep.variants", study.sweep.variants, study.variants)
        if shared := set(study.sweep.seeds) & set(study.study.seeds):
            raise RecipeError(f"sweep.seeds and study.seeds share {sorted(shared)}")


def _check_axis(study: Study) -> None:
    axis, at = study.study.axis, study.study.at
    if bool(axis) != bool(at):
        raise RecipeError("study.axis names what [study.at] holds positions of: give both, or none")
    if not at.keys() <= study.arms.keys():
        _all_known("study.at", tuple(at), [MAIN, *study.variants])


def _all_known(key: str, names: Sequence[str], known: Mapping[str, Any] | Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise RecipeError(f"{key}: {name!r}; {nearest(name, known)}")


def pairs(arms: Sequence[str]) -> list[str]:
    """Names of the paired differences between arms: later minus earlier, and each minus base."""
    later = [f"{b}-{a}" for i, a in enumerate(arms) for b in arms[i + 1 :]]
    return [*later, *(f"{arm}-base" for arm in arms)]
