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
