"""Measure the size of a report of 5,000 inspected answers, and how fast it opens and filters.

    python benchmarks/analysis/report_page.py [--answers 5000] [--tokens 33] [--contexts 9]

Synthetic answers with random advantages, which compress worse than real ones. Needs playwright and a
Chromium on the PATH (or CHROMIUM=...). Prints a line per figure and asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from playwright.sync_api import sync_playwright

from selfteach.analysis.report.page import write_report

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
WORDS = [*"let x be the sum of two terms so that we have".split(), *"=+-123456789().x"]  # noqa: SIM905
STEPS = 6


def write_answers(folder: Path, answers: int, tokens: int, contexts: int) -> None:
    """Write answers.jsonl and tokens.parquet as `selfteach inspect` does, of random words."""
    rng = np.random.default_rng(0)
    names = [f"context_{i}" for i in range(contexts)]
    step = np.minimum(np.arange(tokens) * STEPS // tokens, STEPS - 1)
    rows, columns = [], {n: [] for n in ("text", "advantage", "student_logp")}
    for i in range(answers):
        words = rng.choice(WORDS, tokens)
        ends = np.cumsum([len(word) + 1 for word in words])
        spans = [
            [int(ends[step < s].max(initial=0)), int(ends[step == s].max())] for s in range(STEPS)
        ]
        steps = [{"text": "as it should be", "status": "kept", "original": None}] * (STEPS - 1)
        rows.append({
            "problem_id": f"problem-{i // 8}", "sample": i % 8, "question": f"What is {i // 8}?",
            "gold_answer": "7", "text": " ".join(words), "correct": bool(i % 3 == 0), "parsed": "7",
            "finished": True, "step_spans": {"characters": spans, "tokens": []},
            "first_error": None if i % 3 == 0 else 2, "fidelity": 0.4,
            "critique": {"case": "D", "answer": "7", "steps": steps},
            "contexts": dict.fromkeys(names, " ".join(rng.choice(WORDS, tokens))), "dropped": {},
        })  # fmt: skip
        logp = -rng.exponential(0.3, tokens)
        for _ in names:
            columns["text"].extend(words)
            columns["student_logp"].extend(logp)
            columns["advantage"].extend(rng.normal(0, 1, tokens))
    folder.mkdir(parents=True)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = answers * contexts
    table = pa.table({
        **columns,
        "answer": np.repeat(np.arange(answers, dtype=np.int32), contexts * tokens),
        "context": np.tile(np.repeat(names, tokens), answers),
        "step": np.tile(step.astype(np.int32), whole),
        "kind": np.tile(rng.choice(["style", "task", "other"], tokens), whole),
    })  # fmt: skip
    pq.write_table(table, folder / "tokens.parquet")
    about = {"format": 1, "contexts": names, "model": "made up"}
    (folder / "inspection.json").write_text(json.dumps(about))


def look(path: Path) -> None:
    """Open the report and time what a reader waits for, in milliseconds."""
    browser = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=browser, args=FLAGS)
        page = opened.new_page(viewport={"width": 1280, "height": 900})
        page.goto(path.as_uri())
        page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        print(f"first paint                   {paint:8.0f} ms")
        start = time.perf_counter()
        page.get_by_role("link", name="Answers").first.click()
        page.locator("#answer-title").wait_for()
        print(f"answers page, first answer    {1e3 * (time.perf_counter() - start):8.0f} ms")
        took = page.evaluate("""() => { const t = performance.now();
            document.getElementById("f-verdict").value = "right"; filter();
            return performance.now() - t; }""")
        print(f"filter                        {took:8.1f} ms")
        start = time.perf_counter()
        page.locator("#list").focus()
        page.keyboard.press("End")
        page.wait_for_function(
            "document.querySelector('.row[aria-selected=true]').ariaPosInSet > 99"
        )
        page.locator("#steps .token").first.wait_for()
        print(f"last answer, block loaded     {1e3 * (time.perf_counter() - start):8.0f} ms")
        opened.close()


def main() -> None:
    """Write a report, measure it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=5_000)
    parser.add_argument("--tokens", type=int, default=33)
    parser.add_argument("--contexts", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "inspected"
        write_answers(root, args.answers, args.tokens, args.contexts)
        start = time.perf_counter()
        path = write_report(root)
        print(f"{args.answers:,} answers of {args.tokens} tokens under {args.contexts} contexts")
        print(f"written in                    {time.perf_counter() - start:8.1f} s")
        print(f"size                          {path.stat().st_size / 2**20:8.1f} MiB")
        look(path)


if __name__ == "__main__":
    main()
