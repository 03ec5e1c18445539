"""Test the report in a headless Chromium: opened from a file, with pointer and keys."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from covering import covering

from selfteach.analysis.report.page import render
from selfteach.commands.inspect.token_table import SCHEMA

axe = pytest.importorskip("axe_core_python.sync_playwright", reason="axe is not installed")

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
ANSWERS, PER_PROBLEM = 5_000, 8
STEPS = ["1 + 1 = 2;", "2 + 2 = 5;", "= 7"]
TOKENS = [*["1", "+", "1", "=", "2", ";"], *["2", "+", "2", "=", "5", ";"], "=", "7", "<end>"]
STEP_OF = [0] * 6 + [1] * 6 + [2] * 3
N = len(TOKENS)
REASONS = {5: "malformed", 6: "truncated"}
"""By sample: answers whose critique could not be used."""


def answer_row(i: int) -> dict:
    """Return a row of answers.jsonl.

    Every fourth answer is right; samples 5 and 6 of a problem are dropped; the first is hostile.
    """
    sample, right = i % PER_PROBLEM, i % 4 == 0
    spans, end = [], 0
    for step in STEPS:
        spans.append([end, end + len(step)])
        end += len(step) + 1
    critique = {
        "case": "A" if right else "D", "answer": "4", "first_error": None if right else 1,
        "steps": [
            {"text": STEPS[0], "status": "kept", "original": STEPS[0]},
            {"text": "2 + 2 = 4;", "status": "fixed", "original": STEPS[1]},
        ],
    }  # fmt: skip
    reason = REASONS.get(sample)
    return {
        "problem_id": f"p-{i // PER_PROBLEM}", "sample": sample, "policy_version": 0,
        "question": HOSTILE if i == 0 else f"What is 2 + 2 (variant {i // PER_PROBLEM})?",
        "gold_answer": "4", "text": " ".join(STEPS), "correct": right, "formatted": True,
        "parsed": "7", "finished": True, "tokens": N,
        "step_spans": {"tokens": [], "characters": spans},
        "first_error": None if right else 1, "first_error_from": "oracle",
        "critique": {"reason": reason, "detail": "said nothing"} if reason else critique,
        "contexts": {"reference": f"Read {HOSTILE}", **({} if reason else {"step_aligned": "aligned"})},
        "dropped": {"step_aligned": reason} if reason else {}, "fidelity": 0.4, "verbatim": {},
    }  # fmt: skip


def advantages(i: int, context: str) -> np.ndarray:
    """Return known advantages: the reference's near −1, the aligned one's sharp at the error."""
    t = np.arange(N)
    if context == "reference":
        return np.float32(-1 - 0.0123 * t)
    return np.where(t == 10, -9.4321, 0.25).astype(np.float32)


def write_inspection(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    rows = [answer_row(i) for i in range(count)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = []
    for i, row in enumerate(rows):
        for context in row["contexts"]:
            advantage = advantages(i, context)
            table = {
                "answer": [i] * N, "problem_id": [row["problem_id"]] * N, "text": TOKENS,
                "context": [context] * N, "step": STEP_OF, "kind": ["task", "style", "other"] * 5,
                "student_logp": [-0.5] * N, "advantage": advantage,
            }  # fmt: skip
            tables.append(table)
    columns = {name: list(chain.from_iterable(t[name] for t in tables)) for name in tables[0]}
    nothing = np.zeros(len(columns["answer"]))
    arrays = [pa.array(columns.get(field.name, nothing)).cast(field.type) for field in SCHEMA]
    pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), folder / "tokens.parquet")
    about = {"format": 1, "contexts": ["reference", "step_aligned"], "model": "a-model"}
    (folder / "inspection.json").write_text(json.dumps(about))


def write_run(folder: Path, samples: int = 3) -> None:
    """Write a run as training does: recipe, metrics and samples, no inspection."""
    config = {
        "seed": 0, "context": {"type": "step_aligned"}, "optimizer": {"lr": 0.001},
        "train": {"steps": 2}, "evaluation": {"every": 1},
    }  # fmt: skip
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        {"step": s, "kind": "step", "correct": 0.25, "length": 15.0, "loss": 0.1, "entropy": 0.4,
         "truncated": 0.5, "rollouts_sampled": samples, "time/rollout": 1.0}
        for s in (1, 2)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = answer_row(1)
    sample = {
        "problem_id": "train-1", "question": answer["question"], "answer": answer["text"],
        "correct": False, "formatted": True, "parsed": "7", "critique": answer["critique"],
        "context": "aligned", "dropped": None, "finished": False, "gold": "4",
        "steps": answer["step_spans"]["characters"], "first_error_token": 6,
        "first_change": {"step": 1, "token": 10, "fidelity": 0.6},
    }  # fmt: skip
    for step in (1, 2):
        lines = (json.dumps({**sample, "sample": i}) + "\n" for i in range(samples))
        (folder / "samples" / f"step_{step:06d}.jsonl").write_text("".join(lines))


def written(folder: Path) -> Path:
    """Write the report alone, without its figures as files."""
    path = folder / "report.html"
    path.write_text(render([folder])[0], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Write the report of a run with an inspection of 5,000 answers."""
    folder = tmp_path_factory.mktemp("inspected") / "first"
    write_run(folder, samples=0)
    write_inspection(folder / "inspection", ANSWERS)
    return written(folder)


@pytest.fixture
def answers(open_page, report):
    page = open_page(report, "answers")
    page.locator("#answer-title").wait_for()
    return page


def counted(page) -> str:
    return page.locator("#count").inner_text()


def visible_pages(page) -> list[str]:
    return page.eval_on_selector_all(".page", "all => all.filter(p => !p.hidden).map(p => p.id)")


def tip(page) -> str:
    page.locator("#tip").wait_for()
    return page.locator("#tip").inner_text()


def token(page, i: int):
    return page.locator(f"#steps .token[data-i='{i}']")


def test_every_page_opens_from_a_file_without_an_error(open_page, report):
    page = open_page(report)
    assert visible_pages(page) == ["overview"]
    for name in ("Answers", "Health", "Budget", "Overview"):
        page.get_by_role("link", name=name).first.click()
        # A click is over before the page has heard of its new address.
        page.locator(f"#{name.lower()}").wait_for()
        assert visible_pages(page) == [name.lower()]
        assert page.locator("nav a[aria-current=page]").inner_text().startswith(name)
    # An address within a page opens that page.
    page.evaluate("location.hash = '#check-truncated'")
    page.locator("#health").wait_for()
    assert "50% of the rollouts are truncated" in page.locator("#health").inner_text()


def test_filters_over_five_thousand_answers(answers):
    page = answers
    assert counted(page) == "5,000 of 5,000 answers"
    page.locator("#f-verdict").select_option("right")
    assert counted(page) == "1,250 of 5,000 answers"
    assert "✓ right" in page.locator("#answer-title").inner_text()
    page.locator("#f-verdict").select_option("wrong")
    assert counted(page) == "3,750 of 5,000 answers"
    page.locator("#f-case").select_option("A")
    assert counted(page) == "0 of 5,000 answers"
    assert "No answer passes" in page.locator("#answer").inner_text()
    page.locator("#f-case").select_option("none")
    assert counted(page) == "1,250 of 5,000 answers"  # samples 5 and 6 have no critique
    page.locator("#f-dropped").select_option(label="dropped: malformed")
    assert counted(page) == "625 of 5,000 answers"
    page.locator("#f-dropped").select_option("dropped")
    page.locator("#f-problem").fill("VARIANT 62)")
    assert counted(page) == "2 of 5,000 answers"
    page.locator("#answer-title", has_text="problem p-62,").wait_for()


@pytest.mark.parametrize(
    ("menu", "value", "left"),
    [
        ("#f-verdict", "right", "1,250"),
        ("#f-case", "D", "2,500"),  # wrong, and neither sample 5 nor 6
        ("#f-dropped", "dropped", "1,250"),
        ("#f-dropped", "usable", "3,750"),
        ("#f-dropped", "reason 1", "625"),
        ("#f-source", "0", "5,000"),
    ],
)
def test_each_filter_by_itself(answers, menu, value, left):
    answers.locator(menu).select_option(value)
    assert counted(answers) == f"{left} of 5,000 answers"


def test_only_rows_in_view_are_nodes_and_keys_reach_all(answers):
    page = answers
    assert page.locator(".row").count() < 40
    page.locator("#list").focus()
    page.keyboard.press("ArrowDown")
    page.locator("#answer-title", has_text="problem p-0, answer 2").wait_for()
    page.keyboard.press("End")
    page.locator("#answer-title", has_text="problem p-624, answer 8").wait_for()
    last = page.locator(".row[aria-selected=true]")
    assert last.get_attribute("aria-posinset") == last.get_attribute("aria-setsize") == "5000"
    active = page.locator("#list").get_attribute("aria-activedescendant")
    assert active == last.get_attribute("id")
    assert page.locator(".row").count() < 40


def test_pointing_at_a_token_shows_exact_values(answers):
    page = answers
    page.locator(".row").nth(1).click()
    page.locator("#answer-title", has_text="answer 2").wait_for()
    token(page, 10).hover()
    shown = tip(page)
    assert "token 10 “5”, step 2, style" in shown
    assert "step_aligned: −9.4321 nats" in shown and "reference: −1.1230 nats" in shown
    assert "student −0.5000" in shown
    page.mouse.move(0, 0)
    assert page.locator("#tip").is_hidden()


def test_a_scroll_that_ends_late_leaves_the_values_of_the_token_under_the_pointer(answers):
    page = answers
    token(page, 3).hover()
    assert "token 3" in tip(page)
    page.evaluate("dispatchEvent(new Event('scroll'))")
    assert page.locator("#tip").is_visible()
    page.mouse.move(0, 0)
    assert page.locator("#tip").is_hidden()


def test_the_keyboard_shows_the_same_values(answers):
    page = answers
    page.locator(".row").nth(1).click()
    page.locator("#answer-title", has_text="answer 2").wait_for()
    # One stop for Tab, then arrow keys.
    assert page.locator("#steps .token[tabindex='0']").count() == 1
    page.locator("#numbers").focus()
    page.keyboard.press("Tab")
    assert "reference: −1.0000 nats" in tip(page)
    page.keyboard.press("ArrowRight")
    assert "token 1 “+”" in tip(page) and "reference: −1.0123 nats" in tip(page)
    focused = page.locator(":focus")
    assert focused.get_attribute("data-i") == "1"
    assert focused.get_attribute("aria-describedby") == "tip"
    page.keyboard.press("End")
    assert "<end>" in tip(page)
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_another_context_recolours_the_same_tokens(answers):
    page = answers
    page.locator(".row").nth(1).click()
    page.locator("#answer-title", has_text="answer 2").wait_for()
    assert "down" in token(page, 0).get_attribute("class")
    page.get_by_label("step_aligned").check()
    assert "up" in token(page, 0).get_attribute("class").split()
    strength = token(page, 10).evaluate("t => getComputedStyle(t).getPropertyValue('--a')")
    assert float(strength) == pytest.approx(0.55)  # 9.4 nats are beyond the strongest colour
    weak = token(page, 0).evaluate("t => getComputedStyle(t).getPropertyValue('--a')")
    assert float(weak) == pytest.approx(0.25 / 4 * 0.55, abs=1e-3)
    token(page, 10).hover()
    assert page.locator("#tip strong").inner_text() == "step_aligned: −9.4321 nats"
    page.locator("#numbers").check()
    assert token(page, 10).get_attribute("data-a") == "−9.4"
    # The choice stays with the next answer.
    page.get_by_role("button", name="Next answer").click()
    page.locator("#answer-title", has_text="answer 3").wait_for()
    assert page.get_by_label("step_aligned").is_checked()


def test_jump_to_the_first_error(answers):
    page = answers
    assert page.locator("#to-error").is_disabled()  # the first answer is right
    page.locator(".row").nth(1).click()
    page.locator("#answer-title", has_text="answer 2").wait_for()
    page.get_by_role("button", name="First error: step 2").click()
    assert page.locator(":focus").get_attribute("data-i") == "6"
    row = page.locator("#steps tr.error")
    assert "first error" in row.inner_text()
    assert "corrected" in row.inner_text() and "2 + 2 = 4;" in row.inner_text()


def test_steps_and_critique_are_side_by_side(answers):
    page = answers
    page.locator(".row").nth(1).click()
    page.locator("#answer-title", has_text="answer 2").wait_for()
    rows = page.locator("#steps tbody tr")
    texts = [" ".join(rows.nth(i).inner_text().split()) for i in range(rows.count())]
    assert texts[0] == "1 1 + 1 = 2; repeated1 + 1 = 2;"
    assert texts[2] == "answer = 7<end> 4"


def test_hostile_text_is_text(answers):
    page = answers
    assert page.locator("pre.question").inner_text() == HOSTILE
    page.get_by_text("Teacher context:").click()
    assert HOSTILE in page.locator("#read pre").inner_text()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    # What is written into the page against the policy does not run either.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p id=late>late</p>')")
    assert page.locator("#late").count() == 1 and page.evaluate("window.hacked") is None


def test_an_answer_has_an_address(open_page, report):
    page = open_page(report, "answers/4321")
    page.locator("#answer-title", has_text="problem p-540, answer 2").wait_for()
    assert page.locator(".row[aria-selected=true]").get_attribute("aria-posinset") == "4322"


def test_training_answers_alone_fill_the_browser(open_page, tmp_path):
    write_run(tmp_path / "plain", samples=4)
    page = open_page(written(tmp_path / "plain"), "answers")
    page.locator("#answer-title", has_text="✗ wrong").wait_for()
    assert counted(page) == "8 of 8 answers"
    text = page.locator("#answer").inner_text()
    assert "plain, training step 1" in text and "60 % repeated before the first change" in text
    assert "2 + 2 = 5;" in text and re.search(r"truncated\s+at the token limit", text)
    page.get_by_role("button", name="First error: step 2").click()
    assert "error" in page.locator(":focus").get_attribute("class")


def test_an_inspection_alone_has_a_report(open_page, tmp_path):
    write_inspection(tmp_path / "inspected", 16)
    page = open_page(written(tmp_path / "inspected"))
    assert "a-model" in page.locator("#overview h1").inner_text()
    links = page.locator("nav a").all_inner_texts()
    assert links == ["Overview", "Answers"]
    page.get_by_role("link", name="Answers").click()
    page.locator("#answer-title", has_text="problem p-0, answer 1").wait_for()
    assert counted(page) == "16 of 16 answers"


CONTRAST = """() => {
  const light = (c) => (c <= 10 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    paint.fillStyle = colour;
    paint.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map(light);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = luminance(getComputedStyle(document.body).backgroundColor);
  const probe = document.body.appendChild(document.createElement("span"));
  return Object.fromEntries(["ink", "quiet", "yes", "alert", "link"].map((name) => {
    probe.style.color = `var(--${name})`;
    const text = luminance(getComputedStyle(probe).color);
    return [name, (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05)];
  }));
}"""
"""WCAG's contrast of each colour of text against the page."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_of_text_has_contrast(open_page, report, scheme):
    page = open_page(report, color_scheme=scheme)
    contrasts = page.evaluate(CONTRAST)
    assert min(contrasts.values()) >= 4.5, contrasts


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Write the report of a run with samples and an inspection of few answers."""
    folder = tmp_path_factory.mktemp("small") / "run"
    write_run(folder)
    write_inspection(folder / "inspection", 16)
    return written(folder)


@pytest.mark.parametrize(
    ("name", "scheme"),
    covering(["overview", "feedback", "answers", "health", "budget"], ["light", "dark"]),
)
def test_axe_finds_no_violation(open_page, small, name, scheme):
    """Check the rules of axe-core: names, roles, order of headings, contrast, keyboard, tables."""
    page = open_page(small, name, color_scheme=scheme)
    if name == "answers":
        page.locator("#answer-title").wait_for()
    outcome = axe.Axe().run(page)
    assert visible_pages(page) == [name] and len(outcome["passes"]) > 20
    violations = [(rule["id"], rule["nodes"][0]["html"]) for rule in outcome["violations"]]
    assert violations == []


def test_the_theme_overrides_the_system(open_page, report):
    page = open_page(report, color_scheme="light")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    button = page.get_by_role("button", name="Theme")
    button.click()
    button.click()
    assert button.inner_text() == "Theme: dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


@pytest.mark.parametrize("name", ["overview", "answers", "health", "budget"])
def test_nothing_overflows_a_narrow_window(open_page, report, name):
    page = open_page(report, name, viewport={"width": 380, "height": 800})
    if name == "answers":
        page.locator("#answer-title").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 380


def test_without_scripts_all_pages_are_there(open_page, report):
    page = open_page(report, java_script_enabled=False)
    text = page.locator("main").inner_text()
    assert "Health" in text and "Budget" in text and "this browser runs none" in text
