"""Claims hold while there is evidence that their owner lives, and each reply is paid for once."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from selfteach.errors import CriticError
from selfteach.feedback.critics import claim_owner, reply_cache
from selfteach.feedback.critics.chat_model import NoReply, OnReply, Reply, Request
from selfteach.feedback.critics.reply_cache import CachedModel, ReplyCache, buying_for

HOLDER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from selfteach.feedback.critics.reply_cache import ReplyCache
    cache = ReplyCache(Path(sys.argv[1]))
    assert all(cache.claim(key) for key in "klmn")
    print("claimed", flush=True)
    time.sleep(600)
    """
)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "replies.sqlite"


@contextmanager
def holder(cache: Path, *command: str) -> Iterator[subprocess.Popen[str]]:
    """A process that claims "k" to "n" and stays."""
    process = subprocess.Popen(
        [*command, sys.executable, "-c", HOLDER, str(cache)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "claimed\n":
            pytest.skip("this machine does not run the command")
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_claims_end_with_their_process_at_once(cache: Path, number: int) -> None:
    replies, others = ReplyCache(cache), ReplyCache(cache)
    with holder(cache) as process:
        assert not any(replies.claim(key) for key in "klmn")
        process.send_signal(number)
        process.wait()
        assert replies.claim("k") and replies.claim("l") and others.claim("m") and others.claim("n")


def test_a_claim_of_a_process_of_another_pid_namespace_holds(cache: Path) -> None:
    """Two containers with one host name: a process id of one is another's, or none, in the other."""
    command = ("unshare", "--user", "--map-root-user", "--pid", "--kill-child", "--mount-proc")
    with holder(cache, *command):
        assert not ReplyCache(cache).claim("k")


def test_a_claim_holds_whatever_its_process_id_and_host(cache: Path, monkeypatch) -> None:
    other = ReplyCache(cache)
    monkeypatch.setattr("socket.gethostname", lambda: "same-name")
    monkeypatch.setattr("os.getpid", lambda: 2**22 + 12345)  # no such process here
    assert other.claim("k")
    monkeypatch.setattr("os.getpid", lambda: 1)
    assert not ReplyCache(cache).claim("k")


def test_a_process_id_that_is_used_again_keeps_no_claim_alive(cache: Path, monkeypatch) -> None:
    here = os.getpid()
    with holder(cache) as process:
        process.kill()
        process.wait()
        monkeypatch.setattr("os.getpid", lambda: process.pid)
        assert ReplyCache(cache).claim("k")
        monkeypatch.setattr("os.getpid", lambda: here)


@pytest.mark.parametrize("clock_offset", [-86_400.0, 0.0, 86_400.0])
def test_a_claim_of_another_machine_holds_while_it_is_renewed(
    cache: Path, monkeypatch, clock_offset: float
) -> None:
    now, monotonic = time.time(), [1000.0]
    monkeypatch.setattr(claim_owner, "kernel", lambda: "elsewhere")
    monkeypatch.setattr("time.time", lambda: now + clock_offset)
    there = ReplyCache(cache)
    assert there.claim("k")
    monkeypatch.undo()
    monkeypatch.setattr(reply_cache, "RENEWAL_S", 3600)
    monkeypatch.setattr("time.monotonic", lambda: monotonic[0])
    here = ReplyCache(cache)
    for _ in range(50):
        monotonic[0] += 60
        assert not here.claim("k"), "its process may still get the reply"
        there.renew()
    monotonic[0] += 1
    assert not here.claim("k")
    monotonic[0] += reply_cache.LEASE_S
    assert not here.claim("k")
    monotonic[0] += 1
    assert here.claim("k"), "it is renewed no more"
    there.release(["k"])
    assert not there.claim("k"), "the claim is another's now, and not for the late owner to release"


def test_claims_are_renewed_in_the_background(cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(reply_cache, "RENEWAL_S", 0.05)
    monkeypatch.setattr(reply_cache, "LEASE_S", 0.5)
    there, here = ReplyCache(cache), ReplyCache(cache)
    assert there.claim("k")
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        assert not here.claim("k")
        time.sleep(0.05)


def test_a_forked_child_has_claims_of_its_own(cache: Path) -> None:
    replies = ReplyCache(cache)
    assert replies.claim("parent")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if replies.claim("child") and not replies.claim("parent") else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert replies.claim("child"), "the child has ended"
    assert not ReplyCache(cache).claim("parent"), "and the parent has not"


def test_an_owner_leaves_no_file_and_no_thread(cache: Path) -> None:
    def count() -> int:
        return sum(thread.name == "lease" for thread in threading.enumerate())

    before = count()
    replies = ReplyCache(cache)
    assert replies.claim("k") and count() == before + 1
    owners = cache.with_name(f"{cache.name}.owners")
    assert len(list(owners.iterdir())) == 1
    del replies
    deadline = time.monotonic() + 10
    while (count() > before or list(owners.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert count() == before and not list(owners.iterdir())


# -- what was paid ---------------------------------------------------------------------------------


class Server:
    """Replies to every request, or dies after some."""

    identity, remote = "stub", False

    def __init__(self, dies_after: int | None = None) -> None:
        self.sent: list[str] = []
        self._dies_after = dies_after

    def complete(self, requests: Sequence[Request], on_reply: OnReply) -> list[Reply | NoReply]:
        replies: list[Reply | NoReply] = []
        for index, request in enumerate(requests):
            if len(self.sent) == self._dies_after:
                raise KeyboardInterrupt
            self.sent.append(request.messages[0][1])
            replies.append(Reply("x", True, 10, 1))
            on_reply(index, replies[-1])  # type: ignore[arg-type]
        return replies


def requests(text: str) -> list[Request]:
    return [Request((("user", letter),), 0.0, 64) for letter in text]


def paid(replies: list[tuple[Reply | NoReply, bool]]) -> int:
    return sum(not free for _, free in replies)


def test_replies_stored_before_a_kill_count_as_paid_once(cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt), buying_for("run/step_000001.000"):
        CachedModel(Server(dies_after=3), ReplyCache(cache)).complete(requests("abcd"))
    server = Server()
    resumed = CachedModel(server, ReplyCache(cache))
    with buying_for("run/step_000001.000"):
        assert paid(resumed.complete(requests("abcda"))) == 4 and server.sent == ["d"]
    for other in ("run/step_000002.000", "another run/step_000001.000", ""):
        with buying_for(other):
            assert paid(resumed.complete(requests("abcd"))) == 0


def test_what_a_killed_batch_bought_is_not_counted_by_another(cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt), buying_for("one"):
        CachedModel(Server(dies_after=2), ReplyCache(cache)).complete(requests("abc"))
    total = 0
    for batch, text in (("two", "abcx"), ("one", "abc"), ("three", "cx")):
        with buying_for(batch):
            total += paid(CachedModel(Server(), ReplyCache(cache)).complete(requests(text)))
    with closing(sqlite3.connect(cache)) as database:
        assert total == database.execute("SELECT count(*) FROM replies").fetchone()[0] == 4


def test_a_file_of_an_earlier_version_is_read(cache: Path) -> None:
    with closing(sqlite3.connect(cache)) as database, database:
        database.executescript(
            """
            CREATE TABLE replies (
                key TEXT PRIMARY KEY, model TEXT NOT NULL, request TEXT NOT NULL, text TEXT NOT NULL,
                finished INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
                completion_tokens INTEGER NOT NULL, created REAL NOT NULL
            );
            CREATE TABLE claims (
                key TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, since REAL NOT NULL
            );
            INSERT INTO replies VALUES ('k', 'm', '{}', 'old', 1, 2, 3, 0.0);
            """
        )
    assert ReplyCache(cache).bought("k") == (Reply("old", True, 2, 3), "")


def test_a_cache_that_fails_during_a_run_is_one_line(cache: Path) -> None:
    replies = ReplyCache(cache)
    with closing(sqlite3.connect(cache)) as database:
        database.execute("DROP TABLE replies")
    calls: list[Callable[[], object]] = [
        lambda: replies.get("k"), lambda: replies.claim("k"),
        lambda: replies.put("k", "m", requests("a")[0], Reply("x", True, 1, 1)),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(CriticError, match=r"^reply cache .*no such table"):
            call()
