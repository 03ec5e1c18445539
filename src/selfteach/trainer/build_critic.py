"""Builds the critic of a recipe from its ``[critic]`` section."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from selfteach.config.critic_section import (
    CriticConfig,
    CustomCriticConfig,
    EndpointConfig,
    LocalCriticConfig,
    OracleConfig,
    PolicyCriticConfig,
    RecordedConfig,
)
from selfteach.config.recipe import ModelConfig, Recipe, ThinkingConfig
from selfteach.config.schema import Section
from selfteach.config.served_model import ServedModelConfig
from selfteach.errors import CriticError, RecipeError
from selfteach.feedback.critics.chat_model import ChatModel
from selfteach.feedback.critics.code_parser import CodeCritiqueParser
from selfteach.feedback.critics.llm import LlmCritic
from selfteach.feedback.critics.local import LocalModel
from selfteach.feedback.critics.oracle import OracleCritic
from selfteach.feedback.critics.parser import CritiqueParser
from selfteach.feedback.critics.recorded import RecordedCritic
from selfteach.feedback.critics.reply_cache import CachedModel, ReplyCache, default_path
from selfteach.models.loading import LoadedModel, choose_device, load
from selfteach.models.policy import Policy
from selfteach.prompts.template_set import Templates
from selfteach.protocols import Critic
from selfteach.runtime.torch_setup import configure_torch
from selfteach.tasks.code.code_oracle import CodeOracle, solutions_of
from selfteach.tasks.code.code_steps import code_steps
from selfteach.tasks.code.code_verifier import CodeVerifier
from selfteach.tasks.task import Task
from selfteach.trainer.custom_components import build_custom_critic

FINGERPRINT_ENTRIES = 2**24
"""Weights whose bits are summed at a time."""


def build_critic(
    config: CriticConfig,
    task: Task,
    templates: Templates,
    loaded: LoadedModel | None = None,
    policy: Policy | None = None,
    *,
    seed: int,
) -> Critic:
    """Build the critic of a recipe; must be called while the policy still has its initial weights.

    ``loaded`` and ``policy`` are None if no policy is loaded. Raises `CriticError` or `RecipeError`
    before any request is sent.
    """
    match config:
        case OracleConfig():
            if task.oracle is None:
                raise RecipeError(
                    'critic.type = "oracle": these problems have no oracle critic (with [environment] '
                    "only chain sums with a calculator have one)"
                )
            if isinstance(task.oracle, CodeOracle):
                _require_solutions(task)
            return OracleCritic(task.oracle, error_rate=config.error_rate, seed=seed)
        case RecordedConfig():
            return RecordedCritic(Path(config.run))
        case CustomCriticConfig():
            return build_custom_critic(config, task, templates, seed=seed)
        case _:
            if not templates.has("critic"):
                raise RecipeError(
                    f'critic.type = "{config.type}": the template set has no critic.jinja'
                )
            path = Path(config.reply_cache).expanduser() if config.reply_cache else default_path()
            cache = ReplyCache(path, "critic.reply_cache")
            return LlmCritic(
                CachedModel(_chat_model(config, templates, loaded, policy), cache),
                templates,
                _parser(task, config.min_similarity),
                config,
            )


def _require_solutions(task: Task) -> None:
    """Raise `RecipeError` if no training problem has a program for the oracle to run."""
    if task.train and not any(map(solutions_of, task.train)):
        raise RecipeError(
            f'critic.type = "oracle": none of the {len(task.train):,} training problems has a worked '
            "solution: name their column (data.columns.answer), or choose another critic"
        )


def _parser(task: Task, min_similarity: float) -> CritiqueParser | CodeCritiqueParser:
    if isinstance(task.verify, CodeVerifier) and task.split_steps is code_steps:
        return CodeCritiqueParser(task.split_steps, task.verify, min_similarity)
    return CritiqueParser(task.split_steps, task.verify, min_similarity)


def critic_threads(recipe: Recipe) -> int:
    """Return how many batches may be critiqued and judged during sampling: with servers several.

    None with a critic in this process, which cannot run while the policy does.
    """
    judged = recipe.reward is not None and recipe.reward.judges
    if isinstance(recipe.critic, EndpointConfig) or (recipe.critic is None and judged):
        return 4
    return 0


def _chat_model(
    config: EndpointConfig | LocalCriticConfig | PolicyCriticConfig,
    templates: Templates,
    loaded: LoadedModel | None,
    policy: Policy | None,
) -> ChatModel:
    match config:
        case EndpointConfig():
            _require_openai("critic", config.type)
            from selfteach.feedback.critics.endpoint import EndpointModel

            return EndpointModel(config)
        case LocalCriticConfig():
            return _local(config, templates)
        case PolicyCriticConfig():
            if loaded is None or policy is None:
                raise RecipeError('critic.type = "policy" needs a recipe with a policy')
            if config.thinking is not None:
                raise RecipeError(
                    "critic.thinking: the policy as critic always uses model.thinking.student"
                )
            return LocalModel(
                policy.model,
                loaded.renderer,
                identity=f"policy:{config.thinking}:{fingerprint(policy.model)}",
                end_ids=loaded.end_ids,
                pad_id=loaded.pad_id,
                max_length=loaded.max_length,
                batch_size=config.batch_size,
                weights=initial_weights(policy),
                autocast=loaded.autocast,
            )


def require_served_model(config: Section | None) -> None:
    """Check once that a served critic or judge is up; other critics are checked when they are built.

    Raises `CriticError` in one line.
    """
    if isinstance(config, ServedModelConfig) and config.healthcheck:
        _require_openai(config.role, "judge" if config.role == "judge" else "endpoint")
        from selfteach.feedback.critics.critic_healthcheck import require_server

        require_server(config)


def served_models(config: EndpointConfig) -> list[str]:
    """Return the models that a critic's server lists. Raises `CriticError` if it cannot be reached."""
    _require_openai("critic", config.type)
    from selfteach.feedback.critics.critic_healthcheck import listed_models

    return listed_models(config)


def _require_openai(role: str, kind: str) -> None:
    try:
        import selfteach.feedback.critics.endpoint  # noqa: F401
    except ImportError:
        raise CriticError(
            f'{role}.type = "{kind}" needs OpenAI\'s client: pip install "selfteach[endpoint]"'
        ) from None


def _local(config: LocalCriticConfig, templates: Templates) -> ChatModel:
    model_config = ModelConfig(
        path=config.path,
        gguf_file=config.gguf_file,
        weights_dtype=config.weights_dtype,
        trust_remote_code=config.trust_remote_code,
        thinking=ThinkingConfig(student=config.thinking, teacher=config.thinking),
    )
    device = choose_device(config.device)
    configure_torch(device)
    loaded = load(model_config, templates, device=device)
    model = loaded.model.requires_grad_(False)
    return LocalModel(
        model,
        loaded.renderer,
        identity=f"local:{config.path}:{config.thinking}:{fingerprint(model)}",
        end_ids=loaded.end_ids,
        pad_id=loaded.pad_id,
        max_length=loaded.max_length,
        batch_size=config.batch_size,
        weights=contextlib.nullcontext,
        prompt_lookup=config.prompt_lookup,
    )


def initial_weights(policy: Policy) -> Callable[[], AbstractContextManager[object]]:
    """Return a context manager under which the policy's model has its initial weights.

    With adapters it turns them off; else it swaps in a copy of the weights.
    """
    if policy.has_adapters:
        return policy.adapters_off
    copies = {name: weight.detach().clone() for name, weight in policy.trainable.items()}
    return lambda: policy.weights_swapped(copies)


def fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """Return a hash of a model's weights, so that a folder whose weights change is another critic.

    It is made of sums of the weights' bits, which are equal on every device: a run that is resumed on
    another one finds its replies in the cache.
    """
    sums = [
        (name, tuple(weight.shape), str(weight.dtype), _sum_of_bits(weight.detach()))
        for name, weight in sorted(model.named_parameters())
        if "lora_" not in name
    ]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def _sum_of_bits(weight: Tensor) -> int:
    """Sum in chunks, since each is widened to 64 bits."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    chunks = weight.contiguous().view(bits).flatten().split(FINGERPRINT_ENTRIES)
    return int(torch.stack([chunk.sum(dtype=torch.int64) for chunk in chunks]).sum().item())
