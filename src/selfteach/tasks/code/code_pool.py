"""Runs answers in a bounded number of isolated processes at a time, each behind its own supervisor."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from selfteach.config.code_section import CodeConfig, Isolation
from selfteach.errors import DataError
from selfteach.tasks.code import isolation
from selfteach.tasks.verify_client import append_row, end_process, exchange, read_keys

Request = Mapping[str, Any]
Outcome = dict[str, Any]
START_S = 120.0
"""Time limit for starting a supervisor, in seconds: it imports a few modules of Python's."""
ATTEMPTS = 2
"""Supervisors that try an answer before it counts as one that cannot be run."""
WALL_FACTOR, WALL_EXTRA_S = 30.0, 60.0
"""A supervisor that has no outcome after this many times the CPU time, and this, is replaced."""
MAX_CACHED = 20_000
"""Outcomes that are held in memory."""
MAX_WORKERS = 8


class CodePool:
    """Runs tests on answers; thread-safe. Starting it proves that answers are isolated.

    Outcomes are held in memory, since verifier and critic's parser try the same answers. All processes
    end with this one, however it ends. Raises `DataError`, in one line, if the isolation that the
    recipe demands does not work here.
    """

    def __init__(self, config: CodeConfig) -> None:
        self.config = config
        self.limits = {
            "cpu_s": config.cpu_s,
            "memory_bytes": config.memory_mb << 20,
            "scratch_bytes": config.scratch_mb << 20,
            "refused_imports": list(config.refused_imports),
        }
        isolation.candidates(config.isolation)  # refuses other systems before anything is started
        self.workers = config.workers or min(MAX_WORKERS, len(os.sched_getaffinity(0)))
        self._lock = threading.Lock()
        self._outcomes: OrderedDict[str, Outcome] = OrderedDict()
        self._stored: dict[str, Outcome] = {}
        self._journal: Path | None = None
        self._scratch = tempfile.mkdtemp(prefix="selfteach-code-")
        self._end = weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        self.isolation: Isolation = config.isolation
        """How answers are isolated; never ``auto`` once the pool has started."""
        self.timeouts = 0
        """Number of answers that were not judged in time."""
        self._start_workers()

    def run(self, tests: Mapping[str, Any], code: str) -> Outcome:
        """Return the outcome of one answer's tests."""
        return self.run_all([(tests, code)])[0]

    def run_all(self, answers: Sequence[tuple[Mapping[str, Any], str]]) -> list[Outcome]:
        """Return the outcomes of many answers' tests, in order; equal ones are run once."""
        if self._pid != os.getpid():  # a fork has neither threads nor a right to these pipes
            self._start_workers()
        requests = {}
        keys = []
        for tests, code in answers:
            line = json.dumps({"tests": tests, "code": code, "limits": self.limits}, sort_keys=True)
            keys.append(key := hashlib.blake2b(line.encode(), digest_size=16).hexdigest())
            requests[key] = line
        missing = [key for key in requests if self._known(key) is None]
        fresh = dict(zip(missing, self._map([requests[key] for key in missing]), strict=True))
        for key, outcome in fresh.items():
            self._remember(key, outcome)
        return [fresh.get(key) or self._known(key) or self._run(requests[key]) for key in keys]

    def keep_timeouts(self, path: Path) -> None:
        """Store the outcomes that may depend on the machine in a file, and use those that it holds."""
        with self._lock:
            self._journal = path
            rows = read_keys(path)
            self._stored |= {key: row.get("outcome", {"kind": "timeout"}) for key, row in rows}

    def close(self) -> None:
        """End all processes; the pool cannot be used any more."""
        self._threads.shutdown(wait=True)
        while not self._idle.empty():
            self._idle.get().close()
        self._end()

    def _start_workers(self) -> None:
        self._pid = os.getpid()
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="code")
        self._idle: queue.LifoQueue[CodeWorker] = queue.LifoQueue()
        first = self._proven()
        for index in range(self.workers):
            self._idle.put(first if index == 0 else CodeWorker(self.isolation, self._scratch))

    def _proven(self) -> CodeWorker:
        """Return a worker of the first isolation that holds. Raises `DataError` if there is none."""
        reasons: dict[str, str] = {}
        for candidate in isolation.candidates(self.config.isolation):
            worker = CodeWorker(candidate, self._scratch)
            try:
                reason = self._fault(worker)
            except DataError as error:
                reason = str(error)
            if reason is None:
                self.isolation = candidate
                return worker
            worker.close()
            reasons[candidate] = reason
        self._end()
        raise isolation.refusal(self.config.isolation, reasons)

    def _fault(self, worker: CodeWorker) -> str | None:
        """Return what an isolated process can do that it should not; None if there is nothing."""
        outcome = worker.run(json.dumps(isolation.probe_request(self.limits)), START_S)
        if outcome is None or outcome["kind"] not in ("passed", "failed"):
            detail = (outcome or {}).get("detail") or (outcome or {}).get("error")
            return f"a first program could not be run: {detail or 'no reply'}"
        if outcome["kind"] == "failed" and worker.isolation != "rlimits":
            return f"a program was able to {outcome['got']}"
        return None

    def _map(self, lines: Sequence[str]) -> list[Outcome]:
        if len(lines) == 1:
            return [self._run(lines[0])]
        return list(self._threads.map(self._run, lines))

    def _run(self, line: str) -> Outcome:
        worker = self._idle.get()
        try:
            outcome = None
            for _ in range(ATTEMPTS):
                outcome = worker.run(line, self._wall_s(line))
                if outcome is not None and outcome["kind"] != "broken":
                    break
                worker.close()
            outcome = outcome or {"kind": "broken", "detail": "no reply"}
            return {name: _storable(value) for name, value in outcome.items()}
        except (
            BaseException
        ):  # an interrupt leaves a reply in the pipe, which is not the next one's
            worker.close()
            raise
        finally:
            self._idle.put(worker)

    def _wall_s(self, line: str) -> float:
        return WALL_FACTOR * self.config.cpu_s * max(1, line.count('"stdin"')) + WALL_EXTRA_S

    def _known(self, key: str) -> Outcome | None:
        with self._lock:
            return self._stored.get(key) or self._outcomes.get(key)

    def _remember(self, key: str, outcome: Outcome) -> None:
        """Hold an outcome in memory, and store one that may differ on another machine."""
        with self._lock:
            self._outcomes[key] = outcome
            while len(self._outcomes) > MAX_CACHED:
                self._outcomes.popitem(last=False)
            if outcome["kind"] in ("timeout", "broken", "memory"):
                self.timeouts += outcome["kind"] != "memory"
                self._stored[key] = outcome
                if self._journal is not None:
                    append_row(self._journal, {"timed_out": key, "outcome": outcome})


class CodeWorker:
    """Runs `sandbox.supervisor` in a subprocess, started on first use; one answer at a time."""

    def __init__(self, name: Isolation, scratch: str) -> None:
        self.isolation: Isolation = name
        self._scratch = scratch
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, line: str, limit_s: float) -> Outcome | None:
        """Return the outcome of a request; None if the supervisor died or did not reply in time.

        Raises `DataError` if the supervisor cannot start.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = self._started()
        outcome = exchange(self._process, line, limit_s)
        if outcome is None:
            self.close()
        return outcome

    def close(self) -> None:
        """End the supervisor, and so all processes that it has started."""
        if self._process is not None:
            end_process(self._process)
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        settings = isolation.settings(self.isolation, self._scratch)
        code = (
            f"import sys; sys.path.append({settings['folder']!r}); "
            "from sandbox.supervisor import main; main()"
        )
        process = subprocess.Popen(
            [*settings["python"], "-c", code],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=settings["environment"], cwd="/",
            start_new_session=True,  # Ctrl-C goes to the parent; the supervisor ends with its pipe
        )  # fmt: skip
        weakref.finalize(self, end_process, process)
        reply = exchange(process, json.dumps(settings), START_S)
        if reply is None or "ready" not in reply:
            end_process(process)
            reason = (reply or {}).get("error", f"no reply within {START_S:.0f} s")
            raise DataError(str(reason))
        return process


def _storable(value: Any) -> Any:
    """Return a value; a text without halves of surrogate pairs, which no file takes."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
