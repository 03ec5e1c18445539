#!/usr/bin/env python3
"""Keep the complete runs of a study in an archive, so that another machine can go on from there.

    python parts.py save runs/paper_on_a_laptop/study/chain_sums results/chain_sums.tar.xz
    python parts.py restore results/chain_sums.tar.xz runs/paper_on_a_laptop/study/chain_sums

An archive holds what tables are made from (recipe, environment, metrics, evaluations, result), not
rollouts, samples or weights. A study resumed from a restored folder starts the incomplete runs only.
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

FILES = ("config.json", "environment.json", "metrics.jsonl", "result.json")
OF_STUDY = ("study.json", "results.json", "sweep.json")


def main() -> None:
    """Save or restore, as the first argument says."""
    if len(sys.argv) != 4 or sys.argv[1] not in ("save", "restore"):
        sys.exit(__doc__)
    _, what, source, target = sys.argv
    if what == "save":
        print(f"{target}: {save(Path(source), Path(target))} complete runs")
    else:
        restore(Path(source), Path(target))


def save(study: Path, archive: Path) -> int:
    """Write the complete runs of the studies below a folder to an archive; return their number."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    runs = sorted(path.parent for path in study.rglob("result.json"))
    with tarfile.open(archive, "w:xz") as tar:
        for path in sorted(files_of(study, runs)):
            tar.add(path, path.relative_to(study), filter=anonymous)
    return len(runs)


def files_of(study: Path, runs: list[Path]) -> Iterator[Path]:
    """Yield the files that an archive holds."""
    for name in OF_STUDY:
        yield from study.rglob(name)
    for run in runs:
        yield from (run / name for name in FILES)
        yield from (run / "evaluations").glob("*.json")


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Remove owner and time, so that the same runs make the same archive."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def restore(archive: Path, study: Path) -> None:
    """Unpack an archive; files that are there already stay as they are."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if not (study / member.name).exists():
                tar.extract(member, study, filter="data")


if __name__ == "__main__":
    main()
