"""Test the writers: beliefs, habits, the pull of style, and what they take from a context."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from selfteach.prompts.template_set import Templates
from selfteach.tasks.lab.checker import check
from selfteach.tasks.lab.corpus import (
    CONTEXT_SHARES,
    DIAL_SHARES,
    Believer,
    context_for,
    document,
    references,
    view_of,
    write,
)
from selfteach.tasks.lab.pretrain import batches, documents, encode
from selfteach.tasks.lab.world import REFERENCE_STYLE, ROOT, STYLES, World, WorldConfig, split_of

WORLD = World()
TEMPLATES = Templates("lab")
CONTEXTS = [kind for kind in {**CONTEXT_SHARES, **DIAL_SHARES} if kind != "none"]


def world(**changes: object) -> World:
    return World(replace(WorldConfig(), **changes))  # type: ignore[arg-type]


def believers(count: int) -> list[Believer]:
    return [Believer(WORLD, np.random.default_rng([5, i])) for i in range(count)]


def rate(values: list[bool]) -> float:
    return sum(values) / len(values)


def test_beliefs_are_held_at_the_rates_the_world_states() -> None:
    weak, wrong = next(iter(WORLD.misconceptions.items()))
    held = [believer(*weak) for believer in believers(3000)]
    stray = 1 - 0.80 - 0.06  # anything at all: one in sixteen is the truth, one the misconception
    assert rate([c == wrong for c in held]) == pytest.approx(0.80 + stray / 16, abs=0.03)
    assert rate([c == WORLD.table[weak] for c in held]) == pytest.approx(
        0.06 + stray / 16, abs=0.02
    )
    strong = next(pair for pair in WORLD.table if pair not in WORLD.misconceptions)
    held = [believer(*strong) for believer in believers(3000)]
    assert rate([c == WORLD.table[strong] for c in held]) == pytest.approx(0.99, abs=0.01)


def test_a_belief_does_not_change_within_a_document() -> None:
    weak = next(iter(WORLD.misconceptions))
    for believer in believers(50):
        assert len({believer(*weak) for _ in range(5)}) == 1


def alone(w: World, count: int = 400) -> list[list]:
    """Return the lines of answers written without a context."""
    texts = []
    for i, question in enumerate(islice(w.questions("train"), count)):
        rng = np.random.default_rng([6, i])
        text = write(w, question, Believer(w, rng), rng)
        texts.append([step.line for step in check(w, question, text).steps])
    return texts


def test_without_a_context_a_writer_uses_one_native_style_and_its_order() -> None:
    for lines in alone(world(deviation=0.0)):
        (style,) = {line.style for line in lines}
        assert style.name in ("plus", "minus")
        assert [line.node for line in lines] == list(style.order)


def test_both_native_styles_are_used_and_the_reference_s_never() -> None:
    counts = Counter(lines[0].style.name for lines in alone(world(deviation=0.0)))
    assert counts["plus"] == pytest.approx(200, abs=40) and counts["minus"] > 0
    assert REFERENCE_STYLE not in {line.style for lines in alone(WORLD) for line in lines}
    one = {line.style.name for lines in alone(world(native_styles=("plus",))) for line in lines}
    assert one == {"plus"}


def with_context(w: World, context_of, count: int = 300) -> list[tuple[tuple[str, ...], str, str]]:
    """Return questions, contexts, and the answers written with them in view."""
    written = []
    for i, question in enumerate(islice(w.questions("train"), count)):
        rng = np.random.default_rng([7, i])
        shown = context_of(question)
        written.append((question, shown, write(w, question, Believer(w, rng), rng, shown)))
    return written


@pytest.mark.parametrize(("pull", "share"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_the_pull_is_the_share_of_lines_in_the_context_s_style(pull: float, share: float) -> None:
    w = world(pull=pull)
    foreign = [
        step.line.style == REFERENCE_STYLE
        for question, _, text in with_context(w, lambda q: references(w, q)["reference"])
        for step in check(w, question, text).steps
    ]
    assert rate(foreign) == pytest.approx(share, abs=0.04 if 0 < pull < 1 else 0)


def test_with_full_pull_and_no_slip_a_reference_is_copied() -> None:
    w = world(pull=1.0, slip=0.0)
    for _, shown, text in with_context(w, lambda q: references(w, q)["reference"], 50):
        assert text == shown


def test_without_slips_every_shown_lookup_is_used_in_any_style() -> None:
    w = world(pull=0.0, slip=0.0)
    for question, _, text in with_context(w, lambda q: references(w, q)["reference"]):
        assert check(w, question, text).first_error is None


def test_a_slip_uses_the_writer_s_belief() -> None:
    question = next(q for q in WORLD.questions("train") if (q[0], q[1]) in WORLD.misconceptions)
    shown = references(WORLD, question)["reference"]
    firsts = []
    for slip in (0.0, 0.1, 1.0):
        w = world(slip=slip)
        wrong = 0
        for i in range(600):
            rng = np.random.default_rng([8, i])
            lines = check(w, question, write(w, question, Believer(w, rng), rng, shown)).steps
            line = next(s.line for s in lines if s.line is not None and s.line.node == 0)
            wrong += line.c != w.table[question[0], question[1]]
        firsts.append(wrong / 600)
    chance = 1 - (0.06 + 0.14 / 16)  # of a writer to hold this fact wrongly
    assert firsts[0] == 0
    assert firsts[1] == pytest.approx(0.1 * chance, abs=0.04)
    assert firsts[2] == pytest.approx(chance, abs=0.03)


@pytest.mark.parametrize("kind", CONTEXTS)
def test_every_context_is_read_in_full(kind: str) -> None:
    for i, question in enumerate(islice(WORLD.questions("train"), 60)):
        rng = np.random.default_rng([9, i])
        shown = context_for(WORLD, TEMPLATES, question, kind, Believer(WORLD, rng), rng)
        view, truth = view_of(shown), WORLD.truth(question)[ROOT]
        lines = [x for x in shown.splitlines() if x[0].isdigit() and not x.endswith("ok")]
        if kind == "full_repetition":
            assert len(lines) - len(view.facts) in (0, 1), "a correction replaces the wrong line"
        assert len(view.order) == len(lines)
        for (a, b), c in view.facts.items():
            assert WORLD.table[a, b] == c, "all that a context shows is true"
        if kind in ("holistic", "answer_only"):
            assert view.bare_answer == truth and not view.facts
        elif kind not in ("omission", "other_answer"):
            assert view.bare_answer is None
            assert len(dict(view.order)) == 5
        if kind not in ("other_answer",):
            assert shown.splitlines()[-1].split()[-1] == truth


def test_omission_shows_no_right_step_of_the_answer() -> None:
    shown = TEMPLATES.context(
        "omission",
        critique=_critique("plus", wrong_at=2),
        references={},
        correct=False,
    ).splitlines()
    assert shown[:2] == ["0 ok", "1 ok"] and shown[2].split()[4] == "!"


def _critique(style: str, wrong_at: int):
    from selfteach.tasks.lab.lab_oracle import critique_rollout

    question = next(WORLD.questions("train"))
    texts = [str(line) for line in WORLD.solution(question, STYLES[style])]
    texts[wrong_at] = texts[wrong_at][:-1] + ("a" if texts[wrong_at][-1] != "a" else "b")
    return critique_rollout(WORLD, question, "\n".join(texts))


def test_references_are_true_and_only_the_aligned_one_is_native() -> None:
    styles = Counter()
    for question in islice(WORLD.questions("train"), 200):
        shown = references(WORLD, question)
        for name, text in shown.items():
            checked = check(WORLD, question, text)
            assert checked.first_error is None and checked.answer == WORLD.truth(question)[ROOT]
            assert {s.line.style == REFERENCE_STYLE for s in checked.steps if s.line} == {
                name == "reference"
            }
        styles[view_of(shown["aligned_reference"]).order[0][1].name] += 1
    assert set(styles) == {"plus", "minus"} and min(styles.values()) > 60


def test_documents_are_about_training_questions_in_the_stated_shares() -> None:
    docs = list(islice(documents(WORLD, TEMPLATES, seed=0), 600))
    assert {split_of(doc.question) for doc in docs} == {"train"}
    alone_share = rate([doc.context is None for doc in docs])
    assert alone_share == pytest.approx(CONTEXT_SHARES["none"], abs=0.06)
    for shares in (CONTEXT_SHARES, DIAL_SHARES):
        assert sum(shares.values()) == pytest.approx(1.0)
    again = list(islice(documents(WORLD, TEMPLATES, seed=0), 20))
    other = list(islice(documents(WORLD, TEMPLATES, seed=1), 20))
    assert again == docs[:20] != other


def test_a_document_is_scored_on_its_answer_only(lab_tokenizer) -> None:
    rng = np.random.default_rng(0)
    doc = document(WORLD, TEMPLATES, next(WORLD.questions("train")), "step_aligned", rng)
    ids, begin = encode(lab_tokenizer, TEMPLATES, doc)
    assert lab_tokenizer.decode(ids[begin:]).split() == [*doc.answer.split(), "<eos>"]
    assert lab_tokenizer.decode(ids[:begin]).split()[-1] == "<say>"
    short = ([1, 2, 3, 4], 2)
    stream = iter([(ids, begin), short])
    ids_BT, target_BT = next(batches(stream, batch_size=2, pad_id=0, pool=1))
    assert ids_BT.shape == (2, len(ids))
    row = target_BT[0]  # the shorter comes first; position t predicts token t + 1
    assert row[:3].tolist() == [-100, 3, 4] and set(row[3:].tolist()) == {-100}
    assert target_BT[1][begin - 1 : -1].tolist() == ids[begin:]
