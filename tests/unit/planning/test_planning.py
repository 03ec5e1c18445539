"""Plans: the arithmetic by hand, the simulation where the answer is known, and wrong input."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from selfteach.commands.check.memory import Load, memory
from selfteach.commands.check.sizes import measure_offline
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import load_study
from selfteach.errors import CheckpointError, RecipeError
from selfteach.models.architectures import Shape, known_shapes
from selfteach.planning import costs
from selfteach.planning.calibration import Measured, calibrate, read_run
from selfteach.planning.costs import Decoding, Efficiency
from selfteach.planning.describe_plan import describe
from selfteach.planning.devices import Device, find_device, known_devices
from selfteach.planning.estimate import Where, best, estimate, forecast, with_concurrency
from selfteach.planning.layout import Layout, fewest_trainers, require_room
from selfteach.planning.lengths import Spread
from selfteach.planning.simulation import Line, simulate
from selfteach.planning.workload import Asked, Work, work_of

PAPER = Path(__file__).parents[3] / "recipes" / "paper.toml"
TINY = Shape("llama", 8, 16, 2, 2, 2, 4, 32, 512, True)
DEVICE = Device(
    memory_gib=1, tflops=1e-6, memory_gb_per_s=1e-3, link_gb_per_s=1e-3, devices_per_node=8,
    network_gb_per_s=1e-4, host_gb_per_s=1e-3, source="made up",
)  # fmt: skip
"""10⁶ operations and 10⁶ bytes a second."""
EXACT = Efficiency(1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def constant(tokens: int) -> Spread:
    return Spread(math.log(tokens), 0.0, tokens)


def work(**changes: object) -> Work:
    load = Load(
        shape=TINY, parameters=TINY.parameters, trained=TINY.parameters, adapters=None,
        weight_bytes=4, compute_bytes=4, recompute=False, copies=0, learn_tokens=1000,
        chunk_entries=64, sample_rows=4, sample_length=20,
    )  # fmt: skip
    own = Work(
        load=load, steps=10, problems=4, samples=1, batch_size=4, prompt=6.0,
        answer=constant(10), teacher_prompt=0.0, shows_trace=False, teacher_sides=0, updates=1,
        micro_batch_tokens=1000, asked=Asked("nobody"), staleness=0, engine="transformers",
    )  # fmt: skip
    return dataclasses.replace(own, **changes)


def test_operations_by_hand() -> None:
    # Body 1,576 − 256 = 1,320. A sequence of 16: 16 · 2 · 1,320 + 2 · 2 layers · 8 · 16² = 50,432,
    # and 10 answer tokens meet the head: 10 · 2 · 32 · 8 = 5,120.
    answers = np.array([10.0])
    assert costs.forward(work(), answers)[0] == 42_240 + 8_192 + 5_120
    assert costs.learn_flops(work(), answers)[0] == 3 * 55_552, "forth, and twice that back"
    adapted = dataclasses.replace(work().load, adapters=(2, 7), trained=100, recompute=True)
    assert costs.learn_flops(work(load=adapted), answers)[0] == 3 * 55_552 + 6 * 100 * 16
    # The teacher reads 6 + 10 of a trace + 10: 26 · 2,640 + 32 · 26² + 5,120.
    told = work(teacher_prompt=6.0, shows_trace=True, teacher_sides=1)
    assert costs.learn_flops(told, answers)[0] == 3 * 55_552 + 68_640 + 21_632 + 5_120


def test_a_pass_reads_weights_and_keys_or_computes() -> None:
    one = costs.decoding(TINY, DEVICE, EXACT, group=1, slots=9, engine="vllm")
    # 2 bytes each: weights 3,152; keys and values of a token 2 · 2 layers · 8 · 2 = 64.
    assert one.weights == pytest.approx(3152e-6) and one.per_context == pytest.approx(64e-6)
    assert one.per_row == pytest.approx(2 * 1576e-6)
    assert one.pass_seconds(1, 10) == pytest.approx(3792e-6), "memory"
    assert one.pass_seconds(2, 10) == pytest.approx(6304e-6), "operations"
    two = costs.decoding(TINY, DEVICE, EXACT, group=2, slots=9, engine="vllm")
    assert two.weights == pytest.approx(one.weights / 2)


def test_the_trainer_with_most_to_do_is_waited_for() -> None:
    learn = costs.learning(work(), DEVICE, EXACT, 2)
    bare = dataclasses.replace(learn, gather=0.0, optimizer=0.0)
    lengths = np.array([10.0, 20.0, 10.0, 20.0])
    most = 2 * costs.learn_flops(work(), np.array([20.0]))[0] / 1e6
    assert bare.seconds(lengths) == pytest.approx(most)
    # Gathers twice and reduces once: half of 3 · 1,576 · 4 bytes over a link of 10⁶ a second.
    assert learn.gather == pytest.approx(0.5 * 3 * 1576 * 4e-6)
    far = costs.gather_seconds(work(), DEVICE, EXACT, 16)
    assert far == pytest.approx(15 / 16 * 3 * 1576 * 4e-5), "over the network"
    slow = dataclasses.replace(bare, gather=100.0)
    assert slow.seconds(lengths) == 100.0, "one micro-batch"


def test_sharding_divides_what_is_kept_and_gathers_what_runs() -> None:
    load = work().load
    whole, half = memory(load), memory(dataclasses.replace(load, shards=2))
    assert [2 * item.bytes for item in half.always] == [item.bytes for item in whole.always]
    gathered = {item.name: item.bytes for item in half.training}["gathered weights"]
    assert gathered == (256 + 2 * 660) * 4, "embeddings and two layers of (1,576 − 256) / 2"
    assert "gathered weights" not in {item.name for item in whole.training}


@pytest.mark.parametrize("mean", [3.0, 100.0, 900.0])
def test_a_spread_has_its_mean_after_the_cut(mean: float) -> None:
    spread = Spread.around(mean, 1000)
    drawn = spread.draw(np.random.default_rng(0), 200_000)
    assert spread.mean == pytest.approx(mean)
    assert drawn.mean() == pytest.approx(mean, rel=0.02)
    assert (drawn == 1000).mean() == pytest.approx(spread.cut, abs=0.005)
    full = Spread.around(1000, 1000)
    assert full.mean == pytest.approx(1000) and full.cut == 1


FLAT = Decoding(0.01, 0.0, 0.0, 0.0, 0.0, 100)


def line(**changes: object) -> Line:
    own = Line(
        batches=[8], samples=1, prompt=10.0, answer=constant(100), sampler=FLAT, samplers=1,
        learn=lambda lengths: 2.0, marker="latency", latency=3.0, concurrency=8,
    )  # fmt: skip
    return dataclasses.replace(own, **changes)


@pytest.mark.parametrize(
    ("changes", "period"),
    [
        ({}, 1 + 3 + 2),  # one after the other
        ({"staleness": 2}, 3),  # the longest phase
        ({"staleness": 1, "latency": 5.0}, 5),
        ({"staleness": 2, "concurrency": 4}, 6),  # two rounds of replies
        ({"staleness": 3, "concurrency": 16, "latency": 9.0}, 4.5),  # two steps at a time
        ({"staleness": 2, "samplers_share": True, "latency": 0.5}, 3),  # turns on one device
        ({"marker": "program", "critics_share": True, "latency": 0.1}, 1 + 0.8 + 2),
        ({"marker": "nobody"}, 1 + 2),
        ({"batches": [2, 2, 2, 2], "queue": 2, "marker": "program", "latency": 0.0}, 4 + 2),
        ({"sampler": dataclasses.replace(FLAT, slots=4)}, 2 + 3 + 2),  # two rounds of answers
        ({"publish": 0.5, "wake": 0.25}, 6.75),
    ],
)
def test_the_simulation_where_the_answer_is_known(
    changes: dict[str, object], period: float
) -> None:
    assert simulate(line(**changes)).period == pytest.approx(period)


def test_answers_in_one_engine_share_its_time() -> None:
    cost = Decoding(0.01, 0.02, 1e-5, 0.005, 1e-4, 64)
    spread = Spread.around(60, 200)
    told = simulate(line(sampler=cost, answer=spread, batches=[32], marker="nobody"), steps=4)
    drawn = [spread.draw(np.random.default_rng(seed), 32) for seed in range(40)]
    alone = np.mean([cost.drain(lengths, 10.0) for lengths in drawn]) + 32 * 10 * 1e-4
    assert told.mean("begun", "sampled") == pytest.approx(alone, rel=0.1)


def test_a_calibration_finds_the_costs_that_made_the_numbers() -> None:
    have = dataclasses.replace(EXACT, train_mfu=0.3, layer_micro_s=0.05, mark_s=0.02)
    sizes = [work(problems=n, batch_size=100) for n in (2, 8)]
    runs = []
    for own in sizes:
        lengths = np.full(own.answers, 10.0)
        learn = costs.learning(own, DEVICE, have, 1).seconds(lengths)
        seconds = {"rollout": 10 * (0.4 + 0.03 * own.answers), "train": learn}
        seconds["critique"] = 0.02 * own.answers
        runs.append(Measured(own, (lengths,), (seconds,), None))
    found = calibrate(runs, DEVICE)
    assert found.train_mfu == pytest.approx(0.3) and found.layer_micro_s == pytest.approx(0.05)
    assert found.mark_s == pytest.approx(0.02)
    assert found.line == pytest.approx((0.4, 0.03))
    told = forecast(work(problems=30, batch_size=30), Where("x", DEVICE, found), Layout(1))
    assert told.phases["rollout"] == pytest.approx(10 * (0.4 + 0.03 * 30))


def paper(**changes: object) -> Work:
    recipe: Recipe = load_study(PAPER).recipe("step_aligned", seed=0)
    return dataclasses.replace(work_of(recipe, measure_offline(recipe)), engine="vllm", **changes)


H100 = Where("h100-sxm", find_device("h100-sxm"), Efficiency())


@pytest.mark.slow
def test_more_devices_are_not_slower_and_stop_at_the_longest_critique() -> None:
    periods = [best(paper(), H100, count).period for count in (4, 16)]
    assert periods == sorted(periods, reverse=True)
    told = best(paper(), H100, 16)
    assert told.line.critic is not None
    floor = 16384 * told.line.critic.pass_seconds(1, 10_000)
    assert 0.5 * floor < told.period
    assert forecast(paper(staleness=4), H100, told.layout).period < told.period


def test_the_estimate_is_near_the_simulation() -> None:
    for staleness in (0, 2):
        own = with_concurrency(paper(staleness=staleness))
        layout = Layout(2, 2, 8, 1, 4)
        drawn = own.answer.draw(np.random.default_rng(0), own.answers)
        told = forecast(own, H100, layout).period
        guess = estimate(own, H100, layout, drawn)
        assert told / 2 < guess < 2 * told


def test_explaining_shows_numbers_and_what_they_rest_on() -> None:
    told = "\n".join(describe(forecast(paper(), H100, Layout(1, 1, 4, 1, 4)), explain=True))
    for part in ("step time:", "bottleneck:", "assumed: 0.4", "16,384 passes"):
        assert part in told


def test_too_few_devices_say_how_many_are_needed() -> None:
    big = dataclasses.replace(paper().load, parameters=70_000_000_000)
    own = paper(load=big)
    fewest = fewest_trainers(own, H100.device)
    assert fewest is not None and fewest > 1
    with pytest.raises(RecipeError, match=f"at least {fewest} are needed"):
        require_room(own, H100.device, Layout(fewest - 1, 1, 4, 1, 4), "h100-sxm")
    require_room(own, H100.device, Layout(fewest, 1, 4, 1, 4), "h100-sxm")
    with pytest.raises(RecipeError, match="--critics 1: the critic needs at least 2 × l40s"):
        small = find_device("l40s")
        require_room(paper(), small, Layout(1, 1, 1), "l40s")


def test_too_few_to_share_out_say_how_many_would_do() -> None:
    small = Where("l4", find_device("l4"), Efficiency())
    with pytest.raises(RecipeError, match="--devices 2: too few to hold this; at least 4 × l4"):
        best(paper(), small, 2)


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'h100': not known; there are here, .*h100-sxm"):
        find_device("h100")
    file = tmp_path / "own.toml"
    file.write_text("[mine]\nmemory_gib = 8\n")
    with pytest.raises(RecipeError, match=r"\[mine\]: tflops"):
        known_devices(file)
    with pytest.raises(RecipeError, match="--device-file"):
        known_devices(tmp_path / "none.toml")
    with pytest.raises(CheckpointError, match="not a run's folder"):
        read_run(tmp_path)


def test_a_device_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    rows = {**DEVICE.model_dump(), "source": "me"}
    file.write_text("[mine]\n" + "\n".join(f"{k} = {v!r}" for k, v in rows.items()))
    assert find_device("mine", file).source == "me"
    assert set(known_devices()) < set(known_devices(file))


def test_shapes_know_both_models_of_the_figure() -> None:
    assert {"Qwen/Qwen3-32B", "Qwen/QwQ-32B"} <= set(known_shapes())
