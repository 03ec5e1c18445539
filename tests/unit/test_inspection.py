"""Per-token advantages, against a slow and obvious form."""

from __future__ import annotations

import pytest
import torch

from selfteach.build import build
from selfteach.config import Recipe
from selfteach.inspection.example import advantages, advantages_by_context
from selfteach.template_sets import Templates
from selfteach.types import Sampling

RECIPE = Recipe.model_validate(
    {
        "data": {"type": "lab", "train": 1, "validation": 12, "test": 1},
        "critic": {"type": "oracle"},
        "context": {"type": "step_aligned"},
    }
)


@pytest.fixture(scope="module")
def built():
    return build(RECIPE)


def test_advantages_are_differences_of_plain_log_probabilities(built) -> None:
    rollout = built.parts.engine.generate(built.task.validation[:1], Sampling(1, 1.0, 40, 0))[0]
    prompt = built.parts.renderer.teacher_prompt(rollout.problem, "# a")
    model = built.parts.policy.model

    @torch.no_grad()
    def slow(prefix: tuple[int, ...]) -> list[float]:
        ids, told = list(prefix), []
        for token in rollout.answer_ids:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            told.append(logits.log_softmax(-1)[token].item())
            ids.append(token)
        return told

    expected = [t - s for t, s in zip(slow(prompt), slow(rollout.prompt_ids), strict=True)]
    assert advantages(built, rollout, prompt) == pytest.approx(expected, abs=1e-4)
    own = advantages(built, rollout, rollout.prompt_ids)
    assert own == pytest.approx([0.0] * len(own), abs=1e-6)


def test_the_example_has_something_before_and_after_its_first_error(built) -> None:
    rollouts = built.parts.engine.generate(built.task.validation, Sampling(4, 1.0, 40, 0))
    contexts = ["reference", "step_aligned"]
    example = advantages_by_context(built, Templates("lab"), rollouts, contexts)
    assert example is not None and list(example["contexts"]) == contexts
    at, length = example["first_error_token"], len(example["tokens"])
    assert 0 < at < length and example["steps"][at] == example["steps"][at - 1] + 1
    for context in example["contexts"].values():
        assert len(context["advantage"]) == length
    # What the paper found: aligned feedback leaves right steps alone and denies the failing one.
    aligned = example["contexts"]["step_aligned"]["advantage"]
    failing = [aligned[t] for t in range(length) if example["steps"][t] == example["steps"][at]]
    before = [abs(a) for a in aligned[:at]]
    assert min(failing) < -1 and max(map(abs, failing)) > 3 * sum(before) / len(before)


def test_no_wrong_answer_no_example(built) -> None:
    assert advantages_by_context(built, Templates("lab"), [], ["reference"]) is None
