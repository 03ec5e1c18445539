"""Sample the teacher's answers: completions of the teacher prompts of rollouts, kept in the folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from selfteach.rollout.journaled_engine import problems_by_id
from selfteach.rollout.prompt_request import CompletionEngine, PromptRequest
from selfteach.runtime.run_folder import RunFolder
from selfteach.runtime.seeds import EpisodeKey
from selfteach.types import Rollout, Sampling

TEACHER_STREAM = 7_919
"""Added to the seed: the teacher's random numbers are not those of the rollouts it is compared with."""

Prompts = Mapping[tuple[str, int], tuple[int, ...]]
"""The teacher prompt of each rollout that has one, by `Rollout.key`."""


def sample_teacher(
    engine: CompletionEngine,
    run: RunFolder,
    name: str,
    rollouts: Sequence[Rollout],
    prompts: Prompts,
    sampling: Sampling,
    *,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> dict[tuple[str, int], list[Rollout]]:
    """Return ``sampling.samples`` completions of each teacher prompt, by the key of its rollout.

    Rollouts of a problem with the same prompt share its prefill. Batches that are in the folder are
    read instead. ``sampling`` has the seed of the rollouts: of an episode the teacher gets the same
    environment, whose first message is in its prompt.
    """
    teacher = replace(sampling, seed=sampling.seed + TEACHER_STREAM)
    completions: dict[tuple[str, int], list[Rollout]] = defaultdict(list)
    batches = list(_batches(_requests(rollouts, prompts, sampling), batch_size))
    for number, batch in enumerate(batches):
        file = f"{name}.{number:03d}"
        problems = problems_by_id([request.problem for request in batch])
        saved = run.load_rollouts(file, problems)
        if saved is None or len(saved) != sum(len(request.samples) for request in batch):
            saved = engine.complete(batch, teacher)
            run.save_rollouts(file, saved)
        for rollout in saved:
            completions[rollout.problem.id, rollout.sample // teacher.samples].append(rollout)
        progress(number + 1, len(batches))
    return completions


def _requests(
    rollouts: Sequence[Rollout], prompts: Prompts, sampling: Sampling
) -> list[PromptRequest]:
    """Return one request per distinct prompt of a problem, with an index for each completion."""
    samples = sampling.samples
    indices: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    episodes: dict[tuple[str, tuple[int, ...]], list[EpisodeKey]] = defaultdict(list)
    problems = problems_by_id([rollout.problem for rollout in rollouts])
    for rollout in rollouts:
        if rollout.key in prompts:
            first = rollout.sample * samples
            place = rollout.problem.id, prompts[rollout.key]
            indices[place] += range(first, first + samples)
            key = EpisodeKey(sampling.seed, rollout.sample, rollout.policy_version)
            episodes[place] += [key] * samples
    return [
        PromptRequest(problems[id_], prompt, tuple(numbers), episodes=tuple(episodes[id_, prompt]))
        for (id_, prompt), numbers in indices.items()
    ]


def _batches(requests: Sequence[PromptRequest], size: int) -> Iterator[list[PromptRequest]]:
    """Yield batches of at most ``size`` completions, equally many per prompt, prompts by length."""
    by_count: dict[int, list[PromptRequest]] = defaultdict(list)
    for request in requests:
        by_count[len(request.samples)].append(request)
    for count in sorted(by_count):
        alike = sorted(by_count[count], key=lambda request: len(request.prompt_ids))
        step = max(1, size // count)
        yield from (alike[at : at + step] for at in range(0, len(alike), step))
