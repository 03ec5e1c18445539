"""Test that any body of a chat completion ends as a reply, a refusal or an unusable body."""

from __future__ import annotations

import json
from typing import Any

import pytest

from selfteach.feedback.critics.chat_model import Reply
from selfteach.feedback.critics.completion_reader import UnusableBody, read_completion

BODY: dict[str, Any] = {
    "choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4},
}
ODD: list[Any] = [
    None, True, -1, 1e308, float("inf"), float("nan"), 10**300, "", "\ud800", "\x00\x1b[31m", [], {},
    [[]], [None], [1], [{}], [{"text": "t"}], [{"type": ["x"], "text": "t"}], [{"text": {"value": 1}}],
    {"text": 1}, {"text": "t"}, "9" * 5000,
]  # fmt: skip
PATHS: list[tuple[str | int, ...]] = [
    (), ("choices",), ("choices", 0), ("choices", 0, "message"), ("choices", 0, "message", "content"),
    ("choices", 0, "message", "refusal"), ("choices", 0, "finish_reason"), ("choices", 0, "error"),
    ("usage",), ("usage", "prompt_tokens"), ("usage", "completion_tokens"), ("error",),
]  # fmt: skip


def replaced(path: tuple[str | int, ...], value: Any) -> bytes:
    body = json.loads(json.dumps({"": BODY}))
    place: Any = body
    for key in ("", *path)[:-1]:
        place = place[key]
    place[("", *path)[-1]] = value
    return json.dumps(body[""]).encode()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_value_of_another_type_in_any_field_ends_typed(path: tuple[str | int, ...]) -> None:
    for value in ODD:
        try:
            reply = read_completion(replaced(path, value))
        except UnusableBody:
            continue
        if isinstance(reply, Reply):
            (reply.text + reply.refusal).encode()
            assert type(reply.finished) is bool
            assert 0 <= reply.prompt_tokens + reply.completion_tokens <= 2 * 10**9


def test_control_characters_that_a_server_does_not_escape_are_text() -> None:
    body = json.dumps(BODY).replace("hi", "one\ntwo\x01").encode()
    reply = read_completion(body)
    assert (
        isinstance(reply, Reply) and reply.text == "one\ntwo\x01" and reply.completion_tokens == 4
    )


def test_a_refusal_among_the_parts_is_a_refusal() -> None:
    parts = [{"type": "refusal", "refusal": "I cannot."}]
    reply = read_completion(replaced(("choices", 0, "message", "content"), parts))
    assert isinstance(reply, Reply) and "I cannot." in reply.refusal
