"""Explain in words what a report shows: arms, contexts, measures, and the lab's notation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from selfteach.analysis.results_text import Results
from selfteach.analysis.run_data import Groups

CONTEXTS = {
    "step_aligned": "the critic's corrected trace of this very answer: right steps verbatim, the first "
    "wrong one corrected",
    "full_repetition": "the critic's corrected trace of this answer, with the wrong step quoted before "
    "its correction",
    "omission": "the critic's trace of this answer, with right steps called right instead of repeated",
    "reference": "the problem's worked solution, in other words and another order than the answer's",
    "aligned_reference": "a worked solution in the model's own manner, made without looking at this "
    "answer",
    "holistic": "whether the answer is right as a whole, and the right final answer",
    "answer_only": "the right final answer alone",
    "shuffled_lines": "the lines of the critic's trace in random order: the same facts, not aligned",
    "partly_aligned": "a critique of which a share of the steps keeps the answer's words and places",
    "other_answer": "the critic's trace of an answer to another problem: a control that holds no help",
    "other_reference": "the worked solution of another problem: a control that holds no help",
    "peer": "another answer to the same problem that the verifier accepts",
    "environment": "the verifier's message about this answer",
    "none": "nothing but the question",
}
"""What the teacher reads, by ``context.type``."""

MEASURES = {
    "avg": ("Avg@{k}", "mean share of the {k} sampled answers to a problem that are right"),
    "pass": ("Pass@{k}", "share of problems with at least one right answer among {k}"),
    "maj": ("Maj@{k}", "share of problems whose most frequent final answer among {k} is right"),
    "length": ("length", "mean tokens of an answer"),
    "truncated": ("truncated", "share of answers that were cut off at the token limit"),
    "format": ("format", "share of answers from which a final answer could be read"),
}
"""Name and meaning of `results_table.MEASURES`."""

CRITICS = {
    "oracle": "the task's own step checker",
    "endpoint": "a model behind a server",
    "local": "a model on this machine",
    "policy": "the untrained model itself",
    "recorded": "critiques recorded earlier",
}
"""Who writes critiques, by ``critic.type``."""

LAB = (
    "These problems are of the lab, a made-up world with exact answers. A question is six symbols, "
    "x0 to x5. Its answer is found by five look-ups in a fixed table f: n0 = f(x0, x1), "
    "n1 = f(x2, x3), n2 = f(n0, n1), n3 = f(x4, x5), n4 = f(n2, n3), and n4 is the answer. A step is "
    "one line, “0 + a b = c” for n0 = f(a, b) = c: the number of the look-up, what goes in, and what "
    "comes out. The same step has three spellings: “0 + a b = c”, “0 - a b > c”, and in references "
    "“0 < b a : c”, with its two inputs swapped. “!” instead of “=”, “>” or “:” is where a critic has "
    "corrected the step. “# c” is the final answer."
)
"""The lab's notation (`tasks.lab.world`)."""
LAB_QUESTION = re.compile(r"[a-p]( [a-p]){5}")


def context_meaning(name: str) -> str | None:
    """Return what the teacher reads under a context of this package, also ``partly_aligned@0.4``."""
    return CONTEXTS.get(name.partition("@")[0])


def measures(k: int) -> list[tuple[str, str]]:
    """Return the name and the meaning of each measure of k answers per problem."""
    return [(name.format(k=k), meaning.format(k=k)) for name, meaning in MEASURES.values()]


def arm_meanings(results: Results, groups: Groups) -> dict[str, str]:
    """Return what each arm learns from: by its recipe, else by the settings in the results."""
    return {
        name: _arm(name, groups[name][0].config if name in groups else None, arm.get("settings"))
        for name, arm in results["arms"].items()
    }


def _arm(name: str, config: Mapping[str, Any] | None, settings: Mapping[str, Any] | None) -> str:
    if name == "base" if config is None else config["train"]["steps"] == 0:
        return "the model before training"
    objective = (config or {}).get("objective", {}).get("type")
    critic = ((config or {}).get("critic") or {}).get("type")
    context = (config or {}).get("context", {}).get("type") or (settings or {}).get("context")
    if objective == "grpo" or (objective is None and name == "grpo"):
        return (
            "GRPO: learns from verdicts alone, right or wrong, compared within a group of answers"
        )
    if context is None:
        return "trained; its recipe is not in this folder"
    reads = context_meaning(context) or f"the context “{context}”"
    also = " and GRPO's reward together" if objective == "hybrid" else ""
    by = f"; critiques by {CRITICS.get(critic, f'“{critic}”')}" if critic else ""
    return f"self-distillation{also}: learns from a teacher, the same model, that reads {reads}{by}"


def is_lab(groups: Groups, questions: Iterable[str]) -> bool:
    """Return whether the problems are the lab's: by the recipes, else by how questions look."""
    types = {(run.config.get("data") or {}).get("type") for runs in groups.values() for run in runs}
    if types - {None}:
        return "lab" in types
    first = next(iter(questions), None)
    return first is not None and LAB_QUESTION.fullmatch(first.strip()) is not None


def missing(table: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Return the columns in which no row of a table has a value: they are not shown."""
    return [key for key in keys if all(row.get(key) is None for row in table.values())]
