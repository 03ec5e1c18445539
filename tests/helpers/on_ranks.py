"""Runs ranks on gloo in forked processes: torch is imported already, so that they start at once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

TIMEOUT_S = 120


def on_ranks(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what ``work(*args)`` returns on each of ``size`` ranks (pickled, so no live tensors);
    None for a rank that has ended without a result."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = []
    for rank in range(size):
        receiver, sender = context.Pipe()
        settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        process = context.Process(target=_run, args=(settings, sender, work, args))
        process.start()
        sender.close()
        started.append((process, receiver))
    try:
        results = []
        for process, receiver in started:
            assert receiver.poll(TIMEOUT_S), "a rank sends no result"
            try:
                results.append(receiver.recv())
            except EOFError:
                results.append(("returned", None))
            process.join(TIMEOUT_S)
    finally:
        for process, _ in started:
            process.kill()
    for kind, value in results:
        assert kind == "returned", value
    return [value for _, value in results]


def _run(settings: dict, out: Connection, work: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in settings.items()})
    try:
        out.send(("returned", work(*args)))
    except BaseException:
        out.send(("failed", traceback.format_exc()))
