"""What prompts share is counted once in a plan where trainer and sampler compute it once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from planned_work import DEVICE, EXACT, FLAT, H100, paper, pipeline, work

from selfteach.commands.check.shared_prompts import count_prompts
from selfteach.commands.check.sizes import measure_offline
from selfteach.commands.check.tokens import TeacherPrompts
from selfteach.commands.planning import costs
from selfteach.commands.planning.dealt_rollouts import deal, tokens_shared
from selfteach.commands.planning.describe_plan import describe
from selfteach.commands.planning.estimate import forecast
from selfteach.commands.planning.layout import Layout
from selfteach.commands.planning.simulation import simulate
from selfteach.commands.planning.workload import SharedTokens, work_of
from selfteach.config.recipe import Recipe
from selfteach.trainer.batching import collate
from selfteach.types import (
    CritiquedRollout,
    Problem,
    Rollout,
    Sequences,
    TokenWeights,
    TrainingSample,
    Verdict,
)

SHARED = SharedTokens(of_all=40, of_group=50)
PAD = 999


def test_rollouts_are_dealt_by_length_and_cut_by_padded_tokens() -> None:
    # Sorted 3, 3, 5, 8: one trainer gets 3 and 5 (padded 10), the other 3 and 8 (padded 16: two cuts).
    dealt = deal(np.array([5.0, 3.0, 8.0, 3.0]), 2, 10)
    assert dealt.trainer_R.tolist() == [0, 0, 1, 1]
    assert dealt.micro_batch_R.tolist() == [0, 0, 2, 1]
    assert dealt.micro_batches_T.tolist() == [1, 2]
    assert deal(np.array([4.0]), 3, 10).micro_batches_T.tolist() == [1, 0, 0]


def test_the_first_of_a_micro_batch_computes_what_the_others_share() -> None:
    lengths = np.full(4, 60.0)
    whole = deal(lengths, 1, 1000)
    shared = tokens_shared(SHARED, lengths, 2, whole)
    assert shared.tokens_R.tolist() == [0, 50, 40, 50] and shared.prefix_R.tolist() == [
        0,
        40,
        40,
        40,
    ]
    # Two micro-batches of one group each: nothing is shared between them.
    halves = deal(lengths, 1, 120)
    assert tokens_shared(SHARED, lengths, 2, halves).tokens_R.tolist() == [0, 50, 0, 50]
    # Beside rests of 120 tokens the 20 further ones are less than a tenth: no tree.
    long = np.full(4, 160.0)
    assert tokens_shared(SHARED, long, 2, whole).tokens_R.tolist() == [0, 40, 40, 40]
    # 20 tokens are too few for a pass of their own, and are shared in the tree.
    few = tokens_shared(SharedTokens(20, 50), lengths, 2, whole)
    assert few.tokens_R.tolist() == [0, 50, 20, 50] and not few.prefix_R.any()


@pytest.mark.parametrize("limit", [400, 1_000, 100_000])
def test_the_plan_counts_what_the_trainer_computes(limit: int) -> None:
    """Groups of four behind 40 common tokens; rollouts differ from their first token on."""
    rng, samples = np.random.default_rng(0), list[TrainingSample]()
    for group in range(6):
        prompt = (*range(40), 100 + group, *range(9))
        for sample in range(4):
            ids = (200 + 4 * group + sample, *[1] * int(rng.integers(5, 30)))
            rollout = Rollout(
                problem=Problem(str(group), "", ""), sample=sample, prompt_ids=prompt, token_ids=ids,
                logps=(-1.0,) * len(ids), text="", finished=True, policy_version=0,
            )  # fmt: skip
            critiqued = CritiquedRollout(rollout, Verdict(True, True, "x"), None)
            samples.append(TrainingSample(critiqued))
    lengths = np.array([50.0 + len(sample.rollout.token_ids) for sample in samples])
    weights = [TokenWeights((1.0,) * len(sample.rollout.token_ids)) for sample in samples]
    batches = collate(samples, weights, pad_id=PAD, micro_batch_tokens=limit)
    dealt = deal(lengths, 1, limit)
    assert dealt.micro_batches_T.tolist() == [len(batches)]
    trees = [batch.student.tree is not None for batch in batches]
    assert any(trees) and (all(trees) or limit == 400), "few rows of as many groups need none"
    shared = tokens_shared(SHARED, lengths, 4, dealt).tokens_R.sum()
    assert sum(computed(batch.student) for batch in batches) == lengths.sum() - shared


def computed(side: Sequences) -> int:
    """Tokens of a pass besides padding; with the last token of each rollout, which is not run."""
    tokens = (side.ids_BT[:, side.shared :] != PAD).sum() - len(side.ids_BT)
    tokens = tokens if side.tree is None else side.tree.ids_1U.numel()
    return side.shared + int(tokens) + len(side.ids_BT)


def test_operations_of_shared_prompts_match_a_count_by_hand() -> None:
    """Four rollouts of 10 tokens after 50, of which 40 are the same for all."""
    changes = {"prompt": 50.0, "problems": 2, "group_size": 2, "shared": SHARED}
    one = costs.training_cost(work(**changes), DEVICE, EXACT, 1)
    lengths = np.full(4, 10.0)
    # A sequence: 60 · 2,640 + 32 · 60² + 5,120. Shared: 140 tokens, and 40² of attention three times.
    nominal, saved = 4 * 278_720, 140 * 2_640 + 3 * 32 * 40**2
    assert one.flops(lengths, one.deal(lengths)).tolist() == [3 * (nominal - saved)]
    sharded = costs.training_cost(work(**changes), DEVICE, EXACT, 2)
    flops = sharded.flops(lengths, sharded.deal(lengths))
    # Each of two ranks has a rollout of either group: 40 tokens shared, but in attention.
    assert flops.tolist() == [3 * (nominal / 2 - 40 * 2_640)] * 2
    again = dataclasses.replace(work().load, recompute=True)
    recomputed = costs.training_cost(work(**changes, load=again), DEVICE, EXACT, 1)
    assert recomputed.flops(lengths, recomputed.deal(lengths)).tolist() == [
        4 * (nominal - 140 * 2_640)
    ]
    adapted = dataclasses.replace(work().load, adapters=(2, 7), trained=100)
    teacher = {"teacher_prompt": 50.0, "teacher_passes": 1, "teacher_shared": SHARED}
    lora = costs.training_cost(work(**changes, **teacher, load=adapted), DEVICE, EXACT, 1)
    expected = 3 * (nominal - saved) + 6 * 100 * (4 * 60 - 140)
    assert lora.flops(lengths, lora.deal(lengths)).tolist() == [expected]


@pytest.mark.parametrize(("samplers", "prefill"), [(1, 0.08), (2, 0.06)])
def test_a_sampler_computes_a_common_prefix_once_per_batch(samplers: int, prefill: float) -> None:
    """Four prompts of 50 tokens, 40 of them the same: 50 + 3 · 10 tokens of 1 ms, or 50 + 10 on two."""
    changes = {"critic_kind": "none", "group_size": 2, "prompt": 50.0, "shared_prompt": 40.0}
    sampler = dataclasses.replace(FLAT, prefill=0.001)
    timeline = simulate(pipeline(**changes, sampler=sampler, samplers=samplers))
    assert timeline.mean("started", "sampled") == pytest.approx(1 + prefill)
    shared = work(prompt=50.0, shared=SHARED, problems=4)
    assert costs.prefill_tokens(shared, 4 / samplers, 1) == pytest.approx(1000 * prefill)


def test_a_plan_says_what_prompts_share_and_who_computes_it_once() -> None:
    changes = {
        "shared": SharedTokens(30, 50),
        "teacher_shared": SharedTokens(10, 20),
        "prompt": 50.0,
    }
    alone = "\n".join(
        describe(forecast(paper(**changes), H100, Layout(1, 1, 4, 1, 4)), explain=True)
    )
    assert (
        "assumed: all prompts begin with the same 30 of 50 tokens (the teacher's: 10 of " in alone
    )
    assert "those of a group with the same 50 (the teacher's: 20)" in alone
    assert "a sampler computes these once per batch, a trainer once per micro-batch" in alone


LAB = {
    "data": {"type": "lab", "max_solve_rate": 0.01, "train": 12, "validation": 2, "test": 2},
    "critic": {"type": "oracle"},
}


@pytest.mark.parametrize(
    ("context", "teacher"),
    [  # a question of 6 words between <bos> and <say>; behind it <see> and the context, of 33 words
        ("reference", TeacherPrompts(6 + 2 + 33, shared_by_all=1, shared_by_group=math.inf)),
        ("step_aligned", TeacherPrompts(6 + 3, shared_by_all=1, shared_by_group=6 + 2)),
        ("none", TeacherPrompts(6 + 2, shared_by_all=1, shared_by_group=math.inf)),
    ],
)
def test_what_a_recipes_prompts_share_is_counted_from_its_templates(
    context: str, teacher: TeacherPrompts
) -> None:
    values: dict[str, Any] = {**LAB, "context": {"type": context}, "train": {"steps": 0}}
    recipe = Recipe.model_validate(values)
    sizes = measure_offline(recipe)
    assert sizes.lengths.shared_prompt == 1 and sizes.lengths.teacher == teacher
    planned = work_of(recipe, sizes)
    assert planned.shared == SharedTokens(1, 8)
    assert planned.teacher_shared == SharedTokens(1, min(teacher.shared_by_group, teacher.mean))
    assert planned.teacher_prompt == teacher.mean


def test_a_penaltys_teacher_is_shown_the_students_prompts() -> None:
    grpo = {"objective": {"type": "grpo", "kl_coef": 0.1}, "data": LAB["data"]}
    recipe = Recipe.model_validate(grpo)
    sizes = measure_offline(recipe)
    assert sizes.lengths.teacher is None
    planned = work_of(recipe, sizes)
    assert planned.teacher_shared == planned.shared == SharedTokens(1, 8)


def test_a_single_prompt_shares_nothing_that_is_known() -> None:
    assert count_prompts([(1, 2, 3)], 1) == ([3], 0)
    assert count_prompts([(1, 2, 3), (1, 2), (9,)], 2) == ([3, 2, 1], 2)
    assert work().shared == SharedTokens()
