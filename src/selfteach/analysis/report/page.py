"""The report: one HTML file that needs nothing else, for a study, one run, or runs side by side.

All words and numbers come from files and are escaped; only figures drawn here, and the script and
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

from selfteach.analysis import comparison, critic_statistics, health, wording
from selfteach.analysis.figures import catalogue, curves, style
from selfteach.analysis.figures.catalogue import Drawing
from selfteach.analysis.inspection import inspection_data
from selfteach.analysis.report import answer_records
from selfteach.analysis.report.packing import pack
from selfteach.analysis.run_data import Groups, Run, grouped, read_json, read_runs
from selfteach.analysis.wording import Results
from selfteach.config.migrations import migrate_results
from selfteach.errors import CheckpointError

FORMAT = 1
"""The results.json that is understood."""
HERE = Path(__file__).parent
SCRIPTS = ("report.js", "browser.js", "answer.js")
"""One script in the page, in this order."""


def write_report(*folders: Path, out: Path | None = None) -> Path:
    """Write the report of a study or a run, or of several side by side; its path.

    By default folder/report.html, for several folders report.html in the working directory. Its
    figures are also written as SVG and PNG, into ``figures`` beside it. The file appears whole or not
    at all; the same files read give the same bytes. Raises `CheckpointError` if there is nothing to
    report of, or if it is broken or of another format.
    """
    path = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    page, drawn = render(folders)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, page)
    for name, drawing in drawn.items():
        if drawing.filed:
            style.save(drawing.figure, path.parent / "figures" / name)
    return path


def render(folders: Sequence[Path]) -> tuple[str, dict[str, Drawing]]:
    """The report as HTML text, and the figures that stand in it."""
    runs = [run for folder in folders if _has_runs(folder) for run in read_runs(folder)]
    results = _results(folders, runs)
    main = _in_order(grouped([run for run in runs if run.variant is None]), results)
    example, localisation = _example(folders), _localisation(folders)
    asked = critic_statistics.read_groups(
        {n: [run.folder for run in own] for n, own in main.items()}
    )
    gains = {} if results["paired"] else {n: comparison.gain(own) for n, own in main.items()}
    drawn = _drawn(results, main, example, localisation)
    records, total = _records(folders, main, example)
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    page = _environment().get_template("report.html.jinja").render(
        r=results,
        w=wording,
        sentences=wording.claims(results, gains),
        figures={name: drawing.inline(name) for name, drawing in drawn.items()},
        health=health.summary(health.findings_of(grouped(runs))),
        checks=[(check, health.logged(main, check.metric)) for check in health.checks()],
        spent={name: comparison.mean_spent(own) for name, own in main.items()},
        phases=curves.PHASES,
        overlap=comparison.overlap,
        has_runs=bool(runs),
        unfinished=[run for run in runs if not run.is_complete],
        feedback=bool(localisation or example or asked),
        localisation=localisation,
        example=example,
        critics=asked,
        critic_words=critic_statistics,
        answers=pack(records) if records else None,
        answers_total=total,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    return page, drawn


def _has_runs(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "study.json"))


def _inspection(folder: Path) -> Path | None:
    """Where a study's or a run's finished inspection lies, or the folder if it is one itself."""
    paths = (folder, folder / "inspection")
    return next((path for path in paths if (path / "inspection.json").exists()), None)


def _results(folders: Sequence[Path], runs: Sequence[Run]) -> dict[str, Any]:
    """A study's own results where it has them, else what its runs have come to so far.

    Of an inspection alone there are none, only how it was made.
    """
    path = folders[0] / "results.json"
    if len(folders) == 1 and not runs and (folders[0] / "inspection.json").exists():
        made = {"versions": {}, "seconds": 0.0, **read_json(folders[0] / "inspection.json")}
        return comparison.nothing(title=str(made.get("model") or folders[0].name), made=made)
    if len(folders) == 1 and path.exists():
        results = migrate_results(read_json(path))
        if results.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {results.get('format')!r}, known is {FORMAT}")
        return {"split": "test", "notes": [], **results}
    if not runs:
        raise CheckpointError(
            f"{folders[0]} is no run, no study and no inspection: name the --out of one"
        )
    own = grouped([run for run in runs if run.variant is None])
    return comparison.results_of(own, title=", ".join(own))


def _in_order(groups: dict[str, list[Run]], results: Results) -> dict[str, list[Run]]:
    """Arms as the results have them, so that an arm looks the same in every figure."""
    known = [name for name in results["arms"] if name in groups]
    return {name: groups[name] for name in [*known, *(n for n in groups if n not in known)]}


def _example(folders: Sequence[Path]) -> dict[str, Any] | None:
    """One answer under several contexts, from an inspection; early studies had a file of their own."""
    for folder in folders:
        if (path := folder / "token_advantages.json").exists():
            return read_json(path)
    found = filter(None, map(_inspection, folders))
    return next((inspection_data.example(folder) for folder in found), None)


def _localisation(folders: Sequence[Path]) -> dict[str, Any] | None:
    """The first folder's that has one: an inspection's measures do not add up."""
    paths = [folder / "localisation.json" for folder in filter(None, map(_inspection, folders))]
    return next((read_json(path) for path in paths if path.exists()), None)


def _drawn(
    results: Results,
    groups: Groups,
    example: Mapping[str, Any] | None,
    localisation: Mapping[str, Any] | None,
) -> dict[str, Drawing]:
    return {
        **catalogue.of_results(results, groups, localisation),
        **catalogue.of_feedback(example, localisation),
        **catalogue.of_health(groups),
        **catalogue.of_budget(groups),
    }


def _records(
    folders: Sequence[Path], groups: Groups, example: Mapping[str, Any] | None
) -> tuple[list[answer_records.Record], int]:
    """What the browser shows first and then, and how many answers there are in all."""
    inspected_ones, total = [], 0
    for folder in filter(None, map(_inspection, folders)):
        own, there = answer_records.inspected(folder)
        inspected_ones, total = [*inspected_ones, *own], total + there
    if not inspected_ones and example and example["contexts"]:
        inspected_ones, total = [answer_records.example(example)], 1
    learned, all_learned = answer_records.learned_from(
        groups, answer_records.MOST - len(inspected_ones)
    )
    return [*inspected_ones, *learned], total + all_learned


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
    """With a true minus sign before numbers and between arms; hyphens in words stay."""
    return re.sub(r"(?<!\w)-(?=\d| )", "−", text)


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
