"""Test the planner: arithmetic by hand, simulations with a known result, and invalid input."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from planned_work import DEVICE, EXACT, FLAT, H100, PAPER, TINY, constant, paper, pipeline, work

from selfteach.commands.planning import costs
from selfteach.commands.planning.calibration import MeasuredRun, calibrate, read_run
from selfteach.commands.planning.costs import DecodingCost, Efficiency
from selfteach.commands.planning.describe_plan import describe
from selfteach.commands.planning.devices import find_device, known_devices
from selfteach.commands.planning.estimate import (
    Hardware,
    best_forecast,
    estimate,
    forecast,
    with_full_concurrency,
)
from selfteach.commands.planning.layout import Layout, fewest_trainers, require_memory
from selfteach.commands.planning.lengths import LengthDistribution
from selfteach.commands.planning.pipeline import SampledStep
from selfteach.commands.planning.plan import PlanRequest, plan
from selfteach.commands.planning.simulation import simulate
from selfteach.commands.planning.workload import Overrides
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import load_study
from selfteach.errors import CheckpointError, RecipeError
from selfteach.models.architectures import known_shapes
from selfteach.trainer.device_memory import memory


def test_operations_match_a_count_by_hand() -> None:
    # Body 1,576 − 256 = 1,320. A sequence of 16: 16 · 2 · 1,320 + 2 · 2 layers · 8 · 16² = 50,432,
    # and 10 rollout tokens meet the head: 10 · 2 · 32 · 8 = 5,120.
    lengths = np.array([10.0])
    assert costs.student_flops(work(), lengths)[0] == 42_240 + 8_192 + 5_120
    assert costs.train_flops(work(), lengths)[0] == 3 * 55_552, "forward, and twice that backward"
    adapted = dataclasses.replace(work().load, adapters=(2, 7), trained=100, recompute=True)
    assert costs.train_flops(work(load=adapted), lengths)[0] == 3 * 55_552 + 6 * 100 * 16
    # The teacher reads 6 + 10 of a trace + 10: 26 · 2,640 + 32 · 26² + 5,120.
    with_teacher = work(teacher_prompt=6.0, context_has_trace=True, teacher_passes=1)
    assert costs.train_flops(with_teacher, lengths)[0] == 3 * 55_552 + 68_640 + 21_632 + 5_120


def test_a_decoding_pass_is_bound_by_memory_or_by_operations() -> None:
    one = costs.decoding_cost(TINY, DEVICE, EXACT, group=1, slots=9, engine="vllm")
    # 2 bytes each: weights 3,152; keys and values of a token 2 · 2 layers · 8 · 2 = 64.
    assert one.weights == pytest.approx(3152e-6) and one.per_context == pytest.approx(64e-6)
    assert one.per_row == pytest.approx(2 * 1576e-6)
    assert one.pass_seconds(1, 10) == pytest.approx(3792e-6), "memory"
    assert one.pass_seconds(2, 10) == pytest.approx(6304e-6), "operations"
    two = costs.decoding_cost(TINY, DEVICE, EXACT, group=2, slots=9, engine="vllm")
    assert two.weights == pytest.approx(one.weights / 2)


def test_a_step_takes_as_long_as_its_busiest_trainer() -> None:
    training = costs.training_cost(work(), DEVICE, EXACT, 2)
    compute_only = dataclasses.replace(training, gather=0.0, optimizer=0.0)
    lengths = np.array([10.0, 20.0, 10.0, 20.0])
    busiest = costs.train_flops(work(), np.array([10.0, 20.0])).sum() / 1e6  # dealt by length
    assert compute_only.seconds(lengths) == pytest.approx(busiest)
    # Two all-gathers and a reduce-scatter: half of 3 · 1,576 · 4 bytes at 10⁶ per second.
    assert training.gather == pytest.approx(0.5 * 3 * 1576 * 4e-6)
    far = costs.gather_seconds(work(), DEVICE, EXACT, 16)
    assert far == pytest.approx(15 / 16 * 3 * 1576 * 4e-5), "over the network"
    slow = dataclasses.replace(compute_only, gather=100.0)
    assert slow.seconds(lengths) == 100.0, "one micro-batch"


def test_sharding_divides_stored_weights_and_gathers_those_of_a_layer() -> None:
    load = work().load
    whole, half = memory(load), memory(dataclasses.replace(load, shards=2))
    assert [2 * item.bytes for item in half.always] == [item.bytes for item in whole.always]
    gathered = {item.name: item.bytes for item in half.training}["gathered weights"]
    assert gathered == (256 + 2 * 660) * 4, "embeddings and two layers of (1,576 − 256) / 2"
    assert "gathered weights" not in {item.name for item in whole.training}


@pytest.mark.parametrize("mean", [3.0, 100.0, 900.0])
def test_a_length_distribution_has_its_mean_after_truncation(mean: float) -> None:
    lengths = LengthDistribution.with_mean(mean, 1000)
    sampled = lengths.sample(np.random.default_rng(0), 200_000)
    assert lengths.mean == pytest.approx(mean)
    assert sampled.mean() == pytest.approx(mean, rel=0.02)
    assert (sampled == 1000).mean() == pytest.approx(lengths.truncated_share, abs=0.005)
    full = LengthDistribution.with_mean(1000, 1000)
    assert full.mean == pytest.approx(1000) and full.truncated_share == 1


@pytest.mark.parametrize(
    ("changes", "period"),
    [
        ({}, 1 + 3 + 2),  # sequential
        ({"staleness": 2}, 3),  # the longest phase
        ({"staleness": 1, "latency": 5.0}, 5),
        ({"staleness": 2, "concurrency": 4}, 6),  # two rounds of replies
        ({"staleness": 3, "concurrency": 16, "latency": 9.0}, 4.5),  # two steps at a time
        (
            {"staleness": 2, "sampling_shares_devices": True, "latency": 0.5},
            3,
        ),  # turns on one device
        ({"critic_kind": "program", "critic_shares_devices": True, "latency": 0.1}, 1 + 0.8 + 2),
        ({"critic_kind": "none"}, 1 + 2),
        ({"critic_kind": "none", "rounds": 2, "mixed_share": 1.0}, 1 + 2),  # no further round
        ({"critic_kind": "none", "rounds": 2, "mixed_share": 0.0}, 3),  # nothing to train on
        ({"critic_kind": "none", "rounds": 1, "mixed_share": 0.0, "batches": [4, 4]}, 4),
        ({"batches": [2, 2, 2, 2], "queue": 2, "critic_kind": "program", "latency": 0.0}, 4 + 2),
        ({"sampler": dataclasses.replace(FLAT, slots=4)}, 2 + 3 + 2),  # two rounds of rollouts
        ({"weight_sync": 0.5, "sleep_and_wake": 0.25}, 6.75),
    ],
)
def test_the_simulated_period_matches_the_one_by_hand(
    changes: dict[str, object], period: float
) -> None:
    assert simulate(pipeline(**changes)).period == pytest.approx(period)


def test_further_rounds_are_simulated_as_often_as_groups_score_alike() -> None:
    lengths = constant(100)
    changes = {"group_size": 2, "batches": [16], "rounds": 3, "mixed_share": 0.5,
               "critic_kind": "none", "rollout_lengths": lengths,
               "train_seconds": lambda lengths: 0.1 * len(lengths)}  # fmt: skip
    rng = np.random.default_rng(0)
    drawn = [SampledStep.draw(pipeline(**changes), rng) for _ in range(400)]
    expected = work(rounds=3, mixed_share=0.5)
    assert expected.sampled_share == 1 + 0.5 + 0.25 + 0.125
    sampled, trained = (np.mean([f(step.trained_R) for step in drawn]) for f in (len, np.sum))
    assert sampled / 16 == pytest.approx(expected.sampled_share, rel=0.05)
    assert trained / 16 == pytest.approx(expected.trained_share, rel=0.05)
    assert all(step.trained_R.sum() <= 16 for step in drawn)
    more = simulate(pipeline(**changes), steps=40)
    assert more.mean("started", "sampled") > 2.5  # of a second each round
    assert more.mean("train_started", "trained") < 1.6


def test_rollouts_in_one_engine_share_its_time() -> None:
    cost = DecodingCost(0.01, 0.02, 1e-5, 0.005, 1e-4, 64)
    lengths = LengthDistribution.with_mean(60, 200)
    only_sampling = pipeline(
        sampler=cost, rollout_lengths=lengths, batches=[32], critic_kind="none"
    )
    timeline = simulate(only_sampling, steps=4)
    sampled = [lengths.sample(np.random.default_rng(seed), 32) for seed in range(40)]
    alone = np.mean([cost.decode_seconds(batch, 10.0) for batch in sampled]) + 32 * 10 * 1e-4
    assert timeline.mean("started", "sampled") == pytest.approx(alone, rel=0.1)


def test_a_calibration_recovers_the_costs_behind_the_measurements() -> None:
    true = dataclasses.replace(EXACT, train_mfu=0.3, micro_batch_layer_s=0.05, critique_s=0.02)
    sizes = [work(problems=n, batch_size=100) for n in (2, 8)]
    runs = []
    for size in sizes:
        lengths = np.full(size.rollouts, 10.0)
        training = costs.training_cost(size, DEVICE, true, 1).seconds(lengths)
        seconds = {"rollout": 10 * (0.4 + 0.03 * size.rollouts), "train": training}
        seconds["critique"] = 0.02 * size.rollouts
        runs.append(MeasuredRun(size, (lengths,), (seconds,), None))
    fitted = calibrate(runs, DEVICE)
    assert fitted.train_mfu == pytest.approx(0.3) and fitted.micro_batch_layer_s == pytest.approx(
        0.05
    )
    assert fitted.critique_s == pytest.approx(0.02)
    assert fitted.sampling_fit == pytest.approx((0.4, 0.03))
    larger = work(problems=30, batch_size=30)
    planned = forecast(larger, Hardware("x", DEVICE, fitted), Layout(1))
    assert planned.phases["rollout"] == pytest.approx(10 * (0.4 + 0.03 * 30))


@pytest.mark.slow
def test_more_devices_help_until_the_longest_critique_limits() -> None:
    periods = [best_forecast(paper(), H100, count).period for count in (4, 16)]
    assert periods == sorted(periods, reverse=True)
    fastest = best_forecast(paper(), H100, 16)
    assert fastest.pipeline.critic is not None
    floor = 16384 * fastest.pipeline.critic.pass_seconds(1, 10_000)
    assert 0.5 * floor < fastest.period
    assert forecast(paper(staleness=4), H100, fastest.layout).period < fastest.period


def test_the_estimate_is_near_the_simulation() -> None:
    for staleness in (0, 2):
        concurrent = with_full_concurrency(paper(staleness=staleness))
        layout = Layout(2, 2, 8, 1, 4)
        lengths = concurrent.rollout_lengths.sample(np.random.default_rng(0), concurrent.rollouts)
        simulated = forecast(concurrent, H100, layout).period
        estimated = estimate(concurrent, H100, layout, lengths)
        assert simulated / 2 < estimated < 2 * simulated


def test_explain_shows_the_numbers_and_their_assumptions() -> None:
    text = "\n".join(describe(forecast(paper(), H100, Layout(1, 1, 4, 1, 4)), explain=True))
    for part in ("step time:", "bottleneck:", "assumed: 0.4", "16,384 passes"):
        assert part in text


def test_a_plan_says_what_further_rounds_are_assumed() -> None:
    values = {
        "objective": {"type": "grpo"}, "sampling": {"dynamic_rounds": 2},
        "train": {"problems_per_step": 4, "group_size": 2},
    }  # fmt: skip
    request = PlanRequest(device="l4", overrides=Overrides(mixed_groups=0.25))
    text = "\n".join(plan(Recipe.model_validate(values), request))
    assert "in up to 3 rounds, one after another: about 18 rollouts, of which 5 are" in text
    assert "assumed: 25% of the groups are mixed (--mixed-groups)" in text
    without = Recipe.model_validate({"objective": {"type": "grpo"}})
    with pytest.raises(RecipeError, match=r"--mixed-groups is for sampling\.dynamic_rounds"):
        list(plan(without, request))


def test_too_few_trainers_report_how_many_are_needed() -> None:
    big = dataclasses.replace(paper().load, parameters=70_000_000_000)
    large = paper(load=big)
    fewest = fewest_trainers(large, H100.device)
    assert fewest is not None and fewest > 1
    with pytest.raises(RecipeError, match=f"at least {fewest} are needed"):
        require_memory(large, H100.device, Layout(fewest - 1, 1, 4, 1, 4), "h100-sxm")
    require_memory(large, H100.device, Layout(fewest, 1, 4, 1, 4), "h100-sxm")
    with pytest.raises(RecipeError, match="--critics 1: the critic needs at least 2 × l40s"):
        small = find_device("l40s")
        require_memory(paper(), small, Layout(1, 1, 1), "l40s")


def test_too_few_devices_to_split_report_how_many_are_needed() -> None:
    small = Hardware("l4", find_device("l4"), Efficiency())
    with pytest.raises(RecipeError, match="--devices 2: too few to hold this; at least 4 × l4"):
        best_forecast(paper(), small, 2)


def test_invalid_input_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'h100' is unknown; known devices: here, .*h100-sxm"):
        find_device("h100")
    file = tmp_path / "devices.toml"
    file.write_text("[mine]\nmemory_gib = 8\n")
    with pytest.raises(RecipeError, match=r"\[mine\]: tflops"):
        known_devices(file)
    with pytest.raises(RecipeError, match="--device-file"):
        known_devices(tmp_path / "none.toml")
    with pytest.raises(CheckpointError, match="not a run folder"):
        read_run(tmp_path)


def test_a_missing_simpy_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simpy", None)
    monkeypatch.delitem(sys.modules, "selfteach.commands.planning.simulation", raising=False)
    recipe = load_study(PAPER).recipe("step_aligned", seed=0)
    with pytest.raises(RecipeError) as caught:
        list(plan(recipe, PlanRequest("h100-sxm")))
    assert str(caught.value) == 'selfteach plan needs SimPy: pip install "selfteach[plan]"'


def test_a_device_file_adds_a_device(tmp_path: Path) -> None:
    file = tmp_path / "devices.toml"
    rows = {**DEVICE.model_dump(mode="json"), "source": "me"}
    file.write_text("[mine]\n" + "\n".join(f"{k} = {v!r}" for k, v in rows.items()))
    assert find_device("mine", file).source == "me"
    assert set(known_devices()) < set(known_devices(file))


def test_shapes_of_both_models_of_the_figure_are_known() -> None:
    assert {"Qwen/Qwen3-32B", "Qwen/QwQ-32B"} <= set(known_shapes())
