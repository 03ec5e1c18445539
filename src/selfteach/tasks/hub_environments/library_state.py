"""Makes the state of a rollout as `verifiers` has it, which its functions read and write."""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Mapping
from typing import Any


async def begun_state(environment: Any, row: Mapping[str, Any], **extra: Any) -> Any:
    """Return the state before the first turn, set up by the environment; ``extra`` are more fields."""
    from verifiers.types import RolloutTiming, State, flatten_task_input  # pyright: ignore[reportMissingImports]
    from verifiers.utils.message_utils import normalize_messages  # pyright: ignore[reportMissingImports]

    values = copy.deepcopy(dict(row))
    if isinstance(values.get("info"), str):
        values["info"] = json.loads(values["info"])
    task = flatten_task_input(values)
    state = State(input=task)
    fields: dict[str, Any] = {
        "task": task, "prompt": normalize_messages(values["prompt"], field_name="input.prompt"),
        "completion": None, "client": None, "model": "", "sampling_args": None,
        "is_completed": False, "is_truncated": False, "stop_condition": None,
        "tool_defs": list(environment.tool_defs or ()),
        "trajectory": [], "trajectory_id": uuid.uuid4().hex, "reward": None, "metrics": None,
        "error": None, "final_env_response": None, "timing": RolloutTiming(), **extra,
    }  # fmt: skip
    for name, value in fields.items():
        state[name] = value
    prepared = await environment.setup_state(state)
    return state if prepared is None else prepared


def trajectory_step(state: Any, prompt: Any, completion: Any, *, is_truncated: bool) -> Any:
    """Return the record of one turn; the policy's tokens are ours alone, so it has none."""
    return {
        "prompt": prompt, "completion": completion, "response": None, "tokens": None,
        "reward": None, "advantage": None, "is_truncated": is_truncated,
        "trajectory_id": state["trajectory_id"], "extras": {},
    }  # fmt: skip


def messages_of(messages: Any, name: str) -> list[Any]:
    """Return messages as the library's records."""
    from verifiers.utils.message_utils import normalize_messages  # pyright: ignore[reportMissingImports]

    return list(normalize_messages(messages, field_name=name))


def text_of(message: Any) -> str:
    """Return a message's text. Raises `ValueError` for one with other contents."""
    content = message["content"]
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        kind = part.get("type")
        if kind != "text":
            raise ValueError(
                f"a message has content of the type {kind!r}: only text can be read here"
            )
        texts.append(str(part["text"]))
    return "\n".join(texts)
