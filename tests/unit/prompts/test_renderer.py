"""Test prompts and answers: token positions, one BOS, and one-line errors of templates."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_families import byte_fallback, byte_level
from transformers import PreTrainedTokenizerFast

from selfteach.config.recipe import CONTEXTS
from selfteach.errors import EngineError, RecipeError
from selfteach.feedback.contexts import SHARED_TEMPLATE
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import TURN, Templates, conversation
from selfteach.tasks import chain_sums
from selfteach.types import Critique, CritiqueStep, Problem

PROMPTS = Path(__file__).parents[2] / "fixtures" / "prompts"
BYTES = Renderer(byte_level(), Templates("steps"))
FALLBACK = Renderer(byte_fallback(), Templates("steps"))
PROBLEM = Problem("p", "What is 2 + 2?", "4")


def test_the_byte_level_tokenizer_adds_bos_and_splits_characters() -> None:
    assert byte_level()("a")["input_ids"][0] == byte_level().bos_token_id
    assert len(BYTES.encode_answer("語")) == 4, "three bytes and the end token"


def test_a_prompt_has_one_bos_and_ends_in_the_header() -> None:
    tokenizer = byte_level()
    for ids in (BYTES.solver_prompt(PROBLEM), BYTES.teacher_prompt(PROBLEM, "look: 4")):
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids).endswith("[assistant]")
        assert tokenizer.eos_token_id not in ids


def test_both_prompts_hold_the_question_and_only_the_teacher_s_the_context() -> None:
    tokenizer = byte_level()
    solver = tokenizer.decode(BYTES.solver_prompt(PROBLEM))
    teacher = tokenizer.decode(BYTES.teacher_prompt(PROBLEM, "LOOK HERE"))
    assert PROBLEM.question in solver and PROBLEM.question in teacher
    assert "LOOK HERE" in teacher and "LOOK HERE" not in solver


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.sampled_from("ab c東京🙂é≤\n"), min_size=1, max_size=12))
def test_token_ends_equal_decoding_every_prefix(text: str) -> None:
    ids = BYTES.encode_answer(text)
    ends = BYTES.token_ends(ids)
    assert BYTES.decode(ids) == text
    assert len(ends) == len(ids) and ends[-1] == len(text)
    assert ends == sorted(ends), "positions never decrease"
    pieces = [BYTES.decode([token]) for token in ids]
    whole = "".join(pieces) == text
    for i, end in enumerate(ends):
        prefix = BYTES.decode(ids[: i + 1])
        assert end == len(prefix)
        if whole:
            assert prefix == text[:end]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.sampled_from("ab c東🙂é≤\n\ufffd"), min_size=1, max_size=12))
def test_token_ends_of_byte_fallback_never_decrease(text: str) -> None:
    ids = FALLBACK.encode_answer(text)
    ends, whole = FALLBACK.token_ends(ids), FALLBACK.decode(ids)
    assert ends == sorted(ends) and ends[-1] == len(whole)
    for index, end in enumerate(ends):
        prefix = FALLBACK.decode(ids[: index + 1])
        if "\ufffd" not in prefix:
            assert whole[:end] == prefix, "a prefix of whole characters"
        assert whole[:end].startswith(prefix.rstrip("\ufffd")), "within its character"


def test_a_text_in_words_and_bytes_is_decoded_in_linear_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def decoded_tokens(text: str) -> int:
        ids, lengths = FALLBACK.encode_answer(text), []
        decode = type(FALLBACK)._decode
        monkeypatch.setattr(
            FALLBACK, "_decode", lambda ids: (lengths.append(len(ids)), decode(FALLBACK, ids))[1]
        )
        FALLBACK.token_ends(ids)
        monkeypatch.undo()
        return sum(lengths)

    once, twice = decoded_tokens("ab 🙂 c東 " * 50), decoded_tokens("ab 🙂 c東 " * 100)
    assert twice < 2.1 * once


def test_the_end_token_has_no_text() -> None:
    ids = BYTES.encode_answer("abc")
    ends = BYTES.token_ends(ids)
    assert ends[-1] == ends[-2] == 3


def test_token_ends_of_the_lab(lab_tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(lab_tokenizer, Templates("lab"))
    ids = renderer.encode_answer("0 + a b = c\n# k")
    # Words are joined by one space: "0 + a b = c # k" and the end token, which is no text.
    assert renderer.decode(ids) == "0 + a b = c # k"
    assert renderer.token_ends(ids) == [1, 3, 5, 7, 9, 11, 13, 15, 15]
    assert renderer.token_ends(()) == []


def test_each_token_is_decoded_once(
    lab_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Decoding every prefix would be quadratic in the answer's length.
    for renderer, text in (
        (BYTES, "plain words"),
        (Renderer(lab_tokenizer, Templates("lab")), "a b"),
    ):
        ids, decode, calls = renderer.encode_answer(text), renderer._decode, []

        def counted(ids, decode=decode, calls=calls):
            calls.append(len(ids))
            return decode(ids)

        monkeypatch.setattr(renderer, "_decode", counted)
        renderer._piece.cache_clear()
        first = renderer.token_ends(ids)
        assert sorted(calls) == [1] * len(set(ids)) + [len(ids)]
        calls.clear()
        assert renderer.token_ends(ids) == first
        assert calls == [len(ids)]


def test_lab_prompts_by_hand(lab_tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(lab_tokenizer, Templates("lab"))
    problem = Problem("p", "a b c d e f", "k")
    assert lab_tokenizer.decode(renderer.solver_prompt(problem)) == "<bos> a b c d e f <say>"
    teacher = lab_tokenizer.decode(renderer.teacher_prompt(problem, "# k"))
    assert teacher == "<bos> a b c d e f <see> # k <say>"


def test_a_tokenizer_without_chat_template_or_end_token_is_an_error() -> None:
    with pytest.raises(EngineError, match="no chat template"):
        Renderer(byte_level(chat_template=None), Templates())
    with pytest.raises(EngineError, match="no end token"):
        Renderer(byte_level(eos=None), Templates())


CRITIQUE = Critique(
    "D",
    (
        CritiqueStep("RIGHT ONE", "kept", "RIGHT ONE"),
        CritiqueStep("FIXED TWO", "fixed", "WRONG TWO"),
        CritiqueStep("THREE", "new"),
    ),
    "FOUR",
    1,
)


def shown(templates: str, context: str) -> str:
    return Templates(templates).context(
        context,
        critique=CRITIQUE,
        references={"reference": "REFERENCE", "aligned_reference": "ALIGNED"},
        correct=False,
    )


@pytest.mark.parametrize("templates", ["steps", "free", "lab", "chain_sums", "free_few_shot"])
def test_what_each_context_shows(templates: str) -> None:
    for context in set(CONTEXTS) - {"none", *SHARED_TEMPLATE}:
        assert Templates(templates).has(context)
    aligned, full = shown(templates, "step_aligned"), shown(templates, "full_repetition")
    assert "RIGHT ONE" in aligned and "WRONG TWO" not in aligned
    assert aligned.index("RIGHT ONE") < aligned.index("FIXED TWO") < aligned.index("THREE")
    assert full.index("WRONG TWO") < full.index("FIXED TWO")
    omission = shown(templates, "omission")
    assert "RIGHT ONE" not in omission and "FIXED TWO" in omission
    for context in ("holistic", "answer_only"):
        only = shown(templates, context)
        assert "FOUR" in only
        assert not any(word in only for word in ("ONE", "TWO", "THREE", "REFERENCE"))
    assert "REFERENCE" in shown(templates, "reference")
    assert "ALIGNED" in shown(templates, "aligned_reference")


SUM = Critique(
    "D",
    (
        CritiqueStep("1 + 2 = 3", "kept", "1 + 2 = 3"),
        CritiqueStep("3 - 1 = 2", "fixed", "3 - 1 = 1"),
        CritiqueStep("2 + 4 = 6", "new"),
    ),
    "6",
    1,
)


@pytest.mark.parametrize("templates", ["steps", "chain_sums"])
def test_prompts_equal_the_golden_files(templates: str) -> None:
    shown, question = Templates(templates), "1 + 2 - 1 + 4 ="
    references = {
        "reference": "Added: 1, 2, 4.\nAnswer: 6",
        "aligned_reference": "1 + 2 = 3\nAnswer: 6",
    }
    prompts = [shown.render("solver", question=question)]
    for name in ("step_aligned", "full_repetition", "omission", "holistic", "answer_only",
                 "reference", "aligned_reference"):  # fmt: skip
        context = shown.context(name, critique=SUM, references=references, correct=False)
        prompts.append(shown.render("teacher", question=question, context=context))
    golden = (PROMPTS / f"{templates}.txt").read_text(encoding="utf-8")
    assert "\n%%%%\n".join(prompts).replace(TURN, "{{ turn }}") + "\n" == golden


@pytest.mark.parametrize("templates", ["steps", "free", "chain_sums", "free_few_shot"])
def test_a_critic_sees_question_answer_and_reference(templates: str) -> None:
    messages = Templates(templates).critic(
        "QUESTION", "STEP ONE\n\nSTEP TWO", steps=["STEP ONE", "STEP TWO"], finished=True,
        reference="REFERENCE",
    )  # fmt: skip
    roles = [message["role"] for message in messages]
    assert roles == ["user", "assistant"] * (len(messages) // 2) + ["user"]
    content = messages[-1]["content"]
    assert content.index("QUESTION") < content.index("STEP ONE") < content.index("STEP TWO")
    assert "REFERENCE" in content
    assert "REFERENCE" not in _critic_messages(templates)[-1]["content"]


def _critic_messages(templates: str, *, finished: bool = True) -> list[dict[str, str]]:
    return Templates(templates).critic("q", "a", steps=["a"], finished=finished)


@pytest.mark.parametrize("templates", ["steps", "free"])
def test_a_critic_s_prompt_has_the_four_cases_and_notes_truncation(templates: str) -> None:
    content = _critic_messages(templates)[-1]["content"]
    assert all(f"Case {case}." in content for case in "ABCD")
    assert "cut off at its end" not in content
    assert "cut off at its end" in _critic_messages(templates, finished=False)[-1]["content"]


def test_the_worked_examples_of_the_chain_sums_critic_are_right_and_show_each_kind() -> None:
    """The example critiques equal those of the program that checks every line."""
    turns = Templates("chain_sums").critic("q", "a", steps=["a"], finished=True)[:-1]
    cases = []
    for prompt, reply in zip(turns[::2], turns[1::2], strict=True):
        question, attempt = prompt["content"].split("\nAttempt:\n```\n")
        text = attempt.split("\n```\n")[0]
        chain = chain_sums.parse_question(question)
        meta = {"terms": list(chain.terms), "signs": chain.signs}
        problem = Problem("p", question, str(chain.value()), {}, meta)
        critique = chain_sums.critique_rollout(problem, text, finished="Answer" in text)
        lines = [*(step.text for step in critique.steps), f"Answer: {critique.answer}"]
        assert reply["content"] == "\n".join(lines)
        cases.append(critique.case)
    assert set(cases) == set("ABCD")


def test_a_local_critic_s_prompt_is_encoded_with_its_tokenizer() -> None:
    tokenizer, templates = byte_level(), Templates("chain_sums")
    messages = templates.critic(PROBLEM.question, "2 + 2 = 5", steps=["2 + 2 = 5"], finished=True)
    ids = Renderer(tokenizer, templates).encode_messages(messages)
    assert str(tokenizer.decode(ids)).endswith(f"[user]{messages[-1]['content']}[assistant]")


def test_a_folder_overrides_the_shipped_set_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "solver.jinja").write_text("Please: {{ question }}\n")
    custom = Templates(f"{tmp_path}/")
    assert custom.render("solver", question="2 + 2") == "Please: 2 + 2"
    shipped = Templates("steps").render("teacher", question="q", context="c")
    assert custom.render("teacher", question="q", context="c") == shipped


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ nothing_like_it }}", "template solver.jinja: 'nothing_like_it' is undefined"),
        ("{% if %}", "template solver.jinja: "),
        ("{{ question.nowhere.to_be }}", "template solver.jinja: "),
    ],
)
def test_a_failing_template_is_named_in_one_line(
    tmp_path: Path, template: str, message: str
) -> None:
    (tmp_path / "solver.jinja").write_text(template)
    with pytest.raises(RecipeError) as caught:
        Templates(f"{tmp_path}/").render("solver", question="q")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_template_or_set_is_a_one_line_error() -> None:
    with pytest.raises(
        RecipeError,
        match="no such template set; shipped: bare, chain_sums, code, code_few_shot, free, "
        "free_few_shot, lab, steps",
    ):
        Templates("stepz")
    with pytest.raises(RecipeError, match="no such template set"):
        Templates("/nowhere/at/all")
    with pytest.raises(RecipeError, match=r"template mystery\.jinja"):
        Templates("steps").render("mystery")
    assert not Templates("steps").has("mystery")


def test_a_question_is_text_and_never_a_template() -> None:
    assert Templates("lab").render("solver", question="{{ 7 * 6 }} & <b>") == "{{ 7 * 6 }} & <b>"


def test_turns_alternate_and_the_last_is_the_user_s() -> None:
    assert conversation(f" q1 {TURN} a1 {TURN} q2 ") == [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]
    assert conversation("q") == [{"role": "user", "content": "q"}]
    with pytest.raises(RecipeError, match="last turn must be the user's"):
        conversation(f"q1{TURN}a1")
