"""One run from a recipe to a result: steps, evaluations, checkpoints; stopped and taken up anywhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.errors import RecipeError, Terminated
from selfteach.evaluation.evaluation_record import evaluation_path
from selfteach.evaluation.evaluator import evaluate, rollouts_name
from selfteach.models.fsdp import whole_state
from selfteach.models.loading import choose_device, resolve
from selfteach.rollout.journaled_engine import JournaledEngine
from selfteach.runtime import torchrun, tracking
from selfteach.runtime.distributed import Ranks, init_ranks
from selfteach.runtime.provenance import collect_provenance, cpu_capability
from selfteach.runtime.run_folder import RunFolder, enough_disk, result_of, write_json
from selfteach.runtime.signals import Termination, handle_sigterm
from selfteach.tasks.task import SplitName, training_order
from selfteach.trainer import checkpoint
from selfteach.trainer.async_training import RolloutRequest, train_steps
from selfteach.trainer.build import Built, build, build_sinks, set_threads
from selfteach.trainer.preflight import preflight
from selfteach.types import Sampling

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
"""What is added up over a run's steps as its cost."""

Record = Callable[[Mapping[str, Any]], None]
"""Writes a row of metrics down."""


def train(recipe: Recipe, folder: Path, alike: Sequence[Path] = ()) -> Iterator[dict[str, Any]]:
    """Run a recipe in a folder, from wherever the folder stands; yields each row of metrics.

    An interrupted run goes on from its last checkpoint; answers and critiques that are on disk are
    used again. The result is, bit for bit on CPU, that of a run that was never stopped. On SIGTERM
    what has been learned is saved, and `Terminated` is raised. Under torchrun all ranks call this;
    rank 0 writes what is written once, and it alone yields.

    ``alike`` are the folders of other runs that begin with the same model, problems and seed: what one
    of them has answered before its first step is not answered again.
    """
    set_threads(recipe.train.threads)
    run = RunFolder(folder)
    with _joined(recipe) as ranks, run.lock() if ranks.is_main else nullcontext():
        if ranks.is_main:
            made = {**collect_provenance(), "processor": cpu_capability()}
            run.create(recipe.model_dump(mode="json"), made, _migrated)
            for other in alike:
                run.copy_rollouts(rollouts_name("validation", 0), RunFolder(other))
        if ranks.broadcast(run.is_complete):
            return
        ranks.all_or_raise(lambda: _require(recipe) if ranks.is_main else None)
        built = build(recipe, ranks)
        step = _restore(run, built)
        heard = _recording(run, recipe) if ranks.is_main else nullcontext(_unheard)
        with heard as record, handle_sigterm(deferred=ranks.size > 1) as termination:
            for row in _steps(run, recipe, built, step, record, termination):
                if ranks.is_main:
                    yield row
            with termination.interruptible():
                _finish(run, recipe, built, record)


def _require(recipe: Recipe) -> None:
    preflight([recipe])


def _migrated(config: dict[str, Any]) -> dict[str, Any]:
    """A recipe of an earlier version with what recipes have had since."""
    return validate(Recipe, config, where="config.json").model_dump(mode="json")


def run_to_end(recipe: Recipe, folder: Path, alike: Sequence[Path] = ()) -> dict[str, Any]:
    """`train` without looking at the rows; returns the result."""
    for _ in train(recipe, folder, alike):
        pass
    return result_of(folder)


def _joined(recipe: Recipe) -> AbstractContextManager[Ranks]:
    """The ranks of this run. Raises `RecipeError` where sharding is asked of a process on its own."""
    config = recipe.distributed
    if config.shard != "none" and not torchrun.is_torchrun():
        raise RecipeError(
            f'distributed.shard = "{config.shard}" needs torchrun: torchrun --nproc-per-node 2 -m '
            'selfteach train ..., or set distributed.shard = "none"'
        )
    return init_ranks(choose_device(recipe.model.device).type, config.timeout_seconds)


def _unheard(row: Mapping[str, Any]) -> None:
    """Rank 0 writes rows down, and it alone."""


def _restore(run: RunFolder, built: Built) -> int:
    """Load the newest checkpoint if there is one; the number of steps that are done."""
    ranks = built.components.ranks
    saved = ranks.broadcast(checkpoint.checkpoints(run.checkpoints)[-1:])
    step = (
        checkpoint.load(saved[0], built.components.policy, built.components.teacher) if saved else 0
    )
    if ranks.is_main:
        run.truncate_metrics(step if saved else -1)
    return step


@contextmanager
def _recording(run: RunFolder, recipe: Recipe) -> Iterator[Record]:
    """What writes a row down: into metrics.jsonl first, then to the sinks that the recipe names."""
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
    """The loop. A step's row precedes its checkpoint, so none is ever missing."""
    components, last = built.components, recipe.train.steps
    components.engine.load_weights(components.policy.trainable.items(), components.policy.version)
    learning = train_steps(
        components, _rollout_requests(recipe, built), range(done + 1, last + 1), run,
        staleness=recipe.train.staleness, interruptible=end.interruptible,
    )  # fmt: skip

    def save(step: int) -> None:
        keep = recipe.train.keep_checkpoints
        run.flushed()  # it counts on the answers that led to it
        checkpoint.save(
            run.checkpoints,
            step,
            components.policy,
            components.teacher,
            keep=keep,
            ranks=components.ranks,
        )

    try:
        if components.ranks.broadcast(_due(run, recipe, done)):
            with end.interruptible():
                row = _measure(run, recipe, built, "validation", done, record)
            yield row
        for step, (_, metrics) in learning:
            among = {"ranks": components.ranks.size} if components.ranks.size > 1 else {}
            row = {"step": step, "kind": "step", **among, **metrics}
            record(row)
            done = step
            yield row
            if components.ranks.broadcast(_due(run, recipe, step)):
                with end.interruptible():
                    row = _measure(run, recipe, built, "validation", step, record)
                yield row
            if step % recipe.train.checkpoint_every == 0 or step == last:
                save(step)
            if step < last and components.ranks.size > 1 and components.ranks.any(end.requested):
                raise Terminated  # on every rank, at the same step
    except Terminated:
        if done > 0 and not checkpoint.path_for_step(run.checkpoints, done).exists():
            save(done)
        raise


def _rollout_requests(recipe: Recipe, built: Built) -> Callable[[int], RolloutRequest]:
    """Who answers what in each step. Raises `RecipeError` if steps of one version share problems."""
    train, problems = recipe.train, built.task.problems("train")
    most = min(train.steps, train.staleness + 1) * min(train.problems_per_step, len(problems))
    if most > len(problems):
        raise RecipeError(
            f"train.staleness = {train.staleness}: the first {train.staleness + 1} steps are answered "
            f"by the same weights, so they need {most} problems, of which there are {len(problems)}"
        )
    order = training_order(len(problems), recipe.seed, train.problems_per_step)
    of_step = [[problems[i] for i in indices] for indices in islice(order, train.steps)]

    def request(step: int) -> RolloutRequest:
        version = max(0, step - 1 - train.staleness) * train.num_iterations
        weights_lost = version != built.components.policy.version
        return RolloutRequest(step, of_step[step - 1], version, weights_lost)

    return request


def _due(run: RunFolder, recipe: Recipe, step: int) -> bool:
    """True if the curve has a point at this step that is not there yet."""
    last = recipe.train.steps
    wanted = last > 0 and (step % recipe.evaluation.every == 0 or step == last)
    return wanted and not any(
        row["step"] == step and row["kind"] == "validation" for row in run.metrics()
    )


def _measure(
    run: RunFolder, recipe: Recipe, built: Built, split: SplitName, step: int, record: Record
) -> dict[str, Any]:
    """Evaluate on a split and write it down."""
    settings, started = recipe.evaluation, time.monotonic()
    sampling = Sampling(
        samples=settings.test_k if split == "test" else settings.validation_k,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens or recipe.sampling.max_tokens,
        seed=recipe.seed,
    )
    engine = JournaledEngine(built.components.engine, run, rollouts_name(split, step))
    evaluation = evaluate(
        engine, built.components.verify, built.task.problems(split), sampling,
        split=split, step=step, same=built.task.answer_format.equivalent, ranks=built.components.ranks,
    )  # fmt: skip
    if built.components.ranks.is_main:
        write_json(evaluation_path(run.path, split, step), evaluation.to_json())
    row = {
        "step": step,
        "kind": split,
        "k": sampling.samples,
        **evaluation.means(),
        "evaluation_rollouts": sampling.samples * len(evaluation.problem_ids),
        "time/evaluate": time.monotonic() - started,
    }
    record(row)
    return row


def _finish(run: RunFolder, recipe: Recipe, built: Built, record: Record) -> None:
    """Score the test problems, once; save the model; write the result last."""
    step = recipe.train.steps
    if recipe.evaluation.test:
        _measure(run, recipe, built, "test", step, record)
    if step > 0:
        _export(run, recipe, built)
    if not built.components.ranks.is_main:
        return
    rows = run.metrics()
    seconds = sum(v for row in rows for k, v in row.items() if k.startswith("time/"))
    budget = {
        name: sum(row.get(name, 0) for row in rows) for name in (*BUDGET, "evaluation_rollouts")
    }
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


def _export(run: RunFolder, recipe: Recipe, built: Built) -> None:
    """The final model as ``transformers`` and PEFT read it, with its tokenizer."""
    aside, target = run.path / ".model.tmp", run.path / "model"
    policy, ranks = built.components.policy, built.components.ranks
    model = policy.model
    # Adapters never touch the embeddings; PEFT would go and look for the base's config to see.
    extra: dict[str, Any] = {"save_embedding_layers": False} if policy.has_adapters else {}
    if policy.is_sharded:
        extra["state_dict"] = whole_state(model, keep=ranks.is_main)
    if not ranks.is_main:
        return
    with enough_disk():
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(str(aside), **extra)
        built.tokenizer.save_pretrained(aside)
        world = Path(resolve(recipe.model.path)) / "world.json"
        if world.exists():  # a model of the lab stays one
            shutil.copy(world, aside)
        shutil.rmtree(target, ignore_errors=True)
        aside.replace(target)
