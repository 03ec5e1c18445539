"""Micro-batches: the position of each token, which samples are left out, and corrupted ids."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from selfteach.errors import AlignmentError
from selfteach.models.sequences import sequences
from selfteach.trainer import batching as module
from selfteach.trainer.batching import check_same_tokens, collate
from selfteach.types import (
    CritiquedRollout,
    Problem,
    Rollout,
    TokenWeights,
    TrainingSample,
    Verdict,
)

PAD = 0


def sample(
    prompt: tuple[int, ...], completion: tuple[int, ...], with_teacher: bool = True
) -> TrainingSample:
    logps = (-0.5,) * len(completion)
    rollout = Rollout(Problem("p", "q", "a"), 0, prompt, completion, logps, "", True, 0)
    critiqued = CritiquedRollout(rollout, Verdict(True, True, "a"), None)
    return TrainingSample(critiqued, teacher_prompt_ids=(*prompt, 9, 9) if with_teacher else None)


SHORT, LONG = sample((1, 2), (3, 4)), sample((1, 2, 5), (6, 7, 8))
ONES = [TokenWeights((1.0, 0.5), 2.0), TokenWeights((1.0, 1.0, 0.0), -1.0)]


def test_sequences_by_hand() -> None:
    side = sequences([(1, 2), (5,)], [(3, 4), (6, 7, 8)], PAD)
    assert side.ids_BT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert side.rows_N.tolist() == [0, 0, 1, 1, 1]
    # The state at column t predicts the token at t + 1.
    assert side.columns_N.tolist() == [1, 2, 0, 1, 2]
    padded = sequences([(1,), (5,)], [(3,), (6, 7)], PAD)
    assert padded.ids_BT.tolist() == [[1, 3, PAD], [5, 6, 7]]


def test_a_batch_by_hand() -> None:
    (batch,) = collate([LONG, SHORT], ONES[::-1], pad_id=PAD, micro_batch_tokens=1000)
    assert batch.ids_N.tolist() == [3, 4, 6, 7, 8], "shorter samples first"
    assert batch.weight_N.tolist() == [1.0, 0.5, 1.0, 1.0, 0.0]
    assert batch.advantage_N.tolist() == [2.0, 2.0, -1.0, -1.0, -1.0]
    assert batch.sampled_logp_N.tolist() == [-0.5] * 5
    assert batch.student.columns_N.tolist() == [1, 2, 2, 3, 4]
    assert batch.teacher is not None
    assert batch.teacher.columns_N.tolist() == [3, 4, 4, 5, 6]


def test_samples_without_a_weight_are_left_out() -> None:
    silent = TokenWeights((0.0, 0.0), 0.0)
    (batch,) = collate([SHORT, LONG], [silent, ONES[1]], pad_id=PAD, micro_batch_tokens=1000)
    assert batch.ids_N.tolist() == [6, 7, 8]
    assert collate([SHORT], [silent], pad_id=PAD, micro_batch_tokens=1000) == []
    assert collate([], [], pad_id=PAD, micro_batch_tokens=1000) == []


def test_a_sample_longer_than_a_micro_batch_is_alone_and_uncut() -> None:
    batches = collate([SHORT, LONG], ONES, pad_id=PAD, micro_batch_tokens=1)
    assert [batch.ids_N.tolist() for batch in batches] == [[3, 4], [6, 7, 8]]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_corrupted_ids_are_detected(side: str) -> None:
    (batch,) = collate([SHORT, LONG], ONES, pad_id=PAD, micro_batch_tokens=1000)
    good = getattr(batch, side)
    ids_BT = good.ids_BT.clone()
    ids_BT[good.rows_N[-1], good.columns_N[-1] + 1] += 1
    broken = dataclasses.replace(batch, **{side: dataclasses.replace(good, ids_BT=ids_BT)})
    with pytest.raises(AlignmentError, match=f"the {side}'s sequence"):
        check_same_tokens(broken)


def test_every_batch_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(prompts, completions, pad_id, **options):
        side = sequences(prompts, completions, pad_id, **options)
        return dataclasses.replace(side, columns_N=side.columns_N - 1)

    monkeypatch.setattr(module, "sequences", shifted)
    with pytest.raises(AlignmentError):
        collate([SHORT], ONES[:1], pad_id=PAD, micro_batch_tokens=1000)


def test_samples_with_and_without_a_teacher_do_not_mix() -> None:
    without_teacher = sample((1, 2), (3, 4), with_teacher=False)
    (batch,) = collate([without_teacher], ONES[:1], pad_id=PAD, micro_batch_tokens=1000)
    assert batch.teacher is None
    for both in ([without_teacher, LONG], [LONG, without_teacher]):
        ones = [TokenWeights((1.0,) * len(one.rollout.token_ids)) for one in both]
        batches = collate(both, ones, pad_id=PAD, micro_batch_tokens=1000)
        assert [batch.teacher is None for batch in batches] == [True, False]


def test_weights_stay_exact_where_floats_allow() -> None:
    (batch,) = collate([SHORT], [TokenWeights((0.25, 0.5))], pad_id=PAD, micro_batch_tokens=1000)
    assert torch.equal(batch.weight_N, torch.tensor([0.25, 0.5]))
