"""Test models that think before they answer: where the thought ends, which tokens are scored."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_families import byte_level, tokenizer_of

from selfteach.config.recipe import ModelConfig
from selfteach.config.recipe_file import load_study
from selfteach.errors import EngineError
from selfteach.feedback.alignment import first_error_token
from selfteach.losses.divergence import Divergence
from selfteach.losses.objectives import Distillation, Grpo
from selfteach.losses.token_masks import TokenMask
from selfteach.models.loading import build_renderer
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.prompts.thinking import Thinking, split_thinking
from selfteach.tasks import segmentation, verifiers
from selfteach.trainer.batching import collate
from selfteach.types import (
    Critique,
    CritiquedRollout,
    CritiqueStep,
    Problem,
    Rollout,
    TrainingSample,
    Verdict,
)

QWEN3 = tokenizer_of("qwen3")
PROBLEM = Problem("p", "What is 2 + 2?", "4")
EMPTY = "<think>\n\n</think>\n\n"
HEADER = "<|im_start|>assistant\n"
THOUGHT = "<think>\nhm\n</think>\n\n"
ANSWER = "<step_1>a</step_1>\n<answer>4</answer>"
CRITIQUE = Critique("D", (CritiqueStep("a", "kept"),), "4", 1)


def renderer_with(**thinking: object) -> Renderer:
    """Build the renderer of a recipe with these settings in ``[model.thinking]``."""
    return build_renderer(ModelConfig(thinking=thinking), QWEN3, Templates("lab"))  # type: ignore[arg-type]


def sample(renderer: Renderer, text: str) -> TrainingSample:
    """Return the training sample of a rollout sampled as ``text``."""
    ids = renderer.encode_answer(text)
    answer = renderer.decode(ids)
    rollout = Rollout(
        PROBLEM, 0, renderer.solver_prompt(PROBLEM), ids, (-1.0,) * len(ids), answer, True, 0
    )
    spans = segmentation.token_spans(segmentation.tags(answer), renderer.token_ends(ids))
    return TrainingSample(
        CritiquedRollout(rollout, Verdict(False, True, "4"), CRITIQUE),
        "# 4",
        renderer.teacher_prompt(PROBLEM, "# 4"),
        None,
        first_error_token(CRITIQUE, spans),
        scored_from=renderer.scored_from(ids),
    )


def scored(objective: Distillation | Grpo, one: TrainingSample) -> str:
    """Return the tokens that enter the loss, as text."""
    (count,) = objective.denominators([one])
    (weights,) = objective.token_weights([one], (count,))
    ids = one.rollout.token_ids
    assert set(weights.weights) <= {0.0, 1 / max(1, count)}
    assert sum(map(bool, weights.weights)) == count
    return str(QWEN3.decode([i for i, w in zip(ids, weights.weights, strict=True) if w]))


def tail(ids: tuple[int, ...]) -> str:
    """Return the end of a prompt, from the last turn's start token on."""
    text = str(QWEN3.decode(ids))
    return text[text.rindex("<|im_start|>") :]


@pytest.mark.parametrize(
    ("student", "teacher", "boundary", "student_header", "teacher_header"),
    [
        (None, None, "student", HEADER, HEADER),
        (True, True, "student", HEADER, HEADER),
        (False, False, "student", HEADER + EMPTY, HEADER + EMPTY),
        # The answer is scored after an empty thought, though the template's default is to think.
        (False, None, "student", HEADER + EMPTY, HEADER + EMPTY),
        # As each chat template has it: the teacher expects another first token than the student.
        (False, True, "teacher", HEADER + EMPTY, HEADER),
        (True, False, "teacher", HEADER, HEADER + EMPTY),
    ],
)
def test_the_header_before_the_answer(
    student: bool | None, teacher: bool | None, boundary: str, student_header: str,
    teacher_header: str,
) -> None:  # fmt: skip
    thinking = renderer_with(student=student, teacher=teacher, boundary=boundary)
    assert tail(thinking.solver_prompt(PROBLEM)) == student_header
    assert tail(thinking.teacher_prompt(PROBLEM, "# 4")) == teacher_header


@pytest.mark.parametrize(("student", "teacher"), [(False, True), (True, False), (None, False)])
def test_a_switch_without_effect_is_refused(student: bool | None, teacher: bool) -> None:
    with pytest.raises(EngineError, match=r"thinking\.teacher = (true|false) changes nothing"):
        renderer_with(student=student, teacher=teacher)


def test_in_the_papers_recipe_the_teacher_s_switch_changes_the_token_ids() -> None:
    path = Path(__file__).parents[3] / "src" / "selfteach" / "recipes" / "paper.toml"
    thinking = load_study(path).recipe("step_aligned", seed=0).model.thinking
    assert (thinking.student, thinking.teacher) == (False, True)
    thinks = renderer_with(**thinking.model_dump())
    does_not = renderer_with(**{**thinking.model_dump(), "teacher": False})
    assert thinks.solver_prompt(PROBLEM) == does_not.solver_prompt(PROBLEM)
    with_thought = thinks.teacher_prompt(PROBLEM, "# 4")
    without = does_not.teacher_prompt(PROBLEM, "# 4")
    assert without[: len(with_thought)] == with_thought, "the header alone differs"
    assert QWEN3.decode(without[len(with_thought) :]) == EMPTY


def test_the_rest_of_the_teacher_s_prompt_follows_the_teacher_s_setting() -> None:
    mode = (
        "{{ '/think' if enable_thinking else '/no_think' }} "
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{{ '' if enable_thinking else '<>' }}{% endif %}"
    )
    tokenizer = byte_level(chat_template=mode)
    renderer = Renderer(
        tokenizer, Templates("lab"), thinking=Thinking(student=False, teacher=True)
    )  # fmt: skip
    assert tokenizer.decode(renderer.solver_prompt(PROBLEM)).startswith("/no_think [user]")
    teacher = tokenizer.decode(renderer.teacher_prompt(PROBLEM, "# 4"))
    assert teacher.startswith("/think [user]") and teacher.endswith("# 4[assistant]<>")


def test_a_chat_template_without_a_separate_header_needs_the_teacher_s_boundary() -> None:
    odd = "{{ 'h' if add_generation_prompt else 'n' }}{{ messages[0].content }}"
    tokenizer = byte_level(chat_template=odd)
    with pytest.raises(EngineError, match=r'set model\.thinking\.boundary = "teacher"'):
        Renderer(tokenizer, Templates("lab"), thinking=Thinking(student=False, teacher=True))
    Renderer(tokenizer, Templates("lab"), thinking=Thinking(False, True, boundary="teacher"))


ALL = THOUGHT + ANSWER + "<|im_end|>"


@pytest.mark.parametrize(
    ("thinking", "sampled", "expected"),
    [
        # Without a thought every token counts, the end of the turn too.
        ({"student": False}, ANSWER, ANSWER + "<|im_end|>"),
        ({"student": False, "teacher": True, "boundary": "teacher"}, ANSWER, ANSWER + "<|im_end|>"),
        ({"student": True, "scored": False}, ANSWER, ANSWER + "<|im_end|>"),
        # The tags around a thought, and the white space after it, are part of the thought.
        ({"student": True}, THOUGHT + ANSWER, ALL),
        ({"student": True, "scored": False}, THOUGHT + ANSWER, ANSWER + "<|im_end|>"),
        # One that never ends leaves nothing else to score.
        ({"student": True}, "<think>\nhm", "<think>\nhm<|im_end|>"),
        ({"student": True, "scored": False}, "<think>\nhm", ""),
    ],
)
def test_which_tokens_are_scored(thinking: dict[str, object], sampled: str, expected: str) -> None:
    one = sample(renderer_with(**thinking), sampled)
    assert scored(Distillation(Divergence("reverse_kl"), 1.0), one) == expected
    assert scored(Grpo(1.0, kl_coef=0.1), one) == expected


def test_the_first_error_token_is_after_the_thought() -> None:
    for renderer in (renderer_with(student=True), renderer_with(student=True, scored=False)):
        objective = Distillation(Divergence("reverse_kl"), 1.0, TokenMask(from_first_error=True))
        one = sample(renderer, THOUGHT + ANSWER)
        assert scored(objective, one) == "<answer>4</answer><|im_end|>"


def test_no_step_begins_before_the_thought_ends() -> None:
    renderer = renderer_with(student=True, scored=False)
    quoting = "<think><step_1>b</step_1></think><step_1>a</step_1><answer>4</answer>"
    assert scored(Distillation(Divergence("reverse_kl"), 1.0), sample(renderer, quoting)) == (
        "<step_1>a</step_1><answer>4</answer><|im_end|>"
    )


def test_student_and_teacher_score_the_sampled_ids_including_the_thought() -> None:
    one = sample(renderer_with(student=True), THOUGHT + ANSWER)
    token_weights = Distillation(Divergence("reverse_kl"), 1.0).token_weights([one], (1.0,))
    (batch,) = collate([one], token_weights, pad_id=0, micro_batch_tokens=10_000)
    assert batch.ids_N.tolist() == list(one.rollout.token_ids)
    assert str(QWEN3.decode(batch.ids_N.tolist())) == ALL
    assert batch.teacher is not None
    for side in (batch.student, batch.teacher):
        assert str(QWEN3.decode(side.ids_BT[0].tolist())).endswith(HEADER + ALL)


@pytest.mark.parametrize(
    ("sampled", "text"),
    [
        (ANSWER, ANSWER),
        (THOUGHT + ANSWER, ANSWER),
        ("<think><answer>5</answer></think>" + ANSWER, ANSWER),
        ("<think>a</think>b<think>c</think>" + ANSWER, ANSWER),
        # The model was truncated in a thought, or ended its turn in the middle of one.
        ("<think>it may be <answer>4</answer>", ""),
        ("<think>hm</think>", ""),
    ],
)
def test_verifier_critic_and_steps_see_the_text_after_the_thought(sampled: str, text: str) -> None:
    one = sample(renderer_with(student=True), sampled)
    assert one.rollout.text == text
    verdict = verifiers.exact(PROBLEM, one.rollout.text)
    assert verdict.formatted == verdict.correct == bool(text)


def test_a_thought_that_the_prompt_begins() -> None:
    opening = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
    )
    renderer = Renderer(byte_level(chat_template=opening), Templates("lab"))
    assert renderer.decode(renderer.encode_answer("hm</think>4")) == "4"
    assert renderer.decode(renderer.encode_answer("hm, 4")) == "", "truncated in the thought"


def test_thinking_tags_may_be_special_tokens_of_other_names() -> None:
    tokenizer = byte_level(("<s>", "</s>", "[THINK]", "[/THINK]"))
    tags = ("[THINK]", "[/THINK]")
    renderer = Renderer(tokenizer, Templates("lab"), thinking=Thinking(scored=False, tags=tags))
    ids = renderer.encode_answer("[THINK]hm[/THINK] 4")
    assert renderer.decode(ids) == "4"
    assert tokenizer.decode(ids[renderer.scored_from(ids) :]) == "4</s>"
    assert renderer.decode(renderer.encode_answer("[THINK]hm")) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4", ("", "4")),
        (" 4", ("", " 4")),
        ("<think>hm</think> 4", ("<think>hm</think> ", "4")),
        ("hm</think>4", ("hm</think>", "4")),
        ("\n<think>hm", ("\n<think>hm", "")),
        ("I <think> so", ("", "I <think> so")),
        ("", ("", "")),
    ],
)
def test_split_thinking(text: str, expected: tuple[str, str]) -> None:
    assert split_thinking(text) == expected


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n"]), max_size=8).map("".join),
    st.booleans(),
)
def test_thought_and_answer_concatenate_to_the_text(text: str, opened: bool) -> None:
    thought, answer = split_thinking(text, opened=opened)
    assert thought + answer == text
    assert "</think>" not in answer
    assert not opened or not answer or "</think>" in thought
