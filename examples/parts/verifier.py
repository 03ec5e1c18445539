"""A verifier of one's own: decides whether the text of a rollout answers its problem."""

from selfteach.types import Problem, Verdict


def first_answer(problem: Problem, text: str, *, mark: str = "#", may_go_on: bool = True) -> Verdict:
    """Read the word after the first ``mark``; with ``may_go_on = false`` nothing may follow it."""
    _, has_mark, rest = text.partition(mark)
    words = rest.split()
    if not has_mark or not words or (len(words) > 1 and not may_go_on):
        return Verdict.of_final(False, None)
    return Verdict.of_final(words[0] == problem.answer, words[0])
