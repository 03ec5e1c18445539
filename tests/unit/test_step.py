"""The step, with scripted parts around a real small model: what each stage hands to the next."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from selfteach import protocols
from selfteach.config.recipe import Recipe
from selfteach.losses.divergence import Divergence, per_token
from selfteach.losses.objectives import Distillation, Grpo
from selfteach.models import prefix_cache
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.prompts.thinking import Thinking
from selfteach.runtime.run_folder import lesson_row
from selfteach.trainer.build import build
from selfteach.trainer.metrics import coverage, describe
from selfteach.trainer.step import Parts, learn, mark, teach, train_step
from selfteach.types import (
    Critique,
    CritiqueStep,
    Marked,
    NoCritique,
    Problem,
    Rollout,
    Sampling,
    Verdict,
)

PROBLEMS = [Problem(f"q{i}", question, "a") for i, question in enumerate(["a b", "c d e", "f"])]
ANSWERS = ["0 + a b = c # c", "0 + c d = e 1 - e e > a # a", "# a"]


class Scripted:
    """An engine that gives the answers it was told to, and remembers what it was given."""

    def __init__(self, encode: Callable[[Problem, str], Rollout]) -> None:
        self.encode, self.versions = encode, list[int]()

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        told = dict(zip((p.id for p in PROBLEMS), ANSWERS, strict=True))
        return [
            dataclasses.replace(
                self.encode(p, told[p.id]), sample=i, policy_version=(self.versions or [0])[-1]
            )
            for p in problems
            for i in range(sampling.samples)
        ]

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.versions.append(version)


def verify(problem: Problem, text: str) -> Verdict:
    return Verdict(text.endswith(problem.answer), True, text[-1])


def critic(judged: Sequence[tuple[Rollout, Verdict]]) -> list[Critique | NoCritique]:
    """Refuses the last question; finds the second step of the others wrong."""
    return [
        NoCritique("refused")
        if rollout.problem.id == "q2"
        else Critique("D", (CritiqueStep(rollout.text, "kept"),), "a", 1)
        for rollout, _ in judged
    ]


def context(marked: Sequence[Marked]) -> list[str | NoCritique]:
    return [m.critique if isinstance(m.critique, NoCritique) else "# a" for m in marked]


@pytest.fixture
def parts() -> Parts:
    data = {"type": "lab", "train": 1, "validation": 1, "test": 1}
    built = build(Recipe.model_validate({"data": data, "train": {"steps": 0}}))

    def encode(problem: Problem, text: str) -> Rollout:
        ids = built.parts.renderer.encode_answer(text)
        prompt = built.parts.renderer.solver_prompt(problem)
        return Rollout(problem, 0, prompt, ids, (-1.0,) * len(ids), text, True, 0)

    return dataclasses.replace(
        built.parts,
        engine=Scripted(encode),
        verify=verify,
        critic=critic,
        context=context,
        sampling=Sampling(2, 1.0, 40, 0),
    )


def lessons_of(parts: Parts) -> list:
    return teach(parts, mark(parts, parts.engine.generate(PROBLEMS, parts.sampling)))


def slow_loss(parts: Parts, lessons: Sequence, spec: Divergence) -> Tensor:
    """One answer at a time, full logits, plain form, mean over all tokens that are taught."""
    losses = []
    for lesson in lessons:
        if lesson.teacher_prompt_ids is None:
            continue
        answer = torch.tensor(lesson.rollout.answer_ids)

        def logits(prompt: Sequence[int], answer: Tensor = answer) -> Tensor:
            ids = torch.cat([torch.tensor(prompt), answer])[None]
            return parts.policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]

        with torch.no_grad():
            teacher = logits(lesson.teacher_prompt_ids)
        losses.append(per_token(spec, logits(lesson.rollout.prompt_ids), teacher, answer).loss)
    return torch.cat(losses).mean()


def test_scripted_parts_are_parts() -> None:
    assert isinstance(Scripted(lambda p, t: None), protocols.Engine)  # type: ignore[arg-type,return-value]
    for seam, fake in ((protocols.Verifier, verify), (protocols.Critic, critic),
                       (protocols.Context, context)):  # fmt: skip
        assert isinstance(fake, seam)


def test_what_is_said_of_an_answer_stays_with_it(parts: Parts) -> None:
    lessons = lessons_of(parts)
    assert [lesson.rollout.problem.id for lesson in lessons] == ["q0", "q0", "q1", "q1", "q2", "q2"]
    assert [lesson.dropped for lesson in lessons] == [None] * 4 + ["refused"] * 2
    assert [lesson.marked.verdict.correct for lesson in lessons] == [False] * 2 + [True] * 4
    # "0 + c d = e" has six tokens, so the second step begins at the seventh.
    assert [lesson.first_error_token for lesson in lessons[:4]] == [6, 6, 6, 6]


@pytest.mark.parametrize(
    "micro_batch_tokens, min_shared, recompute",
    [(1, 32, False), (60, 32, False), (10_000, 32, False), (10_000, 1, False), (10_000, 1, True)],
)
def test_learning_is_the_slow_loss_and_its_gradient(
    parts: Parts, monkeypatch, micro_batch_tokens: int, min_shared: int, recompute: bool
) -> None:
    monkeypatch.setattr(prefix_cache, "MIN_SHARED", min_shared)
    if recompute:
        data = {"type": "lab", "train": 1, "validation": 1, "test": 1}
        checkpointed = {"gradient_checkpointing": True}
        recipe = {"model": checkpointed, "data": data, "train": {"steps": 0}}
        built = build(Recipe.model_validate(recipe)).parts
        parts = dataclasses.replace(parts, policy=built.policy, teacher=built.teacher)
    spec = Divergence("reverse_kl")
    parts = dataclasses.replace(
        parts, objective=Distillation(spec, 1.0), micro_batch_tokens=micro_batch_tokens,
        chunk_tokens=5,
    )  # fmt: skip
    lessons = lessons_of(parts)
    expected = slow_loss(parts, lessons, spec)
    expected.backward()
    gradient = {n: p.grad.clone() for n, p in parts.policy.trainable.items() if p.grad is not None}
    parts.policy.optimizer.zero_grad()
    found: dict[str, Tensor] = {}

    def look(*_: object) -> None:
        found.update({n: p.grad.clone() for n, p in parts.policy.trainable.items()})  # type: ignore[union-attr]

    parts.policy.optimizer.register_step_pre_hook(look)
    metrics = learn(parts, lessons)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-4)
    scale = min(1.0, 1.0 / metrics["grad_norm"])  # the clip at norm 1
    for name, value in gradient.items():
        assert torch.allclose(found[name], scale * value, atol=1e-5), name
    assert metrics["tokens_trained"] == 2 * (9 + 15)


def test_a_step_publishes_and_tells_the_teacher(parts: Parts) -> None:
    updates = []
    teacher = parts.teacher

    class Watched:
        score, state, load_state = teacher.score, teacher.state, teacher.load_state

        def update(self) -> None:
            updates.append(parts.policy.version)

    parts = dataclasses.replace(parts, teacher=Watched(), updates_per_batch=3)
    lessons, metrics = train_step(parts, PROBLEMS)
    assert isinstance(parts.engine, Scripted)
    assert parts.engine.versions == [3] and updates == [1, 2, 3]
    assert metrics["answers_sampled"] == 6 and metrics["critiques"] == 4
    assert metrics["dropped"] == metrics["dropped/refused"] == pytest.approx(1 / 3)
    assert coverage(parts, lessons) == {"taught": pytest.approx(2 / 3), "end_supervised": 1.0}
    assert 0 <= metrics["repetition"] < 1 and metrics["hesitations"] == 0


def test_a_lesson_says_where_the_steps_of_its_answer_are(parts: Parts) -> None:
    for shown in (context, None):
        for lesson in lessons_of(dataclasses.replace(parts, context=shown)):
            text = lesson.rollout.text
            assert list(lesson.steps) == parts.split_steps(text)
            assert lesson_row(lesson)["steps"] == lesson.steps
            assert "".join(text[a:b] for a, b in lesson.steps) == text


def test_nothing_to_learn_leaves_the_weights(parts: Parts) -> None:
    before = {n: p.detach().clone() for n, p in parts.policy.trainable.items()}
    alike = [PROBLEMS[2]]  # refused by the critic; for GRPO: all answers score alike
    for objective, shown in ((parts.objective, context), (Grpo(1.0), None)):
        changed = dataclasses.replace(parts, objective=objective, context=shown)
        lessons, metrics = train_step(changed, alike)
        assert metrics["tokens_trained"] == 0 and metrics["loss"] == 0
        assert coverage(changed, lessons) == {"taught": 0.0}
    for name, param in parts.policy.trainable.items():
        assert torch.equal(param, before[name])


def test_a_thought_counts_as_the_recipe_says(
    parts: Parts, lab_tokenizer: PreTrainedTokenizerFast
) -> None:
    # As if "0 + a b =" were a thought: five tokens of the first answer, none of the last.
    unscored = Thinking(scored=False, marks=("0", "="))
    renderer = Renderer(lab_tokenizer, Templates("lab"), thinking=unscored)
    for shown in (context, None):
        changed = dataclasses.replace(parts, renderer=renderer, context=shown)
        by_question = {m.rollout.problem.id: m.scored_from for m in lessons_of(changed)}
        assert by_question["q0"] == 5 and (shown is not None or by_question["q2"] == 0)
        plain = dataclasses.replace(parts, context=shown)
        assert {lesson.scored_from for lesson in lessons_of(plain)} == {0}


def test_a_lesson_that_does_not_fit_is_dropped_whole(parts: Parts) -> None:
    fits = lessons_of(parts)[0]
    assert fits.teacher_prompt_ids is not None
    length = len(fits.teacher_prompt_ids) + len(fits.rollout.answer_ids)
    for room, dropped in ((length, None), (length - 1, "longer than the context window")):
        lesson = lessons_of(dataclasses.replace(parts, max_length=room))[0]
        assert lesson.dropped == dropped
        assert (lesson.teacher_prompt_ids is None) == (dropped is not None)


# The parts are read only; built anew for every example they would take seconds each.
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(max_length=st.integers(2, 60))
def test_nothing_of_a_lesson_is_ever_cut(parts: Parts, max_length: int) -> None:
    """Question, critique, header and end token are whole in every lesson that is taught."""
    lessons = lessons_of(dataclasses.replace(parts, max_length=max_length))
    header, end = parts.renderer.solver_prompt(PROBLEMS[0])[-1], parts.renderer.end_id
    for lesson in lessons:
        rollout, prompt = lesson.rollout, lesson.teacher_prompt_ids
        if lesson.context is None:
            assert lesson.dropped == "refused"
            continue
        whole = parts.renderer.teacher_prompt(rollout.problem, lesson.context)
        fits = len(whole) + len(rollout.answer_ids) <= max_length
        assert (lesson.dropped is None) == fits
        if prompt is not None:
            assert prompt == whole and len(prompt) + len(rollout.answer_ids) <= max_length
            text = " ".join(map(parts.renderer.token_text, prompt))
            assert rollout.problem.question in text and lesson.context in text
            assert prompt[-1] == header and rollout.answer_ids[-1] == end
            assert parts.renderer.decode(rollout.answer_ids) == rollout.text
    lost = sum(lesson.dropped == "longer than the context window" for lesson in lessons)
    told = describe(lessons)
    assert told.get("dropped/longer than the context window", 0) == pytest.approx(lost / 6)
    assert told["dropped"] == pytest.approx((lost + 2) / 6)


def test_later_updates_are_measured_from_the_first(parts: Parts) -> None:
    """GRPO's ratio is 1 in the first update, and in the second taken against what that one said."""
    first, moved = list[torch.Tensor](), list[float]()

    class Watched(Grpo):
        def per_token(self, logits_CV, teacher_logits_CV, batch, rows):  # type: ignore[no-untyped-def]
            said = super().per_token(logits_CV, teacher_logits_CV, batch, rows)
            if batch.old_logp_N is None:  # the first update: what it says is what it starts from
                first.append(said["logp"])
            else:
                assert torch.equal(batch.old_logp_N[rows], first[len(moved)])
                moved.append((said["logp"] - batch.old_logp_N[rows]).abs().max().item())
            return said

    mixed = dataclasses.replace(PROBLEMS[0], id="q1")  # one right and one wrong answer to "q1"
    rollouts = [*parts.engine.generate(PROBLEMS[1:2], parts.sampling)[:1]]
    wrong = dataclasses.replace(rollouts[0], sample=1, text="# b")
    assert mixed.id == wrong.problem.id
    parts = dataclasses.replace(parts, objective=Watched(1.0), context=None, updates_per_batch=2)
    learn(parts, teach(parts, mark(parts, [*rollouts, wrong])))
    assert len(first) == len(moved) > 0 and max(moved) > 1e-4


def test_known_critiques_are_not_asked_for_again(parts: Parts) -> None:
    rollouts = parts.engine.generate(PROBLEMS[:1], parts.sampling)
    known = {("q0", 1): NoCritique("too"), ("q0", 0): NoCritique("kept"), ("q1", 0): None}
    marked = mark(dataclasses.replace(parts, critic=None), rollouts, known)
    assert [m.critique for m in marked] == [known["q0", 0], known["q0", 1]]


def test_a_served_critic_marks_a_batch_while_the_next_is_sampled(parts: Parts) -> None:
    began, seen = threading.Event(), list[str]()

    def served(judged: Sequence[tuple[Rollout, Verdict]]) -> list[Critique | NoCritique]:
        seen.append(judged[0][0].problem.id)
        began.set()
        return [NoCritique("late") for _ in judged]

    class Waiting(Scripted):
        def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
            if problems[0].id == "q1":
                assert began.wait(20), "nobody reads the first batch"
            return super().generate(problems, sampling)

    assert isinstance(parts.engine, Scripted)
    parts = dataclasses.replace(
        parts, critic=served, engine=Waiting(parts.engine.encode), batch_answers=1, critic_threads=1
    )
    lessons, metrics = train_step(parts, PROBLEMS[:2])
    assert [lesson.rollout.key for lesson in lessons] == [
        ("q0", 0),
        ("q0", 1),
        ("q1", 0),
        ("q1", 1),
    ]
    assert metrics["no_critique/late"] == 1.0 and seen == ["q0", "q1"]
