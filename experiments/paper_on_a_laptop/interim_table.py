#!/usr/bin/env python3
"""Print the table of a study whose runs are not all there yet, in Markdown.

    python interim_table.py results/chain_sums.tar.xz
    python interim_table.py runs/paper_on_a_laptop/study/chain_sums

Each arm has the seeds of its complete runs; a difference is of the seeds that both arms have. When all
runs are there, `selfteach resume` prints the same with all seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selfteach.analysis.results_text import difference, estimate, pair_decision
from selfteach.analysis.run_comparison import compare_runs
from selfteach.analysis.run_data import RunData, read_runs, unpacked

PAIRS = (
    ("step_aligned", "grpo"), ("step_aligned", "reference"), ("step_aligned", "none"),
    ("step_aligned", "aligned_reference"), ("step_aligned_oracle", "step_aligned"),
    ("step_aligned_oracle", "grpo"), ("step_aligned_oracle", "aligned_reference"),
    ("aligned_reference", "grpo"), ("grpo", "base"), ("reference", "base"), ("none", "base"),
    ("other_reference", "reference"),
)  # fmt: skip
"""The first less the second."""


def main() -> None:
    """Print the rows of arms, then the differences."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with unpacked(Path(sys.argv[1])) as folder:
        groups: dict[str, list[RunData]] = {}
        for run in read_runs(folder):
            groups.setdefault(run.arm, []).append(run)
        results = compare_runs(groups, "")
    print("\n".join([*rows(results), "", *differences(results)]))


def rows(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of all arms, best first."""
    yield f"| arm | seeds | Avg@{results['k']} | Pass@{results['k']} |"
    yield "|---|---|---|---|"
    for name, arm in sorted(results["arms"].items(), key=lambda row: -row[1]["avg"]["mean"]):
        yield f"| {name} | {arm['avg']['seeds']} | {estimate(arm['avg'])} | {estimate(arm['pass'])} |"


def differences(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of paired differences, each of the seeds that both arms have."""
    yield "| difference | seeds | Avg@k | |"
    yield "|---|---|---|---|"
    for first, second in PAIRS:
        pair, sign = f"{first}-{second}", 1
        if pair not in results["paired"]:
            pair, sign = f"{second}-{first}", -1
        value = in_direction(results["paired"][pair]["avg"], sign)
        words = pair_decision(f"{first}-{second}", value)
        yield f"| {first} − {second} | {value['seeds']} | {difference(value)} | {words} |"


def in_direction(value: Mapping[str, Any], sign: int) -> dict[str, Any]:
    """Return a difference as it is, or the other way round."""
    low, high = value["ci95"]
    ends = [low, high] if sign > 0 else [-high, -low]
    return {**value, "mean": sign * value["mean"], "ci95": ends}


if __name__ == "__main__":
    main()
