"""Weights in memory: however they travel, the engine is the same, and no fault mixes weights."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_nccl import ScriptedGroup, ScriptedNccl
from scripted_vllm import HttpError, ScriptedVllm, serving_fleet
from served_policies import LORA, move, publish
from torch import Tensor

from selfteach.config.engine_section import VllmServerConfig
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import EngineError
from selfteach.rollout.vllm import nccl_transfer, packed_weights, vllm_engine, weight_channel
from selfteach.rollout.vllm.nccl_library import NcclError
from selfteach.rollout.vllm.packed_weights import PackedWeights
from selfteach.rollout.vllm.server_client import VllmServer
from selfteach.rollout.vllm.vllm_engine import EngineUnavailable
from selfteach.rollout.vllm.weight_channel import WeightChannel
from selfteach.rollout.vllm.weight_sync import WeightFolder
from selfteach.trainer.build import Built, build
from selfteach.trainer.build_engine import require_engine
from selfteach.types import Rollout, Sampling

TINY: dict[str, Any] = {
    "data": {"type": "lab", "train": 2, "validation": 1, "test": 1},
    "sampling": {"max_tokens": 5, "temperature": 0.7},
    "train": {"steps": 0, "max_length": 96},
}
SAMPLING = Sampling(samples=2, temperature=0.7, max_tokens=3, seed=5)
LABEL = "selfteach-run-1-v0"


@pytest.fixture(scope="module")
def base() -> Built:
    return build(validate(Recipe, TINY))


@pytest.fixture
def servers(base: Built, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ScriptedVllm]]:
    monkeypatch.setattr(vllm_engine, "RETRY_INTERVAL_S", 0.01)
    monkeypatch.setattr(packed_weights, "BUCKET_BYTES", 20_000)
    monkeypatch.setattr(PackedWeights.__init__, "__defaults__", (20_000,))
    model = base.components.policy.model
    with serving_fleet(model, base.tokenizer, 2) as servers:  # type: ignore[arg-type]
        for server in servers:
            server.extension = True
        yield servers


@pytest.fixture
def server(servers: list[ScriptedVllm]) -> ScriptedVllm:
    return servers[0]


def recipe(servers: list[ScriptedVllm], *more: dict[str, Any], **engine: Any) -> Recipe:
    urls = [server.url for server in servers]
    section = {
        "type": "vllm_server", "model": "tiny", "tolerance": 1e-3, "patience_seconds": 20.0,
        **({"urls": urls} if len(urls) > 1 else {"url": urls[0]}), **engine,
    }  # fmt: skip
    values: dict[str, Any] = merge(TINY, {"engine": section})
    for extra in more:
        values = merge(values, extra)
    return validate(Recipe, values, where="test")


def sampled(built: Built) -> list[Rollout]:
    return built.components.engine.generate(built.task.train, SAMPLING)


def moved(servers: list[ScriptedVllm], *more: dict[str, Any], **engine: Any) -> Built:
    torch.manual_seed(7)
    built = build(recipe(servers, *more, **engine))
    publish(built, 0)
    move(built, 0.3, seed=7)
    return built


def once(act: Callable[[dict[str, Any]], None], method: str) -> Callable[[dict[str, Any]], None]:
    """Return a hook that acts on the second call of a method, or on the first if it is a commit."""
    calls: list[str] = []

    def hook(body: dict[str, Any]) -> None:
        calls.append(body["method"])
        if body["method"] == method and calls.count(method) == 1 + (method.endswith("receive")):
            act(body)

    return hook


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_the_engine_is_the_same_whichever_way_weights_travel(
    servers: list[ScriptedVllm], more: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    rollouts = {}
    for way in ("folder", "mapped", "sent", "both"):
        caplog.clear()
        for server in servers:
            server.restart()
            server.rpcs.clear()
        servers[0].maps_memory = way == "mapped"
        members = servers if way == "both" else servers[:1]
        wish = {"folder": "folder", "sent": "stream"}.get(way, "auto")
        built = moved(members, more, weight_transfer=wish)
        publish(built, 1)
        rollouts[way] = sampled(built)
        lines = [r.getMessage() for r in caplog.records if "weights travel" in r.getMessage()]
        assert len(lines) == (wish == "auto"), "one line says how"
        assert ("selfteach_receive" in servers[0].rpcs) == (way in ("sent", "both"))
    assert rollouts["folder"] == rollouts["mapped"] == rollouts["sent"] == rollouts["both"]


def test_without_the_extension_weights_travel_through_a_folder(
    server: ScriptedVllm, caplog: pytest.LogCaptureFixture
) -> None:
    server.extension = False
    with caplog.at_level(logging.WARNING):
        publish(moved([server]), 1)
    assert "weights travel through a folder" in caplog.text and not server.rpcs
    with pytest.raises(EngineError, match=r"does not accept .*--worker-extension-cls") as raised:
        require_engine(recipe([server], weight_transfer="stream"))
    assert "\n" not in str(raised.value)
    server.extension = True
    require_engine(recipe([server], weight_transfer="stream"))
    server.restart()
    server.developer = False  # adapters can still be loaded by name
    require_engine(recipe([server], LORA))
    publish(moved([server], LORA), 1)


def cut(body: dict[str, Any]) -> None:
    raise ConnectionResetError


def damage(body: dict[str, Any]) -> None:
    data = body["kwargs"]["data"]
    body["kwargs"]["data"] = ("B" if data[0] == "A" else "A") + data[1:]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(f, marks=[] if f == "cut" else [pytest.mark.slow])
        for f in ("cut", "damaged", "restarted", "cut in the commit")
    ],
)
def test_a_transfer_that_fails_is_made_again_and_nothing_is_sampled_in_between(
    server: ScriptedVllm, fault: str
) -> None:
    expected_from = moved([server], weight_transfer="folder")
    publish(expected_from, 1)
    expected = sampled(expected_from)
    server.restart()
    server.maps_memory = False
    built = moved([server])
    labels: list[str] = []

    def act(body: dict[str, Any]) -> None:
        labels.append(server.label)
        if fault == "restarted":
            server.restart()
        elif fault == "damaged":
            damage(body)
        else:
            cut(body)

    server.before_rpc = once(act, "selfteach_commit" if "commit" in fault else "selfteach_receive")
    publish(built, 1)
    # While buckets arrive, the old weights are in use under their label.
    assert labels[0].endswith("-loading") == ("commit" in fault)
    assert server.rpcs.count("selfteach_open") == 3
    assert sampled(built) == expected


def test_a_transfer_that_stays_damaged_ends_the_run_with_the_old_weights_in_use(
    server: ScriptedVllm,
) -> None:
    server.maps_memory = False
    built = moved([server], patience_seconds=0.0)
    before = {name: value.clone() for name, value in server.model.state_dict().items()}
    label, loads = server.label, server.loads
    server.before_rpc = lambda body: damage(body) if "data" in body["kwargs"] else None
    with pytest.raises(
        EngineError, match=r"cut off: bucket 0 differs .*selfteach resume"
    ) as raised:
        publish(built, 1)
    assert "\n" not in str(raised.value)
    assert (server.label, server.loads) == (label, loads)
    after = server.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("by", "line"), [(1, "another checksum than those sent"), (10_000, "is not within the")]
)
def test_weights_of_a_wrong_shape_are_refused_before_they_are_used(
    server: ScriptedVllm, by: int, line: str
) -> None:
    built = moved([server], patience_seconds=0.0)
    label, loads = server.label.partition("+")[0], server.loads

    def widen(body: dict[str, Any]) -> None:
        if body["method"] == "selfteach_open":
            manifest = json.loads(body["kwargs"]["manifest"])
            manifest[-1][2][0] += by
            body["kwargs"]["manifest"] = json.dumps(manifest)

    server.before_rpc = widen
    with pytest.raises(EngineError, match=line) as raised:
        publish(built, 1)
    assert "\n" not in str(raised.value) and server.loads == loads
    assert server.label.startswith(label) or server.label.endswith("-loading")


def test_a_loader_that_fails_in_the_middle_leaves_a_label_that_says_so(
    server: ScriptedVllm,
) -> None:
    built = moved([server])

    def fail(weights: dict[str, Tensor]) -> None:
        raise RuntimeError("size mismatch")

    server.load = fail  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="refuses the weights: RuntimeError: size mismatch"):
        publish(built, 1)
    assert server.label.endswith("-loading")


def test_a_restarted_server_gets_the_weights_that_were_sent_not_the_present_ones(
    server: ScriptedVllm,
) -> None:
    built = moved([server])
    publish(built, 1)
    expected = sampled(built)
    move(built, 0.3, seed=7)  # the trainer is a step ahead
    server.restarts_after = 2
    assert sampled(built) == expected
    server.restarts_after, server.stale = 2, True
    with pytest.raises(EngineError, match="was restarted with another model"):
        sampled(built)


def test_other_words_from_the_workers_are_no_success(server: ScriptedVllm) -> None:
    built = moved([server], patience_seconds=0.0)
    server.worker.selfteach_commit = lambda **_: None  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="not the worker extension's"):
        publish(built, 1)
    server.worker.selfteach_probe = lambda: {"protocol": 0}  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="another version of selfteach"):
        require_engine(recipe([server], weight_transfer="stream"))


def test_a_tied_weight_travels_once() -> None:
    weight = torch.arange(6.0).view(2, 3)
    named = [("a", weight), ("b", weight), ("c", torch.ones((), dtype=torch.bfloat16))]
    packed = PackedWeights(named, LABEL)
    assert packed.size == 128 and [name for name, _ in packed.tensors] == ["a", "b", "c"]
    for (_, there), (_, here) in zip(packed.tensors, named, strict=True):
        assert torch.equal(there, here) and there.dtype == here.dtype
    weight.zero_()
    assert packed.tensors[0][1].sum() == 15.0, "a copy"


@pytest.fixture
def nccl(server: ScriptedVllm, monkeypatch: pytest.MonkeyPatch) -> ScriptedNccl:
    nccl = ScriptedNccl(20_000)
    monkeypatch.setattr(nccl_transfer, "NcclLibrary", lambda: nccl)
    monkeypatch.setattr(nccl_transfer, "PIECE_BYTES", 20_000)
    server.nccl = nccl.groups
    return nccl


def on_gpu(server: ScriptedVllm, folder: Path, **engine: Any) -> VllmServer:
    values = {"type": "vllm_server", "model": "tiny", "url": server.url, **engine}
    config = VllmServerConfig.model_validate(values)
    channel = WeightChannel(config, WeightFolder(folder, None), device=torch.device("cuda"))
    return VllmServer(config, channel)


def test_full_weights_travel_over_nccl_where_the_server_takes_them(
    server: ScriptedVllm, nccl: ScriptedNccl, base: Built, tmp_path: Path
) -> None:
    client, named = on_gpu(server, tmp_path), list(base.components.policy.trainable.items())
    doubled = [(name, value.detach() * 2) for name, value in named]
    client.load_weights(named, LABEL)
    client.load_weights(doubled, "selfteach-run-2-v1")
    cycle = ["pause", "start", "update", "finish", "resume"]
    assert server.updates == ["init", *cycle, *cycle]
    state = server.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in doubled)
    assert client.current_label("selfteach-run-2-v1") is not None
    (group,) = nccl.groups.values()
    assert group.pieces > 4
    server.restart()
    client.reload_weights("selfteach-run-2-v1")
    state = server.model.state_dict()
    assert len(nccl.groups) == 2 and all(torch.equal(state[name], v) for name, v in doubled)


@pytest.mark.parametrize("ends", ["rejected", "cut"])
def test_a_broadcast_that_nobody_receives_is_ended(
    server: ScriptedVllm, nccl: ScriptedNccl, base: Built, tmp_path: Path, ends: str
) -> None:
    client, named = on_gpu(server, tmp_path), list(base.components.policy.trainable.items())
    client.load_weights(named, LABEL)

    def receive(_: dict[str, Any]) -> Any:
        time.sleep(0.05)
        raise HttpError(500, "out of memory") if ends == "rejected" else ConnectionResetError

    receives, server._receive = server._receive, receive  # type: ignore[method-assign]
    with pytest.raises((EngineError, EngineUnavailable)):
        client.load_weights(named, "selfteach-run-2-v1")
    assert [group.aborted for group in nccl.groups.values()] == [True]
    assert server.label == "selfteach-run-2-v1-loading" and server.updates[-1] == "start"
    server._receive = receives  # type: ignore[method-assign]
    client.load_weights(named, "selfteach-run-2-v1")
    assert len(nccl.groups) == 2 and server.updates[-1] == "resume"


def test_a_server_that_is_being_updated_is_named_and_goes_on(
    server: ScriptedVllm, nccl: ScriptedNccl, base: Built, tmp_path: Path
) -> None:
    client, named = on_gpu(server, tmp_path), list(base.components.policy.trainable.items())
    server.is_updating = True
    with pytest.raises(EngineError, match=r"in the middle of a weight update.*restart") as raised:
        client.load_weights(named, LABEL)
    assert "\n" not in str(raised.value) and server.updates == ["init", "pause", "resume"]


def test_an_update_whose_communicator_does_not_end_keeps_its_cause(
    server: ScriptedVllm, nccl: ScriptedNccl, base: Built, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def receive(_: dict[str, Any]) -> Any:
        raise HttpError(500, "out of memory")

    def abort(_: ScriptedGroup) -> None:
        raise NcclError("ncclCommAbort: internal error")

    client, named = on_gpu(server, tmp_path), list(base.components.policy.trainable.items())
    monkeypatch.setattr(server, "_receive", receive)
    monkeypatch.setattr(ScriptedGroup, "abort", abort)
    with pytest.raises(EngineError, match="out of memory"):
        client.load_weights(named, LABEL)


@pytest.mark.parametrize(
    ("adapters", "device", "line"),
    [(True, "cuda", "is for full weights"), (False, "cpu", "needs a GPU that trains")],
)
def test_nccl_is_refused_where_it_cannot_be(adapters: bool, device: str, line: str) -> None:
    values = {"type": "vllm_server", "model": "tiny", "weight_transfer": "nccl"}
    config = VllmServerConfig.model_validate(values)
    with pytest.raises(EngineError, match=line) as raised:
        weight_channel.chosen(config, adapters=adapters, device=torch.device(device))
    assert "\n" not in str(raised.value)


def test_nccl_is_preferred_and_required_in_one_line(
    server: ScriptedVllm, nccl: ScriptedNccl
) -> None:
    def chosen(wish: str) -> str:
        values = {"type": "vllm_server", "model": "t", "url": server.url, "weight_transfer": wish}
        config = VllmServerConfig.model_validate(values)
        return weight_channel.chosen(config, adapters=False, device=torch.device("cuda"))

    assert [chosen(wish) for wish in ("auto", "nccl", "stream", "folder")] == [
        "nccl", "nccl", "stream", "folder",
    ]  # fmt: skip
    server.nccl_engine = "SparseNCCLWeightTransferEngine"
    assert chosen("auto") == "stream", "it takes changed weights alone"
    server.nccl = None
    assert chosen("auto") == "stream"
    server.extension = False
    assert chosen("auto") == "folder"
    with pytest.raises(EngineError, match=r"does not accept .*--weight-transfer-config") as raised:
        chosen("nccl")
    assert "\n" not in str(raised.value)
