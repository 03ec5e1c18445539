#!/usr/bin/env python3
"""Print the table of a study whose runs are not all there yet, in Markdown.

    python interim_table.py results/chain_sums.tar.xz
    python interim_table.py runs/paper_on_a_laptop/study/chain_sums

Each arm has the seeds of its complete runs; a difference is of the seeds that both arms have. When all
runs are there, `selfteach resume` prints the same with all seeds.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from selfteach.analysis.results_text import difference, estimate, pair_decision
from selfteach.analysis.run_comparison import compare_runs
from selfteach.analysis.run_data import RunData, read_runs

PAIRS = (
    "step_aligned-grpo", "step_aligned-reference", "step_aligned-none",
    "step_aligned-aligned_reference",
    "step_aligned_oracle-step_aligned", "step_aligned_oracle-grpo",
    "step_aligned_oracle-aligned_reference",
    "aligned_reference-grpo", "grpo-base", "reference-base", "none-base", "other_reference-reference",
)  # fmt: skip


def main() -> None:
    """Print the rows of arms, then the differences."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as unpacked:
        folder = source
        if source.is_file():
            folder = Path(unpacked)
            with tarfile.open(source) as archive:
                archive.extractall(folder, filter="data")
        groups = complete(read_runs(folder))
        print("\n".join([*rows(groups), "", *differences(groups)]))


def complete(runs: Sequence[RunData]) -> dict[str, list[RunData]]:
    """Group the runs that were tested by arm."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        if list(run.folder.glob("evaluations/test_*.json")):
            groups.setdefault(run.arm, []).append(run)
    return groups


def rows(groups: Mapping[str, Sequence[RunData]]) -> Iterator[str]:
    """Yield a table of all arms, best first."""
    results = {name: compare_runs({name: runs}, "") for name, runs in groups.items()}
    k = next(iter(results.values()))["k"]
    yield f"| arm | seeds | Avg@{k} | Pass@{k} |"
    yield "|---|---|---|---|"
    cells = {name: result["arms"][name] for name, result in results.items()}
    for name in sorted(cells, key=lambda name: -cells[name]["avg"]["mean"]):
        arm = cells[name]
        seeds = len(groups[name])
        yield f"| {name} | {seeds} | {estimate(arm['avg'])} | {estimate(arm['pass'])} |"


def differences(groups: Mapping[str, Sequence[RunData]]) -> Iterator[str]:
    """Yield a table of paired differences, each of the seeds that both arms have."""
    yield "| difference | seeds | Avg@k | |"
    yield "|---|---|---|---|"
    for pair in PAIRS:
        b, a = pair.split("-")
        if b not in groups or a not in groups:
            continue
        common = {run.seed for run in groups[a]} & {run.seed for run in groups[b]}
        both = {name: [run for run in groups[name] if run.seed in common] for name in (a, b)}
        if not common:
            continue
        value = compare_runs(both, "")["paired"][pair]["avg"]
        words = pair_decision(pair, value)
        yield f"| {b} − {a} | {len(common)} | {difference(value)} | {words} |"


if __name__ == "__main__":
    main()
