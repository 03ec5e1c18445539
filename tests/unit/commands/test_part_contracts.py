"""`selfteach check` runs the contract of each part of one's own, and says what is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfteach.commands.check.part_contracts import check_parts
from selfteach.config.recipe_file import study_from
from selfteach.errors import PartError
from selfteach.trainer.build import build

PARTS = """
import random
import numpy as np
import torch
from selfteach.models.teacher import LiveTeacher
from selfteach.types import Critique, CritiqueFailure, CritiqueStep, Problem, TokenWeights, Verdict
from selfteach.losses.policy_gradient import token_logp
from selfteach.protocols import Objective

calls = []

def random_verdict(problem, text):
    return Verdict.of_final(random.random() < 0.5, str(random.random()))

def numpy_verdict(problem, text):
    return Verdict(np.bool_(True), True, "a")

def true(problem, text):
    return True

def random_spans(text):
    return [(0, random.randint(0, len(text)))]

def backward_spans(text):
    return [(3, 1)]

def fewer(judged):
    return [CritiqueFailure("none")]

def unwritable(judged):
    return [Critique("D", (CritiqueStep("a", "new", original=b"x"),), "a", 0) for _ in judged]

def counted(judged):
    calls.append(len(judged))
    return [CritiqueFailure("none") for _ in judged]

def random_context(critiqued):
    return [random.choice("abc") + random.choice("abc") for _ in critiqued]

def numbers(critiqued):
    return [1 for _ in critiqued]

class Plain(Objective):
    needs_teacher = False

    def denominators(self, samples):
        return (float(len(samples)),)

    def token_weights(self, samples, counts, update):
        return [TokenWeights((1 / counts[0],) * len(s.rollout.token_ids)) for s in samples]

    def per_token(self, logits_CV, teacher_logits_CV, batch, rows):
        logp_C = token_logp(logits_CV, batch.ids_N[rows], 1.0)
        return {"loss": -logp_C, "logp": logp_C.detach()}

class Short(Plain):
    def token_weights(self, samples, counts, update):
        return [TokenWeights((1.0,)) for s in samples]

class Infinite(Plain):
    def per_token(self, logits_CV, teacher_logits_CV, batch, rows):
        values = super().per_token(logits_CV, teacher_logits_CV, batch, rows)
        return {**values, "loss": values["loss"] / 0}

class PerBatch(Plain):
    def loss(self, student, teacher, batch, chunk_tokens):
        total, values = super().loss(student, teacher, batch, chunk_tokens)
        return total / len(batch.ids_N), values

class Summed(Plain):
    def per_token(self, logits_CV, teacher_logits_CV, batch, rows):
        values = super().per_token(logits_CV, teacher_logits_CV, batch, rows)
        return {**values, "loss": values["loss"].sum()}

class Forgetful(LiveTeacher):
    def __init__(self, policy):
        super().__init__(policy)
        self.scale = 1.0

    def state(self):
        return {"scale": torch.tensor(self.scale)}

    def load_state(self, state):
        for weight in self._policy.trainable.values():
            weight.data.mul_(1.1)

class Noisy(LiveTeacher):
    def score(self, sequences):
        for weight in self._policy.trainable.values():
            weight.data.mul_(1.0 + 0.01 * random.random())
        return super().score(sequences)

class Nothing:
    pass

def other_problems(split):
    return [{"question": f"a b c d {random.choice('abcdefgh')} {c}", "answer": "a"} for c in "abcd"]

def same_ids(split):
    return [Problem("x", f"a b c d {c}", "a") for c in "abcd"]

def no_rows(split):
    return {"train": []}
"""
SECTIONS = {
    "verifier": lambda part: {"data": {"verifier": part}},
    "splitter": lambda part: {"data": {"steps": part}},
    "problems": lambda part: {"data": part, "model": {"templates": "lab"}, "critic": False},
    "critic": lambda part: {"critic": part},
    "context": lambda part: {"context": part},
    "objective": lambda part: {"objective": part, "context": {"type": "none"}},
    "teacher": lambda part: {"teacher": part},
}


def checked(folder: Path, kind: str, name: str) -> list[str]:
    """Build and check a recipe of the lab with one part of the file above."""
    file = folder / "parts.py"
    file.write_text(PARTS)
    recipe = {
        "data": {"type": "lab", "train": 4, "validation": 2, "test": 2},
        "critic": {"type": "oracle"}, "context": {"type": "step_aligned"},
        "train": {"problems_per_step": 2, "group_size": 2, "steps": 1},
    }  # fmt: skip
    for section, value in SECTIONS[kind]({"type": f"{file}:{name}"}).items():
        is_problems = kind == "problems" or section == "context" or value is False
        recipe[section] = value if is_problems else {**recipe.get(section, {}), **value}
    if kind == "problems":
        recipe["context"] = {"type": "none"}
    chosen = study_from(recipe).recipe("run")
    return check_parts(chosen, build(chosen), {})


@pytest.mark.parametrize(
    ("kind", "name", "line"),
    [
        ("verifier", "random_verdict", "and the same text returned Verdict("),
        ("verifier", "numpy_verdict", "returned a Verdict whose correct is a numpy bool"),
        ("verifier", "true", "returned a bool and not a Verdict (Verdict.of_final"),
        ("splitter", "random_spans", "two calls with the same text returned"),
        ("splitter", "backward_spans", "returned the span (3, 1) after 0"),
        ("critic", "fewer", "returned 1 for 6 rollouts: one critique each"),
        ("critic", "unwritable", "its Critique cannot be written as JSON"),
        ("context", "random_context", "two calls with the same rollouts returned different contexts"),
        ("context", "numbers", "returned a int among its contexts"),
        ("objective", "Short", "returned 1 weights for a rollout of"),
        ("objective", "Infinite", "its loss is not finite"),
        ("objective", "PerBatch", "in several: put all denominators into token_weights"),
        ("objective", "Summed", "NoneType, Batch, int) raised ValueError: loss of shape ()"),
        ("objective", "Nothing", "has no denominators, token_weights, per_token, loss, needs_teacher"),
        ("teacher", "Forgetful", "load_state(state()) changes its logits"),
        ("teacher", "Noisy", "two calls of score with the same sequences returned different logits"),
        ("teacher", "Nothing", "has no score, update, state, load_state"),
        ("problems", "other_problems", "are others at the second call"),
        ("problems", "same_ids", "4 problems of train have the id 'x'"),
        ("problems", "no_rows", "returned a dict and not a list of problems or rows"),
    ],
)  # fmt: skip
def test_a_broken_contract_is_one_line(tmp_path: Path, kind: str, name: str, line: str) -> None:
    with pytest.raises(PartError) as error:
        checked(tmp_path, kind, name)
    message = str(error.value)
    assert message.startswith(f"{kind} ") and f":{name}" in message and "\n" not in message
    assert line in message


def test_a_part_whose_contract_holds_is_listed_with_its_source(tmp_path: Path) -> None:
    (line,) = checked(tmp_path, "objective", "Plain")
    assert line.startswith("objective: parts.py:Plain, source ")
    assert line.endswith("its contract holds on 6 made-up rollouts of 2 problems")


def test_a_critic_is_called_once_for_all_arms_that_have_it(tmp_path: Path) -> None:
    checked(tmp_path, "critic", "counted")  # writes the file
    critic = {"type": f"{tmp_path}/parts.py:counted"}
    arms = {"a": {"context": {"type": "step_aligned"}}, "b": {"context": {"type": "holistic"}}}
    data = {"type": "lab", "train": 4, "validation": 2, "test": 2}
    study = study_from({"data": data, "critic": critic, "arms": arms})
    cache: dict = {}
    built = build(study.recipe("a"))
    for arm in arms:
        check_parts(study.recipe(arm), built, cache)
    assert len(cache) == 1
