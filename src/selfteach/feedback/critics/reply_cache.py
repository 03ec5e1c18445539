"""Caches replies on disk before they are used, so that the same request is never paid for twice.

One SQLite file serves any number of runs and processes. If another process has sent the same request
and has no reply yet, this one waits for that reply instead of sending the request again: the request
is claimed, and a claim holds for as long as there is evidence that its owner lives (`claim_owner`).

The file also says for whom a reply was bought, so that each is counted as paid exactly once: by its
buyer, also when the buyer was killed before it could count.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

from selfteach.errors import CriticError
from selfteach.feedback.critics.chat_model import ChatModel, NoReply, Reply, Request, request_key
from selfteach.feedback.critics.claim_owner import ClaimOwner, forget, has_ended

LEASE_S = 120.0
"""A claim that was not renewed for so long can be taken over. It is measured with the waiting process's
monotonic clock: the clocks of two machines may differ by hours."""
RENEWAL_S = 5.0
"""Seconds between renewals of this process's claims."""
POLL_S = 0.2
"""Seconds between checks for a reply that another process is waiting for."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, request TEXT NOT NULL, text TEXT NOT NULL,
    finished INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    created REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS purchases (
    key TEXT PRIMARY KEY, buyer TEXT NOT NULL, refusal TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS leases (
    key TEXT PRIMARY KEY, owner TEXT NOT NULL, kernel TEXT NOT NULL, renewals INTEGER NOT NULL
);
"""
# Earlier versions, which may share the file, write eight columns of `replies`: the rest is elsewhere.
PAGE = 500
"""Replies read at a time by `ReplyCache.stored`, so that no writer waits long."""

_BUYER: ContextVar[str] = ContextVar("buyer", default="")


@contextmanager
def buying_for(buyer: str) -> Iterator[None]:
    """Buy replies in the name of a piece of work that is repeated if it is killed, like one batch.

    A reply that was bought in this name before counts as paid again: the work that bought it has not
    counted it, or it would not be repeated.
    """
    token = _BUYER.set(buyer)
    try:
        yield
    finally:
        _BUYER.reset(token)


def default_path() -> Path:
    """Return the file used unless the recipe names one, in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "selfteach" / "critiques.sqlite"


@dataclass(frozen=True, slots=True)
class StoredReply:
    """Holds a reply with all that the cache knows of it, except for whom it was bought."""

    key: str
    model: str
    """`ChatModel.identity` of the model that wrote it."""
    request: str
    """The request as JSON."""
    text: str
    finished: bool
    prompt_tokens: int
    completion_tokens: int
    created: float
    """Seconds since 1970."""
    refusal: str


class ReplyCache:
    """Maps request keys to replies in a SQLite file. Raises `CriticError` if it cannot be used.

    ``key`` is that of the recipe which names the file, for errors; empty for a file named otherwise.
    """

    def __init__(self, path: Path, key: str = "") -> None:
        self._path, self._key = path, key
        self._owners = path.with_name(f"{path.name}.owners")
        self._owner: ClaimOwner | None = None
        self._owner_lock = threading.Lock()
        self._seen: dict[str, tuple[str, int, float]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from None
        with self._open() as database:
            database.executescript(SCHEMA)

    @staticmethod
    def is_one(path: Path) -> bool:
        """Return True if a file is a SQLite file with a table of replies; reads only."""
        try:
            uri = f"{path.resolve().as_uri()}?mode=ro"
            with closing(sqlite3.connect(uri, uri=True)) as database:
                columns = {row[1] for row in database.execute("PRAGMA table_info(replies)")}
        except sqlite3.Error:
            return False
        return {"key", "model", "request", "text"} <= columns

    def get(self, key: str) -> Reply | None:
        """Return the reply of a key, or None."""
        bought = self.bought(key)
        return None if bought is None else bought[0]

    def bought(self, key: str) -> tuple[Reply, str] | None:
        """Return the reply of a key and its buyer, or None; replies of earlier versions have none."""
        columns = "text, finished, prompt_tokens, completion_tokens, refusal, buyer"
        with self._open() as database:
            row = database.execute(
                f"SELECT {columns} FROM replies LEFT JOIN purchases USING (key) WHERE key = ?",
                (key,),
            ).fetchone()
        if row is None:
            return None
        return Reply(row[0], bool(row[1]), row[2], row[3], row[4] or ""), row[5] or ""

    def put(self, key: str, model: str, request: Request, reply: Reply, buyer: str = "") -> None:
        """Save a reply and release the claim on it."""
        row = (
            key, model, json.dumps(asdict(request), ensure_ascii=True), reply.text,
            int(reply.finished), reply.prompt_tokens, reply.completion_tokens, time.time(),
        )  # fmt: skip
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            purchase = (key, buyer, reply.refusal)
            database.execute("INSERT OR REPLACE INTO purchases VALUES (?, ?, ?)", purchase)
            database.execute("DELETE FROM leases WHERE key = ?", (key,))

    def stored(self) -> Iterator[StoredReply]:
        """Yield all replies by key, as the file has them: damage may be values of any type."""
        columns = (
            "key, model, request, text, finished, prompt_tokens, completion_tokens, created, "
            "COALESCE(refusal, '')"
        )
        last = ""
        while True:
            with self._open() as database:
                page = database.execute(
                    f"SELECT {columns} FROM replies LEFT JOIN purchases USING (key) "
                    "WHERE key > ? ORDER BY key LIMIT ?",
                    (last, PAGE),
                ).fetchall()
            if not page:
                return
            yield from (StoredReply(*row) for row in page)
            last = page[-1][0]

    def add(self, replies: Sequence[StoredReply]) -> tuple[int, int, int]:
        """Add replies of another cache; return how many are new, are here already, and differ.

        A reply that is here already stays, also where another one differs from it.
        """
        new = same = differing = 0
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            for reply in replies:
                here = database.execute(
                    "SELECT text, finished, COALESCE(refusal, '') FROM replies "
                    "LEFT JOIN purchases USING (key) WHERE key = ?",
                    (reply.key,),
                ).fetchone()
                if here is not None:
                    equal = here == (reply.text, int(reply.finished), reply.refusal)
                    same, differing = same + equal, differing + (not equal)
                    continue
                row = (
                    reply.key, reply.model, reply.request, reply.text, int(reply.finished),
                    reply.prompt_tokens, reply.completion_tokens, reply.created,
                )  # fmt: skip
                database.execute("INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
                purchase = (reply.key, "", reply.refusal)
                database.execute("INSERT OR REPLACE INTO purchases VALUES (?, ?, ?)", purchase)
                new += 1
        return new, same, differing

    def claim(self, key: str) -> bool:
        """Return True if this process may send the request: no reply, and no other process waits."""
        owner = self._this_owner()
        ended = None
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            holder = database.execute(
                "SELECT owner, kernel, renewals FROM leases WHERE key = ?", (key,)
            ).fetchone()
            if holder is not None and has_ended(self._owners, *holder[:2]):
                # All its claims at once: with its file the evidence that it has ended goes.
                database.execute("DELETE FROM leases WHERE owner = ?", holder[:1])
                ended = holder[0]
            elif holder is not None and self._is_renewed(key, *holder):
                return False
            # Another process may have got its reply since this one looked for it.
            stored = database.execute("SELECT 1 FROM replies WHERE key = ?", (key,)).fetchone()
            if not stored:
                lease = (key, owner.id, owner.kernel, 0)
                database.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", lease)
        if ended is not None:
            forget(self._owners, ended)
        return not stored

    def release(self, keys: Sequence[str]) -> None:
        """Release this process's claims on requests that got no reply."""
        owner = self._this_owner().id
        with self._open() as database:
            database.executemany(
                "DELETE FROM leases WHERE key = ? AND owner = ?", [(key, owner) for key in keys]
            )

    def renew(self) -> None:
        """Renew all claims of this process."""
        if self._owner is not None:
            with self._open() as database:
                database.execute(
                    "UPDATE leases SET renewals = renewals + 1 WHERE owner = ?", (self._owner.id,)
                )

    def _is_renewed(self, key: str, owner: str, kernel: str, renewals: int) -> bool:
        """Return True if a claim was renewed within the lease, as far as this process has seen."""
        now, seen = time.monotonic(), self._seen.get(key)
        if seen is None or seen[:2] != (owner, renewals):
            seen = self._seen[key] = (owner, renewals, now)
        if now - seen[2] <= LEASE_S:
            return True
        self._seen.pop(key, None)
        return False

    def _this_owner(self) -> ClaimOwner:
        """Return the owner of this process's claims; a forked child has another than its parent."""
        with self._owner_lock:
            if self._owner is None or self._owner.pid != os.getpid():
                self._owner = ClaimOwner(self._owners)
                alive = threading.Event()
                weakref.finalize(self._owner, alive.set)
                work = (weakref.ref(self), self._owner.id, alive)
                threading.Thread(target=_keep_renewed, args=work, name="lease", daemon=True).start()
            return self._owner

    def owned_by(self, owner: str) -> bool:
        """Return True if this is the owner of this process's claims."""
        return self._owner is not None and self._owner.id == owner

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # One connection per use: they must not cross threads or forks, and replies are rare.
        try:
            with (
                closing(
                    sqlite3.connect(self._path, timeout=60.0, isolation_level=None)
                ) as database,
                database,
            ):
                database.execute("PRAGMA synchronous = FULL")
                yield database
        except (sqlite3.Error, OverflowError) as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> CriticError:
        named = f"{self._key} = " if self._key else "reply cache "
        return CriticError(f"{named}{str(self._path)!r}: {error}")


class CachedModel:
    """Wraps a chat model: sends only requests whose replies are not in the cache."""

    def __init__(self, model: ChatModel, cache: ReplyCache) -> None:
        self._model, self._cache = model, cache
        self.remote = model.remote

    def complete(self, requests: Sequence[Request]) -> list[tuple[Reply | NoReply, bool]]:
        """Return a reply per request, or why there is none, and whether it cost nothing.

        A reply costs nothing if it was bought for other work (`buying_for`), or if the same request
        occurs earlier in the list.
        """
        identity, buyer = self._model.identity, _BUYER.get() or uuid.uuid4().hex
        keys = [request_key(identity, request) for request in requests]
        replies: dict[str, tuple[Reply | NoReply, bool]] = {}
        pending = dict(zip(keys, requests, strict=True))  # the same request twice is one
        while pending:
            for key in list(pending):
                if (bought := self._cache.bought(key)) is not None:
                    replies[key] = (bought[0], bought[1] != buyer)
                    del pending[key]
            claimed = [key for key in pending if self._cache.claim(key)]
            sent = self._send([pending[key] for key in claimed], claimed, buyer)
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

    def _send(
        self, requests: Sequence[Request], keys: Sequence[str], buyer: str
    ) -> list[Reply | NoReply]:
        if not requests:
            return []
        identity = self._model.identity

        def save(index: int, reply: Reply) -> None:
            self._cache.put(keys[index], identity, requests[index], reply, buyer)

        try:
            return self._model.complete(requests, save)
        finally:
            self._cache.release(keys)


def _keep_renewed(
    cache: weakref.ReferenceType[ReplyCache], owner: str, ended: threading.Event
) -> None:
    """Renew the claims of an owner until it, or its cache, is used no more."""
    while not ended.wait(RENEWAL_S):
        held = cache()
        if held is None or not held.owned_by(owner):
            return
        with suppress(CriticError):  # locked for long, or a full disk: the next renewal may work
            held.renew()
        del held
