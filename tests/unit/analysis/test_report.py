"""Test figures, report and terminal tables with a made-up study."""

import base64
import hashlib
import io
import json
import re
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from selfteach.analysis import results_text
from selfteach.analysis.figures import results_figures, style
from selfteach.analysis.report.compressed_records import decompress
from selfteach.analysis.report.page import render, write_report
from selfteach.analysis.terminal.tables import print_evaluation, print_results
from selfteach.config.migrations import migrate_results
from selfteach.errors import CheckpointError

SEEDS = [0, 1, 2]
SCORES = {"base": 12.0, "grpo": 19.7, "reference": 30.6, "step_aligned": 35.8}
HOSTILE = "<script>alert('--><img/src=x>')</script>"


def estimate(mean, half=3.0):
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def arm(name, avg):
    rates = {"avg": avg, "pass": avg + 30, "maj": avg + 8, "length": 33.0, "truncated": 1.5}
    measures = {
        key: {**estimate(v), "per_seed": {str(s): v + s - 1 for s in SEEDS}}
        for key, v in {**rates, "format": 98.0}.items()
    }
    budget = {
        "rollouts_sampled": 7680, "tokens_sampled": 253440, "tokens_trained": 190080,
        "teacher_tokens": 410000, "critiques": 7680, "optimizer_steps": 60, "seconds": 91.4,
        "evaluation_rollouts": 2304,
    }  # fmt: skip
    if name == "base":
        return {**measures, "budget": dict.fromkeys(budget, 0)}
    steps = np.arange(0, 61, 10)
    curve = {str(s): (12 + (avg - 12) * (steps / 60) ** 0.6 + s - 1).tolist() for s in SEEDS}
    curve = {"steps": steps.tolist(), "avg": curve}
    return {
        **measures, "budget": budget, "curve": curve, "settings": {"optimizer.lr": 0.001},
        "collapsed": [2] if name == "reference" else [],
    }  # fmt: skip


def setting(scores):
    names = list(scores)[1:]
    pairs = [f"{b}-{a}" for i, a in enumerate(names) for b in names[i + 1 :]]
    pairs += [f"{name}-base" for name in names]
    paired = {}
    for pair in pairs:
        b, a = pair.split("-")
        gap = estimate(scores[b] - scores[a], 5.5)
        paired[pair] = {"avg": gap, "pass": estimate(2.0), "maj": gap, "length": estimate(-4.0, 1)}
    return {"arms": {name: arm(name, avg) for name, avg in scores.items()}, "paired": paired}


def made_up_results():
    flipped = {**SCORES, "reference": 45.0, "grpo": 45.0}
    return {
        "format": 1, "title": "The paper in miniature", "k": 12, "seeds": SEEDS,
        "intervals": "student",
        "headline": ["step_aligned-grpo", "step_aligned-reference"],
        **setting(SCORES),
        "variants": {
            "no_pull": {"title": "no pull of style (ρ = 0)", "seeds": [0, 1], **setting(flipped)},
            "easy": {"title": "", "seeds": [0], **setting({**SCORES, "grpo": 36.5})},
        },
        "made": {
            "command": "selfteach study recipe.toml --out runs/x", "commit": "abc123",
            "versions": {"torch": "2.10.0", "peft": None}, "date": "2026-08-20", "seconds": 5123.4,
            "python": "3.11.9",
        },
    }  # fmt: skip


def made_up_example():
    lines = ["0 + c a = d", "1 < f f : b $x$ 中", f"2 {HOSTILE} k", "3 > e = c d f", "= k \n"]
    tokens = [token for line in lines for token in line.split(" ")]
    steps = [i for i, line in enumerate(lines) for _ in line.split(" ")]
    rng, error = np.random.default_rng(0), steps.index(2)
    after = np.array([-9.0 if t == error else 0 for t in range(len(tokens))])
    noisy = {"reference": rng.normal(-2, 3, len(tokens)), "step_aligned": after + 0.2}
    return {
        "problem": "validation-3", "question": "c a f & f e d", "answer": "\n".join(lines),
        "correct": False, "first_error_token": error, "tokens": tokens, "steps": steps,
        "contexts": {
            name: {"text": f"Shown: {HOSTILE}", "advantage": values.tolist()}
            for name, values in noisy.items()
        },
    }  # fmt: skip


@pytest.fixture
def results():
    return made_up_results()


@pytest.fixture
def example():
    return made_up_example()


class Page(HTMLParser):
    """Collects the text, tags and links of a page."""

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.links, self.open = "", [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data):
        self.text += data


def saved(folder, results, example=None):
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    if example is not None:
        (folder / "token_advantages.json").write_text(json.dumps(example), encoding="utf-8")
    return folder


def report(folder, results, example=None):
    return render([saved(folder, results, example)])[0]


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """Render the report of the made-up study once, for the tests that only read it."""
    return report(tmp_path_factory.mktemp("study"), made_up_results(), made_up_example())


@pytest.fixture
def undrawn(monkeypatch):
    """Skip drawing figures, the slow part, in tests of text."""
    monkeypatch.setattr("selfteach.analysis.report.page.draw_figures", lambda *_: {})


def records_in(html):
    """Return all records in a page, block by block."""
    blocks = re.findall(r'<script type="text/plain" class="block">(.*?)</script>', html)
    return [record for block in blocks for record in decompress(block)]


def printed(results, width=100):
    sink = io.StringIO()
    print_results(results, Console(file=sink, width=width))
    return sink.getvalue()


# -- report ----------------------------------------------------------------------------------


def test_report_states_differences_and_whether_they_are_supported(html):
    page = Page(html)
    text = " ".join(page.text.split())
    assert "step_aligned answers 35.8 % of samples right, grpo 19.7 %" in text
    assert "+16.1 points of Avg@12 (95 % interval 10.6 to 21.6)" in text
    assert "the data support that step_aligned is better than grpo" in text
    assert "+5.2 points of Avg@12 (95 % interval −0.3 to 10.7)" in text
    assert "the data do not decide between step_aligned and reference" in text
    leads = [attrs["class"] for tag, attrs in page.tags if "lead" in attrs.get("class", "").split()]
    assert leads[:2] == ["lead decided", "lead"]
    assert "step_aligned − grpo +16.1 [10.6, 21.6] +2.0 [−1.0, 5.0]" in text
    assert "not comparable" in text and "16.11" in text and "5.27" in text
    for expected in ("[32.8, 38.8]", "1 of 3 seeds collapsed", "253,440", "abc123", "torch 2.10.0",
                     "5,123 seconds", "optimizer.lr = 0.001", "seeds 0, 1, 2"):  # fmt: skip
        assert expected in text, expected


def test_every_measure_of_every_arm_and_seed_is_in_the_report(html, results):
    text = Page(html).text
    for name in SCORES:
        assert f"{results['arms'][name]['pass']['mean']:.1f}" in text
        for value in results["arms"][name]["maj"]["per_seed"].values():
            assert f"{value:.1f}" in text
    assert "collapsed: ended far below the base" in text


def test_variants_report_where_the_order_reverses(html):
    text = " ".join(Page(html).text.split())
    no_pull, easy = text.split("no pull of style (ρ = 0) seeds 0, 1")[1].split("easy seeds 0")
    assert re.search(r"step_aligned − grpo: −9.2 .*?: REVERSED", no_pull)
    assert re.search(r"− reference: −9.2 .*?: decided here only, mean reversed", no_pull)
    assert re.search(r"step_aligned − grpo: −0.7 .*?: one seed, undecided, mean reversed", easy)


def test_one_seed_decides_nothing(tmp_path, results):
    """How much two runs of one arm differ is not known, however far from 0 an interval is."""
    one = {**results, "seeds": [0], "variants": {}}
    text = " ".join(Page(report(tmp_path, one)).text.split())
    assert "step_aligned − grpo +16.1 [10.6, 21.6]" in text
    assert "the data support" not in text and "supported: " not in text
    assert "not decided: one seed" in text
    assert "another run of step_aligned or grpo may differ by as much" in text
    assert "other problems, not other training runs" in text
    in_terminal = printed(migrate_results(one))
    assert "+16.1 [10.6, 21.6] " in in_terminal and "*" not in in_terminal
    assert "no difference is decided" in " ".join(in_terminal.split())


def test_intervals_of_an_earlier_version_are_named_as_such(tmp_path, results):
    del results["intervals"]
    text = " ".join(Page(report(tmp_path, results)).text.split())
    assert "a bootstrap over seeds and problems, which is too narrow with few seeds" in text
    assert "Run the study again to compute them anew" in text


def test_text_from_files_is_escaped(tmp_path, results, example):
    results["title"] = f"A & B {HOSTILE}"
    results["arms"]["<b>bold</b>"] = results["arms"]["reference"]
    html = report(tmp_path, results, example)
    page = Page(html)
    tags = [tag for tag, _ in page.tags]
    assert not {"img", "b", "link", "iframe"} & set(tags)
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert [a.get("type") for a in scripts] == ["text/plain"] * (len(scripts) - 1) + [None]
    assert page.text.count(HOSTILE) == 2 and "<b>bold</b>" in page.text  # title and heading
    (record,) = records_in(html)
    assert HOSTILE in record["text"] and HOSTILE in record["contexts"]["reference"]["text"]


def test_only_the_script_of_this_package_may_run(html):
    policy = next(a for tag, a in Page(html).tags if "http-equiv" in a)["content"]
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in policy.replace("style-src 'unsafe-inline'", "")
    assert "innerHTML" not in script and "insertAdjacentHTML" not in script


def test_report_needs_no_network(html):
    assert all(link.startswith("#") for link in Page(html).links)
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)'\"]*)", html))
    assert "@import" not in html
    # Namespaces are names, not addresses.
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_report_is_accessible_to_screen_readers(html):
    page = Page(html)
    assert ("html", {"lang": "en"}) in page.tags
    drawings = [a for tag, a in page.tags if tag == "div" and a.get("role") == "img"]
    # Two of the three have another form for a phone, under the same description.
    assert len(drawings) == 3 and [tag for tag, _ in page.tags].count("svg") == 5
    assert [a["class"] for a in drawings] == ["drawing two", "drawing two", "drawing wide"]
    assert "step_aligned from 12.0 to 35.8 %" in drawings[1]["aria-label"]
    assert "reference from −" in drawings[2]["aria-label"]
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)), "an id stands twice"
    for _, attrs in page.tags:
        assert attrs.get("aria-labelledby", ids[0]) in ids


def test_the_example_is_in_the_browser_with_its_values(html, example):
    (record,) = records_in(html)
    assert record["tokens"]["text"] == example["tokens"]
    assert record["first_error"] == 2 and record["problem"] == "validation-3"
    advantage = np.array(record["contexts"]["step_aligned"]["advantage"]) * 1e-4
    np.testing.assert_allclose(
        advantage, example["contexts"]["step_aligned"]["advantage"], atol=5e-5
    )
    # Its steps are the text from one step's first token to the next one's.
    begin, end = record["spans"][2]
    assert record["text"][begin:end] == "".join(
        t for t, s in zip(example["tokens"], example["steps"], strict=True) if s == 2
    )


def test_same_results_give_the_same_bytes_and_no_other_files(tmp_path, results):
    saved(tmp_path, results)
    first = write_report(tmp_path).read_bytes()
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(drawn) == {f"{n}.{k}" for n in ("forest", "learning_curves") for k in ("svg", "png")}
    assert write_report(tmp_path).read_bytes() == first
    assert {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()} == drawn
    assert {path.name for path in tmp_path.iterdir()} == {"figures", "report.html", "results.json"}


def test_a_failure_leaves_the_old_report_unchanged(tmp_path, results, undrawn):
    before = write_report(saved(tmp_path, results)).read_text(encoding="utf-8")
    del results["arms"]["grpo"]["avg"]
    with pytest.raises(KeyError, match="avg"):
        write_report(saved(tmp_path, results))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_a_failed_rename_leaves_no_temporary_file(tmp_path, results, undrawn, monkeypatch):
    before = write_report(saved(tmp_path, results)).read_text(encoding="utf-8")

    def refuse(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_report(saved(tmp_path, {**results, "title": "Another"}))
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "results.json"}
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_small_studies_have_a_report(tmp_path, results):
    one = {"base": 12.0, "run": 20.0}
    small = {**results, **setting(one), "variants": {}, "headline": [], "title": "", "seeds": [0]}
    assert "run is better than base" not in Page(report(tmp_path, small)).text
    only_base = {**small, "arms": {"base": small["arms"]["base"]}, "paired": {}}
    page = Page(report(tmp_path, only_base))
    assert "svg" not in {tag for tag, _ in page.tags}


def test_an_example_without_contexts_or_error_is_shown(tmp_path, results, example, undrawn):
    example["first_error_token"] = None
    (record,) = records_in(report(tmp_path, results, example))
    assert record["first_error"] is None and "step_aligned" in record["contexts"]
    example["contexts"] = {}
    assert records_in(report(tmp_path, results, example)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no folder of a run"),
        ("{", "is damaged"),
        ('{"format": 2}', "format 2, expected 1"),
    ],
)
def test_results_that_cannot_be_read_are_refused_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        write_report(tmp_path)
    place = tmp_path if content is None else tmp_path / "results.json"
    assert str(place) in str(refusal.value) and "\n" not in str(refusal.value)


# -- figures ---------------------------------------------------------------------------------


def test_curves_are_means_and_bands_are_extremes(results):
    axes = results_figures.learning_curves(results).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == set(SCORES)
    np.testing.assert_allclose(lines["step_aligned"].get_ydata()[-1], 35.8)
    assert set(lines["base"].get_ydata()) == {12.0}
    band = axes.collections[-1].get_paths()[0].get_extents()
    np.testing.assert_allclose([band.ymin, band.ymax], [11.0, 36.8])


def test_a_forest_of_many_arms_shows_the_headline_and_differences_from_the_base(results):
    value = next(iter(results["paired"].values()))
    arms = [f"arm{i}" for i in range(8)]
    pairs = [f"{b}-{a}" for i, a in enumerate(arms) for b in arms[i + 1 :]]
    results["paired"] = dict.fromkeys([*pairs, *(f"{arm}-base" for arm in arms)], value)
    results["headline"], results["variants"] = ["arm1-arm0"], {}
    labels = [text.get_text() for text in results_figures.forest(results).axes[0].get_yticklabels()]
    assert labels == ["arm1 − arm0", *(f"{arm} − base" for arm in arms)]


def test_forest_draws_every_pair_and_fills_decided_ones(results):
    panels = results_figures.forest(results).axes
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles == ["main", "no pull of style (ρ = 0)", "easy"]
    for axes in panels:
        labels = [label.get_text().strip() for label in axes.get_yticklabels()]
        assert labels.count("step_aligned − grpo") == 1 and len(labels) == len(results["paired"])
    axes, labels = panels[0], [label.get_text() for label in panels[0].get_yticklabels()]
    marks = {
        int(line.get_ydata()[0]): line.get_markerfacecolor()
        for line in axes.get_lines() if line.get_linestyle() == "None"
    }  # fmt: skip
    assert marks[labels.index("step_aligned − grpo")] != "none"
    assert marks[labels.index("step_aligned − reference")] == "none"


def test_variants_of_one_title_are_all_drawn(results):
    results["variants"]["easy"]["title"] = results["variants"]["no_pull"]["title"] = "main"
    panels = results_figures.forest(results).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["main"] * 3


def test_token_figure_has_a_panel_per_context_on_one_scale(example):
    figure = results_figures.token_advantages(example)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["reference", "step_aligned"]
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    np.testing.assert_allclose(heights, example["contexts"]["step_aligned"]["advantage"])
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    drawn = style.svg(figure)
    assert drawn.count("first error") == 2 and ">$x$<" in drawn and ">&lt;script&gt;" in drawn
    assert f">{HOSTILE[:13]}…<".replace("<script>", "&lt;script&gt;") in drawn


def test_a_long_answer_is_drawn_without_token_labels(example):
    long = {**example, "tokens": ["中"] * 600, "steps": [t // 60 for t in range(600)]}
    long["contexts"] = {"reference": {"text": "", "advantage": [0.1] * 600}}
    assert "token of the answer" in style.svg(results_figures.token_advantages(long))


def test_svg_is_self_contained_and_reproducible(results):
    drawn = style.svg(results_figures.forest(results))
    assert drawn == style.svg(results_figures.forest(results))
    assert drawn.startswith("<svg") and drawn.endswith("</svg>")
    assert "no pull of style" in drawn and "currentColor" in drawn and style.INK not in drawn
    assert not re.search(r"<!|<\?|<metadata|\d{4}-\d\d-\d\d", drawn)


def test_svg_can_be_drawn_from_threads(results):
    drawn = []
    threads = [
        threading.Thread(target=lambda: drawn.append(style.svg(results_figures.forest(results))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(drawn) == 2 and drawn[0] == drawn[1]


def test_an_arm_keeps_its_style_and_no_two_are_equal():
    names = ["base", "grpo", "reference", "mine", "step_aligned", "yours", "omission"]
    look = style.styles(names)
    assert look["grpo"] == style.styles(["grpo"])["grpo"]
    assert len({(style.dash, style.marker) for style in look.values()}) == len(names)


@pytest.mark.parametrize(
    ("token", "expected"), [(" a", "␣a"), ("\n", "↵"), ("\t", "⇥"), ("\x00", "␀"), ("é", "é")]
)
def test_white_space_is_visible(token, expected):
    assert results_figures.visible(token) == expected


# -- terminal --------------------------------------------------------------------------------


def test_console_prints_each_arm_and_each_pair_within_100_columns(results):
    text = printed(results)
    assert max(map(len, text.splitlines())) <= 100
    for name, avg in SCORES.items():
        # Means on one line, the intervals of all six measures below them.
        row = re.search(rf"^ {name} +{avg} .*\n +\[{avg - 3:.1f}, {avg + 3:.1f}\](.*)", text, re.M)
        assert row and row.group(1).count("[") == 5, name
    for pair in results["paired"]:
        assert results_text.pair_title(pair) in text
    assert re.search(
        r"step_aligned - grpo +\+16\.1 \[10\.6, 21\.6\]\* +\+2\.0 \[-1\.0, 5\.0\]  ", text
    )
    assert "collapsed: reference 1 of 3 seeds" in text
    assert "253,440" in text
    assert re.search(r"step_aligned - grpo +-9\.2 .*REVERSED", text)


def test_console_does_not_read_names_as_markup(results):
    results["arms"]["[red]x[/red]"] = results["arms"].pop("grpo")
    results["title"] = "[bold]T"
    text = printed(results, width=200)
    assert "[red]x[/red]" in text and "[bold]T" in text


def test_console_prints_one_evaluation():
    measures = {name: estimate(20.0) for name in results_text.MEASURE_TITLES}
    sink = io.StringIO()
    result = {"what": "runs/x", "split": "test", "problems": 192, "k": 4, **measures}
    print_evaluation(result, Console(file=sink, width=80))
    assert "runs/x: test, 192 problems" in sink.getvalue()
    assert re.search(r"Avg@4, % +20\.0 \[17\.0, 23\.0\]", sink.getvalue())


# -- text -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 2, "higher"), (-2, -0.1, "lower"), (-1, 1, "open"), (0, 2, "open"), (-2, 0, "open")],
)
def test_only_an_interval_without_zero_decides(low, high, expected):
    assert results_text.decision({"mean": (low + high) / 2, "ci95": [low, high]}) == expected


def test_one_seed_supports_no_difference():
    one = {**estimate(9.0), "seeds": 1}
    assert results_text.decision(one) == "one seed"
    assert results_text.decision({**one, "seeds": 2}) == "higher"
    assert results_text.variant_order(one, estimate(7.0)) == "one seed, undecided"
    assert results_text.variant_order(estimate(-9.0), one) == "decided here only, mean reversed"


@pytest.mark.parametrize(
    ("mean", "expected"),
    [(9, "same order"), (2, "undecided"), (-2, "undecided, mean reversed"), (-9, "REVERSED")],
)
def test_order_compares_with_the_main_setting(mean, expected):
    assert results_text.variant_order(estimate(mean), estimate(7.0)) == expected


@pytest.mark.parametrize(
    ("mean", "expected"),
    [(9, "decided here only"), (2, "undecided"), (-9, "decided here only, mean reversed")],
)
def test_an_undecided_main_setting_cannot_be_reversed(mean, expected):
    assert results_text.variant_order(estimate(mean), estimate(2.0)) == expected


def test_headline_falls_back_to_existing_pairs(results):
    assert results_text.headline_pairs(results) == results["headline"]
    results["headline"] = ["gone-grpo"]
    assert "step_aligned-reference" in results_text.headline_pairs(results)
    assert not any(pair.endswith("-base") for pair in results_text.headline_pairs(results))
