"""Print a study's tables with the intervals of this version, beside those that were published.

    python scripts/reissue_tables.py experiments/paper_in_miniature/results/evaluations.tar.xz
    python scripts/reissue_tables.py experiments/smollm2_critic/published.toml

A folder of a study, or an archive of its results.json, config.json and test evaluations, gives exact
intervals. A .toml of what was published gives approximate ones, where evaluations were not kept: from
the seeds' means and the width of the bootstrap interval, of which the problems' part is what the
seeds do not explain. The noise of single cells is not known there and counts as the problems', so
these intervals are a little too wide.
"""

from __future__ import annotations

import argparse
import logging
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfteach.analysis.results_table import MEASURES, as_estimate
from selfteach.analysis.results_text import decision, difference, estimate, pair_title, settings
from selfteach.analysis.run_comparison import with_current_intervals
from selfteach.analysis.run_data import read_json, read_runs, unpacked
from selfteach.config.migrations import migrate_results
from selfteach.evaluation.intervals import PERCENT, Limits, difference_limits, mean_limits
from selfteach.evaluation.statistics import Interval

NORMAL_QUANTILE = 1.959964
WORDS = {"higher": "higher", "lower": "lower", "open": "includes 0", "one seed": "one seed"}


def main() -> None:
    """Print the tables of what is named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="a study's folder, an archive, or a .toml")
    source = parser.parse_args().source
    logging.getLogger("selfteach").setLevel(logging.ERROR)  # recipes of early studies have old keys
    print("\n".join(published_lines(source) if source.suffix == ".toml" else study_lines(source)))


# -- stored evaluations ----------------------------------------------------------------------


def study_lines(source: Path) -> Iterator[str]:
    """Yield the tables of a study, in Markdown."""
    with unpacked(source) as folder:
        old = migrate_results(read_json(folder / "results.json"))
        new = with_current_intervals(old, read_runs(folder))
    for (title, before), (_, now) in zip(settings(old), settings(new), strict=True):
        yield from setting_lines(title, before, now)


def setting_lines(title: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield the arms and the paired differences of one setting."""
    yield f"\n## {title}, {len(old['seeds'])} seeds\n"
    yield f"| arm | {' | '.join(MEASURES)} |"
    yield "|---" * (len(MEASURES) + 1) + "|"
    for name, arm in new["arms"].items():
        yield f"| {name} | {' | '.join(signed(estimate(arm[measure])) for measure in MEASURES)} |"
    yield "\n| difference in avg | published | now | |"
    yield "|---|---|---|---|"
    for pair, values in new["paired"].items():
        yield row(pair_title(pair), old["paired"][pair]["avg"], values["avg"])


# -- published figures -----------------------------------------------------------------------


def published_lines(source: Path) -> Iterator[str]:
    """Yield the differences and rates of a .toml, published and approximately as they are now."""
    published = tomllib.loads(source.read_text(encoding="utf-8"))
    yield f"| {published['measure']} | published | now, about | |"
    yield "|---|---|---|---|"
    for item in published["difference"]:
        old = {"mean": item["old"][0], "ci95": item["old"][1:]}
        seeds = differences_by_seed(item)
        limits = difference_limits(stand_in(seeds, old, published["problems"]), bounds=PERCENT)
        yield row(item["name"], old, as_estimate(as_interval(limits), seeds=len(seeds)))
    for item in published.get("rate", ()):
        old = {"mean": item["old"][0], "ci95": item["old"][1:]}
        seeds = item.get("seeds", [old["mean"]])
        limits = mean_limits(stand_in(seeds, old, published["problems"]), bounds=PERCENT)
        yield f"| {item['name']} | {estimate(old)} | {estimate(as_estimate(as_interval(limits)))} | |"


def differences_by_seed(item: Mapping[str, Any]) -> list[float]:
    """Return b - a for each seed; the mean alone if there is one seed."""
    if "b" not in item:
        return [item["old"][0]]
    return [b - a for b, a in zip(item["b"], item["a"], strict=True)]


def stand_in(seeds: Sequence[float], old: Mapping[str, Any], problems: int) -> np.ndarray:
    """Return a table [S, P] with these seeds' means and the spread that the old interval implies."""
    means_S, num = np.array(seeds, dtype=float), len(seeds)
    low, high = old["ci95"]
    variance = ((high - low) / 2 / NORMAL_QUANTILE) ** 2
    of_seeds = means_S.var() / num  # the bootstrap divides by S, not by S - 1
    sd = np.sqrt(max(variance - of_seeds, 0) * problems)
    signs_P = np.where(np.arange(problems) % 2, 1.0, -1.0)
    signs_P -= signs_P.mean()
    return means_S[:, None] + sd * signs_P / signs_P.std()


def as_interval(limits: Limits) -> Interval:
    """Return the limits of one table."""
    return Interval(*(float(end) for end in limits))


# -- rows ------------------------------------------------------------------------------------


def row(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return a row of a table of differences."""
    before, now = signed(difference(old)), signed(difference(new))
    return f"| {name.replace(' - ', ' − ')} | {before} | {now} | {WORDS[decision(new)]} |"


def signed(text: str) -> str:
    """Return numbers with a minus sign instead of a hyphen."""
    return text.replace("-", "−")


if __name__ == "__main__":
    main()
