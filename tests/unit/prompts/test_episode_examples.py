"""Worked episodes in prompts: real messages of each family, and prompt tokens all of them."""

from __future__ import annotations

import json

import pytest
from model_families import with_tools
from scripted_environment import ScriptedTurns

from selfteach.errors import RecipeError
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import RESULT, TURN, Templates, conversation, without_tools
from selfteach.prompts.thinking import Thinking
from selfteach.prompts.tool_calls import JSON_CALLS, TOOL_FORMATS
from selfteach.rollout.episode_engine import EpisodeEngine, EpisodeLimits
from selfteach.tasks import chain_sums
from selfteach.tasks.environments import calculator, python_tool
from selfteach.tasks.environments.tool_environment import function_tool
from selfteach.types import Problem, Sampling

QUESTION = "State the final answer to the following arithmetic problem: 3 + 4 - 5 ="
PROBLEM = Problem("p", QUESTION, "2", meta={"terms": [3, 4, 5], "signs": [1, 1, -1]})
SETS = ("turns_few_shot", "turns_chain_sums_few_shot")
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "3 + 4"}}\n</tool_call>'
FAMILIES = {"qwen3": "hermes", "llama3": "llama3"}


def renderer(family: str, name: str, tool: dict = calculator.TOOL) -> Renderer:
    thinking = Thinking(student=False, teacher=False) if family == "qwen3" else None
    return Renderer(with_tools(family), Templates(name), tools=[tool], thinking=thinking)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_examples_are_messages_as_the_family_writes_them(family: str, name: str) -> None:
    here = renderer(family, name)
    template = here.templates
    call, end = (
        TOOL_FORMATS[FAMILIES[family]],
        with_tools(family).convert_ids_to_tokens(here.end_id),
    )
    for which, ids in {
        "solver": here.solver_prompt(PROBLEM),
        "teacher": here.teacher_prompt(PROBLEM, "the context 2857"),
    }.items():
        values = {"context": "the context 2857"} if which == "teacher" else {}
        messages = conversation(template.render(which, question=QUESTION, **values))
        roles = [message["role"] for message in messages]
        assert roles == [*["user", *["assistant", "tool"] * 2, "assistant"] * 2, "user"]
        shown = here.shown(ids)
        for message in messages:
            text = (
                json.dumps(message["content"]) if message["role"] == "tool" else message["content"]
            )
            assert (text if family == "llama3" else message["content"]) in shown
        calls = [m["content"] for m in messages if m["role"] == "assistant"][:2]
        assert all(call.read(text).calls and f"{text}{end}" in shown for text in calls)
        assert shown.count(QUESTION) == 1 and shown.index(QUESTION) > shown.rindex(calls[-1])


@pytest.mark.parametrize("name", SETS)
def test_the_tokens_of_examples_are_the_prompt_s(name: str) -> None:
    """An episode's tokens and masks are the same with examples; the prompt alone is longer."""
    rollouts = {}
    for templates in ("turns", name):
        here = renderer("qwen3", templates)
        engine = ScriptedTurns(here, {("p", 0): [CALL, "Answer: 2"]})
        episodes = EpisodeEngine(engine, here, calculator.CalculatorEnvironment, EpisodeLimits())
        (rollouts[templates],) = episodes.generate([PROBLEM], Sampling(1, 1.0, 200, 3))
    bare, shown = rollouts["turns"], rollouts[name]
    assert len(shown.prompt_ids) > len(bare.prompt_ids) + 100
    assert (shown.token_ids, shown.model_mask) == (bare.token_ids, bare.model_mask)
    assert sum(shown.model_mask) == shown.length == len([p for p in shown.logps if p])


def test_python_has_examples_and_another_tool_its_form() -> None:
    python = renderer("qwen3", "turns_few_shot", python_tool.TOOL)
    assert '{"name": "python", "arguments"' in python.shown(python.solver_prompt(PROBLEM))
    tool = function_tool("look_up", "Looks a word up.", word="The word")
    for family, key in {"qwen3": "arguments", "llama3": "parameters"}.items():
        other = renderer(family, "turns_few_shot", tool)
        form = f'{{"name": "look_up", "{key}": {{"word": "…"}}}}'
        for ids in (other.solver_prompt(PROBLEM), other.teacher_prompt(PROBLEM, "x")):
            shown = other.shown(ids)
            assert form in shown and "calculator" not in shown
    no_tools = Templates("turns_few_shot").render("solver", question=QUESTION)
    assert no_tools == Templates("turns").render("solver", question=QUESTION)


def test_calls_as_json_are_shown_and_read_with_any_family() -> None:
    here = Renderer(
        with_tools("llama3"), Templates(SETS[1]), tools=[calculator.TOOL], tool_calls=JSON_CALLS
    )
    assert here.tool_format == JSON_CALLS
    call = '{"name": "calculator", "arguments": {"expression": "8 + 5"}}'
    assert f"{call}<|eot_id|>" in here.shown(here.solver_prompt(PROBLEM))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("family", TOOL_FORMATS)
def test_the_critic_s_examples_are_critiques(name: str, family: str) -> None:
    """Each example's reply is read as the critique that it shows, by the parser of replies."""
    templates = Templates(name).offering([calculator.TOOL], TOOL_FORMATS[family])
    messages = templates.critic("Q", "A", steps=("A",), finished=True, reference="R")
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3 + ["user"]
    replies = [m["content"] for m in messages if m["role"] == "assistant"]
    cases = [reply[6] for reply in replies]
    assert cases == ["D", "A", "C"]
    for reply, shown in zip(replies, messages[::2], strict=False):
        attempt = shown["content"].rpartition("ATTEMPT")[2]
        right = 1 if reply[6] != "A" else 3
        for number in range(1, right + 1):
            turn = reply.partition(f"<turn_{number}>")[2].partition(f"</turn_{number}>")[0]
            assert turn in attempt, "right turns are repeated"
        first = reply.partition("<turn_1>\n")[2].partition("\n</turn_1>")[0]
        assert TOOL_FORMATS[family].read(first).calls
    assert "R\n" in messages[-1]["content"]
    alone = templates.critic("Q", "A", steps=("A",), finished=False)
    assert "FOR YOU ALONE" not in alone[0]["content"] and "CUT OFF" in alone[-1]["content"]


def test_no_problem_set_holds_the_examples_sums() -> None:
    source = Templates("turns_chain_sums_few_shot").offering([calculator.TOOL], None)
    for message in conversation(source.render("solver", question=QUESTION))[:-1]:
        if message["role"] == "user":
            sum_ = message["content"].partition("problem: ")[2].partition(" =")[0]
            assert sum_ in chain_sums.SHOTS


def test_data_writes_no_result_and_results_follow_calls() -> None:
    rendered = Templates("turns").render("solver", question=f"a{RESULT}b{TURN}c")
    assert rendered.startswith("abc") and len(conversation(rendered)) == 1
    with pytest.raises(RecipeError, match="must follow an assistant"):
        conversation(f"a{RESULT}b")
    for text in (f"a{TURN}b{RESULT}c", f"a{TURN}b"):
        with pytest.raises(RecipeError, match="last turn must be the user's"):
            conversation(text)
    roles = [m["role"] for m in without_tools(conversation(f"a{TURN}b{RESULT}c{TURN}d{TURN}e"))]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
