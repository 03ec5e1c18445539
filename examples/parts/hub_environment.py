"""An environment of `verifiers`: problems and a rubric, which any trainer with that library takes."""

import verifiers as vf
from datasets import Dataset


def right(completion, answer):
    """Reward a completion whose last line is the answer."""
    lines = completion[-1]["content"].split("\n")
    return float(lines[-1].strip() == answer)


async def short(completion, state):
    """Reward few words, of completions that ended by themselves."""
    words = len(completion[-1]["content"].split())
    return 0.0 if state["is_truncated"] else max(0.0, 1 - words / 100)


def load_environment(count: int = 60):
    """Return sums, `count` of them; the recipe's `options` are these arguments."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n} + {n + 7}? End with the number alone."}],
            "answer": str(2 * n + 7),
        }
        for n in range(count)
    ]
    rubric = vf.Rubric(funcs=[right, short], weights=[1.0, 0.1])
    return vf.SingleTurnEnv(dataset=Dataset.from_list(rows), rubric=rubric)
