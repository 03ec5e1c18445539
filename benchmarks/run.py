"""Every benchmark, one after the other; then results/<date>.json and the tables of README.md.

    python benchmarks/run.py [--only NAME ...] [--quick] [--date 2026-11-25] [--machine NAME]

Each runs in a process of its own with the interpreter of the environment it needs (see BENCHMARKS).
A benchmark that is not run keeps the tables of the newest results file. ``--machine avx2`` writes
results/<date>.avx2.json and the tables of avx2.md instead, since ratios differ between machines. Other
options are the scripts'.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import tables_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"

ON_GPU = ["--device", "cuda"]
LARGE = ["--models", "Qwen2.5-1.5B, random weights"]
BENCHMARKS: dict[str, tuple[str, str, list[str]]] = {
    "divergences": (".venv-bench", "divergences", []),
    "training_step": (".venv-bench", "training_step", []),
    "sampling": (".venv-bench", "sampling", []),
    "main_job": (".venv", "main_job", []),
    "limit": (".venv", "limit", []),
    "critics": (".venv", "critics", []),
    "sharded_gradients": (".venv", "sharded_gradients", []),
    "divergences_gpu": (".venv-bench", "divergences_gpu", []),
    "training_step_gpu": (".venv-bench", "training_step_gpu", LARGE),
    "sampling_gpu": (".venv-bench", "sampling", ON_GPU),
}
"""The environment whose Python runs a script, and its arguments; `*_gpu` where there is one."""


def main() -> None:
    """Run, gather, render."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--machine", help="another machine, whose tables have a page of their own")
    args, more = parser.parse_known_args()
    path = HERE / "results" / f"{args.date}{suffix(args.machine)}.json"
    results = newest(args.machine) if not path.exists() else json.loads(path.read_text())
    failed = []
    for name in args.only:
        print(f"== {name}", flush=True)
        if name.endswith("_gpu") and not torch.cuda.is_available():
            print("no CUDA device here: nothing to measure")
            continue
        said = run(name, more, quick=args.quick)
        if said is None:
            failed.append(name)
        elif not args.quick:
            results[name] = {"date": args.date, **said}
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
            render(results, args.machine)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def suffix(machine: str | None) -> str:
    """What a machine's results are called behind their date."""
    return f".{machine}" if machine else ""


def newest(machine: str | None = None) -> dict[str, Any]:
    """What was measured last on a machine."""
    dates = "[0-9]" * 4 + "-[0-9][0-9]" * 2
    earlier = sorted((HERE / "results").glob(f"{dates}{suffix(machine)}.json"))
    return json.loads(earlier[-1].read_text()) if earlier else {}


def run(name: str, more: list[str], *, quick: bool) -> dict[str, Any] | None:
    """One benchmark's tables, or None if it failed."""
    environment, script, arguments = BENCHMARKS[name]
    python = ROOT / environment / "bin" / "python"
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "tables.json"
        command = [str(python), str(HERE / f"{script}.py"), "--json", str(out), *arguments, *more]
        command += ["--quick"] if quick else []
        environ = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run(command, cwd=ROOT, env=environ, check=False)
        return json.loads(out.read_text()) if done.returncode == 0 else None


def render(results: dict[str, Any], machine: str | None = None) -> None:
    """Put the tables between the marks of README.md, or of the machine's own page."""
    parts = []
    for name in (name for name in BENCHMARKS if name in results):
        said = results[name]
        title = name.removesuffix("_gpu").replace("_", " ").capitalize()
        parts.append(f"## {title}{' on a GPU' * name.endswith('_gpu')}\n")
        command = f"make bench BENCH={name}" + (f" MACHINE={machine}" if machine else "")
        parts.append(f"`{command}`; {where(said)}.\n")
        parts += [table.markdown() for table in tables_of(said)]
    page = HERE / (f"{machine}.md" if machine else "README.md")
    pattern = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
    body = BEGIN + "\n\n" + "\n".join(parts) + "\n" + END
    page.write_text(pattern.sub(lambda _: body, page.read_text()))


def where(said: dict[str, Any]) -> str:
    """Date, commit, machine and versions in one line."""
    on, versions = said["machine"], said["machine"]["versions"]
    halves = " and ".join(on["bf16"]) or "no instructions for bf16"
    device = on["gpu"] or f"{on['cpu']} ({halves}), {on['cores']} cores, {on['threads']} thread"
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"{said['date']}, commit {on['commit']}, {device}, {listed}, load {on['load']} at the "
        f"start, {said['seconds']} s in all"
    )


if __name__ == "__main__":
    main()
