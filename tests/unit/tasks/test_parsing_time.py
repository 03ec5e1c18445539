"""Test that every reader of answers and replies takes time linear in the text: twice the text,
about twice the time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import pytest

from selfteach.analysis.terminal.sanitize import sanitized
from selfteach.feedback.alignment import first_change
from selfteach.feedback.critics.parser import CritiqueParser
from selfteach.prompts.control_tokens import ControlTokenEscaper
from selfteach.prompts.template_set import fence, untagged
from selfteach.prompts.thinking import split_thinking
from selfteach.tasks import chain_sums, segmentation, verifiers
from selfteach.tasks.lab import checker, lab_oracle
from selfteach.tasks.lab.world import World
from selfteach.tasks.math_answers import read_answer
from selfteach.trainer.rollout_statistics import hesitations
from selfteach.types import Critique, CritiquedRollout, CritiqueStep, Problem, Rollout, Verdict

PROBLEM = Problem("p", "q", "10", meta={"terms": [1, 1], "signs": "++"})
WORLD = World()
QUESTION = next(WORLD.questions("train"))
RIGHT = "<step_1>a b</step_1><answer>10</answer>"


def parse(answer: str, reply: str) -> None:
    rollout = Rollout(PROBLEM, 0, (1,), (5,), (-0.5,), answer, True, 0)
    for split in (segmentation.tags, segmentation.lines, segmentation.sentences):
        parser = CritiqueParser(split, verifiers.exact)
        parser(reply, rollout, verifiers.exact(PROBLEM, answer))


def align(text: str) -> None:
    rollout = Rollout(PROBLEM, 0, (1,), (5,), (-0.5,), text, True, 0)
    for split in (segmentation.tags, segmentation.lines):
        spans = split(text)
        steps = tuple(CritiqueStep(segmentation.content(text, span), "kept") for span in spans)
        critiqued = CritiquedRollout(
            rollout, Verdict(False, False, None), Critique("D", steps, "10", 0)
        )
        first_change(critiqued, spans, range(1, len(text) + 1))


READERS: dict[str, Callable[[str], object]] = {
    **segmentation.SPLITTERS,
    "lab": segmentation.lab,
    "content": lambda text: segmentation.content(text, (0, len(text))),
    **verifiers.READERS,
    "unwrapped": verifiers.unwrapped,
    "exact": lambda text: verifiers.exact(PROBLEM, f"<answer>{text}</answer>"),
    "math": read_answer,
    "chain_sums answer": chain_sums.parse_answer,
    "chain_sums check": lambda text: chain_sums.check(PROBLEM, text),
    "lab answer": checker.parse_answer,
    "lab check": lambda text: checker.check(WORLD, QUESTION, text),
    "lab oracle": lambda text: lab_oracle.critique_rollout(WORLD, QUESTION, text),
    "critique": lambda text: parse(RIGHT, text),
    "critique in tags": lambda text: parse(RIGHT, f"<case>D</case>{text}{RIGHT}"),
    "critiqued rollout": lambda text: parse(f"{text}<answer>9</answer>", RIGHT),
    "both": lambda text: parse(text, f"{text}{RIGHT}"),
    "alignment": align,
    "escape": ControlTokenEscaper().escape,
    "unescape": ControlTokenEscaper().unescape,
    "untagged": untagged,
    "fence": lambda text: fence(text, "`"),
    "thinking": split_thinking,
    "terminal": sanitized,
    "hesitations": hesitations,
}

UNITS = (
    " ", "\n", " \n", "\n ", "\t", "a", "A", "A.A ", "1", "1,", "1.", "1-", "1+1=2 ", "a.", "a. ", ". ",
    'a." ', "!", "$", "*", "* ", "-", "# ", "1. ", "…", "a\n\n", "<", "[", "[A", "\\", "\\boxed{",
    "\\boxed ", "{", "}", "(", "\\text{", "<step_1>", "<answer>", "</answer>", "<step_", "<step_1",
    "<answer>1</answer>", "<step_1>a</step_1>", "<case>", "<think>", "</think>", "<step_<step_1>1>",
    "answer to ", "step ", "so, ", "\u2060", "<|", "0 + a b = c ", "\x1b[", "\x1b]", "7 hours ", "1/2 ",
    "and ", ", ",
)  # fmt: skip
BEGINNINGS = ("", "answer to", "[")
SHORT = 2_000
FAST = 0.01
"""Seconds that are too few to be compared."""


def seconds(read: Callable[[str], object], text: str) -> float:
    gc.disable()
    started = time.process_time()
    try:
        read(text)
    finally:
        gc.enable()
    return time.process_time() - started


def is_linear(read: Callable[[str], object], beginning: str, unit: str, end: str) -> bool:
    """Return whether eight times the text takes less than 24 times the time (a square takes 64)."""
    small = beginning + unit * (SHORT // len(unit)) + end
    large = beginning + unit * (8 * SHORT // len(unit)) + end
    if seconds(read, large) < FAST:
        return True
    return any(seconds(read, large) < max(FAST, 24 * seconds(read, small)) for _ in range(3))


@pytest.mark.parametrize("name", READERS)
def test_time_is_linear_in_the_text(name: str) -> None:
    read = READERS[name]
    slow = []
    for unit in UNITS:
        for beginning in BEGINNINGS:
            for end in ("", "x"):
                short = beginning + unit * (SHORT // len(unit) // 4) + end
                # A cubic reader would take hours at the full length.
                if seconds(read, short) > 0.5 or not is_linear(read, beginning, unit, end):
                    slow.append((beginning, unit, end))
    assert not slow
