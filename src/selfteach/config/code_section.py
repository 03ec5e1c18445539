"""Defines ``[data.code]``: how unit tests are run on an answer's code (``data.verifier = "code"``)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from selfteach.config.schema import Section

Isolation = Literal["auto", "bubblewrap", "namespaces", "landlock", "rlimits"]


class CodeConfig(Section):
    """Sets where a row's unit tests are, and the limits of the process that runs an answer."""

    tests: str | None = None
    """Column of the tests; unset: ``tests``, ``test_list`` (MBPP), ``test`` (HumanEval),
    ``private_test_cases`` and ``public_test_cases`` (LiveCodeBench) or ``input_output`` (APPS), those
    that a row has."""
    entry_point: str | None = None
    """Column of the name of the function that the tests call, or the name itself; unset: the column
    ``entry_point``, else what the tests call and nothing defines."""
    setup: str | None = None
    """Column of code that is run before the tests; unset: ``test_setup_code`` or ``test_imports``."""
    prelude: str | None = None
    """Column of code that is run before the answer, as HumanEval's ``prompt``; unset: none."""
    isolation: Isolation = "auto"
    """How answers are isolated: by ``bubblewrap``, by ``namespaces`` of the runner's own, by
    ``landlock`` (with a filter of system calls), each with limits of resources; ``auto`` takes the
    first that works here, and stops where none does. ``rlimits`` restricts resources alone: answers
    run with this user's rights."""
    cpu_s: float = Field(default=5.0, gt=0, le=600)
    """Seconds of CPU time for all tests of an answer, or for each run of a program. A process that
    waits by itself for twice as long, or takes twenty times as long by the clock, is ended too."""
    memory_mb: int = Field(default=1024, ge=64)
    """Address space of the process, in MiB."""
    scratch_mb: int = Field(default=16, ge=1)
    """Size of its scratch folder, and of a file, in MiB."""
    workers: int | None = Field(default=None, ge=1)
    """Number of answers that are run at the same time; unset: one per CPU, at most 8."""
    refused_imports: tuple[str, ...] = ("ctypes", "multiprocessing", "socket", "subprocess")
    """Modules whose import is refused with a message that says so. Isolation does not depend on it."""
