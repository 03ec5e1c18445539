"""The families' original chat templates with tools, as TRL's wheel carries them (Apache-2.0)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from model_families import tokenizer_of

from selfteach.episodes import ToolCall
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.prompts.tool_calls import TOOL_FORMATS
from selfteach.tasks.environments.calculator import TOOL
from selfteach.types import Problem

FAMILIES = {"qwen2_5": "hermes", "qwen3": "hermes", "llama3": "llama3"}
FILES = {"llama3": "llama3_1"}
HEADERS = {
    "hermes": "<|im_start|>{}\n",
    "llama3": "<|start_header_id|>{}<|end_header_id|>\n\n",
}
REPLIES = {
    "hermes": "\n<|im_start|>user\n<tool_response>\n42\n</tool_response>\n<tool_response>\n7\n"
    "</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "llama3": '<|start_header_id|>ipython<|end_header_id|>\n\n"42"<|eot_id|>'
    '<|start_header_id|>ipython<|end_header_id|>\n\n"7"<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
PROBLEM = Problem("p", "What is 6 * 7?", "42")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def renderer(family: str) -> Renderer:
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed")
    path = Path(spec.origin).parent / "chat_templates" / f"{FILES.get(family, family)}.jinja"
    if not path.exists():
        pytest.skip("this trl has no such template")
    tokenizer = tokenizer_of(family)
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    return Renderer(tokenizer, Templates("turns_few_shot"), tools=[TOOL])


def test_an_episode_s_ids_are_those_of_the_original_template(
    family: str, renderer: Renderer
) -> None:
    """Prompt, call, end token and replies: the ids of the template's own text, examples included."""
    form = FAMILIES[family]
    assert renderer.tool_format == TOOL_FORMATS[form]
    renderer.require_replies("tool")
    reply = renderer.reply(["42", "7"], "tool")
    assert renderer.shown(reply) == REPLIES[form]
    prompt = renderer.shown(renderer.solver_prompt(PROBLEM))
    header = HEADERS[form].format("assistant")
    assert prompt.count("What is 6 * 7?") == 1 and '"name": "calculator"' in prompt
    call = TOOL_FORMATS[form].write(ToolCall("calculator", {"expression": "2 * 60"}))
    assert f"{header}{call}" in prompt and f"{header}<answer>600</answer>" in prompt
    ids = (*renderer.solver_prompt(PROBLEM), *renderer.encode_answer(call), *reply)
    text = renderer.shown(ids)
    tokenizer = tokenizer_of(family)
    assert list(ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert text.endswith(f"{call}{renderer.shown([renderer.end_id])}{REPLIES[form]}")
