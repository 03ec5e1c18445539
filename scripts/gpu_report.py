"""Measure a GPU in at most eight minutes and write the tables: for a device that is lent for minutes.

    python scripts/gpu_report.py --out FOLDER                        on a GPU
    python scripts/gpu_report.py --out FOLDER --device cpu --tiny    a rehearsal on a CPU

Parts (`benchmarks/training/gpu_parts.py`): the device's rates; parity with the CPU; a run that is
killed and resumed in deterministic mode, compared bit for bit; seconds, peak memory, tokens per second
and MFU of steps (LoRA and full weights, 512 and 2,048 tokens) beside TRL's SDPO and GRPO where TRL can
be imported; a budget per phase; weights on their way to a sampler, in all ways that one GPU has (NCCL
needs two); sampling; a LoRA step with and without `model.compile`. The model has the shape of
Qwen2.5-1.5B and random weights: nothing is downloaded.

TRL is no dependency: `pip install trl==1.16.0 datasets` before, into the same environment. Without it
its rows say so, and only the comparison is missing.

Each part is a process of its own with a time limit (in a rehearsal all are this process), and writes
FOLDER/NAME.json after each row, so that a part that fails or is stopped keeps what it has.
FOLDER/report.md has all tables. The exit status is 0 if every part has ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for _folder in ("src", "benchmarks", "benchmarks/training"):
    sys.path.insert(0, str(ROOT / _folder))

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SECONDS = 480
LIMITS = {
    "rates": 20, "parity": 40, "resume": 60, "step, full, 512": 60, "step, LoRA, 512": 50,
    "budget": 35, "weights": 50, "sample": 30, "step, LoRA, 2048": 45, "step, full, 2048": 40,
    "compile, LoRA, 512": 50,
}  # fmt: skip
"""Seconds of each part at most, the start of its process included: together `SECONDS`. What a part does
not need, those after it may use. The order is that of importance."""


def main() -> None:
    """Measure all parts, or one."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--out", type=Path, required=True, help="a folder for the results")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--tiny", action="store_true", help="small models, in this process")
    options.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    options.add_argument("--parts", nargs="*", choices=LIMITS, default=list(LIMITS))
    options.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part is not None:
        measure(args.part, args)
        return
    deadline = time.monotonic() + args.seconds
    for number, name in enumerate(args.parts):
        left = deadline - time.monotonic()
        if left <= 5:
            save(args.out, name, {"state": "not measured: the time was up", "rows": []})
        elif args.tiny:
            measure(name, args)
        else:
            in_process_of_its_own(name, args, limit_of(name, args.parts[number + 1 :], left))
        write_report(args.out, args.parts)
    states = {name: load(args.out, name)["state"] for name in args.parts}
    print(f"\nreport: {args.out / 'report.md'}")
    sys.exit(any(state != "ended" for state in states.values()))


def limit_of(name: str, others: list[str], left: float) -> float:
    """Return the seconds of a part when ``left`` are left for it and the others after it."""
    return min(left, max(LIMITS[name], left - sum(LIMITS[other] for other in others)))


def measure(name: str, args: argparse.Namespace) -> None:
    """Measure one part here; its rows are saved one by one, and a failure is a state."""
    result: dict[str, Any] = {"state": "running", "rows": [], "seconds": 0.0}
    start = time.monotonic()
    save(args.out, name, result)
    try:
        import torch
        from gpu_parts import PARTS, Settings
        from harness import format_value, machine

        torch.set_num_threads(1 if args.tiny else min(8, os.cpu_count() or 1))
        result |= {"machine": machine(), "what": first_line(PARTS[name])}
        for row in PARTS[name](Settings(args.device, args.tiny)):
            result["rows"].append(row)
            save(args.out, name, result)
            print("  ".join(f"{k}={format_value(v)}" for k, v in row.items()), flush=True)
        result["state"] = "ended"
    except Exception as error:
        print(traceback.format_exc(), file=sys.stderr)
        reason = " ".join(str(error).split())[:300]
        result["state"] = f"failed: {type(error).__name__}: {reason}"
    result["seconds"] = round(time.monotonic() - start, 1)
    save(args.out, name, result)


def first_line(part: Any) -> str:
    """Return the first line of a part's docstring."""
    return (getattr(part, "func", part).__doc__ or "").splitlines()[0]


def in_process_of_its_own(name: str, args: argparse.Namespace, limit: float) -> None:
    """Measure a part in another process, which is killed at its limit: its saved rows stay."""
    command = [sys.executable, __file__, "--part", name, "--out", str(args.out)]
    command += ["--device", args.device]
    print(f"# {name}: at most {limit:.0f} s", flush=True)
    start = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, check=False, timeout=limit)
    result = load(args.out, name)
    if result["state"] == "running":  # killed, here or by the system
        result["state"] = f"stopped after {time.monotonic() - start:.0f} s"
        save(args.out, name, result)


def path_of(folder: Path, name: str) -> Path:
    """Return the file of a part."""
    return folder / f"{name.replace(', ', '_').lower()}.json"


def save(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Replace a part's file: never half of it."""
    path = path_of(folder, name)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def load(folder: Path, name: str) -> dict[str, Any]:
    """Return a part's result; one that never began has a state that says so."""
    try:
        return json.loads(path_of(folder, name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"state": "not measured", "rows": []}


def write_report(folder: Path, names: list[str]) -> None:
    """Write the tables of all parts that were measured so far."""
    from harness import Table

    lines, described = ["# GPU report", ""], False
    for name in names:
        result = load(folder, name)
        rows = with_ratios(result["rows"])
        if not described and "machine" in result:
            lines += [f"`{json.dumps(result['machine'])}`", ""]
            described = True
        title = f"{name}: {result.get('what', '')} ({result['state']})"
        lines += [Table(title, rows).markdown(), ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of steps with TRL's seconds divided by each variant's of ours."""
    if not rows or "TRL / ours" not in rows[0]:
        return rows
    trl = {row["kind"]: row["step, s"] for row in rows if row["who"] == "TRL"}
    return [
        {**row, "TRL / ours": trl[row["kind"]] / row["step, s"]}
        if row["who"] != "TRL" and row["step, s"] and trl.get(row["kind"])
        else row
        for row in rows
    ]


if __name__ == "__main__":
    main()
