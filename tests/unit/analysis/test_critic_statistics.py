"""Test the counts of critiques by hand, and how they are shown."""

from __future__ import annotations

import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console

from selfteach.analysis import critic_statistics, results_text
from selfteach.analysis.terminal import critique_summary
from selfteach.analysis.terminal.sanitize import sanitized
from selfteach.analysis.terminal.tables import print_critics

HOSTILE = "<script>alert(1)</script>"
NEVER = {"step": None, "token": None, "fidelity": 1.0}


def critique(case: str, answer: str, first_error: int | None = None, **usage: float) -> dict:
    used = {"requests": 1, "cached": 0, "prompt_tokens": 20, "completion_tokens": 7, "cost": 0.5}
    steps = [{"text": "a", "status": "kept", "original": "a"}]
    reply = {"case": case, "steps": steps, "answer": answer, "first_error": first_error}
    return {**reply, "usage": {**used, **usage}}


def failure(reason: str, answer: str | None = None) -> dict:
    return {"reason": reason, "detail": "why", "said": "text", "answer": answer, "usage": {}}


def row(critique: dict | None, correct: bool, change: tuple[int, float] | None = None, **more: Any):
    where = NEVER if change is None else {"step": change[0], "token": 1, "fidelity": change[1]}
    return {
        "problem_id": "p", "sample": 0, "question": "q", "answer": "the answer", "correct": correct,
        "parsed": "10" if correct else "9", "critique": critique, "dropped": None,
        "first_change": where if critique and "case" in critique else None,
        "answer_steps": ["a"], **more,
    }  # fmt: skip


ROWS = [
    row(critique("A", "10"), True),
    row(critique("B", "10"), True, (1, 0.5)),  # something inserted
    row(critique("B", "10", 0), True, (0, 0.0)),  # a right step replaced
    row(critique("D", "10", 1), False, (1, 0.25)),
    row(critique("C", "10", requests=0, cached=1, prompt_tokens=0, cost=0.0), False, (0, 0.05)),
    row(critique("D", "9", 0), False, (0, 0.75)),  # a program that errs
    row(failure("wrong_answer", "9"), False, dropped="wrong_answer"),
    row(failure("wrong_answer", "8"), False, dropped="wrong_answer"),
    row(failure("empty"), True, dropped="empty"),
    row(None, True),  # not sent to a critic
]


def test_counts_by_hand() -> None:
    total = critic_statistics.count_critiques(ROWS)
    assert (total.rollouts, total.correct, total.critiques, total.is_model) == (9, 4, 6, True)
    assert total.cases == {"A": 1, "B": 2, "C": 1, "D": 2}
    assert list(total.failures.items()) == [("empty", 1), ("wrong_answer", 2)]
    assert total.dropped == {"empty": 1, "wrong_answer": 2}
    assert (total.false_alarms, total.added, total.misses) == (1, 1, 2)
    assert total.changed_at == {-1: 1, 0: 3, 1: 2}
    assert total.fidelity == (0.0, 0.05, 0.25, 0.5, 0.75, 1.0)
    assert total.mean_fidelity == pytest.approx(2.55 / 6)
    assert total.histogram() == [2, 0, 1, 0, 0, 1, 0, 1, 0, 1]
    assert total.usage == {
        "requests": 5, "cached": 1, "prompt_tokens": 100, "completion_tokens": 42, "cost": 2.5,
    }  # fmt: skip
    assert critic_statistics.summary_line(total) == (
        "9 rollouts, 6 critiques (A 1, B 2, C 1, D 2); empty 1; wrong_answer 2; fidelity 0.42; "
        "5 requests, 1 cached; 142 tokens, cost 2.50"
    )


def test_quantiles_by_hand() -> None:
    total = critic_statistics.count_critiques(ROWS)
    assert total.quantile(0.0) == 0.0 and total.quantile(1.0) == 1.0
    assert total.quantile(0.5) == pytest.approx(0.375) and total.quantile(0.1) == pytest.approx(
        0.025
    )
    nothing = critic_statistics.count_critiques([])
    assert math.isnan(nothing.quantile(0.5)) and math.isnan(nothing.mean_fidelity)
    assert nothing.rollouts == 0 and not nothing.is_model


@pytest.fixture
def study(tmp_path: Path) -> Path:
    def write(folder: Path, step: int, rows: list[dict]) -> None:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        path = folder / "samples" / f"step_{step:06d}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / "metrics.jsonl").write_text(
            '{"kind": "step", "time/critique": 1.5}\n{"kind": "validation"}\n{"cut o'
        )

    runs = tmp_path / "runs"
    write(runs / "served" / "seed_0", 1, ROWS[:4])
    write(runs / "served" / "seed_0", 2, ROWS[4:7])
    write(runs / "served" / "seed_1", 1, ROWS[7:])
    program = {**ROWS[0], "critique": {**ROWS[0]["critique"], "usage": {}}}
    write(runs / "oracle" / "seed_0", 1, [program])
    write(runs / "grpo" / "seed_0", 1, [ROWS[-1]])
    (runs / "base" / "seed_0").mkdir(parents=True)
    return tmp_path


def test_runs_of_an_arm_are_read_together(study: Path) -> None:
    critics = critic_statistics.read_study_critics(study)
    assert list(critics) == ["oracle", "served"], "arms without a critic have nothing to show"
    served = critics["served"]
    assert served.total == critic_statistics.count_critiques(ROWS) and served.seconds == 3.0
    assert {step: s.rollouts for step, s in served.by_step.items()} == {1: 6, 2: 3}
    assert not critics["oracle"].total.is_model


def page(critics: dict[str, critic_statistics.ArmCritic]) -> str:
    folder = Path(critic_statistics.__file__).parent / "report"
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined
    )
    template = environment.get_template("critics.html.jinja")
    return template.render(
        data={"critics": critics}, critic_statistics=critic_statistics, text=results_text
    )


class Seen(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.cells[-1] = " ".join(f"{self.cells[-1]} {data}".split())


def test_the_report_shows_outcomes_fidelity_agreement_and_cost(study: Path) -> None:
    html = page(critic_statistics.read_study_critics(study))
    seen = Seen(html)
    assert seen.tags.count("table") == seen.tags.count("caption") == 5
    assert "script" not in seen.tags and "NaN" not in html and "nan" not in html
    at = [i for i, cell in enumerate(seen.cells) if cell == "served"]
    outcomes, fidelity, cost = (seen.cells[i + 1 :] for i in at[:3])
    assert outcomes[:5] == ["9", "1 11 %", "2 22 %", "1 11 %", "2 22 %"]
    assert outcomes[5:7] == ["1 11 %", "2 22 %"]
    assert fidelity[:6] == ["0.42", "0.03", "0.10", "0.38", "0.69", "0.88"]
    assert fidelity[6:10] == ["4", "1 25 %", "5", "2 40 %"]
    assert cost[:6] == ["5", "1", "100", "42", "2.50", "3.0"]


def test_names_and_reasons_are_text_in_the_report() -> None:
    summary = critic_statistics.count_critiques([row(failure(HOSTILE), False, dropped=HOSTILE)])
    html = page({HOSTILE: critic_statistics.ArmCritic(summary, {1: summary}, 0.0)})
    assert "script" not in Seen(html).tags and "&lt;script&gt;" in html


def test_a_line_is_printed_per_arm_whose_critic_is_a_model(study: Path) -> None:
    out = io.StringIO()
    print_critics(critic_statistics.read_study_critics(study), Console(file=out, width=300))
    (line,) = out.getvalue().splitlines()
    assert line.strip().startswith("critic of served: 9 rollouts, 6 critiques")
    assert line.strip().endswith("3 seconds")


def test_examples_show_every_kind_before_any_twice() -> None:
    kinds = [critique_summary._kind(row) for row in critique_summary.examples(ROWS[:9], 9)]
    assert kinds[:6] == ["B", "D", "wrong_answer", "A", "C", "empty"]
    assert sorted(kinds) == sorted(critique_summary._kind(r) for r in ROWS[:9])
    assert (
        len(critique_summary.examples(ROWS[:9], 2)) == 2 and critique_summary.examples([], 3) == []
    )


def test_an_answer_is_paired_with_its_critique_step_by_step() -> None:
    def step(text: str, status: str, original: str | None = None) -> dict:
        return {"text": text, "status": status, "original": original}

    reply = critique("D", "10", 1)
    reply["steps"] = [step("one", "kept", "one"), step("2", "fixed", "two"), step("3", "new")]
    shown = row(reply, False, (1, 0.3), answer_steps=["one", "two", "three", "four"])
    assert list(critique_summary.step_pairs(shown)) == [
        ("one", "kept", "one"), ("two", "fixed", "2"), ("three", "new", "3"), ("four", "gone", ""),
        ("9", "fixed", "10"),
    ]  # fmt: skip
    unfinished = {**shown, "parsed": None, "answer_steps": ["one", "two"]}
    assert list(critique_summary.step_pairs(unfinished))[2:] == [
        ("", "new", "3"),
        ("", "new", "10"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[31mred\x1b[0m \x1b[2J\x1b[10;5Hx", "red x"),
        ("\x1b]0;title\x07t \x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "t link"),
        ("\x1bcreset \x1b(Bx", "reset x"),
        ("\x9b31mx\x07\x08\r\ny\u202ez", "31mx\nyz"),
        ("naïve 東京 ≤ [bold]", "naïve 東京 ≤ [bold]"),
        ("\x1b]0;never closed", ""),
        ("\x1b", ""),
    ],
)
def test_escape_sequences_are_removed(text: str, expected: str) -> None:
    assert sanitized(text) == expected


@given(st.text(st.characters() | st.sampled_from("\x1b[]0;m\x07\x9b\\"), max_size=40))
def test_no_control_characters_are_left(text: str) -> None:
    shown = sanitized(text)
    assert sanitized(shown) == shown
    assert not any((ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 for c in shown)
