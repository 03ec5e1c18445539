"""A tiny library of the shape of `verifiers` 0.3: what the adapter uses of its classic part."""

import inspect
import signal

from verifiers.types import State


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
    def __init__(self, dataset=None, eval_dataset=None, rubric=None):
        self.dataset, self.eval_dataset, self.tool_defs = dataset, eval_dataset, None
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

    async def render_completion(self, state): ...


class SingleTurnEnv(MultiTurnEnv):
    pass


__all__ = ["MultiTurnEnv", "Parser", "Rubric", "SingleTurnEnv", "State"]
