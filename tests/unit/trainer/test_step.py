"""The step, with scripted components around a real small model: what each stage hands to the next."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from selfteach import protocols
from selfteach.config.recipe import Recipe
from selfteach.feedback.critics.journaled_critic import JournaledCritic
from selfteach.losses.divergence import Divergence, per_token
from selfteach.losses.objectives import Distillation, Grpo
from selfteach.models import prefix_cache
from selfteach.models.teacher import EmaTeacher
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.prompts.thinking import Thinking
from selfteach.rollout.journaled_engine import BatchedEngine
from selfteach.runtime.run_folder import RunFolder
from selfteach.runtime.stored_records import sample_row
from selfteach.trainer.async_training import RolloutRequest, train_steps
from selfteach.trainer.build import build
from selfteach.trainer.metrics import summarize_samples
from selfteach.trainer.step import Components, build_samples, learn, train_step, verify_and_critique
from selfteach.types import (
    Critique,
    CritiquedRollout,
    CritiqueFailure,
    CritiqueStep,
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
        answers = dict(zip((p.id for p in PROBLEMS), ANSWERS, strict=True))
        return [
            dataclasses.replace(
                self.encode(p, answers[p.id]), sample=i, policy_version=(self.versions or [0])[-1]
            )
            for p in problems
            for i in range(sampling.samples)
        ]

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.versions.append(version)


def verify(problem: Problem, text: str) -> Verdict:
    return Verdict(text.endswith(problem.answer), True, text[-1])


def critic(judged: Sequence[tuple[Rollout, Verdict]]) -> list[Critique | CritiqueFailure]:
    """Refuses the last question; finds the second step of the others wrong."""
    return [
        CritiqueFailure("refused")
        if rollout.problem.id == "q2"
        else Critique("D", (CritiqueStep(rollout.text, "kept"),), "a", 1)
        for rollout, _ in judged
    ]


def context(critiqued: Sequence[CritiquedRollout]) -> list[str | CritiqueFailure]:
    return [m.critique if isinstance(m.critique, CritiqueFailure) else "# a" for m in critiqued]


@pytest.fixture
def components() -> Components:
    data = {"type": "lab", "train": 1, "validation": 1, "test": 1}
    built = build(Recipe.model_validate({"data": data, "train": {"steps": 0}}))

    def encode(problem: Problem, text: str) -> Rollout:
        ids = built.components.renderer.encode_answer(text)
        prompt = built.components.renderer.solver_prompt(problem)
        return Rollout(problem, 0, prompt, ids, (-1.0,) * len(ids), text, True, 0)

    return dataclasses.replace(
        built.components,
        engine=Scripted(encode),
        verify=verify,
        critic=critic,
        context=context,
        sampling=Sampling(2, 1.0, 40, 0),
    )


def lessons_of(components: Components) -> list:
    return build_samples(
        components,
        verify_and_critique(components, components.engine.generate(PROBLEMS, components.sampling)),
    )


def slow_loss(components: Components, samples: Sequence, spec: Divergence) -> Tensor:
    """One answer at a time, full logits, plain form, mean over all tokens that are taught."""
    losses = []
    for sample in samples:
        if sample.teacher_prompt_ids is None:
            continue
        answer = torch.tensor(sample.rollout.token_ids)

        def logits(prompt: Sequence[int], answer: Tensor = answer) -> Tensor:
            ids = torch.cat([torch.tensor(prompt), answer])[None]
            return components.policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]

        with torch.no_grad():
            teacher = logits(sample.teacher_prompt_ids)
        losses.append(per_token(spec, logits(sample.rollout.prompt_ids), teacher, answer).loss)
    return torch.cat(losses).mean()


def test_scripted_parts_are_parts() -> None:
    assert isinstance(Scripted(lambda p, t: None), protocols.Engine)  # type: ignore[arg-type,return-value]
    for seam, fake in ((protocols.Verifier, verify), (protocols.Critic, critic),
                       (protocols.Context, context)):  # fmt: skip
        assert isinstance(fake, seam)


def test_what_is_said_of_an_answer_stays_with_it(components: Components) -> None:
    samples = lessons_of(components)
    assert [sample.rollout.problem.id for sample in samples] == ["q0", "q0", "q1", "q1", "q2", "q2"]
    assert [sample.dropped for sample in samples] == [None] * 4 + ["refused"] * 2
    assert [sample.critiqued.verdict.correct for sample in samples] == [False] * 2 + [True] * 4
    # "0 + c d = e" has six tokens, so the second step begins at the seventh.
    assert [sample.first_error_token for sample in samples[:4]] == [6, 6, 6, 6]


@pytest.mark.parametrize(
    "micro_batch_tokens, min_shared, recompute",
    [(1, 32, False), (60, 32, False), (10_000, 32, False), (10_000, 1, False), (10_000, 1, True)],
)
def test_learning_is_the_slow_loss_and_its_gradient(
    components: Components, monkeypatch, micro_batch_tokens: int, min_shared: int, recompute: bool
) -> None:
    monkeypatch.setattr(prefix_cache, "MIN_SHARED", min_shared)
    if recompute:
        data = {"type": "lab", "train": 1, "validation": 1, "test": 1}
        checkpointed = {"gradient_checkpointing": True}
        recipe = {"model": checkpointed, "data": data, "train": {"steps": 0}}
        built = build(Recipe.model_validate(recipe)).components
        components = dataclasses.replace(components, policy=built.policy, teacher=built.teacher)
    spec = Divergence("reverse_kl")
    components = dataclasses.replace(
        components, objective=Distillation(spec, 1.0), micro_batch_tokens=micro_batch_tokens,
        chunk_tokens=5,
    )  # fmt: skip
    samples = lessons_of(components)
    expected = slow_loss(components, samples, spec)
    expected.backward()
    gradient = {
        n: p.grad.clone() for n, p in components.policy.trainable.items() if p.grad is not None
    }
    components.policy.optimizer.zero_grad()
    gradients: dict[str, Tensor] = {}

    def look(*_: object) -> None:
        gradients.update({n: p.grad.clone() for n, p in components.policy.trainable.items()})  # type: ignore[union-attr]

    components.policy.optimizer.register_step_pre_hook(look)
    metrics = learn(components, samples)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-4)
    scale = min(1.0, 1.0 / metrics["grad_norm"])  # the clip at norm 1
    for name, value in gradient.items():
        assert torch.allclose(gradients[name], scale * value, atol=1e-5), name
    assert metrics["tokens_trained"] == 2 * (9 + 15)


def test_a_step_publishes_and_tells_the_teacher(components: Components) -> None:
    updates = []
    teacher = components.teacher

    class Watched:
        score, state, load_state = teacher.score, teacher.state, teacher.load_state

        def update(self) -> None:
            updates.append(components.policy.version)

    components = dataclasses.replace(components, teacher=Watched(), num_iterations=3)
    samples, metrics = train_step(components, PROBLEMS)
    assert isinstance(components.engine, Scripted)
    assert components.engine.versions == [3] and updates == [1, 2, 3]
    assert metrics["rollouts_sampled"] == 6 and metrics["critiques"] == 4
    assert metrics["dropped"] == metrics["dropped/refused"] == pytest.approx(1 / 3)
    assert metrics["frac_in_loss"] == pytest.approx(2 / 3) and metrics["eos_in_loss"] == 1.0
    assert [sample.rollout.sample for sample in samples] == [0, 1] * 3
    assert 0 <= metrics["repetition"] < 1 and metrics["hesitations"] == 0


def test_a_lesson_says_where_the_steps_of_its_answer_are(components: Components) -> None:
    for shown in (context, None):
        for sample in lessons_of(dataclasses.replace(components, context=shown)):
            text = sample.rollout.text
            assert list(sample.steps) == components.split_steps(text)
            assert sample_row(sample)["steps"] == sample.steps
            assert "".join(text[a:b] for a, b in sample.steps) == text


def test_nothing_to_learn_leaves_weights_moments_and_teacher(components: Components) -> None:
    components = dataclasses.replace(components, teacher=EmaTeacher(components.policy, 0.5))
    train_step(components, PROBLEMS)  # so that there are moments, and an average that lags
    before = {n: p.detach().clone() for n, p in components.policy.trainable.items()}
    average = {n: value.clone() for n, value in components.teacher.state().items()}
    version = components.policy.version
    alike = [PROBLEMS[2]]  # refused by the critic; for GRPO: all answers score alike
    for objective, shown in ((components.objective, context), (Grpo(1.0), None)):
        changed = dataclasses.replace(components, objective=objective, context=shown)
        samples, metrics = train_step(changed, alike)
        assert metrics["tokens_trained"] == 0 and metrics["loss"] == 0
        assert metrics["frac_in_loss"] == 0 and "eos_in_loss" not in metrics
        assert len(samples) == 2 and metrics["optimizer_steps"] == 0
    for name, param in components.policy.trainable.items():
        assert torch.equal(param, before[name])
        assert torch.equal(components.teacher.state()[name], average[name])
        assert components.policy.optimizer.state[param]["step"] == 1
    assert components.policy.version == version + 2, "the schedule goes on"


def test_a_thought_counts_as_the_recipe_says(
    components: Components, lab_tokenizer: PreTrainedTokenizerFast
) -> None:
    # As if "0 + a b =" were a thought: five tokens of the first answer, none of the last.
    unscored = Thinking(scored=False, tags=("0", "="))
    renderer = Renderer(lab_tokenizer, Templates("lab"), thinking=unscored)
    for shown in (context, None):
        changed = dataclasses.replace(components, renderer=renderer, context=shown)
        by_question = {m.rollout.problem.id: m.scored_from for m in lessons_of(changed)}
        assert by_question["q0"] == 5 and (shown is not None or by_question["q2"] == 0)
        plain = dataclasses.replace(components, context=shown)
        assert {sample.scored_from for sample in lessons_of(plain)} == {0}


def test_a_lesson_that_does_not_fit_is_dropped_whole(components: Components) -> None:
    fits = lessons_of(components)[0]
    assert fits.teacher_prompt_ids is not None
    length = len(fits.teacher_prompt_ids) + len(fits.rollout.token_ids)
    for room, dropped in ((length, None), (length - 1, "longer than the context window")):
        sample = lessons_of(dataclasses.replace(components, max_length=room))[0]
        assert sample.dropped == dropped
        assert (sample.teacher_prompt_ids is None) == (dropped is not None)


# The components are read only; built anew for every example they would take seconds each.
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(max_length=st.integers(2, 60))
def test_nothing_of_a_lesson_is_ever_cut(components: Components, max_length: int) -> None:
    """Question, critique, header and end token are whole in every sample that is taught."""
    samples = lessons_of(dataclasses.replace(components, max_length=max_length))
    header, end = components.renderer.solver_prompt(PROBLEMS[0])[-1], components.renderer.end_id
    for sample in samples:
        rollout, prompt = sample.rollout, sample.teacher_prompt_ids
        if sample.context is None:
            assert sample.dropped == "refused"
            continue
        whole = components.renderer.teacher_prompt(rollout.problem, sample.context)
        fits = len(whole) + len(rollout.token_ids) <= max_length
        assert (sample.dropped is None) == fits
        if prompt is not None:
            assert prompt == whole and len(prompt) + len(rollout.token_ids) <= max_length
            text = " ".join(map(components.renderer.token_text, prompt))
            assert rollout.problem.question in text and sample.context in text
            assert prompt[-1] == header and rollout.token_ids[-1] == end
            assert components.renderer.decode(rollout.token_ids) == rollout.text
    lost = sum(sample.dropped == "longer than the context window" for sample in samples)
    metrics = summarize_samples(samples)
    assert metrics.get("dropped/longer than the context window", 0) == pytest.approx(lost / 6)
    assert metrics["dropped"] == pytest.approx((lost + 2) / 6)


def test_later_updates_are_measured_from_the_first(components: Components) -> None:
    """GRPO's ratio is 1 in the first update, and in the second taken against what that one said."""
    first, moved = list[torch.Tensor](), list[float]()

    class Watched(Grpo):
        def per_token(self, logits_CV, teacher_logits_CV, batch, rows):  # type: ignore[no-untyped-def]
            stats = super().per_token(logits_CV, teacher_logits_CV, batch, rows)
            if batch.old_logp_N is None:  # the first update: what it says is what it starts from
                first.append(stats["logp"])
            else:
                assert torch.equal(batch.old_logp_N[rows], first[len(moved)])
                moved.append((stats["logp"] - batch.old_logp_N[rows]).abs().max().item())
            return stats

    mixed = dataclasses.replace(PROBLEMS[0], id="q1")  # one right and one wrong answer to "q1"
    rollouts = [*components.engine.generate(PROBLEMS[1:2], components.sampling)[:1]]
    # Of the same tokens, the gradients of the right and the wrong one would cancel.
    others = tuple(reversed(rollouts[0].token_ids))
    wrong = dataclasses.replace(rollouts[0], sample=1, text="# b", token_ids=others)
    assert mixed.id == wrong.problem.id and others != rollouts[0].token_ids
    components = dataclasses.replace(
        components, objective=Watched(1.0), context=None, num_iterations=2
    )
    learn(
        components, build_samples(components, verify_and_critique(components, [*rollouts, wrong]))
    )
    assert len(first) == len(moved) > 0 and max(moved) > 1e-4


def test_saved_critiques_are_not_requested_again(components: Components) -> None:
    rollouts = components.engine.generate(PROBLEMS[:1], components.sampling)
    first, second = CritiqueFailure("first"), CritiqueFailure("second")
    requested: list[tuple[str, int]] = []
    written: list[Sequence[object]] = []

    def counting(judged: Sequence[tuple[Rollout, Verdict]]) -> list[Critique | CritiqueFailure]:
        requested.extend(rollout.key for rollout, _ in judged)
        return critic(judged)

    def critiques(saved: dict[tuple[str, int], CritiqueFailure | None]) -> list[object]:
        journaled = JournaledCritic(counting, saved, lambda _, made: written.append(made))
        changed = dataclasses.replace(components, critic=journaled)
        return [c.critique for c in verify_and_critique(changed, rollouts)]

    assert critiques({("q0", 1): second, ("q0", 0): first, ("q1", 0): None}) == [first, second]
    assert requested == written == []
    # One of a batch is missing: the critic gets the batch that it would have got at first.
    made = critiques({("q0", 1): second})
    assert requested == [("q0", 0), ("q0", 1)] and written == [made]


def test_a_served_critic_reads_a_batch_while_the_next_is_sampled(
    components: Components, tmp_path: Path
) -> None:
    began, seen = threading.Event(), list[str]()

    def served(judged: Sequence[tuple[Rollout, Verdict]]) -> list[Critique | CritiqueFailure]:
        seen.append(judged[0][0].problem.id)
        began.set()
        return [CritiqueFailure("late") for _ in judged]

    class Waiting(Scripted):
        def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
            if problems[0].id == "q1":
                assert began.wait(20), "nobody reads the first batch"
            return super().generate(problems, sampling)

    assert isinstance(components.engine, Scripted)
    components = dataclasses.replace(
        components,
        critic=served,
        engine=BatchedEngine(Waiting(components.engine.encode), batch_size=1),
        critic_threads=1,
    )

    def request(step: int) -> RolloutRequest:
        return RolloutRequest(step, PROBLEMS[:2], 0)

    ((_, (samples, metrics)),) = train_steps(components, request, [1], RunFolder(tmp_path))
    keys = [sample.rollout.key for sample in samples]
    assert keys == [("q0", 0), ("q0", 1), ("q1", 0), ("q1", 1)]
    assert metrics["critique_failure/late"] == 1.0 and seen == ["q0", "q1"]


@pytest.mark.parametrize("threads", [0, 2])
def test_the_loop_s_step_is_train_step(
    components: Components, tmp_path: Path, threads: int
) -> None:
    """Without staleness `train_steps` gives the samples, metrics and weights of `train_step`."""
    assert isinstance(components.engine, Scripted)
    engine = BatchedEngine(components.engine, batch_size=2)
    components = dataclasses.replace(components, engine=engine, critic_threads=threads)
    initial = {n: p.detach().clone() for n, p in components.policy.trainable.items()}
    optimizer = copy.deepcopy(components.policy.optimizer.state_dict())
    samples, metrics = train_step(components, PROBLEMS)
    expected = {n: p.detach().clone() for n, p in components.policy.trainable.items()}
    with torch.no_grad():
        for name, param in components.policy.trainable.items():
            param.copy_(initial[name])
    components.policy.optimizer.load_state_dict(optimizer)
    components.policy.version = 0
    components.engine.load_weights([], 0)

    def request(step: int) -> RolloutRequest:
        return RolloutRequest(step, PROBLEMS, 0)

    steps = list(train_steps(components, request, [1], RunFolder(tmp_path)))
    ((step, (looped, logged)),) = steps
    assert step == 1 and looped == samples
    for name, value in metrics.items():
        assert logged[name] == value, name
    for name, param in components.policy.trainable.items():
        assert torch.equal(param, expected[name]), name
