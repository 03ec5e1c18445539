"""Runs a study's jobs in the process of the test: a new one imports torch for seconds."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

import pytest


class SameProcess(concurrent.futures.Executor):
    """Runs what is submitted at once; takes the arguments of a pool of processes."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


def jobs_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Let studies and sweeps start no processes until the patch is undone."""
    patch.setattr(concurrent.futures, "ProcessPoolExecutor", SameProcess)
