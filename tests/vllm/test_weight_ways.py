"""Weights reach a real server in any way: mapped memory, HTTP, a folder; what it says of NCCL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_server
from selfteach.config.engine_section import VllmServerConfig
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.rollout.vllm import packed_weights
from selfteach.rollout.vllm.http_client import HttpClient
from selfteach.rollout.vllm.nccl_transfer import accepts_nccl
from selfteach.rollout.vllm.packed_weights import PackedWeights
from selfteach.trainer.build import build
from selfteach.trainer.build_engine import require_engine
from selfteach.types import Rollout, Sampling
from vllm_server import Server

SAMPLING = Sampling(samples=2, temperature=0.7, max_tokens=8, seed=5)
LORA = {"model": {"lora": {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]}}}
NCCL = ("--weight-transfer-config", '{"backend": "nccl"}')


@pytest.fixture(scope="module")
def server(
    tiny_model: Path, no_shared_server: None, print_line: Callable[[str], None]
) -> Iterator[Server]:
    port = vllm_server.free_port()
    flags = (*vllm_server.SMALL_FLAGS, "--max-model-len", "2048", *NCCL)
    server = Server(port, print_line, model=tiny_model, engine=True, flags=flags)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def test_the_server_says_that_it_takes_weights_over_nccl(server: Server) -> None:
    config = {"type": "vllm_server", "url": server.address, "model": vllm_server.NAME}
    assert accepts_nccl(HttpClient(VllmServerConfig.model_validate(config)))


@pytest.mark.parametrize("more", [LORA, {}], ids=["lora", "full"])
def test_rollouts_are_the_same_whichever_way_weights_travel(
    server: Server, tiny_model: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters first: they need the weights that the server was started with."""
    rollouts: dict[str, list[Rollout]] = {}
    for way in ("mapped", "http", "folder"):
        monkeypatch.undo()
        if way == "http":
            monkeypatch.setattr(
                packed_weights, "_shareable_bytes",
                lambda size, owner: (torch.empty(size, dtype=torch.uint8), ""),
            )  # fmt: skip
            monkeypatch.setattr(PackedWeights.__init__, "__defaults__", (50_000,))
        engine = {
            "type": "vllm_server", "url": server.address, "model": vllm_server.NAME,
            "tolerance": 1e-3, "weight_transfer": "folder" if way == "folder" else "stream",
        }  # fmt: skip
        values = {
            "model": {"path": str(tiny_model)},
            "data": {"type": "chain_sums", "seed": 3, "train": 3, "validation": 1, "test": 1},
            "sampling": {"max_tokens": 8, "temperature": 0.7},
            "train": {"steps": 0, "max_length": 1024, "threads": 1},
            "engine": engine,
        }  # fmt: skip
        recipe = validate(Recipe, merge(values, more), where="test")
        require_engine(recipe)
        torch.manual_seed(7)
        built = build(recipe)
        policy = built.components.policy
        for version in range(2):  # label, fingerprint and movement are checked each time
            built.components.engine.load_weights(policy.trainable.items(), version)
            with torch.no_grad():
                for weight in policy.trainable.values():
                    weight.add_(torch.randn_like(weight) * 0.05)
        rollouts[way] = built.components.engine.generate(built.task.train, SAMPLING)
    ids = {way: [r.token_ids for r in sampled] for way, sampled in rollouts.items()}
    assert ids["mapped"] == ids["http"] == ids["folder"]
    logps = {
        way: torch.tensor([x for r in sampled for x in r.logps])
        for way, sampled in rollouts.items()
    }
    assert (logps["http"] - logps["mapped"]).abs().max() < 1e-3
    assert (logps["folder"] - logps["mapped"]).abs().max() < 1e-3
