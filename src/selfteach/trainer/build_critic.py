"""From a recipe's critic section to a critic."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from selfteach.config.critic_section import (
    CriticConfig,
    EndpointConfig,
    LocalCriticConfig,
    OracleConfig,
    PolicyCriticConfig,
    RecordedConfig,
    LlmCriticConfig,
)
from selfteach.config.recipe import ModelConfig
from selfteach.errors import CriticError, RecipeError
from selfteach.feedback.critics.chat_model import ChatModel
from selfteach.feedback.critics.llm import Asking, TextCritic
from selfteach.feedback.critics.local import LocalModel
from selfteach.feedback.critics.oracle import OracleCritic
from selfteach.feedback.critics.parser import Reader
from selfteach.feedback.critics.recorded import RecordedCritic
from selfteach.feedback.critics.reply_cache import ReplyStore, Stored, default_path
from selfteach.models.loading import (
    choose_device,
    context_length,
    end_ids,
    load_model,
    load_tokenizer,
    pad_id,
)
from selfteach.models.policy import Policy
from selfteach.prompts.control_tokens import Spellings
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.prompts.thinking import Thinking
from selfteach.protocols import Critic
from selfteach.runtime.torch_setup import settle
from selfteach.tasks.task import Task

if TYPE_CHECKING:
    from selfteach.feedback.critics.endpoint import Endpoint

FINGERPRINT_ENTRIES = 2**24
"""Weights whose bits are added up at a time."""


@dataclass(frozen=True, slots=True)
class Solver:
    """The model that answers, for a critic that is the same model; None where there is none."""

    policy: Policy
    renderer: Renderer
    end_ids: list[int]
    pad_id: int
    max_length: int
    autocast: torch.dtype | None


def build_critic(
    config: CriticConfig, task: Task, templates: Templates, solver: Solver | None, *, seed: int
) -> Critic:
    """The critic of a recipe; must be built while the policy is still the initial one.

    Raises `CriticError` or `RecipeError` before anything is asked.
    """
    match config:
        case OracleConfig():
            if task.oracle is None:
                raise RecipeError('critic.type = "oracle": these problems have no oracle critic')
            return OracleCritic(task.oracle, error_rate=config.error_rate, seed=seed)
        case RecordedConfig():
            return RecordedCritic(Path(config.run))
        case _:
            if not templates.has("critic"):
                raise RecipeError(
                    f'critic.type = "{config.type}": the template set has no critic.jinja'
                )
            store = ReplyStore(
                Path(config.reply_cache).expanduser() if config.reply_cache else default_path()
            )
            return TextCritic(
                Stored(_chat_model(config, templates, solver), store),
                templates,
                Reader(task.split_steps, task.verify, config.min_similarity),
                _asking(config),
                config.on_failure.model_dump(),
            )


def critic_threads(config: CriticConfig | None) -> int:
    """Batches that may be marked while others are sampled: only a server leaves this machine free."""
    return 4 if isinstance(config, EndpointConfig) else 0


def _asking(config: LlmCriticConfig) -> Asking:
    paid = isinstance(config, EndpointConfig)  # and its tokenizer is elsewhere
    return Asking(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        retry_temperature=config.retry_temperature,
        max_attempts=config.max_attempts,
        sees_reference=config.sees_reference,
        price_prompt=config.price_prompt if paid else 0.0,
        price_completion=config.price_completion if paid else 0.0,
        spellings=Spellings(config.control_tokens) if paid else None,
    )


def _chat_model(
    config: EndpointConfig | LocalCriticConfig | PolicyCriticConfig,
    templates: Templates,
    solver: Solver | None,
) -> ChatModel:
    match config:
        case EndpointConfig():
            endpoint = _endpoint(config)
            from selfteach.feedback.critics.endpoint import EndpointModel

            return EndpointModel(endpoint)
        case LocalCriticConfig():
            return _local(config, templates)
        case PolicyCriticConfig():
            if solver is None:
                raise RecipeError('critic.type = "policy" needs a solver: name a recipe with one')
            if config.thinking is not None:
                raise RecipeError(
                    "critic.thinking: the solver as critic thinks as model.thinking.student says"
                )
            return LocalModel(
                solver.policy.model,
                solver.renderer,
                identity=f"policy:{config.thinking}:{fingerprint(solver.policy.model)}",
                end_ids=solver.end_ids,
                pad_id=solver.pad_id,
                max_length=solver.max_length,
                batch_size=config.batch_size,
                weights=initial_weights(solver.policy),
                autocast=solver.autocast,
            )


def require_critic(config: CriticConfig | None) -> None:
    """Ask a served critic once whether it is there; any other is found wanting when it is built.

    Raises `CriticError` in one line.
    """
    if isinstance(config, EndpointConfig) and config.healthcheck:
        endpoint = _endpoint(config)
        from selfteach.feedback.critics.critic_healthcheck import require_server

        require_server(endpoint)


def _endpoint(config: EndpointConfig) -> Endpoint:
    try:
        from selfteach.feedback.critics.endpoint import Endpoint
    except ImportError:
        raise CriticError(
            'critic.type = "endpoint" needs OpenAI\'s client: pip install "selfteach[endpoint]"'
        ) from None
    thinking = {"enable_thinking": config.thinking}
    asked = {} if config.thinking is None else {"chat_template_kwargs": thinking}
    return Endpoint(
        base_url=config.base_url,
        model=config.model,
        api_key_env=config.api_key_env,
        concurrency=config.concurrency,
        timeout_s=config.timeout_seconds,
        http_retries=config.http_retries,
        requests_per_minute=config.requests_per_minute,
        extra_body={**asked, **config.extra_body},
    )


def _local(config: LocalCriticConfig, templates: Templates) -> ChatModel:
    own = ModelConfig(
        path=config.path,
        gguf_file=config.gguf_file,
        weights_dtype=config.weights_dtype,
        trust_remote_code=config.trust_remote_code,
    )
    tokenizer = load_tokenizer(own)
    device = choose_device(config.device)
    settle(device)
    model = load_model(own, device).requires_grad_(False)
    renderer = Renderer(tokenizer, templates, thinking=Thinking(config.thinking, config.thinking))
    return LocalModel(
        model,
        renderer,
        identity=f"local:{config.path}:{config.thinking}:{fingerprint(model)}",
        end_ids=end_ids(model, tokenizer, renderer),
        pad_id=pad_id(tokenizer),
        max_length=context_length(model),
        batch_size=config.batch_size,
        weights=contextlib.nullcontext,
        prompt_lookup=config.prompt_lookup,
    )


def initial_weights(policy: Policy) -> Callable[[], AbstractContextManager[object]]:
    """A context in which the policy's model has its initial weights: adapters off, or a copy."""
    if policy.has_adapters:
        return policy.adapters_off
    copies = {name: weight.detach().clone() for name, weight in policy.trainable.items()}
    return lambda: policy.weights_swapped(copies)


def fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """Names a model's weights: a folder whose weights change is another critic.

    Sums of their bits, so that every device says the same: a resume elsewhere finds its replies.
    """
    sums = [
        (name, tuple(weight.shape), str(weight.dtype), _sum_of_bits(weight.detach()))
        for name, weight in sorted(model.named_parameters())
        if "lora_" not in name
    ]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def _sum_of_bits(weight: Tensor) -> int:
    """In pieces, since each is widened to 64 bits."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    parts = weight.contiguous().view(bits).flatten().split(FINGERPRINT_ENTRIES)
    return int(torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum().item())
