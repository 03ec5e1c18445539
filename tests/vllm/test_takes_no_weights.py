"""A server that was not started as an engine is reported by the engine's healthcheck."""

from __future__ import annotations

import pytest

import vllm_server
from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.errors import EngineError
from selfteach.trainer.build_engine import require_engine
from vllm_server import Server


def recipe(server: Server, **model: object) -> Recipe:
    section = {"type": "vllm_server", "url": server.address, "model": vllm_server.NAME}
    values = {"model": {"path": str(vllm_server.MODEL), **model}, "engine": section}
    return validate(Recipe, {**values, "train": {"steps": 0}}, where="test")


def test_without_developer_mode_full_weights_are_refused(server: Server) -> None:
    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"):
        require_engine(recipe(server))


def test_without_hot_loading_adapters_are_refused(server: Server) -> None:
    with pytest.raises(EngineError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        require_engine(recipe(server, lora={"rank": 4}))


def test_another_model_is_detected_by_its_tokenizer(server: Server) -> None:
    same = recipe(server)
    other = same.model_copy(update={"model": same.model.model_copy(update={"path": "lab:easy"})})
    with pytest.raises(EngineError, match="tokenizes text differently"):
        require_engine(other)
