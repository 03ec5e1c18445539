"""From a recipe to parts: the one file that knows every implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfteach.config import (
    DistillationConfig,
    EmaTeacher,
    GrpoConfig,
    InitialTeacher,
    LiveTeacher,
    ModelConfig,
    ObjectiveConfig,
    Recipe,
    TeacherConfig,
    TrustRegionTeacher,
)
from selfteach.contexts import TemplateContext
from selfteach.critics import OracleCritic
from selfteach.data import Task, load_task
from selfteach.divergence import Divergence
from selfteach.engines.transformers import TransformersEngine
from selfteach.errors import DataError, RecipeError
from selfteach.loading import DTYPES, choose_device, load_model, load_tokenizer, resolve
from selfteach.objective import Distillation, Grpo
from selfteach.policy import Policy, Schedule, add_adapters, recompute_activations
from selfteach.protocols import Objective, Teacher
from selfteach.rendering import Renderer, Templates, Thinking
from selfteach.step import Parts
from selfteach.teacher import EmaTeacher as Ema
from selfteach.teacher import InitialTeacher as Initial
from selfteach.teacher import LiveTeacher as Live
from selfteach.teacher import TrustRegionTeacher as TrustRegion
from selfteach.types import Problem, Sampling

CHUNK_ENTRIES = 2**23
"""Logits (tokens times vocabulary) that exist at a time while a loss is computed: 32 MB each."""


@dataclass(frozen=True, slots=True)
class Built:
    """A recipe's parts, its problems, and the tokenizer to save a model with."""

    parts: Parts
    task: Task
    tokenizer: PreTrainedTokenizerBase


def build(recipe: Recipe) -> Built:
    """Everything a run needs, checked before anything is spent.

    Raises `RecipeError`, `EngineError` or `DataError` in one line.
    """
    objective = build_objective(recipe.objective, recipe.sampling.temperature)
    device = choose_device(recipe.model.device)
    task = load_task(recipe.data, resolve(recipe.model.path))
    tokenizer = load_tokenizer(recipe.model)
    templates = Templates(recipe.model.templates or task.templates)
    renderer = build_renderer(recipe.model, tokenizer, templates)
    model = load_model(recipe.model, device)
    max_length = context_length(recipe, model)
    check_lengths(renderer, task, max_length, recipe)
    policy = _policy(recipe, _adapted(recipe, model))
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    engine = TransformersEngine(
        policy.model,
        renderer,
        end_ids=end_ids(model, tokenizer, renderer),
        pad_id=pad_id,
        max_length=max_length,
        autocast=_autocast(recipe),
    )
    parts = Parts(
        engine=engine,
        verify=task.verify,
        critic=_critic(recipe, task),
        context=_context(recipe, templates),
        teacher=build_teacher(recipe.teacher, policy),
        objective=objective,
        policy=policy,
        renderer=renderer,
        split_steps=task.split_steps,
        sampling=Sampling(
            recipe.train.answers_per_problem,
            recipe.sampling.temperature,
            recipe.sampling.max_tokens,
            recipe.seed,
        ),
        batch_answers=recipe.sampling.batch_answers,
        updates_per_batch=recipe.train.updates_per_batch,
        micro_batch_tokens=recipe.train.micro_batch_tokens,
        chunk_tokens=max(1, CHUNK_ENTRIES // model.config.get_text_config().vocab_size),
        max_length=max_length,
        pad_id=pad_id,
    )
    return Built(parts, task, tokenizer)


def build_renderer(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, templates: Templates
) -> Renderer:
    """The solver's and the teacher's prompts as a recipe wants them."""
    thinking = Thinking(**config.thinking.model_dump())
    return Renderer(tokenizer, templates, system=config.system, thinking=thinking)


def build_objective(config: ObjectiveConfig, sampling_temperature: float) -> Objective:
    """The objective of a recipe. Raises `RecipeError` for a combination that makes no sense."""
    match config:
        case DistillationConfig():
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
                gate=config.gate,
                from_first_error=config.from_first_error,
                aggregation=config.aggregation,
                importance_cap=config.importance_cap,
            )
        case GrpoConfig():
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
            return TrustRegion(policy, config.live_share)


def context_length(recipe: Recipe, model: PreTrainedModel) -> int:
    """Longest sequence in tokens: the recipe's, or what the model was built for."""
    built_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    asked = recipe.train.max_length
    if asked is not None and built_for is not None and asked > built_for:
        raise RecipeError(f"train.max_length = {asked}: the model was built for {built_for} tokens")
    return asked or built_for or 4096


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


def end_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, renderer: Renderer
) -> list[int]:
    """Token ids that end an answer: the tokenizer's, what the model's own settings add, and what its
    chat template writes behind an answer, lest a model whose settings forget it never stops."""
    own = getattr(model.generation_config, "eos_token_id", None)
    extra = own if isinstance(own, list) else [own]
    known = (tokenizer.eos_token_id, renderer.end_id, *extra)
    return sorted({i for i in known if isinstance(i, int)})


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


def _policy(recipe: Recipe, model: PreTrainedModel | PeftModel) -> Policy:
    optimizer, train = recipe.optimizer, recipe.train
    updates = train.steps * train.updates_per_batch
    return Policy(
        model,
        Schedule(optimizer.lr, optimizer.warmup_steps, optimizer.decay, updates),
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        grad_clip=optimizer.grad_clip,
        autocast=_autocast(recipe),
    )


def _autocast(recipe: Recipe) -> torch.dtype | None:
    return DTYPES[recipe.model.autocast] if recipe.model.autocast else None


def _critic(recipe: Recipe, task: Task) -> OracleCritic | None:
    if recipe.critic is None:
        return None
    if task.oracle is None:
        raise RecipeError(f'data.type = "{recipe.data.type}" has no oracle critic')
    return OracleCritic(task.oracle, error_rate=recipe.critic.error_rate, seed=recipe.seed)


def _context(recipe: Recipe, templates: Templates) -> TemplateContext | None:
    name = recipe.context.type
    return None if name == "none" else TemplateContext(name, templates, seed=recipe.seed)


def set_threads(threads: int | None) -> None:
    """torch's threads for this process; None leaves its default."""
    if threads is not None:
        torch.set_num_threads(threads)
