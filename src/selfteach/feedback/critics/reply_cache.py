"""Replies on disk before they are used: the same request is never paid for twice.

One SQLite file serves any number of runs and processes. A request that another process has sent and
not heard of yet is waited for instead of sent again.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from selfteach.errors import CriticError
from selfteach.feedback.critics.chat_model import ChatModel, NoReply, Reply, Request, key_of

CLAIM_S = 3600.0
"""A claim that has been looked at for this long, unchanged, is free to be taken. Whoever waits measures
it by its own steady clock: the clocks of two machines may differ by hours."""
POLL_S = 0.2
"""Between two looks at what another process is waiting for."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, request TEXT NOT NULL, text TEXT NOT NULL,
    finished INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    created REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS claims (
    key TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, since REAL NOT NULL
);
"""


def default_path() -> Path:
    """Where replies are kept unless the recipe names a file: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "selfteach" / "critiques.sqlite"


class ReplyStore:
    """Replies by key in a SQLite file. Raises `CriticError` if the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: dict[tuple[str, str, int, float], float] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise CriticError(f"critic.reply_cache = {str(path)!r}: {error}") from None

    def get(self, key: str) -> Reply | None:
        """A stored reply, or None."""
        columns = "text, finished, prompt_tokens, completion_tokens"
        with self._open() as database:
            row = database.execute(
                f"SELECT {columns} FROM replies WHERE key = ?", (key,)
            ).fetchone()
        return None if row is None else Reply(row[0], bool(row[1]), row[2], row[3])

    def put(self, key: str, model: str, request: Request, reply: Reply) -> None:
        """Store a reply and let go of the claim on it."""
        row = (
            key, model, json.dumps(asdict(request), ensure_ascii=False), reply.text,
            int(reply.finished), reply.prompt_tokens, reply.completion_tokens, time.time(),
        )  # fmt: skip
        with self._open() as database:
            database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            database.execute("DELETE FROM claims WHERE key = ?", (key,))

    def claim(self, key: str) -> bool:
        """True if this process may send the request: there is no reply, and nobody waits for one."""
        mine = (key, socket.gethostname(), os.getpid(), time.time())
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            held = database.execute(
                "SELECT host, pid, since FROM claims WHERE key = ?", (key,)
            ).fetchone()
            if held is not None and self._alive(key, *held):
                return False
            # Between our look and our claim another process may have heard and let go.
            if database.execute("SELECT 1 FROM replies WHERE key = ?", (key,)).fetchone():
                return False
            database.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", mine)
        return True

    def release(self, keys: Sequence[str]) -> None:
        """Let go of claims on requests that got no reply."""
        with self._open() as database:
            database.executemany("DELETE FROM claims WHERE key = ?", [(key,) for key in keys])

    def _alive(self, key: str, host: str, pid: int, since: float) -> bool:
        """Whether the process that claimed a request may still hear of it."""
        now = time.monotonic()
        if now - self._seen.setdefault((key, host, pid, since), now) > CLAIM_S:
            return False
        return host != socket.gethostname() or _runs(pid)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # A connection per use: SQLite's must not cross threads or forks, and replies are rare.
        with (
            closing(sqlite3.connect(self._path, timeout=60.0, isolation_level=None)) as database,
            database,
        ):
            database.execute("PRAGMA synchronous = FULL")
            yield database


class Stored:
    """A chat model whose replies are kept; asks only for what the store does not hold."""

    def __init__(self, model: ChatModel, store: ReplyStore) -> None:
        self._model, self._store = model, store
        self.remote = model.remote

    def complete(self, requests: Sequence[Request]) -> list[tuple[Reply | NoReply, bool]]:
        """One reply or the reason for none per request, and whether it cost nothing: it came from the
        store, or the same request stands earlier in the list."""
        identity = self._model.identity
        keys = [key_of(identity, request) for request in requests]
        found: dict[str, tuple[Reply | NoReply, bool]] = {}
        waiting = dict(zip(keys, requests, strict=True))  # the same request twice is one
        while waiting:
            for key in list(waiting):
                if (reply := self._store.get(key)) is not None:
                    found[key] = (reply, True)
                    del waiting[key]
            ours = [key for key in waiting if self._store.claim(key)]
            for key, reply in zip(ours, self._ask([waiting[k] for k in ours], ours), strict=True):
                found[key] = (reply, False)
                del waiting[key]
            if waiting:
                time.sleep(POLL_S)
        replies = []
        for key in keys:
            reply, _ = found[key]
            replies.append(found[key])
            found[key] = (reply, True)  # paid for by now
        return replies

    def _ask(self, requests: Sequence[Request], keys: Sequence[str]) -> list[Reply | NoReply]:
        if not requests:
            return []
        identity = self._model.identity

        def keep(index: int, reply: Reply) -> None:
            self._store.put(keys[index], identity, requests[index], reply)

        try:
            return self._model.complete(requests, keep)
        finally:
            self._store.release(keys)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
