"""Select a training set as the paper does: hard for the policy, well formatted, solved by the critic.

    sample k rollouts per problem → verify → critique incorrect ones → filter → split

The folder is a run folder: rollouts and critiques are on disk before they are used, and a selection
that was stopped resumes from them. ``critic.type = "recorded"`` can replay its critiques.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfteach.commands.select.data_card import card_text
from selfteach.commands.select.selectable import require_selectable
from selfteach.config.data_section import FilesData, HubData, SelectConfig
from selfteach.config.part_names import unanchored
from selfteach.config.recipe import ContextConfig, Recipe
from selfteach.errors import DataError, RecipeError
from selfteach.feedback.critics.journaled_critic import JournaledCritic
from selfteach.feedback.critics.reply_cache import buying_for
from selfteach.protocols import SolvingCritic
from selfteach.rollout.journaled_engine import JournaledEngine
from selfteach.rollout.sampling_settings import training_sampling
from selfteach.runtime.atomic_files import write_json, write_lines, write_text
from selfteach.runtime.futures import executor
from selfteach.runtime.part_sources import portable, require_same_sources, with_copies
from selfteach.runtime.provenance import collect_provenance
from selfteach.runtime.run_folder import RunFolder
from selfteach.runtime.stored_files import read_json
from selfteach.runtime.stored_records import history_column, plain_columns
from selfteach.tasks.sources.columns import with_mapping
from selfteach.tasks.sources.conversations import is_conversation
from selfteach.tasks.sources.splits import split_pool, without_duplicates
from selfteach.tasks.verifiers import verdicts_of
from selfteach.trainer.build import Built, build, set_threads
from selfteach.trainer.evaluation_reward import with_stored_rewards
from selfteach.trainer.preflight import preflight
from selfteach.trainer.problem_identity import same_problems
from selfteach.trainer.step import verify_and_critique
from selfteach.types import (
    Critique,
    CritiquedRollout,
    Problem,
    Rollout,
    TrainingSample,
    Usage,
)

FILTERS = (
    "max_solve_rate", "min_format_rate", "critic", "critic_test", "critic_answers", "split",
)  # fmt: skip
"""Settings of ``[select]`` that may change without sampling again."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts the rollouts and critiques of one problem."""

    problem: Problem
    rollouts: int
    correct: int
    formatted: int
    critiques: int = 0
    """Incorrect rollouts that were given to the critic."""
    solved: bool = False
    """True if the critic solved it (``select.critic_test``)."""
    usage: Usage = field(default_factory=Usage)

    @property
    def avg(self) -> float:
        """Return Avg@k: the fraction of correct rollouts."""
        return self.correct / self.rollouts

    @property
    def format(self) -> float:
        """Return the fraction of rollouts whose final answer could be parsed."""
        return self.formatted / self.rollouts


@dataclass(frozen=True, slots=True)
class SelectionProgress:
    """Counts the problems that are done, and those selected so far."""

    done: int
    total: int
    selected: int


def select(recipe: Recipe, config: SelectConfig, folder: str | Path) -> Iterator[SelectionProgress]:
    """Select problems into a folder, resuming what is there; yield progress after each batch.

    Writes ``train.jsonl``, ``validation.jsonl``, ``test.jsonl``, a data card ``README.md``, and
    ``card.json`` last. Raises one of `selfteach.errors`.
    """
    require_selectable(recipe, config)
    set_threads(recipe.train.threads)
    run = RunFolder(folder)
    folder = run.path
    with run.lock():
        _replace_filters(run, as_config(recipe, config))
        run.create(as_config(recipe, config), collect_provenance())
        if is_complete(folder):
            return
        recipe = with_copies(recipe, folder, only_missing=True)
        # A critic that is not used is not loaded: a local one may be larger than the policy.
        without = {"critic": None, "context": ContextConfig(type="none")}
        needed = recipe if config.critic else recipe.model_copy(update=without)
        preflight([needed])
        require_same_sources(folder, needed)
        built = build(needed).for_measuring()
        if config.critic and config.critic_test == "solution":
            _require_solving_critic(built)
        built = same_problems(run, built)
        pool, duplicates = candidates(built, config)
        split_pool(pool, config.split)  # raises for too few problems before anything is sampled
        tallies: list[Tally] = []
        for batch in _tallies(run, recipe, config, built, pool):
            tallies += batch
            selected = sum(reason_against(tally, config) is None for tally in tallies)
            yield SelectionProgress(len(tallies), len(pool), selected)
        _write(folder, recipe, config, built, tallies, duplicates)


def _require_solving_critic(built: Built) -> None:
    if not isinstance(built.components.critic, SolvingCritic):
        raise RecipeError(
            'select.critic_test = "solution" needs a language model as the critic, and the recipe\'s '
            'cannot solve a question: name another critic.type, or set critic_test = "critique"'
        )


def _replace_filters(run: RunFolder, config: dict[str, Any]) -> None:
    """Store other filters in a folder whose rollouts were sampled in the same way."""

    def without_filters(values: dict[str, Any]) -> dict[str, Any]:
        sampling = {k: v for k, v in values.get("select", {}).items() if k not in FILTERS}
        return {**values, "select": sampling}

    path = run.path / "config.json"
    if not path.exists() or run.config() == config:
        return
    if without_filters(run.config()) == without_filters(config):
        (run.path / "card.json").unlink(missing_ok=True)
        write_json(path, config)


def as_config(recipe: Recipe, config: SelectConfig) -> dict[str, Any]:
    """Return what ``config.json`` of a selection's folder holds."""
    return {"select": config.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json")}


def is_complete(folder: str | Path) -> bool:
    """Return True if the selection in a folder has finished."""
    return (Path(folder) / "card.json").exists()


def card_of(folder: str | Path) -> dict[str, Any]:
    """Return the counts of a complete selection."""
    return read_json(Path(folder) / "card.json")


def candidates(built: Built, config: SelectConfig) -> tuple[list[Problem], int]:
    """Return the problems to choose from, and the number of duplicates removed from them.

    Raises `DataError` if there are none, or two have the same id.
    """
    listed = [problem for name in config.pool for problem in getattr(built.task, name)]
    pool, duplicates = without_duplicates(listed)
    if not pool:
        raise DataError(f"select.pool = {list(config.pool)}: these splits hold no problems")
    id_, count = Counter(problem.id for problem in pool).most_common(1)[0]
    if count > 1:
        raise DataError(f"select.pool: two problems have the same id {id_!r}")
    return pool, duplicates


def reason_against(tally: Tally, config: SelectConfig) -> str | None:
    """Return the first filter that a problem fails; None if it passes all."""
    if tally.avg >= config.max_solve_rate:
        return "too easy"
    if tally.format < config.min_format_rate:
        return "badly formatted"
    if config.critic and not tally.solved:
        return "critic fails"
    return None


def _tallies(
    run: RunFolder, recipe: Recipe, config: SelectConfig, built: Built, pool: Sequence[Problem]
) -> Iterator[list[Tally]]:
    """Yield tallies batch by batch; a served critic works on one batch while the next is sampled."""
    settings = training_sampling(recipe, config.samples, config.seed)
    sampling = dataclasses.replace(
        settings,
        temperature=config.temperature or settings.temperature,
        max_tokens=config.max_tokens or settings.max_tokens,
    )
    batches = JournaledEngine(built.components.engine, run, "select").batches(pool, sampling)
    with executor(built.components.critic_threads) as submit:
        pending = []
        for number, batch in enumerate(batches):
            pending.append(submit(_tally, run, config, built, number, batch))
            while len(pending) > built.components.critic_threads:
                yield pending.pop(0)()
        for tallies in pending:
            yield tallies()


def _tally(
    run: RunFolder, config: SelectConfig, built: Built, number: int, batch: Sequence[Rollout]
) -> list[Tally]:
    """Count correct and parsable rollouts, then critique incorrect ones of problems that are hard."""
    built = with_stored_rewards(built, run, f"select.{number:03d}", batch)
    verdicts = verdicts_of(batch, built.components.verify, built.components.reward)
    tallies: dict[str, Tally] = {}
    wrong: dict[str, list[Rollout]] = {}
    for rollout, verdict in zip(batch, verdicts, strict=True):
        id_ = rollout.problem.id
        before = tallies.get(id_, Tally(rollout.problem, 0, 0, 0))
        tallies[id_] = Tally(
            rollout.problem,
            before.rollouts + 1,
            before.correct + verdict.correct,
            before.formatted + verdict.formatted,
        )
        if not verdict.correct:
            wrong.setdefault(id_, []).append(rollout)
    if not config.critic:
        return list(tallies.values())
    if config.critic_test == "solution":
        with buying_for(f"{run.identity}/{number}.solutions"):
            return _with_solutions(built, config, list(tallies.values()))
    critiqued = _stored(run, built, number, batch)
    # One rollout of each problem at a time: a problem that is solved needs no further critique.
    for turn in range(config.critic_answers):
        undecided = [t for t in tallies.values() if reason_against(t, config) == "critic fails"]
        rollouts = [r for t in undecided for r in wrong.get(t.problem.id, [])[turn : turn + 1]]
        new = [rollout for rollout in rollouts if rollout.key not in critiqued]
        if new:
            with buying_for(f"{run.identity}/{number}.{turn}"):
                critiqued |= _by_key(verify_and_critique(built.components, new))
            run.save_samples(number, [TrainingSample(result) for result in critiqued.values()])
        tallies = _with_critiques(built, tallies, [critiqued[r.key] for r in rollouts])
    return list(tallies.values())


def _with_solutions(built: Built, config: SelectConfig, tallies: list[Tally]) -> list[Tally]:
    """Ask the critic for its own solution of the problems that pass the other filters.

    The solutions are in its reply cache, so a resumed selection does not pay for them twice.
    """
    critic = built.components.critic
    assert isinstance(critic, SolvingCritic), "checked at the start"
    undecided = [tally for tally in tallies if reason_against(tally, config) == "critic fails"]
    solutions = critic.solve([tally.problem for tally in undecided])
    by_id = {tally.problem.id: tally for tally in tallies}
    for tally, solution in zip(undecided, solutions, strict=True):
        text = solution.text
        by_id[tally.problem.id] = dataclasses.replace(
            tally,
            solved=text is not None and built.components.verify(tally.problem, text).correct,
            usage=tally.usage + solution.usage,
        )
    return list(by_id.values())


def _stored(
    run: RunFolder, built: Built, number: int, batch: Sequence[Rollout]
) -> dict[tuple[str, int], CritiquedRollout]:
    """Return the rollouts of a batch whose critiques are on disk."""
    critic, critiques = built.components.critic, run.load_critiques(number)
    assert critic is not None
    stored = dataclasses.replace(built.components, critic=JournaledCritic(critic, critiques))
    return _by_key(verify_and_critique(stored, [r for r in batch if r.key in critiques]))


def _by_key(critiqued: Sequence[CritiquedRollout]) -> dict[tuple[str, int], CritiquedRollout]:
    return {result.rollout.key: result for result in critiqued}


def _with_critiques(
    built: Built, tallies: Mapping[str, Tally], critiqued: Sequence[CritiquedRollout]
) -> dict[str, Tally]:
    """Add critiques to the tallies of their problems."""
    tallies = dict(tallies)
    for result in critiqued:
        problem, critique = result.rollout.problem, result.critique
        assert critique is not None, "there is a critic"
        ends_correct = (
            isinstance(critique, Critique)
            and built.components.verify(
                problem, built.task.answer_format.write(critique.answer)
            ).correct
        )
        tally = tallies[problem.id]
        tallies[problem.id] = dataclasses.replace(
            tally,
            critiques=tally.critiques + 1,
            solved=tally.solved or ends_correct,
            usage=tally.usage + critique.usage,
        )
    return tallies


def _write(
    folder: Path, recipe: Recipe, config: SelectConfig, built: Built,
    tallies: Sequence[Tally], duplicates: int,
) -> None:  # fmt: skip
    """Write the selected problems by split, the data card README.md, and card.json last."""
    selected = [tally for tally in tallies if reason_against(tally, config) is None]
    card = make_card(recipe, config, tallies, duplicates=duplicates, counts=built.task.counts)
    try:
        if not selected:
            raise DataError(f"no problem is left ({card['filters']})")
        splits = split_pool([tally.problem for tally in selected], config.split)
    except DataError as error:
        raise DataError(
            f"{error}; rollouts and critiques are stored: loosen [select] and run it again"
        ) from None
    by_id = {tally.problem.id: tally for tally in selected}
    for name in ("train", "validation", "test"):
        rows = (problem_row(by_id[problem.id]) for problem in splits[name])
        write_lines(folder / f"{name}.jsonl", rows)
        card["out"][name] = len(splits[name])
    write_text(folder / "README.md", card_text(card))
    write_json(folder / "card.json", card)


def problem_row(tally: Tally) -> dict[str, Any]:
    """Return a problem as ``data.type = "files"`` reads it back, with references and meta."""
    problem = tally.problem
    selection = {"avg": tally.avg, "format": tally.format, "k": tally.rollouts}
    columns = plain_columns(problem.columns)
    prompt = columns.pop("prompt", None)
    is_chat = is_conversation(prompt)  # which is the history too
    return {
        **columns,
        "id": problem.id,
        **({} if is_chat else history_column(problem)),
        "question": prompt if is_chat else problem.question,
        "answer": problem.answer,
        **problem.references,
        "meta": {**problem.meta, "selection": selection},
    }


def make_card(
    recipe: Recipe, config: SelectConfig, tallies: Sequence[Tally], *,
    duplicates: int, counts: Mapping[str, int],
) -> dict[str, Any]:  # fmt: skip
    """Return all counts of a selection; ``out`` is filled in when the splits are written."""
    failed = Counter(reason_against(tally, config) for tally in tallies)
    selected = failed.pop(None, 0)
    usage = sum((tally.usage for tally in tallies), Usage())
    by_correct = Counter(tally.correct for tally in tallies)
    data = recipe.data
    data = with_mapping(data) if isinstance(data, FilesData | HubData) else data
    source = data.model_dump(mode="json", exclude_defaults=True)
    source = portable({"data": {"type": data.type, **source}})[
        "data"
    ]  # its parts are in the folder
    environment = None
    if recipe.environment is not None:
        plain = recipe.environment.model_dump(mode="json", exclude_defaults=True)
        plain = {"type": recipe.environment.type, **plain}
        environment = portable({"environment": plain})["environment"]
    return {
        "source": source,
        "environment": environment,
        "solver": recipe.model.path,
        "critic": unanchored(recipe.critic.model_dump(mode="json"))
        if config.critic and recipe.critic
        else None,
        "select": config.model_dump(mode="json"),
        "reading": {**dict(counts), "duplicates in the pool": duplicates},
        "in": len(tallies),
        "filters": {name: failed[name] for name in ("too easy", "badly formatted", "critic fails")},
        "kept": selected,
        "out": {},
        "answers": sum(tally.rollouts for tally in tallies),
        "critiques": sum(tally.critiques for tally in tallies),
        "usage": dataclasses.asdict(usage),
        "by_right_answers": [by_correct[count] for count in range(config.samples + 1)],
    }
