"""Test in a headless Chromium what a reader sees of a report: wide and on a phone, light and dark."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from selfteach.analysis.report.page import render

PHONE = {"viewport": {"width": 390, "height": 844}}
ARMS = ("grpo", "reference", "other_reference", "my_own_feedback", "step_aligned")
TITLE = "an easy world with a rather long title: the truth within reach of sampling"
PROMPT = "<system>Be brief.</system><user>p a b c\n</user><img src=x>"


def estimate(mean: float) -> dict:
    return {"mean": mean, "ci95": [mean - 20, mean + 20], "seeds": 2}


def arm(mean: float) -> dict:
    rates = dict.fromkeys(("avg", "pass", "maj", "length", "truncated", "format"), mean)
    measures = {
        key: {**estimate(value), "per_seed": {"0": value, "1": value}}
        for key, value in rates.items()
    }
    curve = {"steps": [0, 1], "avg": {"0": [10.0, mean], "1": [10.0, mean]}}
    return {**measures, "budget": {"seconds": 1.0}, "curve": curve, "settings": {"optimizer.lr": 1}}


def setting() -> dict:
    arms = {name: arm(20.0 + 9 * i) for i, name in enumerate(("base", *ARMS))}
    pairs = [f"{name}-base" for name in ARMS]
    measures = ("avg", "pass", "maj", "length")
    return {
        "arms": arms, "paired": {pair: {m: estimate(5.0) for m in measures} for pair in pairs},
        "seeds": [0, 1],
    }  # fmt: skip


def write_run(
    folder: Path, context: str, *, dropped: float = 0.0, prompt: bool = True, **shown: Any
) -> None:
    """Write the folder of a run of one step, whose two samples have the keys ``shown`` too."""
    (folder / "samples").mkdir(parents=True)
    objective = {"type": "grpo"} if context == "none" else {"type": "distillation"}
    config = {
        "seed": int(folder.name.removeprefix("seed_")), "context": {"type": context},
        "optimizer": {"lr": 0.001}, "train": {"steps": 1}, "evaluation": {"every": 1},
        "objective": objective, "data": {"type": "lab"}, "critic": {"type": "oracle"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"commit": "abc", "versions": {"t": "1"}}))
    row = {"step": 1, "kind": "step", "correct": 0.2, "dropped": dropped, "time/rollout": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    sample = {
        "problem_id": "train-1", "sample": 0, "question": "p a b c", "answer": "0 + a b = c",
        "correct": False, "formatted": True, "parsed": "c", "critique": None, "context": "read me",
        "dropped": None, "history": [{"role": "system", "content": "Be brief."}], **shown,
    }  # fmt: skip
    first = {**sample, "prompt": PROMPT} if prompt else sample
    rows = [first, {**sample, "sample": 1}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples" / "step_000001.jsonl").write_text(text)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Write the report of a study of one step, of which a variant's run warns."""
    folder = tmp_path_factory.mktemp("study")
    contexts = dict(zip(ARMS, ("none", *ARMS[1:3], "environment", "step_aligned"), strict=True))
    for name, context in contexts.items():
        write_run(folder / "runs" / name / "seed_0", context)
    write_run(folder / "variants" / "easy" / "grpo" / "seed_0", "none", dropped=0.9)
    results = {
        "format": 1, "title": "A study", "k": 4, "headline": ["grpo-base"], "intervals": "student",
        **setting(), "variants": {"easy": {"title": TITLE, **setting()}},
        "made": {"command": "selfteach study x.toml --out y", "seconds": 3.0, "versions": {}},
    }  # fmt: skip
    (folder / "study.json").write_text("{}")
    (folder / "results.json").write_text(json.dumps(results))
    path = folder / "report.html"
    path.write_text(render([folder])[0], encoding="utf-8")
    return path


OVERFLOWING = """() => [...document.querySelectorAll('.page:not([hidden]) .drawing')]
  .filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.getAttribute('aria-label'))"""
CUT = """(selector) => [...document.querySelectorAll(`.page:not([hidden]) ${selector}`)]
  .filter(e => e.getClientRects().length).filter(e => e.getBoundingClientRect().right > innerWidth)
  .map(e => e.textContent)"""
"""Texts that reach over the right edge of the window."""


@pytest.mark.parametrize("name", ["overview", "health", "budget"])
def test_on_a_phone_no_figure_and_no_caption_is_cut(open_page, study, name):
    page = open_page(study, name, **PHONE)
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate(CUT, "caption span") == []
    assert page.evaluate(CUT, "figcaption") == []
    assert page.evaluate(CUT, ".drawing svg text") == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_letters_of_figures_are_large_enough_on_a_phone(open_page, study):
    for name in ("overview", "health"):
        page = open_page(study, name, **PHONE)
        heights = page.eval_on_selector_all(
            ".page:not([hidden]) .drawing svg text",
            "all => all.filter(t => t.getClientRects().length).map("
            "t => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getScreenCTM().a)",
        )
        assert heights and min(heights) >= 9


def test_the_forest_has_its_first_row_whole_on_a_phone(open_page, study):
    page = open_page(study, **PHONE)
    box = page.locator(".drawing", has=page.get_by_text("grpo − base")).first
    shown = [t for t in box.locator("svg text").all() if t.is_visible()]
    texts = {t.text_content(): t.bounding_box() for t in shown}
    for text in ("grpo − base", "+5.0 [−15.0, 25.0]"):
        at = texts[text]
        assert at["x"] >= 0 and at["x"] + at["width"] <= 390
    # A long heading is broken into lines.
    assert TITLE not in texts and any(text and TITLE.startswith(text) for text in texts)


def test_a_wide_table_says_that_it_scrolls_sideways(open_page, study):
    page = open_page(study, **PHONE)
    table = page.get_by_role("region", name="Results by arm", exact=True)
    sign = table.locator("xpath=following-sibling::*[1]")
    assert sign.inner_text() == "There is more: scroll sideways →"
    assert table.get_attribute("tabindex") == "0"
    table.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
    # A locator, not wait_for_function: the page's policy forbids the eval of its second try.
    page.locator(".sideways:visible", has_text=re.compile("^←")).first.wait_for()
    # The name of the row stays in view.
    head = table.locator("tbody th").first.bounding_box()
    assert head["x"] >= 0 and head["width"] > 60
    wide = open_page(study)
    assert wide.locator(".sideways:visible").count() == 0


def test_the_warned_run_is_in_the_plot_under_its_warning(open_page, study):
    page = open_page(study, "health")
    check = page.locator("article", has=page.locator("#check-dropped"))
    assert "easy/grpo" in check.locator(".lead.alert").inner_text()
    drawn = check.locator("svg text").all_text_contents()
    assert "easy/grpo" in drawn and "warning" in drawn
    assert "easy/grpo seed 0 warns at step 1" in check.locator(".drawing").get_attribute(
        "aria-label"
    )


def test_arms_and_measures_are_explained_under_the_table(open_page, study):
    page = open_page(study)
    words = page.locator("#overview .meanings").inner_text()
    assert "the model before training" in words and "GRPO: learns from verdicts" in words
    assert "the verifier's message about this answer" in words
    for measure in ("Avg@4", "Pass@4", "Maj@4", "truncated", "format"):
        assert measure in words


def test_how_this_was_made_shows_what_differs(open_page, study):
    page = open_page(study)
    table = page.get_by_role("region", name="What differs between the rows")
    rows = [row.inner_text().split("\t") for row in table.locator("tr").all()]
    assert rows[0] == ["setting", *ARMS]
    assert ["context.type", "none", *ARMS[1:3], "environment", "step_aligned"] in [
        [cell.strip() for cell in row] for row in rows
    ]
    assert not any(row[0].startswith(("optimizer", "train", "seed")) for row in rows)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_arms_have_colours_of_their_own(open_page, study, scheme):
    page = open_page(study, color_scheme=scheme)
    label = "[aria-label^='Learning curves']"
    colours = page.eval_on_selector_all(
        f"{label} svg:first-child path[style*='--series']",
        "all => [...new Set(all.map(p => getComputedStyle(p).stroke))].filter(c => c != 'none')",
    )
    assert len(colours) == len(ARMS)


def test_the_students_prompt_and_the_notation_are_on_the_answers_page(open_page, study):
    page = open_page(study, "answers/1")  # the second answer to the problem
    page.locator("#answer-title", has_text="answer 2").wait_for()
    assert page.locator("pre.prompt").inner_text() == PROMPT
    assert page.locator("img").count() == 0
    assert "A question is six symbols" in page.locator("#answers .notation").inner_text()
    page.get_by_text("Prompt as the student saw it").click()
    page.get_by_role("button", name="Previous answer").click()
    page.locator("#answer-title", has_text="answer 1").wait_for()
    assert page.locator("pre.prompt").is_hidden()  # the reader has closed it


def test_an_episode_is_shown_turn_by_turn(open_page, tmp_path):
    texts = ["2 + 2\n(call)", "[tool error] no such tool", "Answer: 5", "[budget] none is left"]
    starts = [len("\n\n".join(texts[:i])) + 2 * bool(i) for i in range(len(texts))]
    spans = [[start, start + len(text)] for start, text in zip(starts, texts, strict=True)]
    kinds = [
        ("model", None),
        ("environment", "tool_error"),
        ("model", None),
        ("environment", "budget"),
    ]
    critique = {
        "case": "D", "answer": "4", "first_error": 0,
        "steps": [{"text": "2 + 2\n(a call)", "status": "fixed", "original": texts[0]}],
    }  # fmt: skip
    write_run(
        tmp_path / "seed_0", "step_aligned", answer="\n\n".join(texts), critique=critique,
        steps=[spans[0], spans[2]], first_change={"step": 0, "token": 0, "fidelity": 0.0}, parsed="5",
        segments=[
            {"kind": kind, "event": event, "span": span}
            for (kind, event), span in zip(kinds, spans, strict=True)
        ],
    )  # fmt: skip
    path = tmp_path / "report.html"
    path.write_text(render([tmp_path / "seed_0"])[0], encoding="utf-8")
    for options in ({}, PHONE):
        page = open_page(path, "answers", **options)
        page.get_by_role("button", name="First error: turn 1").wait_for()
        rows = [row.inner_text().split() for row in page.locator("#steps tbody tr").all()]
        assert [row[0] for row in rows] == ["1", "reply", "answer", "reply"]
        assert rows[1][1:] == texts[1].split() and "corrected" in rows[0]
        assert page.evaluate(CUT, "#steps td") == []
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_without_a_stored_prompt_its_messages_are_shown(open_page, tmp_path):
    write_run(tmp_path / "seed_0", "reference", prompt=False)
    path = tmp_path / "report.html"
    path.write_text(render([tmp_path / "seed_0"])[0], encoding="utf-8")
    page = open_page(path, "answers")
    page.locator("#answer-title").wait_for()
    text = page.locator("#answer").inner_text()
    assert "system: Be brief." in text and "not stored in this folder" in text


def test_a_long_prompt_is_folded(open_page, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PROMPT", "word " * 2000)
    write_run(tmp_path / "seed_0", "reference")
    path = tmp_path / "report.html"
    path.write_text(render([tmp_path / "seed_0"])[0], encoding="utf-8")
    page = open_page(path, "answers", **PHONE)
    page.locator("#answer-title").wait_for()
    prompt = page.locator("pre.prompt")
    assert prompt.is_hidden()
    page.get_by_text("Prompt as the student saw it (10,000 characters)").click()
    assert prompt.is_visible() and prompt.bounding_box()["height"] < 300
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
