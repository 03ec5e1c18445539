"""Run the benchmarks one after the other; write results/<date>.json and render results/tables.md.

    python benchmarks/run.py [--only NAME ...] [--quick] [--date 2026-11-25] [--machine NAME]

Each runs in a separate process with the interpreter of the environment it needs (see BENCHMARKS). A
benchmark that is not run keeps the tables of the newest results file. ``--machine avx2`` writes
results/<date>.avx2.json and renders results/avx2.md instead, since ratios differ between machines.
Other options are passed on to the scripts. README.md is written by hand from these tables.
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
    "divergences": (".venv-bench", "loss/divergences", []),
    "training_step": (".venv-bench", "training/training_step", []),
    "sampling": (".venv-bench", "rollout/sampling", []),
    "fleet": (".venv", "rollout/fleet", ["--rounds", "3"]),
    "weight_transfer": (".venv", "rollout/weight_transfer", []),
    "main_job": (".venv", "training/main_job", []),
    "limit": (".venv", "training/roofline", []),
    "critics": (".venv", "critic/critics", []),
    "sharded_gradients": (".venv", "loss/sharded_gradients", []),
    "divergences_gpu": (".venv-bench", "loss/divergences_gpu", []),
    "training_step_gpu": (".venv-bench", "training/training_step_gpu", LARGE),
    "sampling_gpu": (".venv-bench", "rollout/sampling", ON_GPU),
}
"""By key in results/*.json: the environment whose Python runs a script, the script, its arguments.
`*_gpu` run only where there is a GPU."""


def main() -> None:
    """Run the chosen benchmarks, and save and render after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--machine", help="another machine, with a separate page results/NAME.md")
    args, script_args = parser.parse_known_args()
    path = HERE / "results" / f"{args.date}{suffix(args.machine)}.json"
    results = newest(args.machine) if not path.exists() else json.loads(path.read_text())
    failed = []
    for name in args.only:
        print(f"== {name}", flush=True)
        if name.endswith("_gpu") and not torch.cuda.is_available():
            print("no CUDA device here: nothing to measure")
            continue
        tables = run(name, script_args, quick=args.quick)
        if tables is None:
            failed.append(name)
        elif not args.quick:
            results[name] = {"date": args.date, **tables}
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
            render(results, args.machine)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def suffix(machine: str | None) -> str:
    """Return what follows the date in the file name of a machine's results."""
    return f".{machine}" if machine else ""


def newest(machine: str | None = None) -> dict[str, Any]:
    """Return the newest results of a machine, by benchmark."""
    dates = "[0-9]" * 4 + "-[0-9][0-9]" * 2
    files = sorted((HERE / "results").glob(f"{dates}{suffix(machine)}.json"))
    return json.loads(files[-1].read_text()) if files else {}


def run(name: str, script_args: list[str], *, quick: bool) -> dict[str, Any] | None:
    """Run a benchmark; return its JSON, or None if it failed."""
    environment, script, arguments = BENCHMARKS[name]
    python = ROOT / environment / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tables.json"
        command = [
            str(python),
            str(HERE / f"{script}.py"),
            "--json",
            str(out),
            *arguments,
            *script_args,
        ]
        command += ["--quick"] if quick else []
        environ = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run(command, cwd=ROOT, env=environ, check=False)
        return json.loads(out.read_text()) if done.returncode == 0 else None


def render(results: dict[str, Any], machine: str | None = None) -> None:
    """Put the tables between the markers of results/tables.md, or of the machine's page."""
    sections = []
    for name in (name for name in BENCHMARKS if name in results):
        result = results[name]
        title = name.removesuffix("_gpu").replace("_", " ").capitalize()
        sections.append(f"## {title}{' on a GPU' * name.endswith('_gpu')}\n")
        command = f"make bench BENCH={name}" + (f" MACHINE={machine}" if machine else "")
        sections.append(f"`{command}`; {setup(result)}.\n")
        sections += [table.markdown() for table in tables_of(result)]
    page = HERE / "results" / f"{machine or 'tables'}.md"
    pattern = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
    body = BEGIN + "\n\n" + "\n".join(sections) + "\n" + END
    page.write_text(pattern.sub(lambda _: body, page.read_text()))


def setup(result: dict[str, Any]) -> str:
    """Describe date, commit, machine and versions in one line."""
    on, versions = result["machine"], result["machine"]["versions"]
    bf16 = " and ".join(on["bf16"]) or "no instructions for bf16"
    device = on["gpu"] or f"{on['cpu']} ({bf16}), {on['cores']} cores, {on['threads']} thread"
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"{result['date']}, commit {on['commit']}, {device}, {listed}, load {on['load']} at the "
        f"start, {result['seconds']} s in all"
    )


if __name__ == "__main__":
    main()
