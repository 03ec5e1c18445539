"""Test the files of completions that `selfteach critique` reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from model_families import byte_level

from selfteach.commands.critique import read_rollouts
from selfteach.errors import DataError
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.types import Problem

CHAT = Problem("c", "And now?", "2", history=(("user", "Hi."), ("assistant", "Hello.")))
OTHER = replace(CHAT, id="o", history=(("user", "Bye."), ("assistant", "So long.")))
SETUP = SimpleNamespace(
    task=SimpleNamespace(train=(OTHER, CHAT), validation=(), test=()),
    renderer=Renderer(byte_level(), Templates("steps")),
)


def write(path: Path, *rows: dict, end: str = "\n", encoding: str = "utf-8") -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(("encoding", "end"), [("utf-8", "\n"), ("utf-8-sig", "\r\n")])
def test_a_line_of_a_file_of_rollouts_ends_in_a_line_feed_alone(
    encoding: str, end: str, tmp_path: Path
) -> None:
    row = {"question": "p\u2028q", "text": "a\u0085b", "answer": "2"}
    path = write(tmp_path / "a.jsonl", row, row, end=end, encoding=encoding)
    rollouts = read_rollouts(path, SETUP)  # type: ignore[arg-type]
    assert [r.rollout.problem.question for r in rollouts] == ["p\u2028q"] * 2
    assert rollouts[0].rollout.text == "a\u0085b"


def test_a_question_is_that_of_the_recipe_in_the_same_conversation(tmp_path: Path) -> None:
    history = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    row = {"question": "And now?", "text": "2", "answer": "2"}
    path = write(tmp_path / "a.jsonl", {**row, "history": history}, row)
    chat, alone = read_rollouts(path, SETUP)  # type: ignore[arg-type]
    assert chat.rollout.problem == CHAT and alone.rollout.problem.history == ()
    history[0]["role"] = "tool"
    write(path, {**row, "history": history})
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: the history has a message of the role 'tool'"
    ):
        read_rollouts(path, SETUP)  # type: ignore[arg-type]
