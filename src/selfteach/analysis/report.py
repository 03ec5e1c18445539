"""A study's report: one HTML file that needs nothing else, neither network nor scripts.

All words and numbers come from results.json and token_advantages.json and are escaped; only figures
drawn here go into the page as they are.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from selfteach.analysis import critics as critic_words
from selfteach.analysis import figures, wording
from selfteach.analysis.critics import Record, read_study
from selfteach.analysis.wording import Results, arms_of
from selfteach.errors import CheckpointError

FORMAT = 1
"""The results.json that is understood."""
FULL_COLOUR = 4.0
"""Nats per token at which a token's colour is at its strongest."""
STRONGEST = 0.55
"""Opacity of the strongest colour: text on it stays readable in light and dark."""


def write_report(folder: Path) -> Path:
    """Write folder/report.html from the results in the folder; the same results, the same bytes.

    Its figures are also written as files of their own, folder/figures/*.svg.

    The file appears whole or not at all. Raises `CheckpointError` if the results are missing,
    broken, or of another format.
    """
    results = _read(folder / "results.json")
    if results.get("format") != FORMAT:
        found = results.get("format")
        raise CheckpointError(f"{folder / 'results.json'}: format {found!r}, known is {FORMAT}")
    example_path = folder / "token_advantages.json"
    example = _read(example_path) if example_path.exists() else None
    path = folder / "report.html"
    _write_whole(path, render(results, example, read_study(folder)))
    for name, figure in _drawn(results, example).items():
        figures.save(figure, folder / "figures" / f"{name}.svg")
    return path


def render(
    results: Results,
    example: Mapping[str, Any] | None = None,
    critics: Mapping[str, Record] | None = None,
) -> str:
    """The report as HTML text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["typeset"] = _typeset
    template = environment.get_template("report.html.jinja")
    return template.render(
        r=results,
        example=example,
        critics=critics or {},
        critic_words=critic_words,
        w=wording,
        figures=_figures(results, example),
        sentences=[_sentence(results, pair) for pair in wording.headline(results)],
        spans=_spans(example) if example else {},
    )


def _sentence(results: Results, pair: str) -> dict[str, Any]:
    """One headline comparison, in numbers and as a plain verdict."""
    b, a = arms_of(pair)
    value, arms = results["paired"][pair]["avg"], results["arms"]
    low, high = value["ci95"]
    verdicts = {
        "higher": f"The interval excludes 0: the data support that {b} is better than {a}.",
        "lower": f"The interval excludes 0, the other way: {b} is worse than {a}.",
        "open": f"The interval includes 0: the data do not decide between {b} and {a}.",
    }
    return {
        "numbers": f"{b} answers {arms[b]['avg']['mean']:.1f} % of samples right, "
        f"{a} {arms[a]['avg']['mean']:.1f} %: a difference of {value['mean']:+.1f} points "
        f"of Avg@{results['k']} (95 % interval {low:.1f} to {high:.1f}).",
        "verdict": verdicts[wording.standing(value)],
        "decided": wording.standing(value) != "open",
    }


def _drawn(results: Results, example: Mapping[str, Any] | None) -> dict[str, figures.Figure]:
    """The figures that these results have something to show for."""
    drawn = {}
    if results["paired"]:
        drawn["forest"] = figures.forest(results)
    if any("curve" in arm for arm in results["arms"].values()):
        drawn["learning_curves"] = figures.learning_curves(results)
    if example and example["contexts"]:
        drawn["token_advantages"] = figures.token_advantages(example)
    return drawn


def _figures(results: Results, example: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Each figure as SVG, with what it shows in words for those who do not see it."""
    titles = {
        "forest": "Differences with intervals",
        "learning_curves": "Learning curves",
        "token_advantages": "Advantage of each token",
    }
    facts = {
        "forest": [
            f"{wording.pair_title(pair)} {wording.difference(values['avg'])}"
            for pair, values in results["paired"].items()
        ],
        "learning_curves": [
            f"{name} {_ends(arm['curve'])}"
            for name, arm in results["arms"].items()
            if "curve" in arm
        ],
        "token_advantages": [
            f"{name} from {min(context['advantage']):+.1f} to {max(context['advantage']):+.1f} nats"
            for name, context in (example or {"contexts": {}})["contexts"].items()
        ],
    }
    return {
        name: _figure(figure, titles[name], facts[name])
        for name, figure in _drawn(results, example).items()
    }


def _figure(figure: figures.Figure, title: str, facts: list[str]) -> dict[str, Any]:
    return {"svg": Markup(figures.svg(figure)), "label": f"{title}: {'; '.join(facts)}."}


def _ends(curve: Mapping[str, Any]) -> str:
    first, last = (
        sum(seed[i] for seed in curve["avg"].values()) / len(curve["avg"]) for i in (0, -1)
    )
    return f"from {first:.1f} to {last:.1f} %"


def _spans(example: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Per context: each token with its colour, its exact value, and where steps begin."""
    return {
        name: [
            {
                "text": figures.visible(token),
                "title": f"token {t}, step {step + 1 if step >= 0 else '–'}: {advantage:+.4f} nats",
                "side": "up" if advantage > 0 else "down",
                "opacity": f"{min(abs(advantage) / FULL_COLOUR, 1) * STRONGEST:.2f}",
                "begins": t > 0 and step != example["steps"][t - 1],
                "error": t == example["first_error_token"],
            }
            for t, (token, step, advantage) in enumerate(
                zip(example["tokens"], example["steps"], context["advantage"], strict=True)
            )
        ]
        for name, context in example["contexts"].items()
    }


def _typeset(text: str) -> str:
    """With a true minus sign before numbers and between arms; hyphens in words stay."""
    return re.sub(r"(?<!\w)-(?=\d| )", "−", text)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not there; run selfteach study, or resume it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None


def _write_whole(path: Path, text: str) -> None:
    """Write beside the target and put it in place in one move."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
