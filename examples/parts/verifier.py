"""A verifier of one's own: decides whether the text of a rollout answers its problem.

A function ``verify(problem, text, **options)`` does as well; a class can also say how a final answer is
written, which `selfteach check` and `selfteach select` need where it is not ``<answer>…</answer>``.
"""

from dataclasses import dataclass

from selfteach.types import Problem, Verdict


@dataclass
class FirstAnswer:
    """Reads the word after the first ``mark``; with ``may_go_on = false`` nothing may follow it."""

    mark: str = "#"
    may_go_on: bool = True

    def __call__(self, problem: Problem, text: str) -> Verdict:
        """Return the verdict on a completion's text."""
        _, mark, rest = text.partition(self.mark)
        words = rest.split()
        if not mark or not words or (len(words) > 1 and not self.may_go_on):
            return Verdict.of_final(False, None)
        return Verdict.of_final(words[0] == problem.answer, words[0])

    def write(self, answer: str) -> str:
        """Return the shortest text that states an answer."""
        return f"{self.mark} {answer}"
