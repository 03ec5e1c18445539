"""Forecast every arm whose gain is known, and correlate each measure with the gain.

    python experiments/forecast/validate.py --out runs/forecast_validation

What is sampled is kept in the folder by table of ``known/gains.toml``; a second call samples only what
is missing, so that bases which are pretrained later are added then.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfteach.analysis.inspection.localisation import ranks
from selfteach.commands.forecast.collection import ForecastRequest
from selfteach.commands.forecast.run_forecast import forecast
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import load_study
from selfteach.runtime.atomic_files import write_json

HERE = Path(__file__).parent
RESAMPLES = 2000
TAUGHT = 20.0
"""Points of Avg@12: an arm that gains more has taught something."""


@dataclass(frozen=True, slots=True)
class Row:
    """Holds an arm's forecast with the gain that is known of it."""

    source: str
    arm: str
    base: str
    gain: float
    distills: bool
    measures: Mapping[str, float | None]
    verdict: str


def forecast_tables(
    gains: Path, out: Path, request: ForecastRequest
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any] | None]]:
    """Yield each table of known gains with the forecast of its arms; None where its base is missing."""
    tables = tomllib.loads(gains.read_text(encoding="utf-8"))["table"]
    for number, table in enumerate(tables):
        recipes = recipes_of(table, gains.parent, request.seed)
        folder = out / f"{number:02d}_{table['base']}"
        if not all(base_exists(recipe.model.path) for recipe in recipes.values()):
            yield table, None
        else:
            sys.stderr.write(f"{folder.name}: {', '.join(recipes)}\n")
            yield table, forecast(recipes, request, folder)


def recipes_of(table: Mapping[str, Any], folder: Path, seed: int) -> dict[str, Recipe]:
    """Return the recipes of a table's arms, with enough validation problems for any request."""
    study = load_study(folder / table["recipe"], [])
    return {arm: study.recipe(arm, seed=seed, variant=table.get("variant")) for arm in table["avg"]}


def base_exists(path: str) -> bool:
    """Return whether a base model is here: shipped with the package, or pretrained."""
    return path.startswith("lab:") or Path(path).is_dir()


def rows_of(table: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the arms of a table with their measures and gains."""
    for arm, avg in table["avg"].items():
        forecasted = result["arms"][arm]
        means = {
            name: None if value is None else value["mean"]
            for name, value in forecasted["measures"].items()
        }
        yield Row(
            table["source"], arm, table["base"], avg - table["untrained"],
            forecasted["teacher_sees"] is not None, means, forecasted["verdict"],
        )  # fmt: skip


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Return the rank correlation; NaN where one side has a single value, or below 3 points."""
    a, b = ranks(np.array(x)), ranks(np.array(y))
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def correlation(rows: Sequence[Row], measure: str) -> dict[str, Any] | None:
    """Return a measure's correlation with the gain: of all arms, without each base, and resampled.

    The interval is over arms drawn with replacement. Arms of one base are not independent, so it is
    narrower than one over new bases would be.
    """
    pairs = [(row.base, value, row.gain) for row in rows
             if (value := row.measures.get(measure)) is not None]  # fmt: skip
    if len(pairs) < 3:
        return None
    rng = np.random.default_rng(0)
    values, gains = (np.array(column, dtype=float) for column in list(zip(*pairs, strict=True))[1:])
    draws = rng.integers(len(pairs), size=(RESAMPLES, len(pairs)))
    resampled = np.array([spearman(values[draw], gains[draw]) for draw in draws])
    finite = resampled[np.isfinite(resampled)]
    without = {
        base: spearman(*zip(*[(v, g) for b, v, g in pairs if b != base], strict=True))
        for base in dict.fromkeys(base for base, _, _ in pairs)
        if sum(b != base for b, _, _ in pairs) >= 3
    }
    low, high = np.percentile(finite, (2.5, 97.5)) if len(finite) else (float("nan"),) * 2
    return {
        "arms": len(pairs),
        "bases": len({base for base, _, _ in pairs}),
        "spearman": spearman(values, gains),
        "ci95": [float(low), float(high)],
        "without_base": without,
    }


def verdict_counts(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Count the verdicts on arms that taught (gained more than `TAUGHT`) and on those that did not."""
    counts = {kind: {"taught": 0, "did not": 0} for kind in ("can", "undecided", "cannot")}
    for row in rows:
        counts[row.verdict]["taught" if row.gain > TAUGHT else "did not"] += 1
    return counts


def table_of(rows: Sequence[Row], measures: Sequence[str]) -> list[str]:
    """Format each measure's correlation as a row of a Markdown table."""
    titles = ("measure", "arms", "bases", "Spearman with the gain", "without one base")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for measure in measures:
        result = correlation(rows, measure)
        if result is None:
            continue
        low, high = result["ci95"]
        values = [value for value in result["without_base"].values() if np.isfinite(value)]
        span = f"{min(values):.2f} to {max(values):.2f}" if values else "–"
        lines.append(
            f"| {measure} | {result['arms']} | {result['bases']} | {result['spearman']:.2f} "
            f"[{low:.2f}, {high:.2f}] | {span} |"
        )
    return lines


def arm_lines(rows: Sequence[Row], measures: Sequence[str]) -> list[str]:
    """Format every arm with its gain and measures as a row of a Markdown table."""
    titles = ("base", "arm", "gain", "verdict", *measures)
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        values = (row.measures.get(name) for name in measures)
        cells = " | ".join("" if value is None else f"{value:.3g}" for value in values)
        lines.append(f"| {row.base} | {row.arm} | {row.gain:+.1f} | {row.verdict} | {cells} |")
    return lines


def main() -> None:
    """Run the validation and print its tables."""
    parser = argparse.ArgumentParser(description="Which measures of a forecast predict the gain?")
    parser.add_argument("--gains", type=Path, default=HERE / "known" / "gains.toml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=96)
    parser.add_argument("-k", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    request = ForecastRequest(args.problems, args.k, args.seed)
    rows: list[Row] = []
    for table, result in forecast_tables(args.gains, args.out, request):
        if result is None:
            sys.stderr.write(f"skipped, no base {table['base']}: {table['source']}\n")
        else:
            rows += rows_of(table, result)
    if not rows:
        sys.exit("no base model is here: pretrain them with make dial-bases")
    measures = list(rows[0].measures)
    groups = {
        "distillation": [row for row in rows if row.distills],
        "grpo": [row for row in rows if not row.distills],
    }
    for name, members in groups.items():
        lines = [*table_of(members, measures), "", *arm_lines(members, measures), ""]
        text = "\n".join([f"{name}: verdicts {verdict_counts(members)}", "", *lines])
        sys.stdout.write(f"{text}\n")
    correlations = {
        name: {measure: correlation(members, measure) for measure in measures}
        for name, members in groups.items()
    }
    write_json(args.out / "validation.json", {"correlations": correlations})


if __name__ == "__main__":
    main()
