"""Write the report: one self-contained HTML file of a study, one run, or runs side by side.

All text and numbers come from files and are escaped; only figures drawn here, and the script and
style sheet of this package, go into the page as they are.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from selfteach.analysis import critic_statistics, explanations, results_text
from selfteach.analysis.figures import style
from selfteach.analysis.figures.catalogue import Drawing, draw_figures
from selfteach.analysis.figures.localisation_figures import with_curve
from selfteach.analysis.figures.results_figures import MOST_PAIRS
from selfteach.analysis.figures.training_curves import timed_phases
from selfteach.analysis.health_checks import health_warnings
from selfteach.analysis.inspection import inspection_data
from selfteach.analysis.report import answer_records
from selfteach.analysis.report.compressed_records import compress_records
from selfteach.analysis.report_data import ReportData
from selfteach.analysis.results_text import Results
from selfteach.analysis.run_budget import arm_budget, overlap
from selfteach.analysis.run_comparison import (
    compare_runs,
    empty_results,
    training_gain,
    with_current_intervals,
)
from selfteach.analysis.run_data import Groups, RunData, group_runs, read_json, read_runs
from selfteach.config.migrations import migrate_results
from selfteach.errors import CheckpointError
from selfteach.runtime.stored_files import reading

FORMAT = 1
"""The format of results.json that can be read."""
HERE = Path(__file__).parent
SCRIPTS = ("report.js", "browser.js", "answer.js")
"""Joined to one script in the page, in this order."""


def write_report(*folders: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a study or a run, or of several side by side; return its path.

    By default folder/report.html, for several folders report.html in the working directory. Its
    figures are also written as SVG and PNG, into ``figures`` beside it. The file appears whole or not
    at all; the same input gives the same bytes. Raises `CheckpointError` if there is nothing to
    report, or if it is damaged or of another format.
    """
    read = [Path(folder) for folder in folders]
    path = Path(out or (read[0] / "report.html" if len(read) == 1 else "report.html"))
    page, drawings = render(read)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, page)
    for name, drawing in drawings.items():
        if drawing.is_saved:
            style.save(drawing.figure, path.parent / "figures" / name)
    return path


def render(folders: Sequence[Path]) -> tuple[str, dict[str, Drawing]]:
    """Return the report as HTML text, and its figures."""
    with reading(", ".join(map(str, folders))):
        data = read_report_data(folders)
        drawings = draw_figures(data)
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    page = _environment().get_template("report.html.jinja").render(
        data=data,
        text=results_text,
        critic_statistics=critic_statistics,
        explanations=explanations,
        most_pairs=MOST_PAIRS,
        with_curve=with_curve,
        phases=timed_phases(data.budgets),
        overlap=overlap,
        figures={name: drawing.inline(name) for name, drawing in drawings.items()},
        answers=compress_records(data.answers) if data.answers else None,
        style=Markup(style.theme_colours() + "\n" + (HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    return page, drawings


def read_report_data(folders: Sequence[Path]) -> ReportData:
    """Read everything that the report of some folders shows; raises as `write_report` does."""
    runs = [run for folder in folders if _has_runs(folder) for run in read_runs(folder)]
    results = _results(folders, runs)
    arms = _in_order(group_runs([run for run in runs if run.variant is None]), results)
    variant_arms = group_runs([run for run in runs if run.variant is not None])
    example = _example(folders)
    answers, num_answers = _answers(folders, arms, example)
    return ReportData(
        results=results,
        runs=runs,
        arms=arms,
        variant_arms=variant_arms,
        budgets={name: arm_budget(arm) for name, arm in arms.items()},
        gains={} if results["paired"] else {n: training_gain(arm) for n, arm in arms.items()},
        warnings=health_warnings({**arms, **variant_arms}),
        critics=critic_statistics.read_critics(
            {name: [run.folder for run in arm] for name, arm in arms.items()}
        ),
        localisation=_localisation(folders),
        example=example,
        answers=answers,
        num_answers=num_answers,
    )


def _has_runs(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "study.json"))


def _inspection(folder: Path) -> Path | None:
    """Return where a study's or a run's finished inspection is; the folder if it is one itself."""
    paths = (folder, folder / "inspection")
    return next((path for path in paths if (path / "inspection.json").exists()), None)


def _results(folders: Sequence[Path], runs: Sequence[RunData]) -> dict[str, Any]:
    """Return a study's saved results, else the comparison of its runs so far.

    For an inspection alone there are none, only how it was made.
    """
    path = folders[0] / "results.json"
    if len(folders) == 1 and not runs and (folders[0] / "inspection.json").exists():
        made = {"versions": {}, "seconds": 0.0, **read_json(folders[0] / "inspection.json")}
        return empty_results(title=str(made.get("model") or folders[0].name), made=made)
    if len(folders) == 1 and path.exists():
        results = migrate_results(read_json(path))
        if results.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {results.get('format')!r}, expected {FORMAT}")
        results = with_current_intervals(results, runs)
        return {"split": "test", "notes": [], **results}
    if not runs:
        raise CheckpointError(
            f"{folders[0]} is no folder of a run, a study or an inspection: pass the --out of one"
        )
    groups = group_runs([run for run in runs if run.variant is None])
    return compare_runs(groups, title=", ".join(groups))


def _in_order(groups: dict[str, list[RunData]], results: Results) -> dict[str, list[RunData]]:
    """Order arms as in the results, so that an arm looks the same in every figure."""
    in_results = [name for name in results["arms"] if name in groups]
    others = [name for name in groups if name not in in_results]
    return {name: groups[name] for name in [*in_results, *others]}


def _example(folders: Sequence[Path]) -> dict[str, Any] | None:
    """Read one answer under several contexts, from an inspection or an early study's own file."""
    for folder in folders:
        if (path := folder / "token_advantages.json").exists():
            return read_json(path)
    inspections = filter(None, map(_inspection, folders))
    return next((inspection_data.example(folder) for folder in inspections), None)


def _localisation(folders: Sequence[Path]) -> dict[str, Any] | None:
    """Read the first folder's that has one: measures of several inspections do not add up."""
    paths = [folder / "localisation.json" for folder in filter(None, map(_inspection, folders))]
    return next((read_json(path) for path in paths if path.exists()), None)


def _answers(
    folders: Sequence[Path], arms: Groups, example: Mapping[str, Any] | None
) -> tuple[list[answer_records.AnswerRecord], int]:
    """Return the records of the browser, inspected answers first, and how many there are in all."""
    inspected, num_inspected = list[answer_records.AnswerRecord](), 0
    for folder in filter(None, map(_inspection, folders)):
        records, count = answer_records.inspected_answers(folder)
        inspected, num_inspected = [*inspected, *records], num_inspected + count
    if not inspected and example and example["contexts"]:
        inspected, num_inspected = [answer_records.example_answer(example)], 1
    most = answer_records.MOST - len(inspected)
    trained, num_trained = answer_records.training_answers(arms, most)
    return [*inspected, *trained], num_inspected + num_trained


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["typeset"] = _typeset
    return environment


def _typeset(text: str) -> str:
    """Set a true minus sign before numbers and between arms; hyphens in words stay."""
    return re.sub(r"(?<!\w)-(?=\d| )", "−", text)


def _write_whole(path: Path, text: str) -> None:
    """Write a file beside the target, and rename it to the target."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
