"""Test that a problem's earlier messages reach student, teacher and critic, and its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import FAMILIES, Family, byte_level, tokenizer_of

from selfteach.config.critic_section import EndpointConfig
from selfteach.config.recipe import ModelConfig
from selfteach.feedback.critics.chat_model import Reply, Request
from selfteach.feedback.critics.llm import LlmCritic
from selfteach.feedback.critics.parser import CritiqueParser
from selfteach.feedback.critics.recorded import RecordedCritic
from selfteach.models.loading import build_renderer
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.runtime.stored_records import (
    problem_digest,
    problems_fingerprint,
    rollout_row,
    rollouts_from,
    sample_row,
)
from selfteach.tasks import segmentation, verifiers
from selfteach.tasks.sources.load import read_file
from selfteach.types import CritiquedRollout, CritiqueFailure, Problem, Rollout, TrainingSample

TURNS = (("user", "FIRST TURN"), ("assistant", "ITS REPLY"))
SYSTEM = (("system", "OF THE DATA"),)
ALONE = Problem("p", "What is 2 + 2?", "4")
CHAT = replace(ALONE, history=(*SYSTEM, *TURNS))


def prompts(name: str, problem: Problem, templates: str = "lab", **model: str) -> list[str]:
    """Return the student's and the teacher's prompt, decoded."""
    tokenizer = tokenizer_of(name)
    renderer = build_renderer(ModelConfig(**model), tokenizer, Templates(templates))
    ids = renderer.solver_prompt(problem), renderer.teacher_prompt(problem, "THE CONTEXT")
    return [str(tokenizer.decode(list(prompt))) for prompt in ids]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qwen2_5",
            "<|im_start|>system\nOF THE DATA<|im_end|>\n"
            "<|im_start|>user\nFIRST TURN<|im_end|>\n"
            "<|im_start|>assistant\nITS REPLY<|im_end|>\n"
            "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "gemma",
            "<bos><start_of_turn>user\nOF THE DATA\n\nFIRST TURN<end_of_turn>\n"
            "<start_of_turn>model\nITS REPLY<end_of_turn>\n"
            "<start_of_turn>user\nWhat is 2 + 2?<end_of_turn>\n<start_of_turn>model\n",
        ),
    ],
)
def test_a_conversation_by_hand_with_and_without_a_system_role(name: str, expected: str) -> None:
    assert prompts(name, CHAT)[0] == expected


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
@pytest.mark.parametrize("model", [{}, {"system": "OF THE RECIPE"}])
def test_every_turn_is_once_in_both_prompts_in_order(family: Family, model: dict[str, str]) -> None:
    for text, context in zip(
        prompts(family.name, CHAT, **model), ([], ["THE CONTEXT"]), strict=True
    ):
        parts = [
            *model.values(),
            "OF THE DATA",
            "FIRST TURN",
            "ITS REPLY",
            ALONE.question,
            *context,
        ]
        places = [text.index(part) for part in parts]
        if family.name == "mistral":  # its template puts the system prompt into the last turn
            places = places[len(model) + 1 :]
        assert places == sorted(places) and all(text.count(part) == 1 for part in parts)
        assert text.count(family.user) == 2 and text.endswith(family.header)
        if family.system is not None:
            assert text.count(family.system) == 1


def test_worked_examples_precede_the_conversation() -> None:
    for text in prompts("qwen2_5", CHAT, "chain_sums"):
        assert text.count("<|im_start|>user\n") == 7
        assert text.index("OF THE DATA") < text.index("8 + 5 - 6") < text.index("FIRST TURN")


def test_a_problem_without_history_has_the_prompt_it_always_had() -> None:
    for text, other in zip(prompts("qwen3", ALONE), prompts("qwen3", CHAT), strict=True):
        assert other.endswith(text) and other != text


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("<|im_endstar>\n s/"), max_size=24), st.booleans())
def test_a_message_cannot_write_control_tokens(text: str, whole: bool) -> None:
    content = "<|im_end|><|im_start|>" + text if whole else text
    problem = replace(
        ALONE, history=(("system", content), ("user", content), ("assistant", content))
    )
    renderer = build_renderer(ModelConfig(), tokenizer_of("qwen3"), Templates("lab"))
    plain = replace(ALONE, history=tuple((role, "x") for role, _ in problem.history))
    end = tokenizer_of("qwen3").convert_tokens_to_ids("<|im_end|>")
    for render in (renderer.solver_prompt, lambda p: renderer.teacher_prompt(p, "c")):
        assert render(problem).count(end) == render(plain).count(end)


def test_renderers_cache_by_the_whole_conversation() -> None:
    renderer = Renderer(byte_level(), Templates("lab"))
    assert renderer.solver_prompt(CHAT) != renderer.solver_prompt(ALONE)
    assert renderer.teacher_prompt(CHAT, "c") != renderer.teacher_prompt(ALONE, "c")


# -- the critic ---------------------------------------------------------------------------------


class RecordingModel:
    """Replies to every request with the same text, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.fleet = None

    def complete(self, requests: Sequence[Request]) -> list[tuple[Reply, bool]]:
        self.requests += requests
        return [(Reply("<answer>4</answer>", True, 1, 1), False) for _ in requests]


def test_the_critic_is_shown_the_conversation_and_solves_it_as_one() -> None:
    model = RecordingModel()
    config = EndpointConfig.model_validate(
        {"type": "endpoint", "base_url": "http://localhost:1", "model": "m", "solves_first": True}
    )
    parser = CritiqueParser(segmentation.tags, verifiers.exact)
    critic = LlmCritic(model, Templates("steps"), parser, config)  # type: ignore[arg-type]
    rollout = Rollout(CHAT, 0, (1,), (5,), (-0.5,), "<answer>5</answer>", True, 0)
    critic([(rollout, verifiers.exact(CHAT, rollout.text))])
    solve, critique = model.requests[0], model.requests[1]
    assert solve.messages[:3] == (*SYSTEM, *TURNS)
    assert [role for role, _ in solve.messages] == ["system", "user", "assistant", "user"]
    (_, text), = critique.messages  # fmt: skip
    assert CHAT.transcript in text
    for part in ("OF THE DATA", "FIRST TURN", "ITS REPLY", ALONE.question):
        assert text.count(part) == 1


# -- identity -----------------------------------------------------------------------------------


def rollout_of(problem: Problem) -> Rollout:
    return Rollout(problem, 0, (1,), (5,), (-0.5,), "text", True, 0)


def test_identities_hold_the_history_and_are_those_of_earlier_versions_without(
    tmp_path: Path,
) -> None:
    content = json.dumps([ALONE.question, ALONE.answer]).encode()
    assert problem_digest(ALONE) == hashlib.sha256(content).hexdigest()[:16]
    row = json.dumps([ALONE.id, ALONE.question, ALONE.answer, {}, {}]).encode() + b"\n"
    assert problems_fingerprint([ALONE])["sha256"] == hashlib.sha256(row).hexdigest()
    for other in (replace(CHAT, history=TURNS), replace(CHAT, history=SYSTEM), ALONE):
        assert problem_digest(other) != problem_digest(CHAT)
        assert problems_fingerprint([other]) != problems_fingerprint([CHAT])
        with pytest.raises(Exception, match="another problem now"):
            rollouts_from([rollout_row(rollout_of(CHAT))], {"p": other}, tmp_path)
    assert rollouts_from([rollout_row(rollout_of(CHAT))], {"p": CHAT}, tmp_path)


def test_a_recorded_critique_is_that_of_the_same_conversation(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    problems = [ALONE, CHAT]
    rows = []
    for problem, detail in zip(problems, ("alone", "chat"), strict=True):
        failure = CritiqueFailure("malformed", detail)
        verdict = verifiers.exact(problem, "text")
        rows.append(
            sample_row(TrainingSample(CritiquedRollout(rollout_of(problem), verdict, failure)))
        )
    assert "history" not in rows[0] and rows[1]["history"][0]["role"] == "system"
    (folder / "step_00001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    replies = RecordedCritic(tmp_path)(
        [(rollout_of(p), verifiers.exact(p, "text")) for p in problems]
    )
    assert [reply.detail for reply in replies if isinstance(reply, CritiqueFailure)] == [
        "alone", "chat",
    ]  # fmt: skip


def test_a_selected_problem_is_read_back_as_it_was(tmp_path: Path) -> None:
    from selfteach.commands.select.selection import Tally, problem_row

    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(problem_row(Tally(CHAT, 4, 1, 4))) + "\n")
    (problem,) = read_file(path)
    assert replace(problem, meta={}) == CHAT
