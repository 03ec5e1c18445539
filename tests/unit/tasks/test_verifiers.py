"""Test verifiers: extraction of answers, equality, and hostile answers."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from selfteach.config.data_section import FilesData, GymData
from selfteach.errors import DataError
from selfteach.evaluation.evaluator import merge_equal_answers
from selfteach.tasks import verifiers, verify_client
from selfteach.tasks.task import load_task
from selfteach.tasks.verify_client import VerifierProcess
from selfteach.types import Problem


@pytest.fixture(scope="module")
def math() -> verifiers.MathVerifier:
    return verifiers.MathVerifier(process=VerifierProcess(timeout_s=1.0))


def says(math: verifiers.MathVerifier, gold: str, text: str) -> bool:
    return math(Problem("p", "q", gold), f"<answer>{text}</answer>").correct


@pytest.mark.parametrize(
    ("text", "tag", "boxed", "either"),
    [
        ("<answer>5</answer>", "5", None, "5"),
        (r"so \boxed{5}.", None, "5", "5"),
        (r"\boxed{1} no \boxed{\frac{1}{2}}", None, r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"<answer>\boxed{5}</answer>", r"\boxed{5}", "5", "5"),
        (r"\boxed{4} <answer>5</answer>", "5", "4", "5"),
        (r"\boxed{\{1, 2\}}", None, r"\{1, 2\}", r"\{1, 2\}"),
        (r"\boxed{1} and \boxed{2", None, "1", "1"),  # the one that closes
        (r"\boxed{\left\{ x }", None, r"\left\{ x", r"\left\{ x"),
        (r"\fboxed{7}", None, "7", "7"),
        (r"so $\fbox{7}$", None, "7", "7"),
        (r"\boxed 73.", None, "73", "73"),
        (r"\\boxed{7}", None, "7", "7"),  # escaped twice
        ("<answer>5", None, None, None),  # never closed: what follows is no answer
        ("<answer>let me see, 2 + 3 is 5", None, None, None),
        ("write <answer> tags: <answer>5</answer>", "5", None, "5"),
        ("<answer>4</answer> <answer>5</answer>", "5", None, "5"),
        ("<answer>5</answer> so </answer>", "5", None, "5"),
        (r"\boxed{}", None, None, None),
        ("five", None, None, None),
    ],
)
def test_extracting_an_answer(
    text: str, tag: str | None, boxed: str | None, either: str | None
) -> None:
    assert [read(text) for read in verifiers.READERS.values()] == [tag, boxed, either]


@pytest.mark.parametrize("answer_in", ["tag", "boxed", "tag_or_boxed"])
@pytest.mark.parametrize("answer", ["5", r"\frac{1}{2}", r"\{1, 2\}", "a b"])
def test_a_written_answer_is_extracted_again(answer: str, answer_in: verifiers.AnswerIn) -> None:
    text = verifiers.write_answer(answer, answer_in)
    assert verifiers.READERS[answer_in](text) == answer
    assert verifiers.ExactVerifier(answer_in)(Problem("p", "q", answer), text).correct


def test_the_recipe_s_answer_in_selects_the_reader(tmp_path: object) -> None:
    path = f"{tmp_path}/a.jsonl"
    with open(path, "w") as handle:  # noqa: PTH123
        handle.write('{"question": "1 + 1?", "answer": "2"}\n')
    for answer_in, formatted in [("tag", False), ("boxed", True), ("tag_or_boxed", True)]:
        config = {"type": "files", "train": path, "steps": "paragraphs", "answer_in": answer_in}
        task = load_task(FilesData.model_validate(config), "")
        verdict = task.verify(task.train[0], r"One and one.\n\nSo \boxed{2}")
        assert (verdict.correct, verdict.formatted) == (formatted, formatted)
        assert task.verify(task.train[0], task.answer_format.write("2")).correct


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("0.5", r"\frac{2}{4}", True),
        (r"\frac12", "0.5", True),
        ("1,234", "1234", True),
        (r"3\sqrt{2}", r"\sqrt{18}", True),
        ("2", "3", False),
        ("2", "", False),
        ("2", "no idea", False),
        ("(1,2)", "(2,1)", False),
    ],
)
def test_equal_as_mathematics(
    math: verifiers.MathVerifier, gold: str, text: str, right: bool
) -> None:
    assert says(math, gold, text) is right


def test_a_gold_answer_that_is_no_mathematics_accepts_the_same_text(
    math: verifiers.MathVerifier,
) -> None:
    assert says(math, "?!", " ?! ") and not says(math, "?!", "?")


HOSTILE = ["10^{10^{10}}", "(" * 5000, "\x00\ud800", "}{" * 50]


def test_hostile_answers_time_out_as_wrong_and_the_process_recovers(
    math: verifiers.MathVerifier,
) -> None:
    for text in HOSTILE:
        started = time.monotonic()
        verdict = math(Problem("p", "q", "12"), f"<answer>{text}</answer>")
        assert not verdict.correct and verdict.formatted
        assert time.monotonic() - started < 60, "it timed out"
        assert says(math, "12", "12.0")
    assert math.process.timeouts >= 1
    before = math.process.timeouts
    assert not says(math, "12", HOSTILE[0]) and math.process.timeouts == before, "cached"


def test_a_comparison_that_times_out_is_counted_and_judged_the_same_again(tmp_path: Path) -> None:
    problem, text = Problem("p", "q", "12"), f"<answer>{HOSTILE[0]}</answer>"
    first = verifiers.MathVerifier(process=VerifierProcess(timeout_s=0.5))
    verifiers.keep_timeouts(first, tmp_path / "timeouts.jsonl")
    verdict = first(problem, text)
    assert verdict.timed_out and not verdict.correct and first.process.timeouts == 1
    assert not first(problem, "<answer>13</answer>").timed_out
    with (tmp_path / "timeouts.jsonl").open("a") as handle:
        handle.write('{"timed_o')  # a kill in the middle of a line
    again = verifiers.MathVerifier(process=VerifierProcess())
    verifiers.keep_timeouts(again, tmp_path / "timeouts.jsonl")
    assert again(problem, text) == verdict and again.process._process is None


def test_a_stalled_worker_makes_no_answer_wrong() -> None:
    process = VerifierProcess(timeout_s=0.3)
    math = verifiers.MathVerifier(process=process)
    assert says(math, "1/2", "0.5")
    assert process._process is not None
    os.kill(process._process.pid, signal.SIGSTOP)
    assert says(math, "1/4", "0.25") and process.timeouts == 0


PARENT = """
from selfteach.tasks.verify_client import VerifierProcess
verifier = VerifierProcess(timeout_s=120)
verifier.request("math", gold="1", answer="1")
print(verifier._process.pid, flush=True)
verifier.request("math", gold="1", answer="10^{10^{10}}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals of pipes are Linux's")
def test_a_busy_worker_ends_with_its_killed_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = Path("/proc") / parent.stdout.readline().decode().strip()
        time.sleep(0.5)
        assert worker.exists()
        parent.kill()
    deadline = time.monotonic() + 3
    while worker.exists() and "\nState:\tZ" not in (worker / "status").read_text():
        assert time.monotonic() < deadline, "the worker runs on"
        time.sleep(0.05)


def test_the_worker_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    process = VerifierProcess()
    process.request("math", gold="1", answer="1")
    assert process._process is not None
    environment = Path(f"/proc/{process._process.pid}/environ")
    assert not environment.exists() or b"secret" not in environment.read_bytes()


def test_a_worker_that_cannot_import_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_client, "exchange", lambda *_: {"error": "ImportError: no sympy"})
    with pytest.raises(DataError, match="cannot import its library: ImportError: no sympy"):
        VerifierProcess().request("math", gold="1", answer="1")


def test_an_interrupted_request_leaves_no_reply_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = VerifierProcess()
    assert process.request("math", gold="1", answer="1")["equal"]
    read = verify_client._read_line

    def interrupted(*_: object) -> bytes:
        monkeypatch.setattr(verify_client, "_read_line", read)
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_client, "_read_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.request("math", gold="2", answer="2")
    assert not process.request("math", gold="3", answer="4")["equal"]


def test_threads_share_a_process(math: verifiers.MathVerifier) -> None:
    with ThreadPoolExecutor(8) as pool:
        right = list(pool.map(lambda i: says(math, str(i), f"{i}.0"), range(40)))
        wrong = list(pool.map(lambda i: says(math, str(i), f"{i}.5"), range(40)))
    assert all(right) and not any(wrong)


def test_a_killed_process_is_replaced_and_ends_with_its_owner() -> None:
    verifier = VerifierProcess()
    assert verifier.request("math", gold="1", answer="1")["equal"]
    assert verifier._process is not None
    verifier._process.kill()
    verifier._process.wait()
    assert verifier.request("math", gold="2", answer="2.0")["equal"]
    process = verifier._process
    assert process.poll() is None
    del verifier
    gc.collect()
    assert process.poll() is not None


def test_equal_answers_share_one_vote_in_any_spelling(math: verifiers.MathVerifier) -> None:
    row = ["3", r"\frac{1}{2}", None, "0.5", "3.0", r"\frac{2}{4}"]
    assert merge_equal_answers(row, math.equivalent) == [
        "3",
        r"\frac{1}{2}",
        None,
        r"\frac{1}{2}",
        "3",
        r"\frac{1}{2}",
    ]


def test_reasoning_gym_s_scorer_gives_the_verdict() -> None:
    config = {"type": "reasoning_gym", "task": "countdown", "train": 3, "validation": 1, "test": 1}
    task = load_task(GymData.model_validate(config), "")
    problem = task.train[0]
    # Countdown accepts any expression that uses each number once and evaluates to the target.
    assert task.verify(problem, f"<answer>{problem.answer}</answer>").correct
    assert task.verify(problem, f"<answer>0 + {problem.answer}</answer>").correct is False
    assert not task.verify(problem, problem.answer).formatted
    with pytest.raises(DataError, match="not from reasoning-gym"):
        task.verify(Problem("p", "q", "1"), "<answer>1</answer>")


@pytest.mark.parametrize(
    ("name", "pip"), [("math", "selfteach[math]"), ("reasoning_gym", "selfteach[problems]")]
)
def test_a_missing_package_is_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, name: str, pip: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(DataError) as caught:
        verifiers.build_verifier(name, "tag")
    assert pip in str(caught.value)


@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="asks /proc for the environment"
)
def test_the_worker_inherits_no_secrets_and_writes_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scorers evaluate answers: whatever an answer reaches there, it finds no key."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    process = VerifierProcess()
    assert "error" in process.request("math", gold=1)
    worker = process._process
    assert worker is not None
    assert b"sk-secret" not in Path(f"/proc/{worker.pid}/environ").read_bytes()
    limits = Path(f"/proc/{worker.pid}/limits").read_text()
    assert re.search(r"Max file size +0 +0", limits)
    process.close()
