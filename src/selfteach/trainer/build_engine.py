"""Builds the engine of a recipe."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

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
from selfteach.rollout.vllm.synced_backend import SyncedBackend
from selfteach.rollout.vllm.vllm_engine import SyncedSampler, TrainableWeights, VllmEngine
from selfteach.rollout.vllm.weight_check import Probe, WeightCheck
from selfteach.rollout.vllm.weight_sync import WeightFolder
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.trainer.build_environment import Environments
from selfteach.types import Sequences

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
        _sampler(recipe, config, probe, loaded, policy, ranks),
        loaded.renderer,
        probe.logits,
        TrainableWeights(policy.trainable.items, tied_weights(policy)),
        run_id=ranks.broadcast(uuid.uuid4().hex[:8]),
        end_ids=loaded.end_ids,
        max_length=loaded.max_length,
        ranks=ranks,
    )


def require_engine(recipe: Recipe) -> list[str]:
    """Check once that served engines are reachable and can do what this recipe needs.

    Returns the state of each server. Raises `EngineError` in one line.
    """
    if not isinstance(recipe.engine, VllmServerConfig):
        return []
    _require_openai()
    from selfteach.rollout.vllm.engine_healthcheck import (
        EngineRequirements,
        require_engine_server,
    )

    tokenizer = load_tokenizer(recipe.model)
    return require_engine_server(
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


def _sampler(
    recipe: Recipe,
    config: EngineConfig,
    probe: Probe,
    loaded: LoadedModel,
    policy: Policy,
    ranks: Ranks,
) -> SyncedSampler:
    model = policy.model
    adapter = model.peft_config["default"] if isinstance(model, PeftModel) else None
    match config:
        case VllmServerConfig():
            # Rank 0 writes there; the others need only its path.
            folder = ranks.all_or_raise(lambda: _folder(config.folder) if ranks.is_main else None)
            weight_folder = WeightFolder(ranks.broadcast(folder) or Path(), adapter)
            return _served(config, probe, weight_folder, ranks, policy.device)
        case VllmProcessConfig():
            weight_folder = WeightFolder(_folder(None), adapter)
            process = VllmProcess(config, _served_model(recipe, loaded), weight_folder)
            return SyncedBackend(process, WeightCheck(probe, config.tolerance), ranks)
        case _:
            raise AssertionError(config)


def _served(
    config: VllmServerConfig,
    probe: Probe,
    weight_folder: WeightFolder,
    ranks: Ranks,
    device: torch.device,
) -> SyncedSampler:
    """Return the server of an engine, or its fleet of them."""
    _require_openai()
    from selfteach.rollout.vllm.server_client import VllmServer
    from selfteach.rollout.vllm.synced_server import SyncedServer
    from selfteach.rollout.vllm.vllm_fleet import VllmFleet
    from selfteach.rollout.vllm.weight_channel import WeightChannel

    channel = WeightChannel(config, weight_folder, ranks, device)
    members = [
        (VllmServer(member, channel), WeightCheck(probe, config.tolerance))
        for member in config.members
    ]
    if len(members) == 1:
        return SyncedBackend(*members[0], ranks)
    return VllmFleet(
        [SyncedServer(*member, ranks) for member in members], channel,
        concurrency=config.concurrency, patience_s=config.patience_seconds,
        hedge_after=config.hedge_after,
    )  # fmt: skip


def _require_openai() -> None:
    try:
        import selfteach.rollout.vllm.server_client  # noqa: F401
    except ImportError:
        raise EngineError(
            'engine.type = "vllm_server" needs OpenAI\'s client: pip install "selfteach[endpoint]"'
        ) from None


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
