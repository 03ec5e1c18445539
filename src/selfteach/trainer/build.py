"""Build the components of a run from its recipe: the one file that knows every implementation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfteach.config.critic_section import LlmCriticConfig, PolicyCriticConfig
from selfteach.config.part_section import CustomPart
from selfteach.config.recipe import Recipe, TrackingConfig
from selfteach.config.teacher_section import (
    CustomTeacherConfig,
    EmaTeacherConfig,
    InitialTeacherConfig,
    LiveTeacherConfig,
    TeacherConfig,
    TrustRegionTeacherConfig,
)
from selfteach.errors import RecipeError
from selfteach.feedback.contexts import (
    FallbackContext,
    NoContext,
    PartlyAlignedContext,
    TemplateContext,
)
from selfteach.feedback.rewards.combined_reward import CombinedReward
from selfteach.models.fsdp import Shards
from selfteach.models.loading import (
    DTYPES,
    LoadedModel,
    build_renderer,
    choose_device,
    embedded_tokens,
    load,
    load_tokenizer,
)
from selfteach.models.model_path import resolve
from selfteach.models.policy import Policy, Schedule
from selfteach.models.teacher import EmaTeacher, InitialTeacher, LiveTeacher, TrustRegionTeacher
from selfteach.models.trainable_model import add_adapters, recompute_activations
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.protocols import Context, Critic, Teacher
from selfteach.rollout.gathered_weights import GatheringEngine
from selfteach.rollout.journaled_engine import BatchedEngine
from selfteach.rollout.sampling_settings import training_sampling
from selfteach.runtime import tracking
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.runtime.torch_setup import configure_torch
from selfteach.tasks.task import Task, load_task
from selfteach.trainer.build_critic import build_critic, critic_threads
from selfteach.trainer.build_engine import build_engine
from selfteach.trainer.build_environment import (
    Environments,
    build_environments,
    environment_tools,
    for_episodes,
)
from selfteach.trainer.build_objective import build_objective
from selfteach.trainer.build_reward import build_reward
from selfteach.trainer.custom_components import build_custom_context, build_custom_teacher
from selfteach.trainer.device_load import require_memory, with_memory_choices
from selfteach.trainer.device_memory import chunk_tokens
from selfteach.trainer.fit_checks import require_embedded, require_fitting_templates, within_context
from selfteach.trainer.fleet_metrics import fleets_of
from selfteach.trainer.step import Components


@dataclass(frozen=True, slots=True)
class Built:
    """Holds a recipe's components, its task, and the tokenizer to save a model with."""

    components: Components
    task: Task
    tokenizer: PreTrainedTokenizerBase

    def for_measuring(self) -> Built:
        """Return this without rewards that only training uses: they may cost money.

        Rewards that decide success (``reward.success``) stay: evaluations need them.
        """
        reward = self.components.reward
        if isinstance(reward, CombinedReward) and reward.success is None:
            return replace(self, components=replace(self.components, reward=None))
        return self


def build(recipe: Recipe, ranks: Ranks = SINGLE_PROCESS) -> Built:
    """Build everything a run needs on this rank; invalid combinations in a recipe are raised here.

    Raises `RecipeError`, `EngineError` or `DataError` in one line.
    """
    objective, shard = build_objective(recipe), build_sharding(recipe, ranks)
    device = choose_device(recipe.model.device)
    configure_torch(device, deterministic=recipe.train.deterministic)
    require_memory(recipe)
    recipe = with_memory_choices(recipe, ranks.size if shard else 1)
    task, templates, loaded, environments = _loaded(recipe, device, on_cpu=shard is not None)
    renderer = loaded.renderer
    reward = build_reward(recipe, task, renderer)
    problems = (*task.train, *task.validation, *task.test)
    labelled = ((problem.label, renderer.solver_prompt(problem)) for problem in problems)
    require_embedded(labelled, embedded_tokens(loaded.model))
    model = _with_adapters(recipe, loaded.model)
    sampler = _sampling_model(recipe, model, device, sharded=shard is not None)
    policy = _policy(recipe, model, loaded, ranks, shard)
    prompts = (renderer.solver_prompt(p) for p in problems)
    engine = build_engine(recipe, loaded, policy, prompts, sampler, ranks, environments)
    teacher = build_teacher(recipe.scoring_teacher, policy)
    critic = (
        build_critic(recipe.critic, task, templates, loaded, policy, seed=recipe.seed)
        if recipe.critic
        else None
    )
    gathered = GatheringEngine(engine) if shard else engine
    components = Components(
        engine=BatchedEngine(gathered, recipe.sampling.batch_size, ranks), verify=task.verify,
        critic=critic, context=build_arm_context(recipe, task, templates), teacher=teacher,
        objective=objective, policy=policy, renderer=renderer, split_steps=task.split_steps,
        initial=_watched_initial(recipe, teacher, policy), reward=reward,
        fleets=fleets_of(engine, critic, reward), ranks=ranks, **_step_settings(recipe, loaded),
    )  # fmt: skip
    return Built(components, task, loaded.tokenizer)


def _loaded(
    recipe: Recipe, device: torch.device, *, on_cpu: bool
) -> tuple[Task, Templates, LoadedModel, Environments | None]:
    """Load the task and the model, checked against each other and against the templates."""
    task = load_task(
        recipe.data, resolve(recipe.model.path), reward=recipe.reward,
        episodes=recipe.runs_hub_episodes,
    )  # fmt: skip
    templates = Templates(recipe.model.templates or task.templates)
    require_fitting_templates(recipe, templates)
    environments = build_environments(recipe, task)
    loaded = load(
        recipe.model, templates, device=device, on_cpu=on_cpu,
        all_weights_train=recipe.all_weights_train,
        tools=environments.tools if environments else (),
    )  # fmt: skip
    loaded = replace(loaded, max_length=max_sequence_length(recipe, loaded.max_length))
    task = for_episodes(recipe, task, loaded.renderer.tool_format)
    task = within_context(loaded.renderer, task, loaded.max_length, recipe)
    return task, loaded.renderer.templates, loaded, environments


def _sampling_model(
    recipe: Recipe, model: PreTrainedModel | PeftModel, device: torch.device, *, sharded: bool
) -> PreTrainedModel | PeftModel:
    """Return the model that samples: the policy's, or a full copy of it.

    All ranks run a sharded model's forward pass together, but rollouts end at different lengths: each
    rank samples from a full copy. So does an engine that samples while the policy trains.
    """
    in_process = recipe.engine.type == "transformers"
    copied = in_process and (sharded or recipe.sampling.separate_copy)
    sampler = copy.deepcopy(model).requires_grad_(False) if copied else model
    if in_process or not sharded:
        nn.Module.to(sampler, device)
    return sampler


def _step_settings(recipe: Recipe, loaded: LoadedModel) -> dict[str, Any]:
    """Return the components of a step that are numbers: how it samples, how it batches, how long."""
    assert recipe.train.micro_batch_tokens != "auto"
    vocabulary = loaded.model.config.get_text_config().vocab_size
    return {
        "sampling": training_sampling(recipe, recipe.train.group_size, recipe.seed),
        "critic_threads": critic_threads(recipe),
        "samples_in_background": _samples_in_background(recipe),
        "num_iterations": recipe.train.num_iterations,
        "micro_batch_tokens": recipe.train.micro_batch_tokens,
        "chunk_tokens": chunk_tokens(vocabulary, loaded.device.type),
        "max_length": loaded.max_length,
        "pad_id": loaded.pad_id,
    }


@dataclass(frozen=True, slots=True)
class CritiqueSetup:
    """Holds what critiquing rollouts needs: critic, task and renderer, without a model to train."""

    critic: Critic
    task: Task
    renderer: Renderer


def build_critique_setup(recipe: Recipe) -> CritiqueSetup:
    """Build the critic of a recipe alone; loads the policy's weights only if the policy is the critic.

    Raises what `build` raises.
    """
    assert recipe.critic is not None
    if isinstance(recipe.critic, PolicyCriticConfig):
        built = build(recipe)
        assert built.components.critic is not None
        return CritiqueSetup(built.components.critic, built.task, built.components.renderer)
    task = load_task(
        recipe.data, resolve(recipe.model.path), allow_empty=True, reward=recipe.reward,
        episodes=recipe.runs_hub_episodes,
    )  # fmt: skip
    templates = Templates(recipe.model.templates or task.templates)
    renderer = build_renderer(
        recipe.model, load_tokenizer(recipe.model), templates, environment_tools(recipe, task)
    )
    task = for_episodes(recipe, task, renderer.tool_format)
    critic = build_critic(recipe.critic, task, renderer.templates, seed=recipe.seed)
    return CritiqueSetup(critic, task, renderer)


def build_teacher(config: TeacherConfig, policy: Policy) -> Teacher:
    """Build the teacher of a recipe; must be called while the policy has its initial weights."""
    match config:
        case InitialTeacherConfig():
            return InitialTeacher(policy)
        case LiveTeacherConfig():
            return LiveTeacher(policy)
        case EmaTeacherConfig():
            return EmaTeacher(policy, config.rate)
        case TrustRegionTeacherConfig():
            return TrustRegionTeacher(policy, config.student_mix)
        case CustomTeacherConfig():
            return build_custom_teacher(config, policy)


def _watched_initial(recipe: Recipe, teacher: Teacher, policy: Policy) -> Teacher | None:
    """Return what scores with the initial policy for the guard; None if it watches no KL."""
    if recipe.guard.kl_initial is None:
        return None
    return teacher if isinstance(teacher, InitialTeacher) else InitialTeacher(policy)


def build_sinks(
    config: TrackingConfig, run: tracking.TrackedRun
) -> dict[str, AbstractContextManager[tracking.Sink]]:
    """Return the sinks of a recipe by name, not yet opened."""
    return {name: _sink(name, run) for name in config.sinks}


def _sink(name: str, run: tracking.TrackedRun) -> AbstractContextManager[tracking.Sink]:
    match name:
        case "tensorboard":
            return tracking.tensorboard(run)
        case "wandb":
            return tracking.wandb(run)
        case "trackio":
            return tracking.trackio(run)
        case _:
            raise AssertionError(name)


def max_sequence_length(recipe: Recipe, supported: int) -> int:
    """Return the longest sequence in tokens: the recipe's, or the longest that the model supports."""
    limit = recipe.train.max_length
    if limit is not None and limit > supported:
        raise RecipeError(f"train.max_length = {limit}: the model supports {supported} tokens")
    return limit or supported


def _with_adapters(recipe: Recipe, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
    if recipe.model.gradient_checkpointing is True:
        recompute_activations(model)
    lora = recipe.model.lora
    if lora is None:
        return model.requires_grad_(True)
    return add_adapters(
        model,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        seed=recipe.seed,
    )


def _samples_in_background(recipe: Recipe) -> bool:
    """Return True if the engine has a copy of the weights, so that sampling can overlap training."""
    served = recipe.engine.type == "vllm_server"
    return recipe.train.staleness > 0 and (served or recipe.sampling.separate_copy)


def build_sharding(recipe: Recipe, ranks: Ranks) -> Callable[[PreTrainedModel], Shards] | None:
    """Return the function that shards the model; None if every rank holds the whole model.

    Raises `RecipeError` for a step with fewer problems or batches than ranks.
    """
    per_batch = max(1, recipe.sampling.batch_size // recipe.train.group_size)
    batches = -(-recipe.train.problems_per_step // per_batch)
    if recipe.train.problems_per_step < ranks.size:
        raise RecipeError(
            f"train.problems_per_step = {recipe.train.problems_per_step} is too few for "
            f"{ranks.size} ranks: each needs a problem"
        )
    if batches < ranks.size:
        most = recipe.train.problems_per_step // ranks.size * recipe.train.group_size
        raise RecipeError(
            f"sampling.batch_size = {recipe.sampling.batch_size} makes {batches} of a step's "
            f"rollouts, too few for {ranks.size} ranks, each of which samples whole batches: "
            f"set sampling.batch_size = {most} or less"
        )
    config, mesh = recipe.distributed, ranks.mesh
    if config.shard == "none" or mesh is None:
        return None
    if isinstance(recipe.critic, PolicyCriticConfig):
        raise RecipeError(
            'critic.type = "policy" cannot be sharded, because ranks call it at different times: '
            'name the same model as a critic of type "local", or set distributed.shard = "none"'
        )
    return partial(
        Shards,
        mesh=mesh,
        param_dtype=DTYPES[config.param_dtype] if config.param_dtype else None,
        reduce_dtype=DTYPES[config.reduce_dtype] if config.reduce_dtype else None,
    )


def _policy(
    recipe: Recipe,
    model: PreTrainedModel | PeftModel,
    loaded: LoadedModel,
    ranks: Ranks,
    shard: Callable[[PreTrainedModel], Shards] | None,
) -> Policy:
    optimizer, train = recipe.optimizer, recipe.train
    updates = train.steps * train.num_iterations
    return Policy(
        model,
        Schedule(optimizer.lr, optimizer.warmup_steps, optimizer.decay, updates),
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        grad_clip=optimizer.grad_clip,
        autocast=loaded.autocast,
        ranks=ranks,
        shard=shard,
        compiles=recipe.model.compile and train.steps > 0,
    )


def build_context(
    name: str, task: Task, templates: Templates, *, seed: int, alignment: float
) -> Context:
    """Build one context by name. Raises `RecipeError` if these problems do not support it."""
    if name == "none":
        return NoContext()
    if name != "partly_aligned":
        return TemplateContext(name, templates, seed=seed)
    if task.replace_steps is None:
        raise RecipeError(
            'context "partly_aligned": only the lab can match steps of a reference to those of a '
            "rollout; choose step_aligned or reference"
        )
    trace = TemplateContext(name, templates, seed=seed)
    return PartlyAlignedContext(trace, task.replace_steps, alignment, seed=seed)


def build_arm_context(recipe: Recipe, task: Task, templates: Templates) -> Context | None:
    """Build what the recipe's teacher is shown, with its fallbacks; None without distillation."""
    name, fallback, critic = recipe.context.type, recipe.context.fallback, recipe.critic
    if not recipe.shows_context:
        return None

    def named(name: str, part: CustomPart | None = None) -> Context:
        if part is not None:
            return build_custom_context(part, task, templates, seed=recipe.seed)
        alignment = recipe.context.alignment
        return build_context(name, task, templates, seed=recipe.seed, alignment=alignment)

    context = named(name, recipe.context.custom_part)
    if isinstance(critic, LlmCriticConfig):
        policies = critic.on_failure.model_dump()
        reasons = {reason for reason, policy in policies.items() if policy == "fallback"}
        other = named(critic.fallback)
        context = FallbackContext(context, other, frozenset(reasons)) if reasons else context
    if fallback is not None:
        context = FallbackContext(context, named(fallback, recipe.context.custom_fallback))
    return context


def set_threads(threads: int | None) -> None:
    """Set torch's threads for this process; None leaves the default."""
    if threads is not None:
        torch.set_num_threads(threads)
