"""Read recipes and run folders written before names changed: the one table of old and new names.

Every reader of a recipe, a config.json, metrics.jsonl, rollouts or critiques passes what it has read
through a function of this module. Each renamed recipe key is reported once per file, in one line, by
the logger ``selfteach`` (Python prints its warnings to stderr unless logging is configured).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from selfteach.errors import RecipeError

log = logging.getLogger("selfteach")


@dataclass(frozen=True, slots=True)
class RenamedKey:
    """Describes a recipe key that has another name now, and possibly other values."""

    section: str
    """Dotted path of the table that holds the key."""
    old: str
    new: str
    convert: Callable[[Any], Any] = lambda value: value
    """Maps an old value to the new one."""
    note: str = ""
    """How values have changed, for the reference of recipe keys."""


def _add_one(value: Any) -> Any:
    return value + 1 if isinstance(value, int) and not isinstance(value, bool) else value


def _rename_values(**names: str) -> Callable[[Any], Any]:
    return lambda value: names.get(value, value) if isinstance(value, str) else value


def _on_failure(value: Any) -> Any:
    rename = _rename_values(fall_back="fallback")
    return {k: rename(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _distillation(section: str) -> tuple[RenamedKey, ...]:
    return (
        RenamedKey(
            section,
            "gate",
            "train_on",
            _rename_values(wrong="incorrect", right="correct"),
            '`"wrong"` is `"incorrect"`, `"right"` is `"correct"`',
        ),
        RenamedKey(section, "spans", "changed_steps_fraction"),
    )


def _grpo(section: str) -> tuple[RenamedKey, ...]:
    return (
        RenamedKey(
            section,
            "normalise",
            "scale_rewards",
            _rename_values(std="group"),
            '`"std"` is `"group"`',
        ),
        RenamedKey(section, "kl_weight", "kl_coef"),
    )


RECIPE_KEYS: tuple[RenamedKey, ...] = (
    RenamedKey("train", "answers_per_problem", "group_size"),
    RenamedKey("train", "updates_per_batch", "num_iterations"),
    RenamedKey("sampling", "batch_answers", "batch_size"),
    RenamedKey("sampling", "own_weights", "separate_copy"),
    RenamedKey("context", "fall_back", "fallback"),
    RenamedKey("teacher", "live_share", "student_mix"),
    *_distillation("objective"),
    *_grpo("objective"),
    *_distillation("objective.distillation"),
    *_grpo("objective.grpo"),
    RenamedKey("critic", "retries", "max_attempts", _add_one, "one more: counts the first request"),
    RenamedKey("critic", "max_retries", "http_retries"),
    RenamedKey("critic", "on", "on_failure", _on_failure, '`"fall_back"` is `"fallback"`'),
    RenamedKey("critic", "fall_back", "fallback"),
    RenamedKey("critic", "ask_first", "healthcheck"),
    RenamedKey("critic", "store", "reply_cache"),
    RenamedKey("critic", "batch", "batch_size"),
    RenamedKey("data", "unsound", "invalid_problems"),
    RenamedKey("data", "chance_below", "max_solve_rate"),
    RenamedKey("data", "only", "filter"),
    RenamedKey("model.thinking", "marks", "tags"),
)
"""Renamed keys of one run's recipe."""

RECIPE_VALUES = (
    RenamedKey(
        "model.thinking",
        "boundary",
        "boundary",
        _rename_values(own="teacher"),
        '`"own"` is `"teacher"`',
    ),
)
"""Keys that kept their name and have other values."""

SELECT_KEYS = (
    RenamedKey("", "avg_below", "max_solve_rate"),
    RenamedKey("", "format_from", "min_format_rate"),
)
"""Renamed keys of ``[select]``."""

REMOVED_STUDY_KEYS = {"bootstrap": "intervals are computed without resampling"}
"""Keys of ``[study]`` that have no effect any more, with the reason."""

METRICS = {
    "answers_sampled": "rollouts_sampled",
    "evaluation_answers": "evaluation_rollouts",
    "critic_asked": "critic_requests",
    "critic_reused": "critic_cached",
    "clipped": "clip_fraction",
    "importance_truncated": "importance_ratio_capped",
    "updates_not_finite": "nonfinite_updates",
    "advantage_abs": "teacher_logratio_abs",
    "distilled_share": "distillation_share",
    "taught": "frac_in_loss",
    "end_supervised": "eos_in_loss",
    "seconds_sampling": "time/rollout",
    "seconds_marking": "time/critique",
    "seconds_learning": "time/train",
    "seconds_evaluating": "time/evaluate",
    "busy_sampling": "active_rollout",
    "busy_marking": "active_critique",
    "busy_learning": "active_train",
}
"""Metrics and budget entries, old name to new."""

METRIC_PREFIXES = {"no_critique/": "critique_failure/"}
"""Beginnings of metric names, old to new."""

FOLDERS = {"rollouts": "answers", "samples": "lessons"}
"""Subfolders of a run folder, new name to old."""


def migrate_recipe(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return a recipe's tables with today's keys and values; ``where`` names the file in the log line.

    Raises `RecipeError` if a table holds a key under its old and its new name.
    """
    return _renamed(values, (*RECIPE_KEYS, *RECIPE_VALUES), where)


def migrate_select(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return a ``[select]`` table with today's keys."""
    return _renamed(values, SELECT_KEYS, where, "select.")


def migrate_recipe_file(tables: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return a recipe file, or one ``--set`` setting as nested tables, with today's keys and values.

    Layers must be migrated before they are merged: a new name in one overrides an old name in another.
    Raises `RecipeError` as `migrate_recipe` does.
    """
    studied = ("study", "arms", "variants", "select")
    overrides = {name: tables[name] for name in studied if name in tables}
    return {**migrate_recipe(tables, where), **migrate_study(overrides, where)}


def migrate_config(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return a run folder's config.json (a recipe, or a selection with its recipe), keys migrated."""
    if "recipe" in config and "select" in config:
        return {
            **config,
            "recipe": migrate_recipe(config["recipe"], where),
            "select": migrate_select(config["select"], where),
        }
    return migrate_recipe(config, where)


def migrate_study(study: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return a study as study.json holds it, every layer of overrides with today's keys and values."""
    new = dict(study)
    if "common" in new:
        new["common"] = migrate_recipe(new["common"], where)
    if isinstance(new.get("arms"), Mapping):
        new["arms"] = _each(new["arms"], where)
    if isinstance(new.get("variants"), Mapping):
        new["variants"] = {name: _variant(v, where) for name, v in new["variants"].items()}
    if isinstance(new.get("select"), Mapping):
        new["select"] = migrate_select(new["select"], where)
    if isinstance(new.get("study"), Mapping):
        new["study"] = _without_removed(new["study"], where)
    return new


def migrate_metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of metrics.jsonl, or a budget, with today's names."""
    return {_metric(name): value for name, value in row.items()}


def migrate_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return a results.json, its budgets with today's names.

    Early ones do not say how their intervals were made (by a bootstrap over seeds and problems), nor
    over how many seeds each is.
    """
    new = {"intervals": "bootstrap", **results}
    new["arms"] = {arm: _budgeted(v) for arm, v in results.get("arms", {}).items()}
    seeds = {"seeds": len(results.get("seeds", ()))}
    if isinstance(results.get("paired"), Mapping):
        new["paired"] = {
            pair: {name: {**seeds, **value} for name, value in values.items()}
            for pair, values in results["paired"].items()
        }
    if isinstance(results.get("variants"), Mapping):
        new["variants"] = {name: migrate_results(v) for name, v in results["variants"].items()}
    return new


def migrate_rollout(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a run's rollouts with today's names."""
    return {("token_ids" if name == "answer_ids" else name): v for name, v in row.items()}


def migrate_usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Return the usage of a critique with today's names."""
    names = {"asked": "requests", "reused": "cached"}
    return {names.get(name, name): value for name, value in usage.items()}


def run_subfolder(run: Path, name: str) -> Path:
    """Return ``run/name``, or the subfolder's old name in a run folder that was created with it."""
    old_path = run / FOLDERS.get(name, name)
    return old_path if old_path.exists() and not (run / name).exists() else run / name


def _renamed(
    values: Mapping[str, Any], keys: tuple[RenamedKey, ...], where: str, prefix: str = ""
) -> dict[str, Any]:
    new = dict(values)
    for key in keys:
        table, path = new, [name for name in key.section.split(".") if name]
        for name in path:
            inner = table.get(name)
            if not isinstance(inner, Mapping):
                break
            table[name] = inner = dict(inner)
            table = inner
        else:
            _rename(table, key, where, prefix)
    return new


def _rename(table: dict[str, Any], key: RenamedKey, where: str, prefix: str) -> None:
    if key.old not in table:
        return
    section = prefix + (f"{key.section}." if key.section else "")
    if key.old != key.new and key.new in table:
        raise RecipeError(
            f"{section}{key.old} is now {section}{key.new}, and both are set: remove {key.old}"
        )
    old_value = table[key.old]
    value = key.convert(old_value)
    if key.old == key.new and value == old_value:
        return
    changed = isinstance(value, str | int) and value != old_value
    report(
        where,
        f"{section}{key.old}" + (f" = {old_value!r}" if changed else ""),
        f"{section}{key.new}" + (f" = {value!r}" if changed else ""),
    )
    # In the old key's place, so that a recipe that is written again keeps its order.
    items = [(key.new, value) if name == key.old else (name, v) for name, v in table.items()]
    table.clear()
    table.update(items)


@cache
def report(where: str, old: str, new: str) -> None:
    """Log a renamed key, once for each file."""
    log.warning("%s%s is now %s", f"{where}: " if where else "", old, new)


def _without_removed(study: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in REMOVED_STUDY_KEYS.keys() & study.keys():
        report(where, f"study.{key}", f"ignored: {REMOVED_STUDY_KEYS[key]}")
    return {key: value for key, value in study.items() if key not in REMOVED_STUDY_KEYS}


def _each(tables: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        name: migrate_recipe(table, where) if isinstance(table, Mapping) else table
        for name, table in tables.items()
    }


def _variant(variant: Any, where: str) -> Any:
    if not isinstance(variant, Mapping):
        return variant
    new = dict(variant)
    if isinstance(new.get("set"), Mapping):
        new["set"] = migrate_recipe(new["set"], where)
    if isinstance(new.get("arm_overrides"), Mapping):
        new["arm_overrides"] = _each(new["arm_overrides"], where)
    return new


def _metric(name: str) -> str:
    for old, new in METRIC_PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return METRICS.get(name, name)


def _budgeted(arm: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(arm.get("budget"), Mapping):
        return dict(arm)
    return {**arm, "budget": migrate_metrics(arm["budget"])}
