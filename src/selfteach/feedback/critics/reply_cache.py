"""Caches replies on disk before they are used, so that the same request is never paid for twice.

One SQLite file serves any number of runs and processes. If another process has sent the same request
and has no reply yet, this one waits for that reply instead of sending the request again.
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
from selfteach.feedback.critics.chat_model import ChatModel, NoReply, Reply, Request, request_key

CLAIM_S = 3600.0
"""A claim that this process has seen unchanged for so long can be taken over. It is measured with the
waiting process's monotonic clock: the clocks of two machines may differ by hours."""
POLL_S = 0.2
"""Seconds between checks for a reply that another process is waiting for."""

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
    """Return the file used unless the recipe names one, in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "selfteach" / "critiques.sqlite"


class ReplyCache:
    """Maps request keys to replies in a SQLite file. Raises `CriticError` if it cannot be used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first_seen: dict[tuple[str, str, int, float], float] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise CriticError(f"critic.reply_cache = {str(path)!r}: {error}") from None

    def get(self, key: str) -> Reply | None:
        """Return the reply of a key, or None."""
        columns = "text, finished, prompt_tokens, completion_tokens"
        with self._open() as database:
            row = database.execute(
                f"SELECT {columns} FROM replies WHERE key = ?", (key,)
            ).fetchone()
        return None if row is None else Reply(row[0], bool(row[1]), row[2], row[3])

    def put(self, key: str, model: str, request: Request, reply: Reply) -> None:
        """Save a reply and release the claim on it."""
        row = (
            key, model, json.dumps(asdict(request), ensure_ascii=False), reply.text,
            int(reply.finished), reply.prompt_tokens, reply.completion_tokens, time.time(),
        )  # fmt: skip
        with self._open() as database:
            database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            database.execute("DELETE FROM claims WHERE key = ?", (key,))

    def claim(self, key: str) -> bool:
        """Return True if this process may send the request: no reply, and no other process waits."""
        claim = (key, socket.gethostname(), os.getpid(), time.time())
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            holder = database.execute(
                "SELECT host, pid, since FROM claims WHERE key = ?", (key,)
            ).fetchone()
            if holder is not None and self._may_reply(key, *holder):
                return False
            # Another process may have got its reply since this one looked for it.
            if database.execute("SELECT 1 FROM replies WHERE key = ?", (key,)).fetchone():
                return False
            database.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", claim)
        return True

    def release(self, keys: Sequence[str]) -> None:
        """Release the claims on requests that got no reply."""
        with self._open() as database:
            database.executemany("DELETE FROM claims WHERE key = ?", [(key,) for key in keys])

    def _may_reply(self, key: str, host: str, pid: int, since: float) -> bool:
        """Return True if the process that claimed a request may still get its reply."""
        now = time.monotonic()
        if now - self._first_seen.setdefault((key, host, pid, since), now) > CLAIM_S:
            return False
        return host != socket.gethostname() or _runs(pid)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # One connection per use: they must not cross threads or forks, and replies are rare.
        with (
            closing(sqlite3.connect(self._path, timeout=60.0, isolation_level=None)) as database,
            database,
        ):
            database.execute("PRAGMA synchronous = FULL")
            yield database


class CachedModel:
    """Wraps a chat model: sends only requests whose replies are not in the cache."""

    def __init__(self, model: ChatModel, cache: ReplyCache) -> None:
        self._model, self._cache = model, cache
        self.remote = model.remote

    def complete(self, requests: Sequence[Request]) -> list[tuple[Reply | NoReply, bool]]:
        """Return a reply per request, or why there is none, and whether it cost nothing.

        A reply costs nothing if it came from the cache or if the same request occurs earlier in the
        list.
        """
        identity = self._model.identity
        keys = [request_key(identity, request) for request in requests]
        replies: dict[str, tuple[Reply | NoReply, bool]] = {}
        pending = dict(zip(keys, requests, strict=True))  # the same request twice is one
        while pending:
            for key in list(pending):
                if (reply := self._cache.get(key)) is not None:
                    replies[key] = (reply, True)
                    del pending[key]
            claimed = [key for key in pending if self._cache.claim(key)]
            sent = self._send([pending[key] for key in claimed], claimed)
            for key, reply in zip(claimed, sent, strict=True):
                replies[key] = (reply, False)
                del pending[key]
            if pending:
                time.sleep(POLL_S)
        in_order = []
        for key in keys:
            in_order.append(replies[key])
            replies[key] = (replies[key][0], True)  # a repeated request is paid for once
        return in_order

    def _send(self, requests: Sequence[Request], keys: Sequence[str]) -> list[Reply | NoReply]:
        if not requests:
            return []
        identity = self._model.identity

        def save(index: int, reply: Reply) -> None:
            self._cache.put(keys[index], identity, requests[index], reply)

        try:
            return self._model.complete(requests, save)
        finally:
            self._cache.release(keys)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
