"""A server that was started for chatting only says so, to who asks it to be an engine."""

from __future__ import annotations

import pytest

import vllm_server
from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.errors import EngineError
from selfteach.trainer.build_engine import require_engine
from vllm_server import Server


def recipe(server: Server, **model: object) -> Recipe:
    own = {"type": "vllm_server", "url": server.address, "model": vllm_server.NAME}
    values = {"model": {"path": str(vllm_server.MODEL), **model}, "engine": own}
    return validate(Recipe, {**values, "train": {"steps": 0}}, where="test")


def test_without_developer_mode_there_are_no_full_weights(server: Server) -> None:
    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"):
        require_engine(recipe(server))


def test_without_hot_loading_there_are_no_adapters(server: Server) -> None:
    with pytest.raises(EngineError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        require_engine(recipe(server, lora={"rank": 4}))


def test_another_model_is_found_out_by_its_tokens(server: Server) -> None:
    own = recipe(server)
    other = own.model_copy(update={"model": own.model.model_copy(update={"path": "lab:easy"})})
    with pytest.raises(EngineError, match="reads text as other tokens"):
        require_engine(other)
