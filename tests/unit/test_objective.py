"""Weights, gates and denominators; a step split in any way has the same loss and gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfteach.collate import check_same_tokens, collate
from selfteach.divergence import Divergence
from selfteach.errors import AlignmentError
from selfteach.objective import Distillation, Grpo, first_error_token
from selfteach.protocols import Objective
from selfteach.scores import Head, Scores, chunked_sum
from selfteach.types import Critique, Lesson, Marked, NoCritique, Problem, Rollout, Verdict

VOCABULARY = 11


def lesson(
    question: str,
    length: int,
    *,
    correct: bool = False,
    told: bool = True,
    error: int | None = None,
) -> Lesson:
    answer = tuple((3 * i + len(question)) % VOCABULARY for i in range(length))
    rollout = Rollout(
        Problem(question, question, "x"), 0, (1, 2), answer, (-0.7,) * length, "", True, 0
    )
    return Lesson(
        Marked(rollout, Verdict(correct, True, "x"), None),
        teacher_prompt_ids=(1, 2, 3, 4) if told else None,
        dropped=None if told else "no critique",
        first_error_token=error,
    )


def weights(objective: Objective, lessons: list[Lesson]) -> list[tuple[float, ...]]:
    return [signal.weights for signal in objective.weigh(lessons)[0]]


def distillation(**changes: object) -> Distillation:
    return Distillation(Divergence("reverse_kl"), 1.0, **changes)  # type: ignore[arg-type]


LESSONS = [
    lesson("a", 3, correct=True),
    lesson("b", 2, error=1),
    lesson("c", 4, told=False),
    lesson("d", 5, error=2),
]


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ("all", [(1, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1, 1, 1, 1)]),
        ("wrong", [(0, 0, 0), (1, 1), (0, 0, 0, 0), (1, 1, 1, 1, 1)]),
        ("right", [(1, 1, 1), (0, 0), (0, 0, 0, 0), (0, 0, 0, 0, 0)]),
    ],
)
def test_gates_by_verdict(gate: str, expected: list[tuple[float, ...]]) -> None:
    objective = distillation(gate=gate)
    assert weights(objective, LESSONS) == expected
    assert objective.weigh(LESSONS)[1] == sum(map(sum, expected))


def test_from_the_first_error_on() -> None:
    objective = distillation(from_first_error=True)
    assert weights(objective, LESSONS) == [(0, 0, 0), (0, 1), (0, 0, 0, 0), (0, 0, 1, 1, 1)]
    assert objective.weigh(LESSONS)[1] == 4


def test_sequence_mean_gives_every_answer_the_same_say() -> None:
    signals, count = distillation(aggregation="sequence_mean", from_first_error=True).weigh(LESSONS)
    assert count == 2
    assert [sum(signal.weights) for signal in signals] == pytest.approx([0, 1, 0, 1])


def test_grpo_counts_silent_groups_but_does_not_score_them() -> None:
    lessons = [
        lesson("a", 3, correct=True),
        lesson("a", 2),
        lesson("b", 4),
        lesson("b", 4),
    ]
    signals, count = Grpo(1.0).weigh(lessons)
    assert count == 13
    # Two answers, one right: mean ½, unbiased std 1/√2, so ±.5 / (.7071 + 1e-4).
    assert signals[0].advantage == pytest.approx(0.5 / (0.5**0.5 + 1e-4))
    assert signals[1].advantage == -signals[0].advantage
    assert not any(signals[2].weights) and not any(signals[3].weights)
    penalised, _ = Grpo(1.0, kl_weight=0.1).weigh(lessons)
    assert all(all(signal.weights) for signal in penalised), "the penalty holds everywhere"


def gradient_of(
    objective: Objective, lessons: list[Lesson], micro_batch_tokens: int
) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a bigram model, in float64, through the real path."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCABULARY, 6, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCABULARY, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher_head = Head(torch.randn(VOCABULARY, 6, generator=generator, dtype=torch.float64))
    signals, count = objective.weigh(lessons)
    loss = 0.0
    for batch in collate(lessons, signals, pad_id=0, micro_batch_tokens=micro_batch_tokens):
        side = batch.student
        hidden = embedding[side.ids_BT[side.rows_N, side.columns_N]]
        teacher = Scores.single(hidden, teacher_head)

        def told(logits, rows, batch=batch, teacher=teacher):
            return objective.per_token(logits, teacher.logits(rows), batch, rows)

        total, _ = chunked_sum(
            told,
            Scores.single(hidden, Head(head)),
            batch.weight_N.double() / count,
            chunk_tokens=3,
        )  # fmt: skip
        total.backward()
        loss += total.item()
    assert head.grad is not None
    return loss, head.grad


@given(
    shape=st.lists(
        st.tuples(st.integers(1, 6), st.booleans(), st.booleans()), min_size=2, max_size=7
    ),
    micro=st.integers(1, 80),
    kind=st.sampled_from(["token_mean", "sequence_mean", "grpo"]),
)
@settings(max_examples=40, deadline=None)
def test_any_split_has_the_same_loss_and_gradient(shape: list, micro: int, kind: str) -> None:
    lessons = [lesson("q", n, correct=c, told=t or kind == "grpo") for n, c, t in shape]
    objective = Grpo(1.0, kl_weight=0.1) if kind == "grpo" else distillation(aggregation=kind)
    if not any(any(signal.weights) for signal in objective.weigh(lessons)[0]):
        return
    whole, whole_gradient = gradient_of(objective, lessons, 10_000)
    split, split_gradient = gradient_of(objective, lessons, micro)
    assert split == pytest.approx(whole, rel=1e-12)
    assert torch.allclose(split_gradient, whole_gradient, rtol=1e-12, atol=1e-15)


def test_a_dropped_lesson_is_as_if_absent() -> None:
    objective = distillation()
    with_it = gradient_of(objective, LESSONS, 100)
    without = gradient_of(objective, [LESSONS[0], LESSONS[1], LESSONS[3]], 100)
    assert with_it[0] == pytest.approx(without[0], rel=1e-12)
    assert torch.equal(with_it[1], without[1])


def test_the_importance_weight_scales_a_tokens_loss() -> None:
    capped, plain = distillation(importance_cap=1e9), distillation()
    signals, _ = plain.weigh(LESSONS[:1])
    (batch,) = collate(LESSONS[:1], signals, pad_id=0, micro_batch_tokens=100)
    logits, teacher = torch.randn(3, VOCABULARY), torch.randn(3, VOCABULARY)
    loss = plain.per_token(logits, teacher, batch, slice(None))
    weighted = capped.per_token(logits, teacher, batch, slice(None))
    ratio = (loss["logp"] - batch.sampled_logp_N).exp()
    assert torch.allclose(weighted["loss"], loss["loss"] * ratio)


def test_batches_hold_the_answers_tokens_on_both_sides() -> None:
    signals, _ = distillation().weigh(LESSONS)
    batches = collate(LESSONS, signals, pad_id=0, micro_batch_tokens=30)
    assert sum(len(batch.ids_N) for batch in batches) == 3 + 2 + 5
    for batch in batches:
        assert batch.student.ids_BT.numel() + batch.teacher.ids_BT.numel() <= 30
        check_same_tokens(batch)


def test_a_teacher_that_scores_other_tokens_is_found_out() -> None:
    signals, _ = distillation().weigh(LESSONS)
    batch = collate(LESSONS, signals, pad_id=0, micro_batch_tokens=1000)[0]
    ids = batch.teacher.ids_BT.clone()
    ids[0, batch.teacher.columns_N[0] + 1] += 1
    broken = dataclasses.replace(batch, teacher=dataclasses.replace(batch.teacher, ids_BT=ids))
    with pytest.raises(AlignmentError, match="teacher"):
        check_same_tokens(broken)


def test_the_penalty_towards_the_initial_policy_is_weighed_and_added() -> None:
    lessons = [lesson("a", 3, correct=True), lesson("a", 2)]
    plain, penalised = Grpo(1.0), Grpo(1.0, kl_weight=0.3)
    signals, _ = penalised.weigh(lessons)
    (batch,) = collate(lessons, signals, pad_id=0, micro_batch_tokens=1000)
    logits, initial = torch.randn(5, VOCABULARY), torch.randn(5, VOCABULARY)
    rows, index = slice(None), batch.ids_N[:, None]
    delta = (initial.log_softmax(-1) - logits.log_softmax(-1)).gather(1, index)[:, 0]
    said = penalised.per_token(logits, initial, batch, rows)
    expected = plain.per_token(logits, None, batch, rows)["loss"] + 0.3 * (delta.exp() - delta - 1)
    assert torch.allclose(said["loss"], expected, atol=1e-6)


def test_the_first_error_s_token_begins_its_step() -> None:
    spans = [(0, 6), (6, 12), (12, 14)]

    def at(first_error: int | None) -> int | None:
        return first_error_token(Critique("D", (), "k", first_error), spans)

    assert (at(0), at(1), at(2)) == (0, 6, 12)
    assert at(None) is None and at(3) is None, "no wrong step, or none that stands in the answer"
    assert first_error_token(NoCritique("asleep"), spans) is None
    assert first_error_token(None, spans) is None
