"""A pool's processes: proven isolation, refusals, restarts, an end for sure, stored timeouts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from selfteach.config.code_section import CodeConfig
from selfteach.errors import DataError
from selfteach.tasks.code import code_pool, isolation
from selfteach.tasks.code.code_pool import CodePool
from selfteach.tasks.code.sandbox import seccomp_filter

ONE = {"shape": "cases", "cases": [{"call": "f", "args": [1], "expected": 2}]}
RIGHT, ENDLESS = "def f(x): return x + 1", "def f(x):\n    while True: pass"


def children(pid: int) -> list[int]:
    """Return all processes that a process has started, and theirs."""
    pids = []
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if folder.name.isdigit() and int(fields[1]) == pid and fields[0] != "Z":
            pids += [int(folder.name), *children(int(folder.name))]
    return pids


def wait_until(holds: Any, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_where_no_isolation_works_the_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, scratch: str) -> dict[str, Any]:
        raise DataError(f"no {name}")

    monkeypatch.setattr(isolation, "settings", broken)
    with pytest.raises(DataError) as error:
        CodePool(CodeConfig())
    text = str(error.value)
    assert "\n" not in text and 'data.code.isolation = "auto"' in text
    assert "bubblewrap: no bubblewrap; namespaces: no namespaces; landlock: no landlock" in text


def test_an_isolation_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that finds an open door refuses it: here the door is one that every process has."""
    probe = isolation.PROBE.replace('write(folder + "/selfteach_probe")', 'write("a")')
    monkeypatch.setattr(isolation, "PROBE", probe)
    with pytest.raises(DataError, match="a program was able to"):
        CodePool(CodeConfig(isolation="landlock"))


@pytest.mark.parametrize("folder", ["/dev", "/dev/shm"])
def test_a_probe_tries_to_write_where_namespaces_have_files_in_memory(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is one that can be written: the scratch folder, which the probe takes for it."""
    probe = isolation.PROBE.replace(
        "write(folder +", f"write(('.' if folder == {folder!r} else folder) +"
    )
    monkeypatch.setattr(isolation, "PROBE", probe)
    with pytest.raises(DataError, match=f"was able to.*write a file in {folder}'"):
        CodePool(CodeConfig(isolation="landlock"))


def test_bubblewrap_mounts_devices_and_root_read_only() -> None:
    command = isolation.bubblewrap("bwrap", ["/usr/lib"])
    remounted = [command[k + 1] for k, word in enumerate(command) if word == "--remount-ro"]
    assert remounted == ["/dev", "/"]
    assert command.index("--dev") < command.index("--remount-ro")


def test_what_cannot_be_isolated_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose setting-up fails is broken, and says why."""
    pool = CodePool(CodeConfig(workers=1, cpu_s=1))
    pool.limits["memory_bytes"] = "much"
    outcome = pool.run(ONE, RIGHT)
    assert outcome["kind"] == "broken" and "int" in outcome["detail"], outcome
    assert pool.timeouts == 1
    pool.close()


def test_long_traces_and_outputs_of_any_script_are_cut_and_no_timeout() -> None:
    pool = CodePool(CodeConfig(workers=1, cpu_s=2))
    tests = ONE | {"trace": {"call": 0, "events": 2000}}
    loop = "def f(x):\n    for i in range(999): s = t = '\U0001f600' * 70 + str(i)\n    return 3"
    outcome = pool.run(tests, loop)
    assert outcome["kind"] == "failed" and 400 < len(outcome["trace"]) < 999, outcome["kind"]
    outcome = pool.run({"shape": "output", "stdin": ""}, "print('\U0001f600' * 200_000)")
    assert outcome["kind"] == "passed" and len(outcome["output"]) == 100_000
    pool.close()


def test_a_demanded_isolation_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"isolation = \"bubblewrap\".*bwrap is not installed"):
        CodePool(CodeConfig(isolation="bubblewrap"))


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation.sys, "platform", "darwin")
    with pytest.raises(DataError, match="needs Linux"):
        CodePool(CodeConfig())


def test_limits_alone_are_used_where_the_recipe_says_so() -> None:
    pool = CodePool(CodeConfig(isolation="rlimits", cpu_s=0.5, workers=1))
    assert pool.isolation == "rlimits"
    assert pool.run(ONE, RIGHT)["kind"] == "passed"
    assert pool.run(ONE, ENDLESS)["kind"] == "timeout"
    assert pool.run(ONE, "import os\ndef f(x): os._exit(0)")["kind"] == "exit"
    pool.close()


def test_a_pool_runs_as_many_at_a_time_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = CodePool(CodeConfig(cpu_s=1, workers=3))
    run, at_work, counts = code_pool.CodeWorker.run, [0], []

    def counted(worker: code_pool.CodeWorker, line: str, limit_s: float) -> Any:
        at_work[0] += 1
        counts.append(at_work[0])
        try:
            return run(worker, line, limit_s)
        finally:
            at_work[0] -= 1

    monkeypatch.setattr(code_pool.CodeWorker, "run", counted)
    code = "import time\ndef f(x):\n    time.sleep(0.5)\n    return "
    outcomes = pool.run_all([(ONE, code + str(k)) for k in range(6)])
    kinds = [outcome["kind"] for outcome in outcomes]
    assert kinds == ["failed", "failed", "passed", "failed", "failed", "failed"]
    assert max(counts) == 3
    pool.close()


def test_processes_that_die_are_replaced(any_pool: CodePool) -> None:
    for which in (0, 1, -1):
        pids = children(os.getpid())
        assert any_pool.run(ONE, RIGHT + f"  # {which}")["kind"] == "passed"
        os.kill(pids[which], signal.SIGKILL)
        time.sleep(0.1)
        outcome = any_pool.run(ONE, RIGHT + f"  # after {which}")
        assert outcome["kind"] == "passed", outcome


def test_everything_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from selfteach.config.code_section import CodeConfig
        from selfteach.tasks.code.code_pool import CodePool
        pool = CodePool(CodeConfig(cpu_s=100, workers=1))
        print("ready", flush=True)
        pool.run({"shape": "cases", "cases": [{"call": "f", "args": [1], "expected": 2}]}, sys.argv[1])
    """)
    source = str(Path(code_pool.__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, "-c", script, ENDLESS], stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": source, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    wait_until(
        lambda: len(children(process.pid)) >= 5
    )  # supervisor, zygote, judge, watchdog, answer
    pids = children(process.pid)
    process.kill()
    process.wait()
    process.stdout.close()

    def gone(pid: int) -> bool:
        try:
            return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return True

    wait_until(lambda: all(map(gone, pids)))


def test_an_interrupt_leaves_no_reply_for_the_next_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = CodePool(CodeConfig(cpu_s=1, workers=1))
    exchange, calls = code_pool.exchange, []

    def interrupted(process: Any, line: str, limit_s: float) -> Any:
        calls.append(line)
        if len(calls) == 1:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            raise KeyboardInterrupt
        return exchange(process, line, limit_s)

    monkeypatch.setattr(code_pool, "exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.run(ONE, RIGHT)
    assert pool.run(ONE, "def f(x): return 0")["kind"] == "failed"
    pool.close()


def test_outcomes_that_depend_on_the_machine_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "timeouts.jsonl"
    pool = CodePool(CodeConfig(cpu_s=0.3, workers=1))
    pool.keep_timeouts(path)
    outcome = pool.run(ONE, ENDLESS)
    pool.run(ONE, RIGHT)
    pool.close()
    assert outcome["kind"] == "timeout" and outcome["line"] == 2 and pool.timeouts == 1
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["outcome"] for row in rows] == [outcome]
    path.write_text(path.read_text() + '{"timed_out": "cut')
    again = CodePool(CodeConfig(cpu_s=0.3, workers=1))
    again.keep_timeouts(path)
    monkeypatch.setattr(again, "_run", lambda line: pytest.fail("run again"))
    assert again.run(ONE, ENDLESS) == outcome
    again.close()


def test_a_fork_gets_processes_of_its_own(any_pool: CodePool) -> None:
    any_pool.run(ONE, RIGHT)
    pid = os.fork()
    if pid == 0:
        ok = any_pool.run(ONE, RIGHT + "  # in the fork")["kind"] == "passed"
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert any_pool.run(ONE, RIGHT + "  # after the fork")["kind"] == "passed"


@pytest.mark.parametrize("machine", seccomp_filter.ARCHITECTURES)
def test_numbers_of_system_calls_are_the_kernel_s(machine: str) -> None:
    header = {
        "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        "aarch64": "/usr/include/asm-generic/unistd.h",
    }[machine]
    if not Path(header).exists():
        pytest.skip("no headers of the kernel here")
    lines = Path(header).read_text().replace("__NR3264_fstatat", "__NR_newfstatat").splitlines()
    named: dict[str, int] = {}
    for line in lines:
        words = line.replace("__NR3264_", "__NR_").split()
        if len(words) == 3 and words[0] == "#define" and words[2].isdigit():
            named.setdefault(words[1].removeprefix("__NR_"), int(words[2]))
    numbers = seccomp_filter.ARCHITECTURES[machine][1]
    assert {name: named.get(name) for name in numbers} == numbers


@pytest.mark.parametrize("machine", seccomp_filter.ARCHITECTURES)
def test_the_filter_allows_what_is_listed_and_nothing_else(machine: str) -> None:
    """Run the program in an interpreter of BPF, for machines that are not here too."""
    program = seccomp_filter.build_filter(machine, process=77)
    arch, numbers = seccomp_filter.ARCHITECTURES[machine]
    allow, refuse, absent = 0x7FFF0000, 0x50001, 0x50026

    def run(number: int, *arguments: int, on: int = arch) -> int:
        return interpret(program, number, on, arguments)

    special = {
        "clone",
        "clone3",
        "kill",
        "tgkill",
        "prlimit64",
        "ioctl",
        "fcntl",
        "sendmsg",
        "recvmsg",
    }
    for number in range(600):
        names = {name for name, value in numbers.items() if value == number}
        if not names & special:
            assert run(number) == (allow if names else refuse), number
    assert run(numbers["clone3"]) == absent
    assert run(numbers["clone"], 0x10F00) == allow and run(numbers["clone"], 0x11) == refuse
    assert run(numbers["kill"], 77) == allow and run(numbers["kill"], 1) == refuse
    assert run(numbers["tgkill"], 77, 99) == allow and run(numbers["tgkill"], 78, 99) == refuse
    assert run(numbers["prlimit64"], 0) == allow and run(numbers["prlimit64"], 1) == refuse
    assert run(numbers["ioctl"], 0, 0x5401) == allow and run(numbers["ioctl"], 0, 0x5412) == refuse
    assert run(numbers["fcntl"], 0, 4) == allow and run(numbers["fcntl"], 0, 8) == refuse
    assert run(numbers["sendmsg"]) == refuse
    assert run(numbers["read"], on=0x40000003) == 0x80000000
    if machine == "x86_64":
        assert run(0x40000000 + numbers["read"]) == refuse


def interpret(program: bytes, number: int, arch: int, arguments: tuple[int, ...]) -> int:
    """Return the value of a BPF program of loads, jumps and returns."""
    data = {0: number, 4: arch, **{16 + 8 * i: value for i, value in enumerate(arguments)}}
    at, loaded = 0, 0
    while True:
        code = int.from_bytes(program[8 * at : 8 * at + 2], "little")
        true, false = program[8 * at + 2], program[8 * at + 3]
        value = int.from_bytes(program[8 * at + 4 : 8 * at + 8], "little")
        at += 1
        if code == seccomp_filter.LOAD:
            loaded = data.get(value, 0)
        elif code == seccomp_filter.RETURN:
            return value
        else:
            holds = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[code]
            at += true if holds else false
