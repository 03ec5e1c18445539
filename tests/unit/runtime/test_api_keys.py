"""Children that run others' code get no variable that may hold a secret."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from selfteach.runtime.api_keys import without_secrets
from selfteach.tasks import verify_client


def test_only_variables_that_start_python_are_passed_on() -> None:
    public = {"PATH": "/bin", "LANG": "C", "LC_ALL": "C", "PYTHONPATH": "x", "TMPDIR": "/tmp"}
    secret = {
        "OPENAI_API_KEY": "s", "HF_TOKEN": "s", "AWS_SECRET_ACCESS_KEY": "s", "WANDB_API_KEY": "s",
        "MY_KEY": "s", "DATABASE_URL": "s", "PATH_SECRET": "s", "PGPASSWORD": "s", "HTTPS_PROXY": "s",
    }  # fmt: skip
    assert without_secrets({**public, **secret}) == public


def test_the_verifiers_child_inherits_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "hush")
    verifier = verify_client.VerifierProcess()
    try:
        assert verifier.request("math", gold="1", answer="1") is not None
        environment = Path(f"/proc/{verifier._running('math').pid}/environ").read_bytes()
    finally:
        verifier.close()
    assert b"hush" not in environment and os.environ["PATH"].encode() in environment
