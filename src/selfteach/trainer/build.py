"""From a recipe to components: the one file that knows every implementation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfteach.config.critic_section import LlmCriticConfig, PolicyCriticConfig
from selfteach.config.objective_section import DistillationConfig, GrpoConfig, HybridConfig
from selfteach.config.recipe import (
    EmaTeacher,
    InitialTeacher,
    LiveTeacher,
    ModelConfig,
    Recipe,
    TeacherConfig,
    TrackingConfig,
    TrustRegionTeacher,
)
from selfteach.errors import DataError, RecipeError
from selfteach.feedback.contexts import FallbackContext, PartlyAlignedContext, TemplateContext
from selfteach.losses.divergence import Divergence
from selfteach.losses.objectives import Anneal, Distillation, Grpo, Hybrid
from selfteach.losses.token_masks import TokenMask
from selfteach.models.fsdp import Shards
from selfteach.models.loading import (
    DTYPES,
    autocast_of,
    choose_device,
    context_length,
    end_ids,
    load_model,
    load_tokenizer,
    pad_id,
    resolve,
)
from selfteach.models.policy import Policy, Schedule, add_adapters, recompute_activations
from selfteach.models.teacher import EmaTeacher as Ema
from selfteach.models.teacher import InitialTeacher as Initial
from selfteach.models.teacher import LiveTeacher as Live
from selfteach.models.teacher import TrustRegionTeacher as TrustRegion
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.prompts.thinking import Thinking
from selfteach.protocols import Context, Critic, Objective, Teacher
from selfteach.rollout.gathered_weights import GatheringEngine
from selfteach.rollout.journaled_engine import BatchedEngine
from selfteach.runtime import tracking
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.runtime.torch_setup import configure_torch
from selfteach.tasks.task import Task, load_task
from selfteach.trainer.build_critic import Solver, build_critic, critic_threads
from selfteach.trainer.build_engine import build_engine
from selfteach.trainer.step import Components
from selfteach.types import Problem, Sampling

CHUNK_ENTRIES = {"cpu": 2**20, "cuda": 2**25}
"""Logits (tokens times vocabulary) that exist at a time while a loss is computed: 4 and 128 MB each. A
GPU waits for the calls of a chunk if it is much smaller."""
CHUNK_TOKENS = 76
"""Tokens at least: the head is read once per chunk, and with fewer that is what takes the time. Two
buffers of their logits and what else a loss holds are a tenth of the logits of 2,048 tokens."""


@dataclass(frozen=True, slots=True)
class Built:
    """A recipe's components, its problems, and the tokenizer to save a model with."""

    components: Components
    task: Task
    tokenizer: PreTrainedTokenizerBase


def build(recipe: Recipe, ranks: Ranks = SINGLE_PROCESS) -> Built:
    """Everything a run needs, checked before anything is spent; this rank's part of it.

    Raises `RecipeError`, `EngineError` or `DataError` in one line.
    """
    objective, shard = build_objective(recipe), build_sharding(recipe, ranks)
    device = choose_device(recipe.model.device)
    configure_torch(device)
    task = load_task(recipe.data, resolve(recipe.model.path))
    tokenizer = load_tokenizer(recipe.model)
    templates = Templates(recipe.model.templates or task.templates)
    renderer = build_renderer(recipe.model, tokenizer, templates)
    model = load_model(recipe.model, torch.device("cpu") if shard else device)
    max_length = longest(recipe, context_length(model))
    check_lengths(renderer, task, max_length, recipe)
    adapted = _adapted(recipe, model)
    # All ranks pass through a sharded model together, but answers end when they end: each rank
    # samples from a whole copy. So does who samples while the policy learns.
    # An engine elsewhere needs neither.
    here = recipe.engine.type == "transformers"
    apart = here and (shard is not None or recipe.sampling.separate_copy)
    sampler = copy.deepcopy(adapted).requires_grad_(False) if apart else adapted
    if here or shard is None:
        nn.Module.to(sampler, device)
    policy = _policy(recipe, adapted, ranks, shard)
    ends, pad = end_ids(model, tokenizer, renderer), pad_id(tokenizer)
    autocast = autocast_of(recipe.model, recipe.model.device)
    solver = Solver(policy, renderer, ends, pad, max_length, autocast)
    prompts = (renderer.solver_prompt(p) for p in (*task.train, *task.validation, *task.test))
    engine = build_engine(recipe, solver, prompts, sampler, ranks)
    components = Components(
        engine=BatchedEngine(
            GatheringEngine(engine) if shard else engine, recipe.sampling.batch_size, ranks
        ),
        verify=task.verify,
        critic=build_critic(recipe.critic, task, templates, solver, seed=recipe.seed)
        if recipe.critic
        else None,
        context=_context(recipe, task, templates),
        teacher=build_teacher(recipe.teacher, policy),
        objective=objective,
        policy=policy,
        renderer=renderer,
        split_steps=task.split_steps,
        sampling=Sampling(
            recipe.train.group_size,
            recipe.sampling.temperature,
            recipe.sampling.max_tokens,
            recipe.seed,
        ),
        critic_threads=critic_threads(recipe.critic),
        samples_in_background=_samples_in_background(recipe),
        num_iterations=recipe.train.num_iterations,
        micro_batch_tokens=recipe.train.micro_batch_tokens,
        chunk_tokens=chunk_tokens(model.config.get_text_config().vocab_size, device.type),
        max_length=max_length,
        pad_id=pad,
        ranks=ranks,
    )
    return Built(components, task, tokenizer)


def chunk_tokens(vocabulary: int, device: str) -> int:
    """Tokens whose logits exist at a time on a kind of device."""
    entries = CHUNK_ENTRIES.get(device, CHUNK_ENTRIES["cuda"])
    return max(CHUNK_TOKENS, entries // vocabulary)


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
    task = load_task(recipe.data, resolve(recipe.model.path), allow_empty=True)
    templates = Templates(recipe.model.templates or task.templates)
    renderer = build_renderer(recipe.model, load_tokenizer(recipe.model), templates)
    critic = build_critic(recipe.critic, task, templates, None, seed=recipe.seed)
    return CritiqueSetup(critic, task, renderer)


def build_renderer(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, templates: Templates
) -> Renderer:
    """The solver's and the teacher's prompts as a recipe wants them."""
    thinking = Thinking(**config.thinking.model_dump())
    return Renderer(tokenizer, templates, system=config.system, thinking=thinking)


def build_objective(recipe: Recipe) -> Objective:
    """The objective of a recipe. Raises `RecipeError` for a combination that makes no sense."""
    temperature = recipe.sampling.temperature
    match recipe.objective:
        case DistillationConfig() as config:
            return _distillation(config, temperature)
        case GrpoConfig() as config:
            return _grpo(config, temperature)
        case HybridConfig() as config:
            weight, train = config.weight, recipe.train
            steps = weight.steps or train.steps
            return Hybrid(
                _distillation(config.distillation, temperature),
                _grpo(config.grpo, temperature),
                Anneal(weight.start, weight.end, max(0, steps - 1) * train.num_iterations),
                config.grpo_weight,
                config.grpo_tokens,
            )


def _distillation(config: DistillationConfig, sampling_temperature: float) -> Distillation:
    spec = Divergence(
        kind=config.divergence,
        support=config.support,
        beta=config.beta,
        jsd_scaled=config.jsd_scaled,
        top_k=config.top_k,
        top_k_from=config.top_k_from,
        clip=config.clip,
        temperature=config.temperature,
        control_variate=config.control_variate,
    )
    return Distillation(
        spec,
        sampling_temperature,
        token_mask=TokenMask(
            config.train_on, config.from_first_error, config.changed_steps_fraction
        ),
        aggregation=config.aggregation,
        importance_cap=config.importance_cap,
    )


def _grpo(config: GrpoConfig, sampling_temperature: float) -> Grpo:
    return Grpo(sampling_temperature, **config.model_dump(exclude={"type"}))


def build_teacher(config: TeacherConfig, policy: Policy) -> Teacher:
    """The self-teacher of a recipe; must be built while the policy is still the initial one."""
    match config:
        case InitialTeacher():
            return Initial(policy)
        case LiveTeacher():
            return Live(policy)
        case EmaTeacher():
            return Ema(policy, config.rate)
        case TrustRegionTeacher():
            return TrustRegion(policy, config.student_mix)


def build_sinks(
    config: TrackingConfig, run: tracking.TrackedRun
) -> dict[str, AbstractContextManager[tracking.Sink]]:
    """The sinks of a recipe by name, not yet opened."""
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


def longest(recipe: Recipe, built_for: int) -> int:
    """Longest sequence in tokens: the recipe's, or what the model was built for."""
    asked = recipe.train.max_length
    if asked is not None and asked > built_for:
        raise RecipeError(f"train.max_length = {asked}: the model was built for {built_for} tokens")
    return asked or built_for


def check_lengths(renderer: Renderer, task: Task, max_length: int, recipe: Recipe) -> None:
    """Every question leaves room for a whole answer. Raises `DataError` naming the first without."""
    needed = recipe.sampling.max_tokens
    problems: Sequence[Problem] = [*task.train, *task.validation, *task.test]
    for problem in problems:
        length = len(renderer.solver_prompt(problem))
        if length + needed > max_length:
            raise DataError(
                f"problem {problem.id!r} has a prompt of {length} tokens; with an answer of up to "
                f"{needed} (sampling.max_tokens) it exceeds the context of {max_length}"
            )


def _adapted(recipe: Recipe, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
    if recipe.model.gradient_checkpointing:
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
    """Whether the engine has weights of its own, and there is something to do beside sampling."""
    served = recipe.engine.type == "vllm_server"
    return recipe.train.staleness > 0 and (served or recipe.sampling.separate_copy)


def build_sharding(recipe: Recipe, ranks: Ranks) -> Callable[[PreTrainedModel], Shards] | None:
    """What shards a model as the recipe asks; None where every rank holds all of it.

    Raises `RecipeError` for a step that leaves ranks without a question to ask.
    """
    per_batch = max(1, recipe.sampling.batch_size // recipe.train.group_size)
    batches = -(-recipe.train.problems_per_step // per_batch)
    if recipe.train.problems_per_step < ranks.size:
        raise RecipeError(
            f"train.problems_per_step = {recipe.train.problems_per_step} is too few for "
            f"{ranks.size} ranks: each must have a question"
        )
    if batches < ranks.size:
        most = recipe.train.problems_per_step // ranks.size * recipe.train.group_size
        raise RecipeError(
            f"sampling.batch_size = {recipe.sampling.batch_size} makes {batches} of a step's "
            f"answers, too few for {ranks.size} ranks, each of which samples whole batches: "
            f"set sampling.batch_size = {most} or less"
        )
    config, mesh = recipe.distributed, ranks.mesh
    if config.shard == "none" or mesh is None:
        return None
    if isinstance(recipe.critic, PolicyCriticConfig):
        raise RecipeError(
            'critic.type = "policy" cannot be sharded, since ranks ask it at different times: '
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
        autocast=autocast_of(recipe.model, recipe.model.device),
        ranks=ranks,
        shard=shard,
    )


def build_context(
    name: str, task: Task, templates: Templates, *, seed: int, alignment: float
) -> Context:
    """One context by name. Raises `RecipeError` for one that these problems cannot have."""
    if name != "partly_aligned":
        return TemplateContext(name, templates, seed=seed)
    if task.replace_steps is None:
        raise RecipeError(
            'context "partly_aligned": only the lab knows which step of a reference is which of an '
            "answer; choose step_aligned or reference"
        )
    trace = TemplateContext(name, templates, seed=seed)
    return PartlyAlignedContext(trace, task.replace_steps, alignment, seed=seed)


def _context(recipe: Recipe, task: Task, templates: Templates) -> Context | None:
    name, instead, critic = recipe.context.type, recipe.context.fallback, recipe.critic
    if name == "none":
        return None

    def named(name: str) -> Context:
        alignment = recipe.context.alignment
        return build_context(name, task, templates, seed=recipe.seed, alignment=alignment)

    context = named(name)
    if isinstance(critic, LlmCriticConfig):
        policies = critic.on_failure.model_dump()
        reasons = {reason for reason, policy in policies.items() if policy == "fallback"}
        other = named(critic.fallback)
        context = FallbackContext(context, other, frozenset(reasons)) if reasons else context
    if instead is not None:
        context = FallbackContext(context, named(instead))
    return context


def set_threads(threads: int | None) -> None:
    """torch's threads for this process; None leaves its default."""
    if threads is not None:
        torch.set_num_threads(threads)
