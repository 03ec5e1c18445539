"""Token weights, masks and denominators; a step split in any way has the same loss and gradient."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfteach.errors import AlignmentError
from selfteach.feedback.alignment import first_error_token
from selfteach.losses import fused
from selfteach.losses.divergence import Divergence
from selfteach.losses.objectives import Anneal, Distillation, Grpo, Hybrid
from selfteach.losses.token_masks import TokenMask
from selfteach.models.lm_head import Head, Scores, chunked_sum
from selfteach.protocols import Objective
from selfteach.trainer.batching import check_same_tokens, collate
from selfteach.types import (
    Batch,
    Critique,
    CritiquedRollout,
    CritiqueFailure,
    Problem,
    Rollout,
    TokenWeights,
    TrainingSample,
    Verdict,
)

VOCABULARY = 11


def sample(
    question: str,
    length: int,
    *,
    correct: bool = False,
    has_teacher: bool = True,
    error: int | None = None,
    changed: tuple[tuple[int, int], ...] = (),
) -> TrainingSample:
    answer = tuple((3 * i + len(question)) % VOCABULARY for i in range(length))
    rollout = Rollout(
        Problem(question, question, "x"), 0, (1, 2), answer, (-0.7,) * length, "", True, 0
    )
    return TrainingSample(
        CritiquedRollout(rollout, Verdict(correct, True, "x"), None),
        teacher_prompt_ids=(1, 2, 3, 4) if has_teacher else None,
        dropped=None if has_teacher else "no critique",
        first_error_token=error,
        changed_spans=changed,
    )


def weights_of(
    objective: Objective, samples: list[TrainingSample], update: int = 0
) -> tuple[list[TokenWeights], tuple[float, ...]]:
    counts = objective.denominators(samples)
    return objective.token_weights(samples, counts, update), counts


def mask(objective: Objective, samples: list[TrainingSample]) -> list[tuple[float, ...]]:
    """Return weights before the division by the denominator."""
    token_weights, (count,) = weights_of(objective, samples)
    return [
        tuple(round(w * count, 12) for w in weights_of_sample.weights)
        for weights_of_sample in token_weights
    ]


def distillation(**changes: object) -> Distillation:
    return Distillation(Divergence("reverse_kl"), 1.0, **changes)  # type: ignore[arg-type]


def masked(*token_mask: object) -> Distillation:
    return distillation(token_mask=TokenMask(*token_mask))  # type: ignore[arg-type]


def hybrid(
    weight: float | Anneal, *, grpo_weight: float | None = None, grpo_tokens: str = "all", **changes
) -> Hybrid:
    schedule = weight if isinstance(weight, Anneal) else Anneal(weight, weight)
    return Hybrid(distillation(**changes), Grpo(1.0), schedule, grpo_weight, grpo_tokens)  # type: ignore[arg-type]


SAMPLES = [
    sample("a", 3, correct=True),
    sample("b", 2, error=1),
    sample("c", 4, has_teacher=False),
    sample("d", 5, error=2),
]


@pytest.mark.parametrize(
    ("token_mask", "expected"),
    [
        ("all", [(1, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1, 1, 1, 1)]),
        ("incorrect", [(0, 0, 0), (1, 1), (0, 0, 0, 0), (1, 1, 1, 1, 1)]),
        ("correct", [(1, 1, 1), (0, 0), (0, 0, 0, 0), (0, 0, 0, 0, 0)]),
    ],
)
def test_masks_by_verdict(token_mask: str, expected: list[tuple[float, ...]]) -> None:
    objective = masked(token_mask)
    assert objective.denominators(SAMPLES) == (sum(map(sum, expected)),)
    assert mask(objective, SAMPLES) == expected


def test_tokens_from_the_first_error_on_pass() -> None:
    objective = masked("all", True)
    assert mask(objective, SAMPLES) == [(0, 0, 0), (0, 1), (0, 0, 0, 0), (0, 0, 1, 1, 1)]
    assert objective.denominators(SAMPLES) == (4,)


def test_sequence_mean_gives_every_rollout_the_same_weight() -> None:
    objective = distillation(aggregation="sequence_mean", token_mask=TokenMask("all", True))
    token_weights, (count,) = weights_of(objective, SAMPLES)
    assert count == 2
    assert [sum(weights_of_sample.weights) for weights_of_sample in token_weights] == pytest.approx(
        [0, 0.5, 0, 0.5]
    )


def test_grpo_counts_silent_groups_but_does_not_score_them() -> None:
    samples = [
        sample("a", 3, correct=True),
        sample("a", 2),
        sample("b", 4),
        sample("b", 4),
    ]
    token_weights, (count,) = weights_of(Grpo(1.0), samples)
    assert count == 13
    # Two answers, one right: mean ½, unbiased std 1/√2, so ±.5 / (.7071 + 1e-4).
    assert token_weights[0].advantage == pytest.approx(0.5 / (0.5**0.5 + 1e-4))
    assert token_weights[1].advantage == -token_weights[0].advantage
    assert not any(token_weights[2].weights) and not any(token_weights[3].weights)
    penalised, _ = weights_of(Grpo(1.0, kl_coef=0.1), samples)
    assert all(all(weights_of_sample.weights) for weights_of_sample in penalised), (
        "the penalty holds everywhere"
    )


def gradient_of(
    objective: Objective, samples: list[TrainingSample], micro_batch_tokens: int, update: int = 0
) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a bigram model, in float64, through the real path."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCABULARY, 6, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCABULARY, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher_head = Head(torch.randn(VOCABULARY, 6, generator=generator, dtype=torch.float64))
    token_weights, _ = weights_of(objective, samples, update)
    loss = 0.0
    for batch in collate(samples, token_weights, pad_id=0, micro_batch_tokens=micro_batch_tokens):
        side = batch.student
        hidden = embedding[side.ids_BT[side.rows_N, side.columns_N]]
        teacher = Scores.single(hidden, teacher_head) if batch.teacher else None

        def per_token(logits, rows, batch=batch, teacher=teacher):
            teacher_logits = teacher.logits(rows) if teacher else None
            return objective.per_token(logits, teacher_logits, batch, rows)

        total, _ = chunked_sum(
            per_token,
            Scores.single(hidden, Head(head)),
            batch.weight_N.double(),
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
    kind=st.sampled_from(["token_mean", "sequence_mean", "grpo", "hybrid", "others"]),
)
@settings(max_examples=40, deadline=None)
def test_any_split_has_the_same_loss_and_gradient(shape: list, micro: int, kind: str) -> None:
    samples = [sample("q", n, correct=c, has_teacher=t or kind == "grpo") for n, c, t in shape]
    objective: Objective
    match kind:
        case "grpo":
            objective = Grpo(1.0, kl_coef=0.1)
        case "hybrid":
            objective = hybrid(0.3, aggregation="sequence_mean")
        case "others":
            samples = [
                dataclasses.replace(one, changed_spans=((0, 2), (3, 4)))
                for one in samples
                if one.rollout.token_ids[3:]
            ]
            objective = hybrid(
                0.3, grpo_tokens="others", token_mask=TokenMask(changed_steps_fraction=0.5)
            )
        case _:
            objective = distillation(aggregation=kind)
    if not any(
        any(weights_of_sample.weights) for weights_of_sample in weights_of(objective, samples)[0]
    ):
        return
    whole, whole_gradient = gradient_of(objective, samples, 10_000)
    split, split_gradient = gradient_of(objective, samples, micro)
    assert split == pytest.approx(whole, rel=1e-12)
    assert torch.allclose(split_gradient, whole_gradient, rtol=1e-12, atol=1e-15)


def test_a_dropped_sample_is_as_if_absent() -> None:
    objective = distillation()
    with_it = gradient_of(objective, SAMPLES, 100)
    without = gradient_of(objective, [SAMPLES[0], SAMPLES[1], SAMPLES[3]], 100)
    assert with_it[0] == pytest.approx(without[0], rel=1e-12)
    assert torch.equal(with_it[1], without[1])


def test_the_importance_weight_scales_a_tokens_loss() -> None:
    capped, plain = distillation(importance_cap=1e9), distillation()
    token_weights, _ = weights_of(plain, SAMPLES[:1])
    (batch,) = collate(SAMPLES[:1], token_weights, pad_id=0, micro_batch_tokens=100)
    logits, teacher = torch.randn(3, VOCABULARY), torch.randn(3, VOCABULARY)
    loss = plain.per_token(logits, teacher, batch, slice(None))
    weighted = capped.per_token(logits, teacher, batch, slice(None))
    ratio = (loss["logp"] - batch.sampled_logp_N).exp()
    assert torch.allclose(weighted["loss"], loss["loss"] * ratio)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_at_the_temperature_that_sampled(temperature: float) -> None:
    objective = Distillation(Divergence(kind="reverse_kl"), temperature)
    token_weights, _ = weights_of(objective, SAMPLES[:1])
    (batch,) = collate(SAMPLES[:1], token_weights, pad_id=0, micro_batch_tokens=100)
    logits, teacher = torch.randn(2, 3, VOCABULARY).double()
    values = objective.per_token(logits, teacher, batch, slice(None))
    want = (logits / temperature).log_softmax(-1).gather(-1, batch.ids_N[:, None])[:, 0]
    torch.testing.assert_close(values["logp"], want)


@pytest.mark.parametrize("sampling_temperature", [1.0, 1.1])
def test_a_sampled_token_loss_has_the_gradient_of_its_divergence_at_any_sampling_temperature(
    sampling_temperature: float,
) -> None:
    spec = Divergence("reverse_kl", support="sampled", control_variate=True)
    objective = Distillation(spec, sampling_temperature)
    token_weights, _ = weights_of(objective, SAMPLES[:1])
    (batch,) = collate(SAMPLES[:1], token_weights, pad_id=0, micro_batch_tokens=100)
    student = torch.randn(VOCABULARY).double().requires_grad_()
    teacher = torch.randn(VOCABULARY).double()
    got = torch.zeros_like(student)
    for token in range(VOCABULARY):  # the exact expectation over the token that was sampled
        one = dataclasses.replace(batch, ids_N=torch.full_like(batch.ids_N, token))
        rows = (x.expand(len(one.ids_N), -1) for x in (student, teacher.clone()))
        loss = objective.per_token(*(row.contiguous() for row in rows), one, slice(None))["loss"][0]
        chance = (student.detach() / sampling_temperature).softmax(-1)[token]
        got += chance * torch.autograd.grad(loss, student)[0]
    kl = (student.log_softmax(-1).exp() * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum()
    torch.testing.assert_close(got, torch.autograd.grad(kl, student)[0])


def test_batches_hold_the_answers_tokens_on_both_sides() -> None:
    token_weights, _ = weights_of(distillation(), SAMPLES)
    batches = collate(SAMPLES, token_weights, pad_id=0, micro_batch_tokens=30)
    assert sum(len(batch.ids_N) for batch in batches) == 3 + 2 + 5
    for batch in batches:
        assert batch.student.ids_BT.numel() + batch.teacher.ids_BT.numel() <= 30
        check_same_tokens(batch)


def test_a_teacher_that_scores_other_tokens_is_an_error() -> None:
    token_weights, _ = weights_of(distillation(), SAMPLES)
    batch = collate(SAMPLES, token_weights, pad_id=0, micro_batch_tokens=1000)[0]
    ids = batch.teacher.ids_BT.clone()
    ids[0, batch.teacher.columns_N[0] + 1] += 1
    broken = dataclasses.replace(batch, teacher=dataclasses.replace(batch.teacher, ids_BT=ids))
    with pytest.raises(AlignmentError, match="teacher"):
        check_same_tokens(broken)


def test_the_kl_penalty_is_weighted_and_added() -> None:
    samples = [sample("a", 3, correct=True), sample("a", 2)]
    plain, penalised = Grpo(1.0), Grpo(1.0, kl_coef=0.3)
    token_weights, _ = weights_of(penalised, samples)
    (batch,) = collate(samples, token_weights, pad_id=0, micro_batch_tokens=1000)
    logits, initial = torch.randn(5, VOCABULARY), torch.randn(5, VOCABULARY)
    rows, index = slice(None), batch.ids_N[:, None]
    delta = (initial.log_softmax(-1) - logits.log_softmax(-1)).gather(1, index)[:, 0]
    values = penalised.per_token(logits, initial, batch, rows)
    expected = plain.per_token(logits, None, batch, rows)["loss"] + 0.3 * (delta.exp() - delta - 1)
    assert torch.allclose(values["loss"], expected, atol=1e-6)


def test_the_first_error_s_token_begins_its_step() -> None:
    spans = [(0, 6), (6, 12), (12, 14)]

    def at(first_error: int | None) -> int | None:
        return first_error_token(Critique("D", (), "k", first_error), spans)

    assert (at(0), at(1), at(2)) == (0, 6, 12)
    assert at(None) is None and at(3) is None, "no wrong step, or none that stands in the answer"
    assert first_error_token(CritiqueFailure("asleep"), spans) is None
    assert first_error_token(None, spans) is None


def test_changed_steps_pass_their_earliest_tokens_up_to_the_fraction() -> None:
    changed = sample("d", 12, error=3, changed=((3, 6), (8, 12)))

    def passing(*token_mask: object) -> list[int]:
        return [i for i, weight in enumerate(TokenMask(*token_mask).mask(changed)) if weight]  # type: ignore[arg-type]

    assert passing("all", False, 1.0) == [3, 4, 5, 8, 9, 10, 11]
    assert passing("all", False, 0.25) == [3, 4, 5], "a quarter of 12"
    assert passing("all", False, 0.4) == [3, 4, 5, 8], "4.8, rounded down"
    assert passing("all", False, 0.05) == [], "less than one token"
    assert passing("correct", False, 1.0) == []
    late = dataclasses.replace(changed, first_error_token=5)
    assert TokenMask("all", True, 0.25).mask(late) == [0] * 5 + [1, 0, 0, 1, 1, 0, 0]
    behind = dataclasses.replace(changed, scored_from=4)
    assert TokenMask(changed_steps_fraction=0.25).mask(behind) == [0] * 4 + [1, 1, 0, 0, 1, 0, 0, 0]
    nothing_changed = dataclasses.replace(changed, changed_spans=())
    assert not any(TokenMask(changed_steps_fraction=1.0).mask(nothing_changed))


def test_the_hybrid_matches_a_computation_by_hand() -> None:
    """Two answers of one token over two entries, the second one wrong and the only one distilled.

    s = (½, ½), t = (⅘, ⅕): KL(s‖t) = ½ ln(1 / 0.64), its gradient in logit i is s_i (ln(s_i/t_i) − KL).
    GRPO: advantages ±A with ratio 1; the gradient is −A_n (1[y = i] − s_i). Weight ¼: distillation
    has ¼ of one token, GRPO ¾ of a mean over two.
    """
    right, wrong = (
        dataclasses.replace(one, critiqued=dataclasses.replace(one.critiqued, rollout=rollout))
        for one, token in ((sample("a", 1, correct=True), 0), (sample("a", 1), 1))
        for rollout in [dataclasses.replace(one.rollout, token_ids=(token,))]
    )
    objective = hybrid(0.25, token_mask=TokenMask("incorrect"))
    token_weights, counts = weights_of(objective, [right, wrong])
    assert counts == (1, 2)
    assert [weights_of_sample.weights for weights_of_sample in token_weights] == [
        (0.375,),
        (0.625,),
    ]
    assert [weights_of_sample.shares for weights_of_sample in token_weights] == [(0.0,), (0.4,)]
    (batch,) = collate([right, wrong], token_weights, pad_id=0, micro_batch_tokens=1000)
    exact = {
        "weight_N": [0.375, 0.625],
        "share_N": [0, 0.4],
        "advantage_N": [s.advantage for s in token_weights],
    }
    batch = dataclasses.replace(
        batch, **{k: torch.tensor(v, dtype=torch.float64) for k, v in exact.items()}
    )
    logits = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.8, 0.2]], dtype=torch.float64).log().expand(2, 2)
    values = objective.per_token(logits, teacher, batch, slice(None))
    loss = (batch.weight_N * values["loss"]).sum()
    loss.backward()
    kl, a = 0.5 * math.log(1 / 0.64), 0.5 / (0.5**0.5 + 1e-4)
    assert loss.item() == pytest.approx(0.375 * -a + 0.375 * a + 0.25 * kl, rel=1e-12)
    pulls = [0.5 * (math.log(0.5 / t) - kl) for t in (0.8, 0.2)]
    first = [0.375 * -a * 0.5, 0.375 * a * 0.5]
    second = [0.375 * a * -0.5 + 0.25 * pulls[0], 0.375 * a * 0.5 + 0.25 * pulls[1]]
    expected = torch.tensor([first, second], dtype=torch.float64)
    assert torch.allclose(logits.grad, expected, rtol=1e-12, atol=1e-15)  # type: ignore[arg-type]
    assert values["teacher_logratio"].tolist() == pytest.approx([0, math.log(0.2 / 0.5)]), (
        "first: not distilled"
    )


GROUP = [
    sample("aa", 3, correct=True, changed=()),
    sample("aa", 5, error=2, changed=((2, 5),)),
    sample("b", 2, error=0, changed=((0, 2),)),
    sample("cc", 4, has_teacher=False),
    sample("cc", 2, correct=True),
]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize(
    "token_mask", [TokenMask(), TokenMask("incorrect"), TokenMask(changed_steps_fraction=0.5)]
)
def test_a_mixture_has_both_objectives_at_its_ends(aggregation: str, token_mask: TokenMask) -> None:
    for weight, alone in (
        (0.0, Grpo(1.0)),
        (1.0, distillation(token_mask=token_mask, aggregation=aggregation)),
    ):
        loss, gradient = gradient_of(alone, GROUP, 1000)
        mixed, mixed_gradient = gradient_of(
            hybrid(weight, token_mask=token_mask, aggregation=aggregation), GROUP, 1000
        )
        assert mixed == pytest.approx(loss, rel=1e-12)
        assert torch.allclose(mixed_gradient, gradient, rtol=1e-12, atol=1e-15)
        assert gradient.abs().sum() > 0


def test_a_mixture_is_the_weighted_sum_of_both() -> None:
    for objective, (w, v) in (
        (hybrid(0.3, token_mask=TokenMask("incorrect")), (0.3, 0.7)),
        (hybrid(0.3, grpo_weight=2.0, token_mask=TokenMask("incorrect")), (0.3, 2.0)),
    ):
        distilled = gradient_of(distillation(token_mask=TokenMask("incorrect")), GROUP, 1000)
        rewarded = gradient_of(Grpo(1.0), GROUP, 1000)
        loss, gradient = gradient_of(objective, GROUP, 1000)
        # Weights and shares are float32 in a batch.
        assert loss == pytest.approx(w * distilled[0] + v * rewarded[0], rel=1e-6)
        assert torch.allclose(gradient, w * distilled[1] + v * rewarded[1], rtol=1e-5, atol=1e-8)


def test_grpo_on_the_other_tokens_shares_none_with_distillation() -> None:
    objective = hybrid(
        0.5, grpo_weight=1.0, grpo_tokens="others", token_mask=TokenMask(changed_steps_fraction=0.5)
    )
    token_weights, counts = weights_of(objective, GROUP)
    # Distilled: two of five tokens of the second answer, one of two of the third.
    assert counts == (3, 16 - 3)
    d, g = 0.5 / 3, 1 / 13
    assert token_weights[1].weights == pytest.approx((g, g, d, d, g))
    assert token_weights[1].shares == (0, 0, 1, 1, 0)
    assert token_weights[2].weights == pytest.approx((d, 0)), "alone in its group: no advantage"
    assert token_weights[3].weights == pytest.approx((g,) * 4), "no context: by GRPO all the same"
    batches = collate(GROUP, token_weights, pad_id=0, micro_batch_tokens=1000)
    assert [batch.teacher is None for batch in batches] == [True, False]


def test_a_non_finite_teacher_is_harmless_where_nothing_is_distilled() -> None:
    objective = hybrid(0.5, token_mask=TokenMask("incorrect"))
    token_weights, _ = weights_of(objective, GROUP[:2])
    (batch,) = collate(GROUP[:2], token_weights, pad_id=0, micro_batch_tokens=1000)
    logits = torch.randn(8, VOCABULARY, requires_grad=True)
    teacher = torch.randn(8, VOCABULARY)
    broken = teacher.masked_fill((batch.share_N == 0)[:, None], float("nan"))
    gradients = []
    for scores in (teacher, broken):
        loss = (
            batch.weight_N * objective.per_token(logits, scores, batch, slice(None))["loss"]
        ).sum()
        gradients.append(torch.autograd.grad(loss, logits)[0])
    assert torch.equal(*gradients) and gradients[0].isfinite().all()


def test_an_annealed_weight_has_its_ends_and_a_straight_line_between() -> None:
    # Ten steps of two updates each: the last begins after 18 updates.
    weight = Anneal(0.8, 0.2, 18)
    assert [weight(update) for update in (0, 9, 18, 40)] == pytest.approx([0.8, 0.5, 0.2, 0.2])
    assert Anneal(0.8, 0.2)(0) == 0.2 and Anneal(0.3, 0.3, 5)(2) == pytest.approx(0.3)
    objective = hybrid(Anneal(1.0, 0.0, 4))
    for update, alone in ((0, distillation()), (4, Grpo(1.0)), (7, Grpo(1.0))):
        loss, gradient = gradient_of(alone, GROUP, 1000)
        annealed, annealed_gradient = gradient_of(objective, GROUP, 1000, update)
        assert annealed == pytest.approx(loss, rel=1e-12)
        assert torch.allclose(annealed_gradient, gradient, rtol=1e-12, atol=1e-15)


@dataclasses.dataclass(frozen=True, slots=True)
class Doubled(Distillation):
    """A subclass whose loss is twice its parent's."""

    def per_token(self, logits_CV, teacher_logits_CV, batch, rows):
        values = Distillation.per_token(self, logits_CV, teacher_logits_CV, batch, rows)
        return {**values, "loss": 2 * values["loss"]}


def bf16_inputs(width: int) -> tuple[Scores, Scores, Batch]:
    """Both sides' scores and a batch of eight tokens, in bf16 with a head that trains."""
    token_weights, _ = weights_of(distillation(), GROUP[:2])
    (batch,) = collate(GROUP[:2], token_weights, pad_id=0, micro_batch_tokens=1000)
    generator = torch.Generator().manual_seed(0)
    hidden, head, teacher_hidden, teacher_head = (
        (torch.randn(rows, width, generator=generator) / width**0.25).bfloat16()
        for rows in (8, VOCABULARY, 8, VOCABULARY)
    )
    student = Scores.single(hidden.requires_grad_(), Head(head.requires_grad_()))
    return student, Scores.single(teacher_hidden, Head(teacher_head)), batch


def test_a_subclass_with_another_per_token_is_never_bypassed_by_a_fused_loss(monkeypatch) -> None:
    student, teacher, batch = bf16_inputs(16)
    base, doubled = distillation(), Doubled(Divergence("reverse_kl"), 1.0)
    want, _ = base.loss(student, teacher, batch, 3)
    calls = []

    def fused_sum(*args: object) -> None:
        calls.append(args)
        raise ZeroDivisionError

    monkeypatch.setattr(fused, "supports", lambda *_: True)
    monkeypatch.setattr(fused, "divergence_sum", fused_sum)
    with pytest.raises(ZeroDivisionError):
        base.loss(student, teacher, batch, 3)
    got, values = doubled.loss(student, teacher, batch, 3)
    assert len(calls) == 1, "only the class whose per_token the fused loss replaces"
    torch.testing.assert_close(got.detach(), 2 * want.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close((batch.weight_N * values["loss"]).sum(), got.detach())


@pytest.mark.parametrize("part", [distillation, lambda: Doubled(Divergence("reverse_kl"), 1.0)])
def test_a_hybrid_computes_its_loss_from_per_token(part) -> None:
    student, teacher, batch = bf16_inputs(16)
    batch = dataclasses.replace(batch, share_N=torch.linspace(0, 1, 8))
    objective = Hybrid(part(), Grpo(1.0), Anneal(0.5, 0.5))
    total, values = objective.loss(student, teacher, batch, 3)
    with torch.no_grad():
        logits = student.logits(slice(None)), teacher.logits(slice(None))
    want = objective.per_token(*logits, batch, slice(None))
    assert values.keys() == want.keys()
    torch.testing.assert_close(values["loss"], want["loss"], rtol=1e-4, atol=1e-5)
    want_total = (batch.weight_N * want["loss"]).sum()
    torch.testing.assert_close(total.detach(), want_total, rtol=1e-4, atol=1e-5)


def test_an_objective_inherits_the_chunked_loss_from_the_protocol() -> None:
    class Likelihood(Objective):
        """Implements the four methods that have no default."""

        needs_teacher = False  # type: ignore[assignment]

        def denominators(self, samples):
            return (1.0,)

        def token_weights(self, samples, counts, update):
            return [TokenWeights((1.0,) * len(one.rollout.token_ids)) for one in samples]

        def per_token(self, logits_CV, teacher_logits_CV, batch, rows):
            logp_C = logits_CV.float().log_softmax(-1).gather(1, batch.ids_N[rows, None])[:, 0]
            return {"loss": -logp_C, "logp": logp_C.detach()}

    student, _, batch = bf16_inputs(16)
    total, values = Likelihood().loss(student, None, batch, 3)
    total.backward()
    ((hidden_NH, head, _),) = student.terms
    assert hidden_NH.grad is not None and head.weight_VH.grad is not None
    torch.testing.assert_close(total.detach(), -(batch.weight_N * values["logp"]).sum())
