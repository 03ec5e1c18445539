"""Token scores of student and self-teacher: by hand, and against a slow reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from selfteach.evaluation.token_scores import (
    ScoreRequest,
    ScoringLimits,
    compare_logits,
    score_rollouts,
)
from selfteach.models.lm_head import Scores
from selfteach.models.policy import Policy, Schedule

REQUESTS = [
    ScoreRequest((1, 5, 6), (7, 8, 2), {"long": (1, 9, 10, 11, 12, 5, 6), "short": (1, 4)}),
    ScoreRequest((1, 6), (9, 2), {"short": (1, 4, 4)}),
    ScoreRequest((1, 6, 7, 8, 9), (3, 4, 5, 6, 2), {"long": (1, 3), "short": (1, 6, 7, 8, 9)}),
    ScoreRequest((1, 7), (5, 2), {}),
]


def test_two_entries_by_hand() -> None:
    # student (3/4, 1/4), teacher (1/2, 1/2), the second entry was sampled
    student, teacher = torch.tensor([[3.0, 1.0]]).log().double(), torch.zeros(1, 2).double()
    scores = {k: v.item() for k, v in compare_logits(student, teacher, torch.tensor([1])).items()}
    expected = {
        "student_logp": math.log(1 / 4),
        "teacher_logp": math.log(1 / 2),
        "advantage": math.log(2),
        "kl_forward": 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
        "kl_reverse": 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2),
        "student_entropy": -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)),
        "teacher_entropy": math.log(2),
    }
    assert scores == pytest.approx(expected, rel=1e-7)


def test_a_probability_of_zero_gives_finite_scores() -> None:
    certain = torch.tensor([[0.0, -math.inf]])
    scores = compare_logits(certain, certain, torch.tensor([0]))
    assert all(value.item() == 0 for value in scores.values())


def slow(model, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities at each token of the answer, one forward pass per token, [tokens, V]."""
    with torch.no_grad():
        rows = [
            model(input_ids=torch.tensor([[*prompt, *answer[:t]]])).logits[0, -1].double()
            for t in range(len(answer))
        ]
    return torch.stack(rows).log_softmax(-1)


@pytest.mark.parametrize(
    "limits", [ScoringLimits(10_000, 10_000), ScoringLimits(1, 1), ScoringLimits(24, 3)]
)
def test_scores_equal_the_slow_reference(tiny_llama, limits: ScoringLimits) -> None:
    model = tiny_llama.double()
    policy = Policy(model, Schedule(1e-3))
    scores = score_rollouts(
        policy.score, policy.score, REQUESTS, pad_id=0, device=policy.device, limits=limits
    )
    assert [set(contexts) for contexts in scores] == [
        {"long", "short"},
        {"short"},
        {"long", "short"},
        set(),
    ]
    for request, contexts in zip(REQUESTS, scores, strict=True):
        s = slow(model, request.prompt_ids, request.token_ids)
        sampled = torch.tensor(request.token_ids)[:, None]
        for name, values in contexts.items():
            t = slow(model, request.teacher_prompts[name], request.token_ids)
            expected = {
                "student_logp": s.gather(1, sampled)[:, 0],
                "teacher_logp": t.gather(1, sampled)[:, 0],
                "advantage": (t - s).gather(1, sampled)[:, 0],
                "kl_forward": (t.exp() * (t - s)).sum(1),
                "kl_reverse": (s.exp() * (s - t)).sum(1),
                "student_entropy": -(s.exp() * s).sum(1),
                "teacher_entropy": -(t.exp() * t).sum(1),
            }
            assert values.keys() == expected.keys()
            for key, value in expected.items():
                np.testing.assert_allclose(values[key], value.numpy(), atol=1e-9, err_msg=key)


def test_the_same_prompt_gives_the_same_scores(tiny_llama) -> None:
    policy = Policy(tiny_llama, Schedule(1e-3))
    requests = [ScoreRequest(r.prompt_ids, r.token_ids, {"same": r.prompt_ids}) for r in REQUESTS]
    scores = score_rollouts(
        policy.score,
        policy.score,
        requests,
        pad_id=0,
        device=policy.device,
        limits=ScoringLimits(64, 7),
    )
    for contexts in scores:
        assert np.abs(contexts["same"]["advantage"]).max() < 1e-5
        assert contexts["same"]["kl_forward"].max() < 1e-5


def test_the_student_is_run_once_and_logits_exist_for_one_chunk(
    tiny_llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, rows, chunks = Policy(tiny_llama, Schedule(1e-3)), [], []
    original = Scores.logits

    def logits(self: Scores, chosen: slice) -> torch.Tensor:
        chunks.append(chosen.stop - chosen.start)
        return original(self, chosen)

    def student(side):
        rows.append(len(side.ids_BT))
        return policy.score(side)

    monkeypatch.setattr(Scores, "logits", logits)
    score_rollouts(
        student, policy.score, REQUESTS, pad_id=0, device=policy.device, limits=ScoringLimits(20, 2)
    )
    assert sum(rows) == len(REQUESTS) and max(rows) > 1
    assert max(chunks) == 2
