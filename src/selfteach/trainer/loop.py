"""Run a recipe: steps, evaluations, checkpoints, result; resumable at any point."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from selfteach.config.recipe import Recipe
from selfteach.errors import CheckpointError, RecipeError, RunStopped, Terminated
from selfteach.evaluation.evaluation_record import evaluation_path
from selfteach.evaluation.evaluator import evaluate, rollouts_name
from selfteach.models.fsdp import whole_state
from selfteach.models.loading import choose_device
from selfteach.models.model_path import resolve
from selfteach.rollout.journaled_engine import JournaledEngine
from selfteach.rollout.sampling_settings import evaluation_sampling
from selfteach.runtime import torchrun, tracking
from selfteach.runtime.atomic_files import report_full_disk, sync_folder, sync_tree, write_json
from selfteach.runtime.distributed import Ranks, init_ranks
from selfteach.runtime.part_sources import require_given, require_same_sources, with_copies
from selfteach.runtime.run_folder import RunFolder, load_result
from selfteach.runtime.seeds import hashed_rng
from selfteach.runtime.signals import Termination, handle_termination
from selfteach.tasks.task import SplitName, training_order
from selfteach.tasks.verifiers import keep_timeouts
from selfteach.trainer import checkpoint
from selfteach.trainer.async_training import RolloutRequest, train_steps
from selfteach.trainer.build import Built, build, build_sinks, set_threads
from selfteach.trainer.evaluation_reward import BatchwiseReward
from selfteach.trainer.fit_checks import require_references, require_splits
from selfteach.trainer.fleet_metrics import fleet_metrics
from selfteach.trainer.guard import Guard
from selfteach.trainer.preflight import preflight
from selfteach.trainer.problem_identity import has_uneven_epochs, same_problems
from selfteach.trainer.reward_metrics import JUDGE_BUDGET
from selfteach.trainer.run_environment import as_started, environment_of
from selfteach.trainer.step import publish_weights
from selfteach.types import Problem

BUDGET = (
    "rollouts_sampled",
    "tokens_sampled",
    "tokens_trained",
    "teacher_tokens",
    "critiques",
    "critic_requests",
    "critic_cached",
    "critic_prompt_tokens",
    "critic_completion_tokens",
    "critic_cost",
    "optimizer_steps",
)
"""Metrics that are summed over a run's steps as its budget."""

Record = Callable[[Mapping[str, Any]], None]
"""Records a row of metrics."""


def train(
    recipe: Recipe, folder: str | Path, same_start: Sequence[str | Path] = ()
) -> Iterator[dict[str, Any]]:
    """Run a recipe in a folder, or resume the run that the folder holds; yield each row of metrics.

    A run resumes from its last checkpoint and uses the rollouts and critiques that are in the folder.
    On CPU the result is bitwise that of an uninterrupted run. On SIGTERM (and on Ctrl-C of the command
    line) a checkpoint is saved and `Terminated` is raised. Under torchrun all ranks call this; only
    rank 0 writes shared files and yields rows.

    ``same_start`` are the folders of other runs that start with the same model, problems and seed:
    rollouts of the untrained model are copied from them instead of sampled again.
    """
    set_threads(recipe.train.threads)
    run = RunFolder(folder)
    folder = run.path
    with _ranks(recipe) as ranks, run.lock() if ranks.is_main else nullcontext():
        if ranks.is_main:
            run.create(recipe.model_dump(mode="json"), environment_of(recipe, ranks))
        recipe = as_started(recipe, run, ranks)
        if ranks.broadcast(run.is_complete):
            return
        recipe = with_copies(recipe, folder, only_missing=True)
        ranks.all_or_raise(lambda: _require(recipe, folder) if ranks.is_main else None)
        built = build(recipe, ranks)
        require_splits(recipe, built.task)
        require_references(recipe, built.task)
        built = same_problems(run, built)
        keep_timeouts(built.components.verify, folder / "verifier_timeouts.jsonl")
        if ranks.is_main:
            for other in map(RunFolder, same_start):
                if run.has_problems_of(other, "validation"):
                    run.copy_rollouts(rollouts_name("validation", 0), other)
        step = _restore(run, recipe, built)
        recording = _recording(run, recipe) if ranks.is_main else nullcontext(_not_recorded)
        with recording as record, handle_termination(deferred=ranks.size > 1) as termination:
            for row in _steps(run, recipe, built, step, record, termination):
                if ranks.is_main:
                    yield row
            with termination.interruptible():
                _finish(run, recipe, built, record)


def _require(recipe: Recipe, folder: Path) -> None:
    """Check servers, packages and parts before anything is built; parts must be those of the run."""
    require_given(folder, recipe)
    preflight([recipe])
    require_same_sources(folder, recipe)


def run_to_end(
    recipe: Recipe, folder: str | Path, same_start: Sequence[str | Path] = ()
) -> dict[str, Any]:
    """Run `train` to its end and return the result."""
    for _ in train(recipe, folder, same_start):
        pass
    return load_result(folder)


def _ranks(recipe: Recipe) -> AbstractContextManager[Ranks]:
    """Return the ranks of this run. Raises `RecipeError` for sharding without torchrun."""
    config = recipe.distributed
    if config.shard != "none" and not torchrun.is_torchrun():
        raise RecipeError(
            f'distributed.shard = "{config.shard}" needs torchrun: torchrun --nproc-per-node 2 -m '
            'selfteach train ..., or set distributed.shard = "none"'
        )
    return init_ranks(choose_device(recipe.model.device).type, config.timeout_seconds)


def _not_recorded(row: Mapping[str, Any]) -> None:
    """Discard a row: only rank 0 records metrics."""


def _restore(run: RunFolder, recipe: Recipe, built: Built) -> int:
    """Load the newest checkpoint if there is one; return the number of finished steps.

    Raises `CheckpointError` if the checkpoint or the metrics before it are damaged, or if there must
    have been a checkpoint and there is none.
    """
    ranks = built.components.ranks
    saved = ranks.broadcast(
        ranks.all_or_raise(lambda: _verified_checkpoint(run, recipe) if ranks.is_main else [])
    )
    step = 0
    if saved:
        step = checkpoint.load(saved[0], built.components.policy, built.components.teacher)
    if ranks.is_main:
        run.truncate_metrics(step if saved else -1)
    return step


def _verified_checkpoint(run: RunFolder, recipe: Recipe) -> list[Path]:
    """Return the newest checkpoint, its files and the metrics before it verified; empty without one."""
    saved = checkpoint.checkpoints(run.checkpoints)[-1:]
    done = max((row["step"] for row in run.metrics() if row["kind"] == "step"), default=0)
    for path in saved:
        checkpoint.verify(path, run.metrics_path)
    if not saved and done > recipe.train.checkpoint_every:
        raise CheckpointError(
            f"{run.metrics_path} reaches step {done}, but {run.checkpoints} holds no checkpoint: "
            f"restore it, or move {run.metrics_path} away to train again from the stored rollouts"
        )
    return saved


@contextmanager
def _recording(run: RunFolder, recipe: Recipe) -> Iterator[Record]:
    """Yield a function that writes a row to metrics.jsonl, then to the recipe's sinks."""
    config, sinks = recipe.tracking, {}
    if config.sinks:
        known = tracking.tracked_run(run.path, config.project, recipe.model_dump(mode="json"))
        sinks = build_sinks(config, known)
    with tracking.open_sinks(sinks, run.path, run.metrics()) as send:

        def record(row: Mapping[str, Any]) -> None:
            run.append_metrics(row)
            send(row)

        yield record


def _steps(
    run: RunFolder, recipe: Recipe, built: Built, done: int, record: Record, end: Termination
) -> Iterator[dict[str, Any]]:
    """Train step by step. A row is written before its step's checkpoint, so that none is missing."""
    components, last = built.components, recipe.train.steps
    publish_weights(components)
    training = train_steps(
        components, _rollout_requests(run, recipe, built), range(done + 1, last + 1), run,
        staleness=recipe.train.staleness, interruptible=end.interruptible,
    )  # fmt: skip
    guard = _guard(run, recipe, built)
    try:
        yield from _due_validation(run, recipe, built, done, record, end)
        for step, (_, metrics) in training:
            ranks = {"ranks": components.ranks.size} if components.ranks.size > 1 else {}
            members = fleet_metrics(components.fleets, components.ranks)
            row = {"step": step, "kind": "step", **ranks, **metrics, **members}
            components.ranks.all_or_raise(run.flushed)  # a row stands for the files of all ranks
            record(row)
            done = step
            events = guard.observe(row)
            components.policy.lr_factor = guard.lr_factor
            yield row
            yield from _due_validation(run, recipe, built, step, record, end)
            if step % recipe.train.checkpoint_every == 0 or step == last:
                _save(run, recipe, built, step)
            if stops := [event.text for event in events if event.action == "stop"]:
                _save_once(run, recipe, built, step)
                raise RunStopped(
                    f"{run.path} stopped after step {step} of {last}: {'; '.join(stops)}. All is kept: "
                    f"selfteach resume {run.path} goes on; [guard] sets when a run stops"
                )
            if step < last and components.ranks.size > 1 and components.ranks.any(end.requested):
                raise Terminated(end.status)  # on every rank, at the same step
    except Terminated:
        if done > 0:
            _save_once(run, recipe, built, done)
        raise


def _due_validation(
    run: RunFolder, recipe: Recipe, built: Built, step: int, record: Record, end: Termination
) -> Iterator[dict[str, Any]]:
    """Evaluate on the validation split if this step has an evaluation, and yield its row."""
    if built.components.ranks.broadcast(_due(run, recipe, step)):
        with end.interruptible():
            row = _measure(run, recipe, built, "validation", step, record)
        yield row


def _save(run: RunFolder, recipe: Recipe, built: Built, step: int) -> None:
    """Save a checkpoint once all is on disk that a resume needs: rollouts, and rows of metrics."""
    components = built.components
    components.ranks.all_or_raise(run.flushed)
    checkpoint.save(
        run.checkpoints, step, components.policy, components.teacher,
        keep=recipe.train.keep_checkpoints, ranks=components.ranks, metrics=run.metrics_path,
    )  # fmt: skip


def _save_once(run: RunFolder, recipe: Recipe, built: Built, step: int) -> None:
    """Save a checkpoint of this step unless there is one."""
    if not checkpoint.path_for_step(run.checkpoints, step).exists():
        _save(run, recipe, built, step)


def _guard(run: RunFolder, recipe: Recipe, built: Built) -> Guard:
    """Return the run's guard, in the state in which it was after the steps on record."""
    ranks, guard = built.components.ranks, Guard(recipe.guard)
    for row in ranks.broadcast(run.metrics() if ranks.is_main else []):
        guard.observe(row)
    built.components.policy.lr_factor = guard.lr_factor
    return guard


def _rollout_requests(
    run: RunFolder, recipe: Recipe, built: Built
) -> Callable[[int], RolloutRequest]:
    """Return the problems and policy version of each step.

    Raises `RecipeError` if there are too few problems for the steps that one version samples.
    """
    train, problems = recipe.train, built.task.problems("train")
    most = min(train.steps, train.staleness + 1) * min(train.problems_per_step, len(problems))
    if most > len(problems):
        raise RecipeError(
            f"train.staleness = {train.staleness}: the first {train.staleness + 1} steps are sampled "
            f"by the same weights, so they need {most} problems, of which there are {len(problems)}"
        )
    order = training_order(
        len(problems), recipe.seed, train.problems_per_step, uneven=has_uneven_epochs(run)
    )
    of_step = [[problems[i] for i in indices] for indices in islice(order, train.steps)]

    def request(step: int) -> RolloutRequest:
        version = max(0, step - 1 - train.staleness) * train.num_iterations
        weights_lost = version != built.components.policy.version
        further = _further_problems(recipe, problems, of_step[step - 1], step)
        rounds = recipe.sampling.dynamic_rounds
        return RolloutRequest(step, of_step[step - 1], version, weights_lost, rounds, further)

    return request


def _further_problems(
    recipe: Recipe, problems: Sequence[Problem], chosen: Sequence[Problem], step: int
) -> list[Problem]:
    """Return a step's problems for further rounds: a function of seed and step, none of ``chosen``."""
    most = recipe.sampling.dynamic_rounds * len(chosen)
    if not most:
        return []
    ids = {problem.id for problem in chosen}
    order = hashed_rng("further problems", recipe.seed, step).permutation(len(problems))
    return [problems[i] for i in order if problems[i].id not in ids][:most]


def _due(run: RunFolder, recipe: Recipe, step: int) -> bool:
    """Return whether this step has a validation that is not recorded yet."""
    last = recipe.train.steps
    wanted = last > 0 and (step % recipe.evaluation.every == 0 or step == last)
    return wanted and not any(
        row["step"] == step and row["kind"] == "validation" for row in run.metrics()
    )


def _measure(
    run: RunFolder, recipe: Recipe, built: Built, split: SplitName, step: int, record: Record
) -> dict[str, Any]:
    """Evaluate on a split and record the result."""
    settings, started, built = recipe.evaluation, time.monotonic(), built.for_measuring()
    k = settings.test_k if split == "test" else settings.validation_k
    sampling = evaluation_sampling(recipe, k, recipe.seed)
    scored = BatchwiseReward(
        run, built, rollouts_name(split, step), step * recipe.train.num_iterations
    )
    engine = JournaledEngine(
        built.components.engine, run, rollouts_name(split, step), on_batch=scored.start
    )
    evaluation = evaluate(
        engine, scored.verifier, built.task.problems(split), sampling,
        split=split, step=step, same=built.task.answer_format.equivalent, ranks=built.components.ranks,
        reward=scored if scored.decides else None,
    )  # fmt: skip
    built.components.ranks.all_or_raise(run.flushed)
    if built.components.ranks.is_main:
        run.save_evaluation(evaluation_path(run.path, split, step), evaluation.to_json())
    row = {
        "step": step,
        "kind": split,
        "k": sampling.samples,
        **evaluation.means(),
        **scored.metrics(),
        "evaluation_rollouts": sampling.samples * len(evaluation.problem_ids),
        "time/evaluate": time.monotonic() - started,
    }
    record(row)
    return row


def _finish(run: RunFolder, recipe: Recipe, built: Built, record: Record) -> None:
    """Evaluate on the test problems, once; save the model; write the result last."""
    step = recipe.train.steps
    if recipe.evaluation.test:
        _measure(run, recipe, built, "test", step, record)
    if step > 0:
        _export(run, recipe, built)
    if not built.components.ranks.is_main:
        return
    rows = run.metrics()
    seconds = sum(v for row in rows for k, v in row.items() if k.startswith("time/"))
    names = [*BUDGET, "evaluation_rollouts", *(JUDGE_BUDGET if _has_judge(recipe) else ())]
    budget = {name: sum(row.get(name, 0) for row in rows) for name in names}
    curve = [(row["step"], row["avg"]) for row in rows if row["kind"] == "validation"]
    write_json(
        run.result_path,
        {
            "step": step,
            "seed": recipe.seed,
            "budget": {**budget, "seconds": seconds},
            "curve": {"steps": [s for s, _ in curve], "avg": [avg for _, avg in curve]},
        },
    )


def _has_judge(recipe: Recipe) -> bool:
    return recipe.reward is not None and len(recipe.reward.judges) > 0


def _export(run: RunFolder, recipe: Recipe, built: Built) -> None:
    """Save the final model for ``transformers`` and PEFT, with its tokenizer."""
    temporary, target = run.path / ".model.tmp", run.path / "model"
    policy, ranks = built.components.policy, built.components.ranks
    model = policy.model
    # Adapters do not change the embeddings; without this PEFT would load the base's config to check.
    extra: dict[str, Any] = {"save_embedding_layers": False} if policy.has_adapters else {}
    if policy.is_sharded:
        extra["state_dict"] = whole_state(model, keep=ranks.is_main)
    if not ranks.is_main:
        return
    with report_full_disk():
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(str(temporary), **extra)
        built.tokenizer.save_pretrained(temporary)
        world = Path(resolve(recipe.model.path)) / "world.json"
        if world.exists():  # so that the export is a lab model as well
            shutil.copy(world, temporary)
        sync_tree(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
        sync_folder(run.path)
