"""A training set as the paper makes one: hard for the solver, well-formatted, solvable by the critic.

    sample k answers to each problem → judge → ask the critic about a wrong one → filter → split

The folder is a run folder: answers and critiques are on disk before they are used, and a selection
that was stopped goes on where it stood. ``critic.type = "recorded"`` can replay its critiques.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfteach.commands.select.data_card import card_text
from selfteach.config.data_section import FilesData, HubData, SelectConfig
from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.errors import DataError, RecipeError
from selfteach.feedback.critics.journaled_critic import JournaledCritic
from selfteach.rollout.journaled_engine import JournaledEngine
from selfteach.runtime.futures import executor
from selfteach.runtime.provenance import collect_provenance
from selfteach.runtime.run_folder import RunFolder, read_json, write_json, write_lines, write_text
from selfteach.tasks.sources.columns import with_mapping
from selfteach.tasks.sources.splits import split_pool, without_duplicates
from selfteach.trainer.build import Built, build, set_threads
from selfteach.trainer.step import verify_and_critique
from selfteach.types import Critique, Problem, Rollout, Sampling, TrainingSample, Usage

FILTERS = ("max_solve_rate", "min_format_rate", "critic", "critic_answers", "split")
"""Settings of ``[select]`` that may change over the same answers."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What a problem's k answers, and the critic, came to."""

    problem: Problem
    answers: int
    correct: int
    formatted: int
    asked: int = 0
    """Wrong answers that the critic was asked about."""
    solved: bool = False
    """True if one of its critiques ended in the right answer."""
    usage: Usage = field(default_factory=Usage)

    @property
    def avg(self) -> float:
        """Avg@k: the share of right answers."""
        return self.correct / self.answers

    @property
    def format(self) -> float:
        """The share of answers that could be parsed."""
        return self.formatted / self.answers


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a selection has come."""

    judged: int
    total: int
    kept: int


def select(recipe: Recipe, chosen: SelectConfig, folder: Path) -> Iterator[Standing]:
    """Select problems into a folder, from wherever it stands; yields after each batch.

    Writes ``train.jsonl``, ``validation.jsonl``, ``test.jsonl``, a data card ``README.md``, and
    ``card.json`` last. Raises one of `selfteach.errors`.
    """
    if chosen.critic and recipe.critic is None:
        raise RecipeError(
            "select.critic asks the recipe's critic, and there is none: add [critic], "
            "or say [select] critic = false"
        )
    set_threads(recipe.train.threads)
    run = RunFolder(folder)
    with run.lock():
        _take_other_filters(run, as_config(recipe, chosen))
        run.create(as_config(recipe, chosen), collect_provenance(), _migrated)
        if is_complete(folder):
            return
        built = build(recipe)
        pool, duplicates = candidates(built, chosen)
        split_pool(pool, chosen.split)  # too few of them is said before anything is sampled
        tallies: list[Tally] = []
        for batch in _tallies(run, recipe, chosen, built, pool):
            tallies += batch
            kept = sum(reasons_against(tally, chosen) is None for tally in tallies)
            yield Standing(len(tallies), len(pool), kept)
        _write(folder, recipe, chosen, built, tallies, duplicates)


def _take_other_filters(run: RunFolder, config: dict[str, Any]) -> None:
    """A folder whose answers were sampled in the same way is filtered anew."""

    def without_filters(values: dict[str, Any]) -> dict[str, Any]:
        chosen = {k: v for k, v in values.get("select", {}).items() if k not in FILTERS}
        return {**values, "select": chosen}

    path = run.path / "config.json"
    if not path.exists() or run.config() == config:
        return
    if without_filters(run.config()) == without_filters(config):
        (run.path / "card.json").unlink(missing_ok=True)
        write_json(path, config)


def as_config(recipe: Recipe, chosen: SelectConfig) -> dict[str, Any]:
    """What ``config.json`` of a selection's folder holds."""
    return {"select": chosen.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json")}


def _migrated(config: dict[str, Any]) -> dict[str, Any]:
    """The same of an earlier version with what recipes have had since."""
    where = "config.json"
    return as_config(
        validate(Recipe, config["recipe"], where=where),
        validate(SelectConfig, config["select"], where=where),
    )


def is_complete(folder: Path) -> bool:
    """True once a selection has ended by itself."""
    return (folder / "card.json").exists()


def card_of(folder: Path) -> dict[str, Any]:
    """The counts of a complete selection."""
    return read_json(folder / "card.json")


def candidates(built: Built, chosen: SelectConfig) -> tuple[list[Problem], int]:
    """The problems to choose from, and how many stood there twice.

    Raises `DataError` if there are none, or two have one id.
    """
    found = [problem for name in chosen.pool for problem in getattr(built.task, name)]
    pool, duplicates = without_duplicates(found)
    if not pool:
        raise DataError(f"select.pool = {list(chosen.pool)}: these splits hold no problem")
    id_, count = Counter(problem.id for problem in pool).most_common(1)[0]
    if count > 1:
        raise DataError(f"select.pool: two problems have the same id {id_!r}")
    return pool, duplicates


def reasons_against(tally: Tally, chosen: SelectConfig) -> str | None:
    """Which filter a problem fails first; None if it is kept."""
    if tally.avg >= chosen.max_solve_rate:
        return "too easy"
    if tally.format < chosen.min_format_rate:
        return "badly formatted"
    if chosen.critic and not tally.solved:
        return "critic fails"
    return None


def _tallies(
    run: RunFolder, recipe: Recipe, chosen: SelectConfig, built: Built, pool: Sequence[Problem]
) -> Iterator[list[Tally]]:
    """Batch by batch; a served critic marks one batch while the next are sampled."""
    sampling = Sampling(
        chosen.samples,
        chosen.temperature or recipe.sampling.temperature,
        chosen.max_tokens or recipe.sampling.max_tokens,
        chosen.seed,
    )
    batches = JournaledEngine(built.components.engine, run, "select").batches(pool, sampling)
    with executor(built.components.critic_threads) as submit:
        waiting = []
        for number, batch in enumerate(batches):
            waiting.append(submit(_judged, run, chosen, built, number, batch))
            while len(waiting) > built.components.critic_threads:
                yield waiting.pop(0)()
        for tallies in waiting:
            yield tallies()


def _judged(
    run: RunFolder, chosen: SelectConfig, built: Built, number: int, batch: Sequence[Rollout]
) -> list[Tally]:
    """Count right and parsable answers, then ask the critic about hard problems' wrong ones."""
    verify = built.components.verify
    tallies: dict[str, Tally] = {}
    wrong: dict[str, list[Rollout]] = {}
    for rollout in batch:
        verdict, id_ = verify(rollout.problem, rollout.text), rollout.problem.id
        before = tallies.get(id_, Tally(rollout.problem, 0, 0, 0))
        tallies[id_] = Tally(
            rollout.problem,
            before.answers + 1,
            before.correct + verdict.correct,
            before.formatted + verdict.formatted,
        )
        if not verdict.correct:
            wrong.setdefault(id_, []).append(rollout)
    if not chosen.critic:
        return list(tallies.values())
    open_ = [t for t in tallies.values() if reasons_against(t, chosen) == "critic fails"]
    asked = [r for t in open_ for r in wrong.get(t.problem.id, [])[: chosen.critic_answers]]
    return list(_with_critic(run, built, number, tallies, asked).values())


def _with_critic(
    run: RunFolder, built: Built, number: int, tallies: dict[str, Tally], asked: Sequence[Rollout]
) -> dict[str, Tally]:
    """The tallies with what the critic made of the answers it was asked about; kept on disk."""
    known = run.load_critiques(number)
    old, new = ([r for r in asked if (r.key in known) is there] for there in (True, False))
    critic = built.components.critic
    assert critic is not None
    saved = dataclasses.replace(built.components, critic=JournaledCritic(critic, known))
    critiqued = [
        *verify_and_critique(saved, old), *verify_and_critique(built.components, new)
    ]  # fmt: skip
    run.save_samples(number, [TrainingSample(answer) for answer in critiqued])
    for answer in critiqued:
        problem, said = answer.rollout.problem, answer.critique
        assert said is not None, "a critic was asked"
        ends_right = (
            isinstance(said, Critique)
            and built.components.verify(
                problem, built.task.answer_format.write(said.answer)
            ).correct
        )
        tally = tallies[problem.id]
        tallies[problem.id] = dataclasses.replace(
            tally,
            asked=tally.asked + 1,
            solved=tally.solved or ends_right,
            usage=tally.usage + said.usage,
        )
    return tallies


def _write(
    folder: Path, recipe: Recipe, chosen: SelectConfig, built: Built,
    tallies: Sequence[Tally], duplicates: int,
) -> None:  # fmt: skip
    """The selected problems by split, the card for people, and the card for programs last."""
    kept = [tally for tally in tallies if reasons_against(tally, chosen) is None]
    card = make_card(recipe, chosen, tallies, duplicates=duplicates, counts=built.task.counts)
    try:
        if not kept:
            raise DataError(f"no problem is left ({card['filters']})")
        splits = split_pool([tally.problem for tally in kept], chosen.split)
    except DataError as error:
        raise DataError(f"{error}; the answers are kept: loosen [select] and call again") from None
    by_id = {tally.problem.id: tally for tally in kept}
    for name in ("train", "validation", "test"):
        rows = (problem_row(by_id[problem.id]) for problem in splits[name])
        write_lines(folder / f"{name}.jsonl", rows)
        card["out"][name] = len(splits[name])
    write_text(folder / "README.md", card_text(card))
    write_json(folder / "card.json", card)


def problem_row(tally: Tally) -> dict[str, Any]:
    """A problem as ``data.type = "files"`` reads it back: references and meta kept."""
    problem = tally.problem
    selection = {"avg": tally.avg, "format": tally.format, "k": tally.answers}
    return {
        "id": problem.id,
        "question": problem.question,
        "answer": problem.answer,
        **problem.references,
        "meta": {**problem.meta, "selection": selection},
    }


def make_card(
    recipe: Recipe, chosen: SelectConfig, tallies: Sequence[Tally], *,
    duplicates: int, counts: Mapping[str, int],
) -> dict[str, Any]:  # fmt: skip
    """All counts of a selection; ``out`` is filled in when the splits are written."""
    failed = Counter(reasons_against(tally, chosen) for tally in tallies)
    kept = failed.pop(None, 0)
    usage = sum((tally.usage for tally in tallies), Usage())
    right = Counter(tally.correct for tally in tallies)
    data = recipe.data
    data = with_mapping(data) if isinstance(data, FilesData | HubData) else data
    source = data.model_dump(mode="json", exclude_defaults=True)
    return {
        "source": {"type": data.type, **source},
        "solver": recipe.model.path,
        "critic": recipe.critic.model_dump(mode="json")
        if chosen.critic and recipe.critic
        else None,
        "select": chosen.model_dump(mode="json"),
        "reading": {**dict(counts), "duplicates in the pool": duplicates},
        "in": len(tallies),
        "filters": {name: failed[name] for name in ("too easy", "badly formatted", "critic fails")},
        "kept": kept,
        "out": {},
        "answers": sum(tally.answers for tally in tallies),
        "critiques": sum(tally.asked for tally in tallies),
        "usage": dataclasses.asdict(usage),
        "by_right_answers": [right[count] for count in range(chosen.samples + 1)],
    }
