"""A tiny library of the shape of `verifiers` 0.3: what the adapter uses of its classic part."""

import inspect
import json
import signal

from verifiers.types import State, ToolCall


class Parser:
    def parse_answer(self, completion):
        return completion[-1]["content"].partition("=")[2] or None


class Rubric:
    def __init__(self, funcs=(), weights=None, parser=None):
        self.funcs, self.parser = list(funcs), parser or Parser()
        self.weights = list(weights or [1.0] * len(self.funcs))
        self.cleaned = []

    def _is_group_func(self, function):
        return "completions" in inspect.signature(function).parameters

    def score_objects(self, state):
        names = ("prompt", "completion", "answer", "info", "task")
        return {"state": state, "parser": self.parser, **{n: state.get(n) for n in names}}

    def group_score_objects(self, states):
        return {"states": states, "completions": [state["completion"] for state in states]}

    async def score_rollout(self, state): ...

    async def score_group(self, states): ...

    async def cleanup(self, state):
        self.cleaned.append(state["trajectory_id"])


class MultiTurnMonitorRubric(Rubric):
    pass


class MultiTurnEnv:
    tool_defs = None

    def __init__(self, dataset=None, eval_dataset=None, rubric=None, max_turns=-1):
        self.dataset, self.eval_dataset, self.max_turns = dataset, eval_dataset, max_turns
        self.rubric = Rubric()
        self.rubric.rubrics = [rubric, MultiTurnMonitorRubric([lambda state: 1.0])]
        signal.signal(signal.SIGTERM, lambda *_: None)

    def build_dataset(self):
        return self.dataset

    def build_eval_dataset(self):
        return self.eval_dataset

    async def setup_state(self, state):
        return state

    async def env_response(self, messages, state): ...

    async def get_prompt_messages(self, state): ...

    async def render_completion(self, state):
        last = state["trajectory"][-1]
        whole = [*last["prompt"], *last["completion"], *(state["final_env_response"] or [])]
        state["completion"] = whole[len(state["prompt"]) :]

    async def add_trajectory_step(self, state, step):
        state["trajectory"].append(step)

    async def stops(self, state):
        return 0 < self.max_turns <= len(state["trajectory"])

    async def is_completed(self, state):
        if state["final_env_response"] is not None or await self.stops(state):
            state["is_completed"] = True
        return state["is_completed"]

    async def cleanup(self, state):
        await self.render_completion(state)


class SingleTurnEnv(MultiTurnEnv):
    pass


class ToolEnv(MultiTurnEnv):
    def __init__(self, tools=(), max_turns=10, **settings):
        super().__init__(max_turns=max_turns, **settings)
        self.tool_map = {tool.__name__: tool for tool in tools}
        self.tool_defs = [_schema(tool) for tool in tools]

    async def stops(self, state):
        if await super().stops(state):
            return True
        return bool(state["trajectory"]) and not state["trajectory"][-1]["completion"][-1].get(
            "tool_calls"
        )

    async def env_response(self, messages, state):
        replies = []
        for call in map(ToolCall, messages[-1]["tool_calls"]):
            try:
                result = self.tool_map[call.name](**json.loads(call.arguments))
                content = str(await result if inspect.isawaitable(result) else result)
            except Exception as error:
                content = f"{error}"
            replies.append({"role": "tool", "content": content, "tool_call_id": call.id})
        return replies


def _schema(tool):
    names = list(inspect.signature(tool).parameters)
    properties = {name: {"type": "integer"} for name in names}
    parameters = {"type": "object", "properties": properties, "required": names}
    return {"name": tool.__name__, "description": tool.__doc__ or "", "parameters": parameters}


__all__ = ["MultiTurnEnv", "Parser", "Rubric", "SingleTurnEnv", "State", "ToolEnv"]
