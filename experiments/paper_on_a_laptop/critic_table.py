#!/usr/bin/env python3
"""Measure the 1.5B critic against the program that checks every step of a chain sum.

    make paper-laptop-critic

The untrained policy writes rollouts of the validation problems; the critic critiques each of them in
several settings. Replies are in a reply cache, so that the same command continues after a stop. The
counts go to results/critic.json, the table to the terminal. About two hours on one slow core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from selfteach import api
from selfteach.analysis.critic_statistics import count_critiques
from selfteach.analysis.critic_truth import count_truth, share
from selfteach.commands.critique import critique_file
from selfteach.evaluation.statistics import Interval
from selfteach.runtime.atomic_files import write_json, write_lines

HERE = Path(__file__).parent
RUNS = Path("runs/paper_on_a_laptop/critic")
SETTINGS: dict[str, list[str]] = {
    "own solution, one retry (the study's)": [],
    "own solution, greedy": ["max_attempts=1"],
    "no solution, one retry": ["solves_first=false"],
    "no solution, greedy": ["solves_first=false", "max_attempts=1"],
    "reference, one retry": ["solves_first=false", "sees_reference=true"],
    "reference, greedy": ["solves_first=false", "sees_reference=true", "max_attempts=1"],
}
"""What the critic sees beside the rollout, and whether a failed critique is requested again."""
SAMPLES = 3
"""Rollouts per validation problem."""


def main() -> None:
    """Sample, critique in every setting, write the counts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rollouts = RUNS / "rollouts.jsonl"
    if not rollouts.exists():
        sample(arguments.settings, rollouts)
    table = {}
    for name, changes in SETTINGS.items():
        critic = [f"arms.step_aligned.critic.{change}" for change in changes]
        critic.append(f"arms.step_aligned.critic.reply_cache={RUNS / 'critiques.sqlite'}")
        recipe = api.load_recipe(
            HERE / "chain_sums.toml", "step_aligned", settings=[*arguments.settings, *critic]
        )
        rows, seconds = critique_file(recipe, rollouts, progress(name))
        table[name] = measures(rows) | {"seconds": seconds}
        write_json(HERE / "results" / "critic.json", table)
    print_table(table)


def sample(settings: list[str], path: Path) -> None:
    """Write rollouts of the untrained policy, as `selfteach critique` reads them."""
    built = api.build(
        api.load_recipe(
            HERE / "chain_sums.toml", "step_aligned_oracle", seed=200, settings=settings
        )
    )
    parts = built.components
    sampling = replace(parts.sampling, samples=SAMPLES)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(
        path,
        (
            {
                "id": rollout.problem.id,
                "sample": rollout.sample,
                "question": rollout.problem.question,
                "answer": rollout.problem.answer,
                "text": rollout.text,
                "finished": rollout.finished,
            }
            for rollout in parts.engine.generate(built.task.validation, sampling)
        ),
    )


def measures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return counts, and shares with 95 % intervals, of critiques in one setting."""
    summary, truth = count_critiques(rows), count_truth(rows)
    assert truth is not None, "chain sums have a program that checks every step"
    fidelity = summary.fidelity
    wrong = [row for row in rows if not row["correct"]]
    usable = [row for row in rows if "reason" not in row["critique"]]
    shares = {
        "usable": share(len(usable), len(rows)),
        "usable_of_wrong": share(sum("reason" not in row["critique"] for row in wrong), len(wrong)),
        "first_error_located": share(truth.located, truth.faulty_usable),
        "changed_earlier": share(truth.early, truth.faulty_usable),
        "missed": share(truth.late, truth.faulty_usable),
        "false_alarms": share(truth.alarms, truth.sound_usable),
    }
    return {
        "counts": asdict(truth) | {"rollouts": len(rows), "correct": summary.correct},
        "shares": {name: None if one is None else asdict(one) for name, one in shares.items()},
        "fidelity": sum(fidelity) / len(fidelity) if fidelity else None,
        "failures": dict(summary.failures),
        "requests": summary.usage["requests"] + summary.usage["cached"],
    }


def print_table(table: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the shares in percent, in Markdown."""
    names = [*next(iter(table.values()))["shares"]]
    print(
        "| critic sees | " + " | ".join(name.replace("_", " ") for name in names) + " | fidelity |"
    )
    print("|---|" + "---|" * (len(names) + 1))
    for setting, row in table.items():
        cells = [percent(row["shares"][name]) for name in names]
        fidelity = "" if row["fidelity"] is None else f"{row['fidelity']:.2f}"
        print(f"| {setting} | " + " | ".join(cells) + f" | {fidelity} |")


def percent(one: Mapping[str, float] | None) -> str:
    """Return a share with its interval in percent."""
    if one is None:
        return ""
    interval = Interval(**one)
    low, mean, high = (f"{100 * x:.0f}" for x in (interval.low, interval.mean, interval.high))
    return f"{mean} [{low}, {high}]"


def progress(name: str) -> Callable[[int, int], None]:
    """Return a function that prints how many rollouts are critiqued."""
    return lambda done, total: print(f"{name}: {done} of {total}", flush=True)


if __name__ == "__main__":
    main()
