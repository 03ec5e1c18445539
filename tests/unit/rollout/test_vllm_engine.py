"""The vLLM engine against a scripted server with a real tiny model: weights, labels, failures."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_vllm import ScriptedVllm, serving
from served_policies import KINDS, LORA, SAMPLING, mismatch, move, publish
from served_policies import TINY as SERVED

from selfteach.config.engine_section import VllmProcessConfig
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import EngineError, RecipeError
from selfteach.rollout.journaled_engine import JournaledEngine, SamplingInterrupted
from selfteach.rollout.vllm import synced_backend, vllm_engine
from selfteach.rollout.vllm.in_process import ServedModel, llm_arguments
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.build import Built, build
from selfteach.trainer.build_engine import require_engine
from selfteach.types import Rollout

TINY = merge(SERVED, {"data": {"train": 4}})
TOLERANCE = 1e-3
"""Nats; both sides compute in float32."""


@pytest.fixture(scope="module")
def base() -> Built:
    return build(validate(Recipe, TINY))


@pytest.fixture
def server(base: Built) -> Iterator[ScriptedVllm]:
    model = base.components.policy.model
    with serving(model, base.tokenizer) as server:  # type: ignore[arg-type]
        yield server


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "RETRY_INTERVAL_S", 0.01)


def recipe(server: ScriptedVllm, *more: dict[str, Any], **engine: Any) -> Recipe:
    section = {
        "type": "vllm_server", "url": server.url, "model": "tiny", "tolerance": TOLERANCE,
        "concurrency": 1, "patience_seconds": 0.0, **engine,
    }  # fmt: skip
    values: dict[str, Any] = merge(TINY, {"engine": section})
    for extra in more:
        values = merge(values, extra)
    return validate(Recipe, values, where="test")


@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_rollouts_come_from_the_weights_of_their_version(
    server: ScriptedVllm, more: dict[str, Any]
) -> None:
    built = build(recipe(server, more))
    problems = built.task.train
    sampled = []
    for version in range(3):
        publish(built, version)
        rollouts = built.components.engine.generate(problems, SAMPLING)
        assert mismatch(built, rollouts) < TOLERANCE
        assert [(r.problem.id, r.sample) for r in rollouts] == [
            (p.id, sample) for p in problems for sample in range(2)
        ]
        assert {r.policy_version for r in rollouts} == {version}
        assert built.components.engine.generate(problems, SAMPLING) == rollouts  # draws repeat
        sampled.append([r.token_ids for r in rollouts])
        move(built)
    assert sampled[0] != sampled[1] != sampled[2]
    ends = set(server.requests[-1]["stop_token_ids"])
    assert all(r.finished == (r.token_ids[-1] in ends) for r in rollouts)
    assert server.loads == 3


def test_prompts_are_sent_as_ids_and_every_rollout_has_its_own_seed(server: ScriptedVllm) -> None:
    built = build(recipe(server))
    rollouts = built.components.engine.generate(built.task.train, SAMPLING)
    bodies = [body for body in server.requests if body["max_tokens"] > 1]
    prompts = {built.components.renderer.solver_prompt(p) for p in built.task.train}
    assert {tuple(body["prompt"]) for body in bodies} == prompts
    assert len({body["seed"] for body in bodies}) == len(rollouts) == 8
    assert all(0 <= body["seed"] < 2**63 and body["temperature"] == 0.7 for body in bodies)


def test_a_request_names_the_whole_distribution(server: ScriptedVllm) -> None:
    built = build(recipe(server))
    cut = dataclasses.replace(SAMPLING, top_p=0.9, top_k=20, min_p=0.1)
    keys = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    for sampling, want in ((SAMPLING, (0.7, 1.0, 0, 0.0, 1.0)), (cut, (0.7, 0.9, 20, 0.1, 1.0))):
        built.components.engine.generate(built.task.train[:1], sampling)
        assert tuple(server.requests[-1][key] for key in keys) == want
        assert server.requests[-1]["ignore_eos"] is True
    probes = [body for body in server.requests if body["max_tokens"] == 1]
    assert probes and all(body["top_p"] == 1 and body["top_k"] == 0 for body in probes)


def test_another_version_of_the_same_weights_samples_other_rollouts(server: ScriptedVllm) -> None:
    built = build(recipe(server))
    sampled = []
    for version in range(2):
        publish(built, version)
        sampled.append(
            [r.token_ids for r in built.components.engine.generate(built.task.train, SAMPLING)]
        )
    assert sampled[0] != sampled[1]


def test_a_load_that_was_cut_off_is_repeated(server: ScriptedVllm) -> None:
    built = build(recipe(server, patience_seconds=20.0))
    publish(built, 0)
    expected = built.components.engine.generate(built.task.train, SAMPLING)
    # A reload after a restart was cut off.
    server.label = server.label.partition("+")[0] + "-loading"
    assert built.components.engine.generate(built.task.train, SAMPLING) == expected
    assert server.loads == 2


def test_a_reload_by_another_rank_is_noticed(
    server: ScriptedVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts of the initial weights, between a restart and the reload, must not count."""
    built = build(recipe(server, patience_seconds=20.0))
    move(built)
    publish(built, 1)
    expected = built.components.engine.generate(built.task.train, SAMPLING)
    backend = built.components.engine.engine._sampler._backend  # type: ignore[attr-defined]
    complete, label, restarts = backend.complete, server.label.partition("+")[0], [True]

    def restart_and_complete(requests: list[Any], expected_label: str) -> Iterator[Any]:
        restarted = bool(restarts) and restarts.pop()
        if restarted:
            server.restart()
        yield from complete(requests, expected_label)
        if restarted:
            backend.reload_weights(label)

    monkeypatch.setattr(backend, "complete", restart_and_complete)
    assert built.components.engine.generate(built.task.train, SAMPLING) == expected
    assert not restarts


def test_without_training_the_engine_gets_the_trainers_weights_too(server: ScriptedVllm) -> None:
    built = build(recipe(server))
    move(built)  # as when a checkpoint is loaded to be evaluated
    assert mismatch(built, built.components.engine.generate(built.task.train, SAMPLING)) < TOLERANCE


@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("by", [0.05, 0.0005])
def test_a_stale_engine_is_detected_before_it_samples(
    server: ScriptedVllm, more: dict[str, Any], by: float
) -> None:
    # The smaller step is well within the tolerance of an engine in bfloat16.
    built = build(recipe(server, more, tolerance=0.5))
    publish(built, 0)
    move(built, 0.05)  # adapters start at zero
    publish(built, 1)
    server.stale = True
    move(built, by * (40 if more else 1))
    with pytest.raises(EngineError, match="is stale: it still has the weights before"):
        publish(built, 2)


def test_an_engine_with_unchanged_weights_is_not_stale(server: ScriptedVllm) -> None:
    built = build(recipe(server))
    for version in range(2):
        publish(built, version)


def test_weights_of_another_model_are_detected(server: ScriptedVllm) -> None:
    with torch.no_grad():
        for weight in server.model.parameters():
            weight.mul_(1.5)
    built = build(recipe(server, LORA))
    with pytest.raises(EngineError, match="has other weights than the trainer"):
        publish(built, 0)


def test_logprobs_without_the_temperature_are_detected(server: ScriptedVllm) -> None:
    server.processed = False
    built = build(recipe(server))
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        publish(built, 0)


def test_a_prefix_cache_that_is_not_emptied_is_an_error(server: ScriptedVllm) -> None:
    server.cache_stays = True
    built = build(recipe(server))
    with pytest.raises(EngineError, match="does not empty its prefix cache"):
        publish(built, 0)


def test_weights_of_another_run_in_the_middle_of_a_batch_are_an_error(server: ScriptedVllm) -> None:
    built = build(recipe(server))
    publish(built, 0)
    server.other_run_loads_after = 3
    with pytest.raises(EngineError, match="is stale: it has the weights 'another-run"):
        built.components.engine.generate(built.task.train, SAMPLING)


@KINDS
def test_a_restarted_server_gets_its_weights_again(
    server: ScriptedVllm, more: dict[str, Any]
) -> None:
    built = build(recipe(server, more, patience_seconds=20.0))
    publish(built, 0)
    move(built)
    publish(built, 1)
    expected = built.components.engine.generate(built.task.train, SAMPLING)
    loads = server.loads
    server.restart()
    assert built.components.engine.generate(built.task.train, SAMPLING) == expected
    server.restarts_after = 3  # in the middle of a batch: what it sampled since then does not count
    assert built.components.engine.generate(built.task.train, SAMPLING) == expected
    assert server.loads == loads + 2


@KINDS
def test_rollouts_received_before_an_engine_dies_are_saved(
    server: ScriptedVllm, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synced_backend, "LABEL_CHECK_INTERVAL_S", -1.0)  # after each completion
    built = build(recipe(server, more))
    engine, problems = built.components.engine, built.task.train
    publish(built, 0)
    expected = engine.generate(problems, SAMPLING)
    run = RunFolder(tmp_path)

    def sample() -> list[Rollout]:
        return JournaledEngine(engine, run, "s").generate(problems, SAMPLING)

    server.dies_after = 7
    with pytest.raises(
        SamplingInterrupted, match=r"is unavailable .* of 8 rollouts .* saved.* selfteach resume"
    ):
        sample()
    unfinished = tmp_path / "rollouts" / "unfinished" / "s.000.jsonl"
    saved = len(unfinished.read_text().splitlines())
    # Whole problems; after the last rollouts the label may not have been read.
    assert saved in (2, 4, 6)
    server.dies_after = None
    server.restart()
    server.requests.clear()
    assert sample() == expected
    assert len([body for body in server.requests if body["max_tokens"] > 1]) == 8 - saved
    assert not unfinished.exists()
    requests = len(server.requests)
    assert sample() == expected and len(server.requests) == requests


def test_a_server_that_restarts_in_time_is_waited_for(server: ScriptedVllm) -> None:
    built = build(recipe(server, patience_seconds=20.0))
    publish(built, 0)
    expected = built.components.engine.generate(built.task.train, SAMPLING)
    server.stop()
    server.restart()
    threading.Timer(0.3, server.start).start()
    assert built.components.engine.generate(built.task.train, SAMPLING) == expected


def test_an_unavailable_engine_cannot_load_weights(server: ScriptedVllm) -> None:
    built = build(recipe(server))
    server.stop()
    with pytest.raises(EngineError, match=r"is unavailable .* restart it"):
        publish(built, 0)


def no_server(server: ScriptedVllm) -> None:
    server.stop()


def other_tokenizer(server: ScriptedVllm) -> None:
    server._tokenizer = lambda text: {"input_ids": [len(text)]}  # type: ignore[assignment]


def no_developer(server: ScriptedVllm) -> None:
    server.developer = False


def no_lora(server: ScriptedVllm) -> None:
    server.lora = False


def no_hot_loading(server: ScriptedVllm) -> None:
    server.hot_loading = False


BROKEN: dict[str, tuple[Callable[[ScriptedVllm], None], dict[str, Any], str]] = {
    "no server": (no_server, {}, r"no server replies at http://127.* start the server"),
    "other model": (lambda _: None, {"engine": {"model": "tyni"}}, "did you mean 'tiny'"),
    "other tokenizer": (other_tokenizer, {}, "tokenizes text differently"),
    "no developer mode": (no_developer, {}, "VLLM_SERVER_DEV_MODE=1"),
    "no LoRA": (no_lora, LORA, "was started without LoRA.*--enable-lora"),
    "no hot loading": (no_hot_loading, LORA, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    "short context": (lambda _: None, {"sampling": {"max_tokens": 96}}, "context of 96 tokens"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_unsuitable_server_is_reported_in_one_line(server: ScriptedVllm, name: str) -> None:
    breaks, more, line = BROKEN[name]
    breaks(server)
    with pytest.raises(EngineError, match=line) as raised:
        require_engine(recipe(server, more))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_a_suitable_server_is_not_changed(server: ScriptedVllm, more: dict[str, Any]) -> None:
    require_engine(recipe(server, more))
    assert server.loads == 0 and server.label == "default" and not server.adapters


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://x/v1"])
def test_an_invalid_address_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match=r"write it like|leave out /v1"):
        validate(Recipe, {"engine": {"type": "vllm_server", "url": url, "model": "m"}})


def test_a_key_in_the_address_is_refused_and_not_repeated(server: ScriptedVllm) -> None:
    with pytest.raises(EngineError, match=r"holds a key") as raised:
        recipe(server, url="http://me:secret@127.0.0.1:1")
    assert "secret" not in str(raised.value)


def test_a_missing_key_is_an_error(server: ScriptedVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(EngineError, match="NO_SUCH_KEY is not set"):
        require_engine(recipe(server, api_key_env="NO_SUCH_KEY"))


def test_in_process_needs_vllm() -> None:
    with pytest.raises(EngineError, match=r'needs vLLM in this environment.*"vllm_server"'):
        build(validate(Recipe, merge(TINY, {"engine": {"type": "vllm"}})))


@pytest.mark.parametrize("cuda", [True, False])
def test_chunked_prefill_is_off_on_a_cpu(cuda: bool) -> None:
    """With a seed it would end vLLM's CPU build: its generator cannot roll a draw back."""
    served = ServedModel("model", max_length=512, lora_rank=None, cuda=cuda)
    arguments = llm_arguments(VllmProcessConfig(type="vllm"), served)
    assert arguments.get("enable_chunked_prefill", True) is cuda
