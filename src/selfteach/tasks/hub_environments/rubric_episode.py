"""Runs one episode of an environment of `verifiers` turn by turn, as the library's rollout does.

The library's loop requests the turns; here they are given, and replies returned. What it calls is the
same in the same order: ``setup_state``; after each turn the stop conditions, then ``env_response``; at
the end the clean-up, the rubric, and the rubric's clean-up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from selfteach.episodes import EnvironmentReply, Turn
from selfteach.tasks.hub_environments.attempts import Outcome
from selfteach.tasks.hub_environments.library_state import (
    begun_state,
    messages_of,
    text_of,
    trajectory_step,
)
from selfteach.tasks.hub_environments.shared_loop import RAISED
from selfteach.types import Rewards

if TYPE_CHECKING:
    from selfteach.tasks.hub_environments.rubric_environment import RubricEnvironment


class RubricEpisode:
    """Holds the state of one episode of an environment, and goes on with it."""

    def __init__(self, load: RubricEnvironment) -> None:
        self._load, self._environment = load, load.environment
        self._state: Any = None
        self._messages: list[Any] = []
        self._last, self._is_clean = "", False

    async def begin(self, row: Mapping[str, Any], seed: int) -> str:
        """Set the state up, with ``state["seed"]``; return what is shown behind the prompt.

        Raises `ValueError` for an environment that rewrites the prompt, which the policy has then not
        seen, and what the environment raises.
        """
        self._state = await begun_state(self._environment, row, seed=seed)
        if self._state.get("error") is not None:
            raise self._state["error"]
        before = [(m["role"], text_of(m)) for m in messages_of(row["prompt"], "prompt")]
        self._messages = list(self._state["prompt"])
        after = [(m["role"], text_of(m)) for m in self._messages]
        return _added(before, after)

    async def reply(self, turn: Turn) -> EnvironmentReply:
        """Reply to a turn, or end the episode."""
        offers_tools = bool(self._environment.tool_defs)
        completion = messages_of([_message(turn, offers_tools, len(self._messages))], "completion")
        step = trajectory_step(self._state, list(self._messages), completion, is_truncated=False)
        await self._environment.add_trajectory_step(self._state, step)
        self._messages += completion
        if offers_tools and turn.malformed is not None:
            return self._refusal(turn.malformed)
        if await self._environment.is_completed(self._state):
            return self._final()
        raised: list[str] = []
        token = RAISED.set(raised)
        try:
            response = await self._environment.env_response(list(self._messages), self._state)
        finally:
            RAISED.reset(token)
        if self._state.get("error") is not None:
            raise self._state["error"]
        if self._state.get("final_env_response") is not None:
            await self._environment.is_completed(self._state)
            return self._final()
        messages = messages_of(response, "env_response")
        self._messages += messages
        return self._reply(messages, failed=bool(raised) or self._calls_unknown(turn))

    async def finish(self) -> Rewards:
        """Return the rewards of the episode, which is over."""
        state = self._state
        if not state["is_completed"]:  # our limits have ended it
            state["is_completed"], state["is_truncated"] = True, True
            state["stop_condition"] = "truncated"
        if not state["trajectory"]:
            empty = messages_of([{"role": "assistant", "content": ""}], "completion")
            step = trajectory_step(state, list(self._messages), empty, is_truncated=True)
            await self._environment.add_trajectory_step(state, step)
        try:
            await self._environment.cleanup(state)
            return self._rewards(await self._load.outcomes(state))
        finally:
            await self._clean(cleanup_environment=False)

    @property
    def last_message(self) -> str:
        """Return what the environment wrote last."""
        return self._last

    async def close(self) -> None:
        """Clean up after an episode that was never finished."""
        if self._state is not None and not self._is_clean:
            await self._clean(cleanup_environment=True)

    async def _clean(self, *, cleanup_environment: bool) -> None:
        self._is_clean = True
        try:
            if cleanup_environment:
                await self._environment.cleanup(self._state)
        finally:
            await self._environment.rubric.cleanup(self._state)

    def _refusal(self, why: str) -> EnvironmentReply:
        """Reply to a malformed call: the library would take it for an answer."""
        limit, turns = getattr(self._environment, "max_turns", -1), len(self._state["trajectory"])
        self._last = f"Error: {why}"
        self._messages += messages_of([{"role": "user", "content": self._last}], "env_response")
        return EnvironmentReply((self._last,), "malformed_call", done=0 < limit <= turns)

    def _calls_unknown(self, turn: Turn) -> bool:
        """Return True if a turn calls a tool that there is not: the library replies with an error."""
        tools = getattr(self._environment, "tool_map", None)
        return isinstance(tools, dict) and any(call.name not in tools for call in turn.calls)

    def _final(self) -> EnvironmentReply:
        final = self._state.get("final_env_response")
        messages = messages_of(final, "final_env_response") if final else []
        texts = tuple(text_of(message) for message in messages)
        self._last = "\n".join(texts) or self._last
        return EnvironmentReply(texts, "observation", done=True)

    def _reply(self, messages: Sequence[Any], *, failed: bool) -> EnvironmentReply:
        texts = tuple(text_of(message) for message in messages)
        roles = {message["role"] for message in messages}
        if roles not in ({"user"}, {"tool"}):
            listed = ", ".join(sorted(roles)) or "no message"
            raise ValueError(
                f"env_response returned {listed}: a reply consists of messages of the user, or of tools"
            )
        self._last = "\n".join(texts)
        if roles == {"user"}:
            return EnvironmentReply(("\n\n".join(texts),), "observation")
        return EnvironmentReply(texts, "tool_error" if failed else "tool_result")

    def _rewards(self, outcomes: Mapping[str, Outcome]) -> Rewards:
        failures = {name: value for name, value in outcomes.items() if isinstance(value, str)}
        values = {name: 0.0 if isinstance(v, str) else v for name, v in outcomes.items()}
        total = math.fsum(self._load.weights[name] * value for name, value in values.items())
        if not math.isfinite(total):
            raise ValueError(f"the rubric's reward is {total}")
        return Rewards(total, values, failures)


def _message(turn: Turn, offers_tools: bool, number: int) -> dict[str, Any]:
    """Return a turn as a message; calls are apart from its text, as a server's parser has it."""
    if not (offers_tools and turn.calls):
        return {"role": "assistant", "content": turn.text}
    calls = [
        {
            "id": f"call_{number}_{i}",
            "name": call.name,
            "arguments": json.dumps(dict(call.arguments)),
        }
        for i, call in enumerate(turn.calls)
    ]
    return {"role": "assistant", "content": turn.before_calls, "tool_calls": calls}


def _added(before: Sequence[tuple[str, str]], after: Sequence[tuple[str, str]]) -> str:
    """Return what the prompt has more than the row's: text of the user at its end."""
    *earlier, (role, last) = before
    same = list(after[: len(earlier)]) == earlier and len(after) >= len(before)
    rest = after[len(earlier) :]
    if not (same and rest[0][0] == role == "user" and rest[0][1].startswith(last)):
        raise ValueError("setup_state rewrites the prompt: it may only add to its end")
    if any(other != "user" for other, _ in rest[1:]):
        raise ValueError("setup_state adds messages to the prompt that are not the user's")
    texts = [rest[0][1].removeprefix(last), *(text for _, text in rest[1:])]
    return "\n\n".join(text.strip() for text in texts if text.strip())
