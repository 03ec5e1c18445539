"""Batch-invariant sampling with vLLM: set in this process, checked at a server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from selfteach.config.engine_section import VllmProcessConfig, VllmServerConfig
from selfteach.errors import EngineError
from selfteach.rollout.vllm import engine_healthcheck, in_process
from selfteach.rollout.vllm.engine_healthcheck import EngineRequirements, require_engine_server
from selfteach.rollout.vllm.http_client import NotFound
from selfteach.rollout.vllm.in_process import BATCH_INVARIANT, ServedModel, VllmProcess
from selfteach.rollout.vllm.weight_sync import WeightFolder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BATCH_INVARIANT, "")
    monkeypatch.delenv(BATCH_INVARIANT)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(in_process, "find_spec", lambda name: object())


def built(*, cuda: bool = True, batch_invariant: bool = True) -> VllmProcess:
    config = VllmProcessConfig(type="vllm", batch_invariant=batch_invariant)
    return VllmProcess(config, ServedModel("m", 64, None, cuda), WeightFolder(Path(), None))


def test_it_is_set_before_vllm_is_imported(gpu: None) -> None:
    built(batch_invariant=False)
    assert BATCH_INVARIANT not in os.environ
    built()
    assert os.environ[BATCH_INVARIANT] == "1"


def test_a_device_that_cannot_is_refused_in_a_line(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match=r"8\.0 or newer, and the model is on a CPU"):
        built(cuda=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(EngineError, match="which a GPU is not"):
        built()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setenv(BATCH_INVARIANT, "0")
    with pytest.raises(EngineError, match="unset it"):
        built()


class Server:
    """Answers a healthcheck as vLLM does."""

    url = "http://server"

    def __init__(self, info: Any) -> None:
        self._info = info

    def get(self, path: str) -> Any:
        match path:
            case "/v1/models":
                return {"data": [{"id": "m", "max_model_len": 4096}]}
            case "/server_info":
                if self._info is None:
                    raise NotFound("no developer mode")
                return self._info
            case _:
                return {"weight_version": "1"}

    def post(self, path: str, body: Any, **_: Any) -> Any:
        assert path == "/tokenize"
        return {"tokens": [1]}


def state(monkeypatch: pytest.MonkeyPatch, info: Any, *, batch_invariant: bool = True) -> str:
    monkeypatch.setattr(engine_healthcheck, "HttpClient", lambda *_: Server(info))
    config = VllmServerConfig(type="vllm_server", model="m", batch_invariant=batch_invariant)
    needs = EngineRequirements(adapters=False, max_tokens=8, encode=lambda text: [1])
    (line,) = require_engine_server(config, needs)
    return line


def test_a_server_in_developer_mode_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    invariant, variant = ({"vllm_env": {BATCH_INVARIANT: value}} for value in (True, False))
    assert state(monkeypatch, invariant).endswith("replies, batch-invariant")
    assert state(monkeypatch, variant, batch_invariant=False).endswith("replies")
    with pytest.raises(EngineError, match="start it with VLLM_BATCH_INVARIANT=1"):
        state(monkeypatch, variant)


@pytest.mark.parametrize("info", [None, {}, {"vllm_env": None}, []])
def test_where_it_cannot_be_read_a_line_says_how(
    monkeypatch: pytest.MonkeyPatch, info: Any
) -> None:
    line = state(monkeypatch, info)
    assert "cannot be read" in line and "VLLM_SERVER_DEV_MODE=1" in line
