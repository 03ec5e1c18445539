"""Builds the engine of a recipe."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from selfteach.config.engine_section import (
    EngineConfig,
    TransformersEngineConfig,
    VllmProcessConfig,
    VllmServerConfig,
)
from selfteach.config.recipe import ModelConfig, Recipe
from selfteach.errors import EngineError, RecipeError
from selfteach.models.loading import LoadedModel, load_tokenizer
from selfteach.models.model_path import resolve
from selfteach.models.policy import Policy
from selfteach.protocols import Engine
from selfteach.rollout.episode_engine import EpisodeEngine
from selfteach.rollout.prompt_request import CompletionEngine
from selfteach.rollout.transformers_engine import TransformersEngine
from selfteach.rollout.vllm.in_process import ServedModel, VllmProcess
from selfteach.rollout.vllm.vllm_engine import TrainableWeights, VllmBackend, VllmEngine
from selfteach.rollout.vllm.weight_check import Probe, WeightCheck
from selfteach.rollout.vllm.weight_sync import WeightFolder
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.trainer.build_environment import Environments
from selfteach.types import Sequences

if TYPE_CHECKING:
    from types import ModuleType

PROBE_TOKENS = 256
"""Length of the prompt whose logprobs engine and trainer compare: some blocks of a prefix cache."""


def build_engine(
    recipe: Recipe,
    loaded: LoadedModel,
    policy: Policy,
    prompts: Iterable[tuple[int, ...]],
    model: PreTrainedModel | PeftModel,
    ranks: Ranks = SINGLE_PROCESS,
    environments: Environments | None = None,
) -> Engine:
    """Build the engine of a recipe; the weight check uses the first of ``prompts``.

    ``model`` samples if the engine is transformers: the policy's model, or a full copy of a sharded
    one. With ``environments`` it runs episodes.

    Raises `EngineError`, `RecipeError` or `DataError` in one line.
    """
    engine = _completion_engine(recipe, loaded, policy, prompts, model, ranks)
    if environments is None:
        return engine
    environments.prepare()
    return EpisodeEngine(engine, loaded.renderer, environments.make, environments.limits)


def _completion_engine(
    recipe: Recipe,
    loaded: LoadedModel,
    policy: Policy,
    prompts: Iterable[tuple[int, ...]],
    model: PreTrainedModel | PeftModel,
    ranks: Ranks,
) -> CompletionEngine:
    config = recipe.engine
    if isinstance(config, TransformersEngineConfig):
        return TransformersEngine(
            model, loaded.renderer, end_ids=loaded.end_ids, pad_id=loaded.pad_id,
            max_length=loaded.max_length, autocast=loaded.autocast,
        )  # fmt: skip
    if ranks.size > 1 and isinstance(config, VllmProcessConfig):
        raise RecipeError(
            f'engine.type = "vllm" runs in one process, but torchrun has started {ranks.size}; their '
            'process groups would be used by vLLM: serve the model (engine.type = "vllm_server"), so '
            "that all ranks sample from there"
        )
    probe = Probe(
        ids := probe_ids(prompts, loaded.max_length - 1),
        recipe.sampling.temperature,
        trainer_logits(policy, ids),
    )
    return VllmEngine(
        _backend(recipe, config, loaded, policy, ranks),
        loaded.renderer,
        WeightCheck(probe, config.tolerance),
        TrainableWeights(policy.trainable.items, tied_weights(policy)),
        run_id=ranks.broadcast(uuid.uuid4().hex[:8]),
        end_ids=loaded.end_ids,
        max_length=loaded.max_length,
        ranks=ranks,
    )


def require_engine(recipe: Recipe) -> None:
    """Check once that a served engine is reachable and can do what this recipe needs.

    Raises `EngineError` in one line.
    """
    if isinstance(recipe.engine, VllmServerConfig):
        _server_client()  # raises if OpenAI's client is not installed
        from selfteach.rollout.vllm.engine_healthcheck import (
            EngineRequirements,
            require_engine_server,
        )

        tokenizer = load_tokenizer(recipe.model)
        require_engine_server(
            recipe.engine,
            EngineRequirements(
                adapters=recipe.model.lora is not None,
                max_tokens=recipe.sampling.max_tokens,
                encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            ),
        )


def probe_ids(prompts: Iterable[tuple[int, ...]], longest: int) -> tuple[int, ...]:
    """Return the first prompts, concatenated and cut to the probe's length or to ``longest``."""
    ids: list[int] = []
    for prompt in prompts:
        ids += prompt
        if len(ids) >= PROBE_TOKENS:
            break
    return tuple(ids[: min(longest, PROBE_TOKENS)])


def tied_weights(policy: Policy) -> dict[str, str]:
    """Return other names of trainable weights, like ``lm_head.weight`` of a model with a tied head."""
    names = {id(weight): name for name, weight in policy.trainable.items()}
    parameters = policy.model.named_parameters(remove_duplicate=False)
    aliases = ((alias, names.get(id(weight))) for alias, weight in parameters)
    return {alias: name for alias, name in aliases if name is not None and name != alias}


def trainer_logits(policy: Policy, ids: Sequence[int]) -> Callable[[], Tensor]:
    """Return a function that computes the policy's present logits [V] of the token after ``ids``."""
    last = torch.tensor([len(ids) - 1])
    sequence = Sequences(torch.tensor([list(ids)]), torch.zeros(1, dtype=torch.long), last)

    def logits() -> Tensor:
        with torch.no_grad():
            return policy.score(sequence.to(policy.device)).logits(slice(None))[0].float().cpu()

    return logits


def _backend(
    recipe: Recipe, config: EngineConfig, loaded: LoadedModel, policy: Policy, ranks: Ranks
) -> VllmBackend:
    model = policy.model
    adapter = model.peft_config["default"] if isinstance(model, PeftModel) else None
    match config:
        case VllmServerConfig():
            # Rank 0 writes there; the others need only its path.
            folder = ranks.all_or_raise(lambda: _folder(config.folder) if ranks.is_main else None)
            weight_folder = WeightFolder(ranks.broadcast(folder) or Path(), adapter)
            return _server_client().VllmServer(config, weight_folder)
        case VllmProcessConfig():
            weight_folder = WeightFolder(_folder(None), adapter)
            return VllmProcess(config, _served_model(recipe, loaded), weight_folder)
        case _:
            raise AssertionError(config)


def _server_client() -> ModuleType:
    try:
        from selfteach.rollout.vllm import server_client
    except ImportError:
        raise EngineError(
            'engine.type = "vllm_server" needs OpenAI\'s client: pip install "selfteach[endpoint]"'
        ) from None
    return server_client


def _served_model(recipe: Recipe, loaded: LoadedModel) -> ServedModel:
    config: ModelConfig = recipe.model
    if config.gguf_file:
        raise RecipeError(
            'engine.type = "vllm" reads safetensors only, and model.gguf_file is set: save the model '
            "with save_pretrained and name that folder in model.path"
        )
    return ServedModel(
        path=resolve(config.path),
        max_length=loaded.max_length,
        lora_rank=config.lora.rank if config.lora else None,
        cuda=loaded.device.type == "cuda",
        trust_remote_code=config.trust_remote_code,
    )


def _folder(parent_name: str | None) -> Path:
    """Make a temporary folder that is deleted when this process exits."""
    parent = None
    if parent_name is not None:
        parent = Path(parent_name).expanduser()
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="selfteach-", dir=parent))
    folder.chmod(0o755)  # the server may be another user's
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
