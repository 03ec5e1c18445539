"""Which turns try to call a tool and do not, and which only look as if: exact rules, for any text."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from selfteach.episodes import ToolCall
from selfteach.prompts.tool_calls import JSON_CALLS, TOOL_FORMATS, ToolFormat
from selfteach.tasks.environments.calculator import TOOL

FORMATS = {name: form.offering([TOOL]) for name, form in TOOL_FORMATS.items()}
CALL = '{"name": "calculator", "arguments": {"expression": "6 * 7"}}'
LLAMA = CALL.replace("arguments", "parameters")
FAMILIES = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)

words = st.text(st.sampled_from("abc 12.,:;-+*`'\n<>/[]()="), max_size=60)
"""Prose, with what stands around calls, and without an object."""
arguments = st.dictionaries(st.text(max_size=6), st.text(max_size=12) | st.integers(), max_size=3)


def written(value: object, form: ToolFormat, indent: int | None) -> str:
    return json.dumps({"name": "calculator", form.arguments: value}, indent=indent)


@pytest.mark.parametrize(
    "turn",
    [
        f"```json\n{CALL}\n```",
        f"First I add them up:\n```json\n{CALL}\n```\nThe sum is 42.\nAnswer: 42",
        f"```\n[{CALL}]\n```",
        f"Let me compute.\n{CALL}\n</tool_call>",
        f"<tools>{CALL}</tools>",
        f"<|python_tag|> {CALL}",
        f"> {CALL}",
        f"`{CALL}`",
        json.dumps(json.loads(CALL), indent=4).join(["```json\n", "\n```"]),
        "```json\n" + LLAMA,
        "Hm:\n" + LLAMA[:-9],
        '{"type": "function", "name": "calculator", "arguments": {"expression": "6',
        CALL.replace('"', '\\"'),
    ],
)
@FAMILIES
def test_a_call_in_another_form_is_malformed(form: ToolFormat, turn: str) -> None:
    read = form.read(turn)
    assert read.calls == () and read.malformed is not None and "\n" not in read.malformed
    shown = ToolCall("calculator", {"expression": "…"})
    assert f"a call is written {' '.join(form.write(shown).split())}" in read.malformed


@pytest.mark.parametrize(
    "turn",
    [
        "Answer: 42",
        '{"answer": 42}',
        '```json\n{"name": "Ann", "age": 42}\n```',
        '{"name": "Ann", "age": 42}',
        '{"name": "Ann", "age": 42} is the person.',
        '```json\n{"name": "Ann", "arguments": ["for", "against"]}\n```',
        '```json\n{"name": "calculator", "price": 42}\n```',
        f"I called {CALL} and got 42.\nAnswer: 42",
        f"Answer: {CALL}",
        '[{"name": "calculator"}, {"name": "abacus"}]',
        "{" * 50,
        "The calculator says: 42",
    ],
)
@FAMILIES
def test_an_answer_with_json_is_an_answer(form: ToolFormat, turn: str) -> None:
    if form.name == "llama3" and '"arguments": [' in turn[:30]:
        return
    read = form.read(turn)
    assert (read.calls, read.malformed) == ((), None)


def test_a_call_of_llama_needs_arguments_or_a_known_name() -> None:
    """The whole turn is the call, so an answer that is an object must not be one."""
    form = FORMATS["llama3"]
    assert form.read('{"name": "abacus", "parameters": {}}').calls == (ToolCall("abacus"),)
    assert form.read('{"name": "calculator"}').calls == (ToolCall("calculator"),)
    assert form.read('{"name": "Ann"}').calls == ()
    assert TOOL_FORMATS["llama3"].read(CALL[:-1]).malformed is not None


@given(before=words, after=words, value=arguments, indent=st.sampled_from([None, 2]))
@example(before="```json\n", after="\n```", value={}, indent=None)
def test_a_call_in_the_family_s_form_is_one_whatever_stands_around_it(
    before: str, after: str, value: dict[str, object], indent: int | None
) -> None:
    form = FORMATS["hermes"]
    call = f"<tool_call>\n{written(value, form, indent)}\n</tool_call>"
    turn = form.read(f"{before}\n{CALL}\n{call}\n{after}")
    assert turn.calls == (ToolCall("calculator", value),) and turn.malformed is None
    assert turn.before_calls == f"{before}\n{CALL}".strip()


@FAMILIES
@given(before=words, after=words, value=arguments, key=st.sampled_from(["arguments", "parameters"]))
def test_a_known_call_on_a_line_of_its_own_is_never_an_answer(
    form: ToolFormat, before: str, after: str, value: dict[str, object], key: str
) -> None:
    text = json.dumps({"name": "calculator", key: value})
    turn = form.read(f"so:{before}\n{text}\n{after}")
    assert turn.calls == () and turn.malformed is not None


@FAMILIES
@given(
    before=words,
    after=words,
    value=st.recursive(
        st.none() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["name", "age", "arguments", "x"]), inner, max_size=3)
        ),
        max_leaves=8,
    ),
)
def test_json_that_names_no_tool_is_text(
    form: ToolFormat, before: str, after: str, value: object
) -> None:
    turn = form.read(f"so:{before}\n```json\n{json.dumps(value)}\n```\n{after}")
    assert (turn.calls, turn.malformed) == ((), None)


@FAMILIES
@pytest.mark.parametrize(
    "unit",
    ['{"name":', "```json\n", "<a>", "[ ", "   ", "\n", '{"name": "calculator", ', "{ ", "> "],
)
def test_no_turn_takes_long_to_read(form: ToolFormat, unit: str) -> None:
    text = unit * (99_000 // len(unit))
    began = time.process_time()
    form.read(text)
    assert time.process_time() - began < 0.5


def test_without_tools_no_text_is_a_malformed_call() -> None:
    assert TOOL_FORMATS["hermes"].read(CALL).malformed is None


JSON = JSON_CALLS.offering([TOOL])


@given(before=words, after=words, value=arguments, indent=st.sampled_from([None, 2]))
def test_calls_of_the_form_json_are_objects_on_lines_of_their_own(
    before: str, after: str, value: dict[str, object], indent: int | None
) -> None:
    call = written(value, JSON, indent)
    turn = JSON.read(f"so:{before}\n```json\n{call}\n```\n{after}\n{CALL}")
    seven = ToolCall("calculator", {"expression": "6 * 7"})
    assert turn.calls == (ToolCall("calculator", value), seven) and turn.malformed is None
    assert JSON.read(JSON.write(seven)).calls == (seven,)


@pytest.mark.parametrize("turn", ["Answer: 42", '{"name": "Ann", "age": 4}', f"I wrote {CALL}."])
def test_other_json_is_no_call_of_the_form_json(turn: str) -> None:
    assert (JSON.read(turn).calls, JSON.read(turn).malformed) == ((), None)


@pytest.mark.parametrize("turn", [CALL[:-3], LLAMA, CALL.replace('"', '\\"')])
def test_a_call_of_the_form_json_may_be_malformed(turn: str) -> None:
    malformed = JSON.read(turn).malformed
    assert malformed is not None and "on a line of its own" in malformed


def test_an_object_inside_a_call_is_not_another_one() -> None:
    inner = json.dumps({"name": "calculator", "arguments": {"x": json.loads(CALL)}}, indent=1)
    assert len(JSON.read(inner).calls) == 1
    began = time.process_time()
    JSON.read(f"{CALL}\n" * 1500)
    assert time.process_time() - began < 0.5
