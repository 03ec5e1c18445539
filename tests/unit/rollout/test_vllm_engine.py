"""vLLM behind a scripted server that runs a tiny model for real: proofs, labels, and bad days."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_vllm import Vllm, serving

from selfteach.config.engine_section import VllmProcessConfig
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import EngineError, RecipeError
from selfteach.losses.policy_gradient import token_logp
from selfteach.models.sequences import sequences
from selfteach.rollout.journaled_engine import Interrupted, JournaledEngine
from selfteach.rollout.vllm import vllm_engine
from selfteach.rollout.vllm.in_process import Serving, arguments
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.build import Built, build
from selfteach.trainer.build_engine import require_engine
from selfteach.types import Rollout, Sampling

TINY: dict[str, Any] = {
    "data": {"type": "lab", "train": 4, "validation": 1, "test": 1},
    "sampling": {"max_tokens": 6, "temperature": 0.7},
    "train": {"steps": 0, "max_length": 96},
}
LORA = {"model": {"lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}}}
TOLERANCE = 1e-3
"""Nats; both sides compute in float32."""
SAMPLING = Sampling(samples=2, temperature=0.7, max_tokens=6, seed=5)


@pytest.fixture(scope="module")
def base() -> Built:
    return build(validate(Recipe, TINY))


@pytest.fixture
def server(base: Built) -> Iterator[Vllm]:
    model = base.components.policy.model
    with serving(model, base.tokenizer) as server:  # type: ignore[arg-type]
        yield server


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "PAUSE_S", 0.01)


def recipe(server: Vllm, *more: dict[str, Any], **engine: Any) -> Recipe:
    own = {
        "type": "vllm_server", "url": server.url, "model": "tiny", "tolerance": TOLERANCE,
        "concurrency": 1, "patience_seconds": 0.0, **engine,
    }  # fmt: skip
    values: dict[str, Any] = merge(TINY, {"engine": own})
    for extra in more:
        values = merge(values, extra)
    return validate(Recipe, values, where="test")


def publish(built: Built, version: int) -> None:
    policy = built.components.policy
    built.components.engine.load_weights(policy.trainable.items(), version)


def move(built: Built, by: float = 0.05) -> None:
    """A step of the trainer, on every weight; `version` by `version` another one."""
    with torch.no_grad():
        for weight in built.components.policy.trainable.values():
            weight.add_(torch.randn_like(weight) * by)


def mismatch(built: Built, rollouts: list[Rollout], temperature: float = 0.7) -> float:
    """Largest difference of log-probabilities, trainer against engine, in nats."""
    worst = 0.0
    for rollout in rollouts:
        side = sequences([rollout.prompt_ids], [rollout.token_ids], 0)
        with torch.no_grad():
            logits = built.components.policy.score(side).logits(slice(None))
        own = token_logp(logits, torch.tensor(rollout.token_ids), temperature)
        worst = max(worst, (own - torch.tensor(rollout.logps)).abs().max().item())
    return worst


@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_answers_come_from_each_version_s_weights(server: Vllm, more: dict[str, Any]) -> None:
    built = build(recipe(server, more))
    problems = built.task.train
    said = []
    for version in range(3):
        publish(built, version)
        rollouts = built.components.engine.generate(problems, SAMPLING)
        assert mismatch(built, rollouts) < TOLERANCE
        assert [(r.problem.id, r.sample) for r in rollouts] == [
            (p.id, sample) for p in problems for sample in range(2)
        ]
        assert {r.policy_version for r in rollouts} == {version}
        assert built.components.engine.generate(problems, SAMPLING) == rollouts  # draws repeat
        said.append([r.token_ids for r in rollouts])
        move(built)
    assert said[0] != said[1] != said[2]
    ends = set(server.asked[-1]["stop_token_ids"])
    assert all(r.finished == (r.token_ids[-1] in ends) for r in rollouts)
    assert server.loads == 3


def test_ids_go_in_as_they_are_and_every_answer_has_a_seed_of_its_own(server: Vllm) -> None:
    built = build(recipe(server))
    rollouts = built.components.engine.generate(built.task.train, SAMPLING)
    asked = [body for body in server.asked if body["max_tokens"] > 1]
    prompts = {built.components.renderer.solver_prompt(p) for p in built.task.train}
    assert {tuple(body["prompt"]) for body in asked} == prompts
    assert len({body["seed"] for body in asked}) == len(rollouts) == 8
    assert all(0 <= body["seed"] < 2**63 and body["temperature"] == 0.7 for body in asked)


def test_the_same_weights_answer_otherwise_as_another_version(server: Vllm) -> None:
    built = build(recipe(server))
    said = []
    for version in range(2):
        publish(built, version)
        said.append(
            [r.token_ids for r in built.components.engine.generate(built.task.train, SAMPLING)]
        )
    assert said[0] != said[1]


def test_a_load_that_got_stuck_is_done_again(server: Vllm) -> None:
    built = build(recipe(server, patience_seconds=20.0))
    publish(built, 0)
    wanted = built.components.engine.generate(built.task.train, SAMPLING)
    # Given again after a restart, and cut off.
    server.label = server.label.partition("+")[0] + "-loading"
    assert built.components.engine.generate(built.task.train, SAMPLING) == wanted
    assert server.loads == 2


def test_who_gives_the_weights_again_is_seen_by_others_that_sample(
    server: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank mends a restart between two looks: what the first weights said must not count."""
    built = build(recipe(server, patience_seconds=20.0))
    move(built)
    publish(built, 1)
    wanted = built.components.engine.generate(built.task.train, SAMPLING)
    sampler = built.components.engine.engine._sampler  # type: ignore[attr-defined]
    plain, ours, restarts = sampler.answers, server.label.partition("+")[0], [True]

    def answers(asks: list[Any], label: str) -> Iterator[Any]:
        restarted = bool(restarts) and restarts.pop()
        if restarted:
            server.restart()
        yield from plain(asks, label)
        if restarted:
            sampler.reload_weights(ours)

    monkeypatch.setattr(sampler, "answers", answers)
    assert built.components.engine.generate(built.task.train, SAMPLING) == wanted
    assert not restarts


def test_without_training_the_engine_has_the_trainer_s_weights_too(server: Vllm) -> None:
    built = build(recipe(server))
    move(built)  # as when a checkpoint is loaded to be evaluated
    assert mismatch(built, built.components.engine.generate(built.task.train, SAMPLING)) < TOLERANCE


@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("by", [0.05, 0.0005])
def test_a_stale_engine_is_found_out_before_it_answers(
    server: Vllm, more: dict[str, Any], by: float
) -> None:
    # The smaller step is well within the tolerance of an engine in bfloat16.
    built = build(recipe(server, more, tolerance=0.5))
    publish(built, 0)
    move(built, 0.05)  # adapters begin as nothing
    publish(built, 1)
    server.stale = True
    move(built, by * (40 if more else 1))
    with pytest.raises(EngineError, match="is stale: it still has the weights before"):
        publish(built, 2)


def test_weights_that_stay_where_they_are_make_no_engine_stale(server: Vllm) -> None:
    built = build(recipe(server))
    for version in range(2):
        publish(built, version)


def test_another_model_s_weights_are_found_out(server: Vllm) -> None:
    with torch.no_grad():
        for weight in server.model.parameters():
            weight.mul_(1.5)
    built = build(recipe(server, LORA))
    with pytest.raises(EngineError, match="has other weights than the trainer"):
        publish(built, 0)


def test_log_probabilities_without_the_temperature_are_found_out(server: Vllm) -> None:
    server.processed = False
    built = build(recipe(server))
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        publish(built, 0)


def test_a_cache_that_stays_is_an_error(server: Vllm) -> None:
    server.cache_stays = True
    built = build(recipe(server))
    with pytest.raises(EngineError, match="does not empty its prefix cache"):
        publish(built, 0)


def test_weights_of_another_run_in_the_middle_of_a_batch_are_an_error(server: Vllm) -> None:
    built = build(recipe(server))
    publish(built, 0)
    server.meddles_after = 3
    with pytest.raises(EngineError, match="is stale: it has the weights 'somebody-else"):
        built.components.engine.generate(built.task.train, SAMPLING)


@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_a_server_that_was_started_again_gets_its_weights_again(
    server: Vllm, more: dict[str, Any]
) -> None:
    built = build(recipe(server, more, patience_seconds=20.0))
    publish(built, 0)
    move(built)
    publish(built, 1)
    wanted = built.components.engine.generate(built.task.train, SAMPLING)
    loads = server.loads
    server.restart()
    assert built.components.engine.generate(built.task.train, SAMPLING) == wanted
    server.restarts_after = 3  # in the middle of a batch: what it said since then does not count
    assert built.components.engine.generate(built.task.train, SAMPLING) == wanted
    assert server.loads == loads + 2


@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_an_engine_that_dies_in_a_batch_leaves_what_it_said(
    server: Vllm, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "LOOK_EVERY_S", -1.0)  # each answer is vouched for at once
    built = build(recipe(server, more))
    engine, problems = built.components.engine, built.task.train
    publish(built, 0)
    wanted = engine.generate(problems, SAMPLING)
    run = RunFolder(tmp_path)

    def sample() -> list[Rollout]:
        return JournaledEngine(engine, run, "s").generate(problems, SAMPLING)

    server.dies_after = 7
    with pytest.raises(Interrupted, match=r"is gone .* of 8 answers .* kept.* selfteach resume"):
        sample()
    unfinished = tmp_path / "rollouts" / "unfinished" / "s.000.jsonl"
    kept = len(unfinished.read_text().splitlines())
    assert kept in (2, 4, 6)  # whole problems; the last answers may not have been vouched for
    server.dies_after = None
    server.restart()
    server.asked.clear()
    assert sample() == wanted
    assert len([body for body in server.asked if body["max_tokens"] > 1]) == 8 - kept
    assert not unfinished.exists()
    asked = len(server.asked)
    assert sample() == wanted and len(server.asked) == asked


def test_a_server_that_comes_back_in_time_is_waited_for(server: Vllm) -> None:
    built = build(recipe(server, patience_seconds=20.0))
    publish(built, 0)
    wanted = built.components.engine.generate(built.task.train, SAMPLING)
    server.stop()
    server.restart()
    alarm = torch.multiprocessing.get_context  # noqa: F841 - nothing of torch is needed here
    import threading

    threading.Timer(0.3, server.start).start()
    assert built.components.engine.generate(built.task.train, SAMPLING) == wanted


def test_an_engine_that_is_gone_when_weights_are_due_is_an_error(server: Vllm) -> None:
    built = build(recipe(server))
    server.stop()
    with pytest.raises(EngineError, match=r"is gone .* start it again"):
        publish(built, 0)


def no_server(server: Vllm) -> None:
    server.stop()


def other_tokenizer(server: Vllm) -> None:
    server._tokenizer = lambda text: {"input_ids": [len(text)]}  # type: ignore[assignment]


def no_developer(server: Vllm) -> None:
    server.developer = False


def no_lora(server: Vllm) -> None:
    server.lora = False


def no_hot_loading(server: Vllm) -> None:
    server.hot_loading = False


WRONG: dict[str, tuple[Callable[[Vllm], None], dict[str, Any], str]] = {
    "no server": (no_server, {}, r"nobody answers at http://127.* start the server"),
    "other model": (lambda _: None, {"engine": {"model": "tyni"}}, "did you mean 'tiny'"),
    "other tokenizer": (other_tokenizer, {}, "reads text as other tokens"),
    "no developer mode": (no_developer, {}, "VLLM_SERVER_DEV_MODE=1"),
    "no LoRA": (no_lora, LORA, "was started without LoRA.*--enable-lora"),
    "no hot loading": (no_hot_loading, LORA, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    "short context": (lambda _: None, {"sampling": {"max_tokens": 96}}, "context of 96 tokens"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_server_that_will_not_do_is_said_in_one_line(server: Vllm, name: str) -> None:
    breaks, more, line = WRONG[name]
    breaks(server)
    with pytest.raises(EngineError, match=line) as raised:
        require_engine(recipe(server, more))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_a_server_that_will_do_is_left_as_it_is(server: Vllm, more: dict[str, Any]) -> None:
    require_engine(recipe(server, more))
    assert server.loads == 0 and server.label == "default" and not server.adapters


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://x/v1"])
def test_an_address_that_cannot_be_one_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match=r"write it like|leave out /v1"):
        validate(Recipe, {"engine": {"type": "vllm_server", "url": url, "model": "m"}})


def test_a_key_in_the_address_is_refused_and_not_repeated(server: Vllm) -> None:
    config = recipe(server, url="http://me:secret@127.0.0.1:1")
    with pytest.raises(EngineError, match=r"holds a key") as raised:
        require_engine(config)
    assert "secret" not in str(raised.value)


def test_a_named_key_has_to_be_there(server: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(EngineError, match="NO_SUCH_KEY is not set"):
        require_engine(recipe(server, api_key_env="NO_SUCH_KEY"))


def test_in_process_needs_vllm() -> None:
    with pytest.raises(EngineError, match=r'needs vLLM in this environment.*"vllm_server"'):
        build(validate(Recipe, merge(TINY, {"engine": {"type": "vllm"}})))


@pytest.mark.parametrize("cuda", [True, False])
def test_a_processor_reads_no_prompt_in_parts(cuda: bool) -> None:
    """With a seed that would end vLLM's CPU build: its generator cannot take a draw back."""
    serving = Serving("model", max_length=512, lora_rank=None, cuda=cuda)
    told = arguments(VllmProcessConfig(type="vllm"), serving)
    assert told.get("enable_chunked_prefill", True) is cuda
