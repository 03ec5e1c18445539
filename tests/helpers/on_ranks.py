"""Two ranks on gloo in forked processes: torch is imported already, so that they start at once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

PATIENCE_S = 120


def on_ranks(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``work(*args)`` returns on each of so many ranks (pickled, so no live tensors); None for
    a rank that has ended without a word."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = []
    for rank in range(size):
        ours, theirs = context.Pipe()
        settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        process = context.Process(target=_run, args=(settings, theirs, work, args))
        process.start()
        theirs.close()
        started.append((process, ours))
    try:
        said = []
        for process, ours in started:
            assert ours.poll(PATIENCE_S), "a rank says nothing"
            try:
                said.append(ours.recv())
            except EOFError:
                said.append(("said", None))
            process.join(PATIENCE_S)
    finally:
        for process, _ in started:
            process.kill()
    for kind, value in said:
        assert kind == "said", value
    return [value for _, value in said]


def _run(settings: dict, out: Connection, work: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in settings.items()})
    try:
        out.send(("said", work(*args)))
    except BaseException:
        out.send(("failed", traceback.format_exc()))
