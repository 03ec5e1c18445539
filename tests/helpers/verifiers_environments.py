"""Source of environments of `verifiers`, for the library itself and for one of its shape."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "fakes" / "verifiers_library"


@contextmanager
def shaped_library(folder: Path, *modules: str) -> Iterator[None]:
    """Let ``verifiers`` be the library of its shape, and modules of a folder importable."""
    before = [*sys.path]
    sys.path[:0] = [str(LIBRARY), str(folder)]
    _forget("verifiers", *modules)
    try:
        yield
    finally:
        sys.path[:] = before
        _forget("verifiers", *modules)


def _forget(*names: str) -> None:
    for name in [module for module in sys.modules if module.split(".")[0] in names]:
        del sys.modules[name]


CLASSIC = """
import verifiers as vf
from datasets import Dataset


def rows(numbers):
    return Dataset.from_list([
        {"prompt": [{"role": "system", "content": "Be brief."},
                    {"role": "user", "content": f"What is {n} + {n}?"}],
         "answer": str(2 * n), "info": {"level": n % 3}}
        for n in numbers
    ])


async def correct(completion, answer, parser, state):
    state["seen"] = True  # the next function reads it
    return float(answer in completion[-1]["content"])


class Longer:
    def __call__(self, completion, state, info):
        assert state["seen"] and state["completion"] is completion
        return len(completion[-1]["content"]) + info["level"]


def longest(completions, **kwargs):
    lengths = [len(one[-1]["content"]) for one in completions]
    return [float(n == max(lengths)) for n in lengths]


def picky(completion):
    if "no" in completion[-1]["content"]:
        raise ValueError("no\\nno")
    return 1.0


def load_environment(count: int = 10, evaluation: int = 2):
    longer = Longer()
    longer.__name__ = "longer"
    rubric = vf.Rubric([correct, longer, longest, picky], [1.0, 0.01, 0.5, 0.25])
    held_out = rows(range(100, 100 + evaluation)) if evaluation else None
    return vf.SingleTurnEnv(dataset=rows(range(count)), eval_dataset=held_out, rubric=rubric)


class Turns(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        return []


def several_turns():
    return Turns(dataset=rows(range(3)), rubric=vf.Rubric([correct]))


class Edits(vf.SingleTurnEnv):
    async def render_completion(self, state): ...


def edited():
    return Edits(dataset=rows(range(3)), rubric=vf.Rubric([correct]))


def nothing():
    return 3
"""

EPISODES = """
import threading
import time

import verifiers as vf
from datasets import Dataset


def rows():
    return Dataset.from_list([
        {"prompt": [{"role": "system", "content": "Be brief."},
                    {"role": "user", "content": f"Guess. Row {n}."}], "answer": str(n)}
        for n in range(10)
    ])


def right(completion, answer, state):
    return float(completion[-1]["role"] != "assistant" and "Yes" in completion[-1]["content"])


def turns(state):
    return float(len(state["trajectory"]))


def of_group(completions, **kwargs):
    return [0.0 for _ in completions]


def raising(completion):
    raise KeyError("no")


class Guess(vf.MultiTurnEnv):
    '''The number to guess is the seed modulo 10; three turns.'''

    cleaned = []

    async def setup_state(self, state):
        state["number"] = str(state["seed"] % 10)
        last = dict(role="user", content=f"The number has {len(state['number'])} digit.")
        state["prompt"] = [*state["prompt"], *self.as_messages([last])]
        return state

    def as_messages(self, messages):
        from verifiers.utils.message_utils import normalize_messages
        return normalize_messages(messages, field_name="x")

    async def env_response(self, messages, state, **kwargs):
        guess = messages[-1]["content"].strip()
        if guess == "hang":
            import asyncio
            await asyncio.sleep(60)
        if guess == "block":
            time.sleep(1.5)
        if guess == "fail":
            raise ValueError("no\\nguess")
        if guess == "nothing":
            return []
        if guess == state["number"]:
            state["final_env_response"] = [{"role": "user", "content": "Yes."}]
            return state["final_env_response"]
        return [{"role": "user", "content": f"Not {guess}."}]

    async def cleanup(self, state, **kwargs):
        type(self).cleaned.append(state["trajectory_id"])
        await super().cleanup(state, **kwargs)


def guess(functions=(right, turns), kind=Guess, **settings):
    rubric = vf.Rubric(list(functions), [1.0, 0.0][: len(functions)])
    return kind(dataset=rows(), rubric=rubric, max_turns=3, **settings)


def with_group():
    return guess((right, of_group))


def with_raising():
    return guess((right, raising))


class Branching(Guess):
    async def get_prompt_messages(self, state):
        return state["prompt"]


def branching():
    return guess(kind=Branching)


class Rewriting(Guess):
    async def setup_state(self, state):
        state["prompt"] = self.as_messages([{"role": "user", "content": "Another."}])
        return state


def rewriting():
    return guess(kind=Rewriting)


def add(x: int, y: int) -> int:
    '''Add two numbers.'''
    if x < 0:
        raise ValueError("x is negative")
    if x == 99:
        time.sleep(60)
    return x + y


async def ask(x: int) -> str:
    '''Ask for a number.'''
    return f"in the loop: {threading.current_thread().name != 'tool'}"


def calls(completion):
    return float(sum(len(m.get("tool_calls") or []) for m in completion if m["role"] == "assistant"))


def size(completion):
    return sum(len(m["content"] or "") for m in completion if m["role"] == "assistant") / 10


def guess_by_size():
    return guess((size, turns))


def sums(functions=(calls,)):
    rubric = vf.Rubric(list(functions), [1.0] * len(functions))
    return vf.ToolEnv(tools=[add, ask], dataset=rows(), rubric=rubric, max_turns=4)


def sums_by_size():
    return sums((calls, size))
"""

TASKSET = """
import verifiers.v1 as vf


class Sum(vf.TaskData):
    answer: str


class Settings(vf.TasksetConfig):
    count: int = 10
    start: int = 0


class SumTask(vf.Task[Sum, vf.State, vf.TaskConfig]):
    @vf.reward(weight=2.0)
    async def correct(self, trace) -> float:
        return float(self.data.answer in trace.last_reply)

    @vf.reward
    async def form(self, task, trace) -> dict:
        return {"ended": 0.5 * (not trace.is_truncated), "turns": 0.25 * trace.num_turns}

    @vf.reward
    async def picky(self, trace) -> float:
        if "no" in trace.last_reply:
            raise ValueError("no")
        return 1.0


class Sums(vf.Taskset[SumTask, Settings]):
    def load(self):
        for n in range(self.config.start, self.config.start + self.config.count):
            prompt = f"What is {n} + {n}?"
            data = Sum(idx=n, prompt=prompt, system_prompt="Be brief.", answer=str(2 * n))
            yield SumTask(data, self.config.task)


class Runs(SumTask):
    @vf.reward
    async def ran(self, trace, runtime) -> float:
        return 1.0


class NeedsRuntime(vf.Taskset[Runs, Settings]):
    def load(self):
        yield Runs(Sum(prompt="q", answer="1"), self.config.task)


class Endless(Sums):
    INFINITE = True


__all__ = ["Sums"]
"""
