"""An evaluation assigns verdicts to problems and computes their measures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from selfteach.evaluation.evaluation_record import Evaluation
from selfteach.evaluation.evaluator import evaluate
from selfteach.rollout.journaled_engine import BatchedEngine
from selfteach.types import Problem, Rollout, Sampling, Verdict

PROBLEMS = [Problem("p", "?", "1"), Problem("q", "?", "2"), Problem("r", "?", "3")]
ANSWERS = {"p": ["1", "2"], "q": ["none", "1"], "r": ["3", "3"]}


class Scripted:
    """Returns rollouts from `ANSWERS`; "none" is truncated and has no final answer."""

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        return [
            Rollout(p, i, (1,), (1,) * len(text), (0.0,) * len(text), text, text != "none", 0)
            for p in problems
            for i, text in enumerate(ANSWERS[p.id])
        ]

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        raise AssertionError("an evaluation changes no weights")


def verify(problem: Problem, text: str) -> Verdict:
    parsed = None if text == "none" else text
    return Verdict(text == problem.answer, parsed is not None, parsed)


def test_rollouts_are_assigned_to_their_problems_at_any_batch_size() -> None:
    for batch_size in (1, 4, 100):
        engine = BatchedEngine(Scripted(), batch_size)
        evaluation = evaluate(engine, verify, PROBLEMS, Sampling(2, 1.0, 8, 0))
        assert evaluation.problem_ids == ["p", "q", "r"]
        assert evaluation.correct == [[True, False], [False, False], [True, True]]
        assert evaluation.parsed == [["1", "2"], [None, "1"], ["3", "3"]]
        assert {name: value.tolist() for name, value in evaluation.per_problem().items()} == {
            "avg": [50.0, 0.0, 100.0],
            "pass": [100.0, 0.0, 100.0],
            "maj": [50.0, 0.0, 100.0],
            "truncated": [0.0, 50.0, 0.0],
            "format": [100.0, 50.0, 100.0],
            "length": [1.0, 2.5, 1.0],
        }
        assert evaluation.means()["avg"] == 50.0
        assert Evaluation.from_json(evaluation.to_json()) == evaluation
