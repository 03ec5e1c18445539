"""From a recipe's engine section to an engine."""

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
from selfteach.models.loading import load_tokenizer, resolve
from selfteach.models.policy import Policy
from selfteach.protocols import Engine
from selfteach.rollout.transformers_engine import TransformersEngine
from selfteach.rollout.vllm.in_process import Serving, VllmProcess
from selfteach.rollout.vllm.vllm_engine import Sampler, VllmEngine, Weights
from selfteach.rollout.vllm.weight_check import Fingerprint, Probe
from selfteach.rollout.vllm.weight_sync import Handover
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.trainer.build_critic import Solver
from selfteach.types import Sequences

if TYPE_CHECKING:
    from types import ModuleType

PROBE_TOKENS = 256
"""Of the prompt that engine and trainer are both asked about: some blocks of a prefix cache."""


def build_engine(
    recipe: Recipe,
    solver: Solver,
    prompts: Iterable[tuple[int, ...]],
    model: PreTrainedModel | PeftModel,
    ranks: Ranks = SINGLE_PROCESS,
) -> Engine:
    """The engine of a recipe; ``prompts`` are what it will be asked, for a look at some.

    ``model`` is what samples in this process: the solver's own, or a whole copy of a sharded one.

    Raises `EngineError` or `RecipeError` in one line.
    """
    config, policy = recipe.engine, solver.policy
    if isinstance(config, TransformersEngineConfig):
        return TransformersEngine(
            model, solver.renderer, end_ids=solver.end_ids, pad_id=solver.pad_id,
            max_length=solver.max_length, autocast=solver.autocast,
        )  # fmt: skip
    if ranks.size > 1 and isinstance(config, VllmProcessConfig):
        raise RecipeError(
            f'engine.type = "vllm" is for one process, and torchrun has started {ranks.size}, whose '
            'groups vLLM would take for its own: serve the model (engine.type = "vllm_server"), so '
            "that all ranks sample from there"
        )
    probe = Probe(
        ids := probe_ids(prompts, solver.max_length - 1),
        recipe.sampling.temperature,
        trainer_logits(policy, ids),
    )
    return VllmEngine(
        _sampler(recipe, config, solver, ranks),
        solver.renderer,
        Fingerprint(probe, config.tolerance),
        Weights(policy.trainable.items, tied_weights(policy)),
        owner=ranks.broadcast(uuid.uuid4().hex[:8]),
        end_ids=solver.end_ids,
        max_length=solver.max_length,
        ranks=ranks,
    )


def require_engine(recipe: Recipe) -> None:
    """Ask a served engine once whether it is there and can do what this recipe wants of it.

    Raises `EngineError` in one line.
    """
    if isinstance(recipe.engine, VllmServerConfig):
        _served()  # the client is needed from here on
        from selfteach.rollout.vllm.engine_healthcheck import Wanted, require_server

        tokenizer = load_tokenizer(recipe.model)
        require_server(
            recipe.engine,
            Wanted(
                adapters=recipe.model.lora is not None,
                max_tokens=recipe.sampling.max_tokens,
                encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            ),
        )


def probe_ids(prompts: Iterable[tuple[int, ...]], longest: int) -> tuple[int, ...]:
    """The first prompts one after another, so long as a probe may be."""
    ids: list[int] = []
    for prompt in prompts:
        ids += prompt
        if len(ids) >= PROBE_TOKENS:
            break
    return tuple(ids[: min(longest, PROBE_TOKENS)])


def tied_weights(policy: Policy) -> dict[str, str]:
    """Other names of weights that train, like ``lm_head.weight`` of a model with a tied head."""
    names = {id(weight): name for name, weight in policy.trainable.items()}
    everywhere = policy.model.named_parameters(remove_duplicate=False)
    known = ((alias, names.get(id(weight))) for alias, weight in everywhere)
    return {alias: name for alias, name in known if name is not None and name != alias}


def trainer_logits(policy: Policy, ids: Sequence[int]) -> Callable[[], Tensor]:
    """What the policy makes of the token behind ``ids``, [V], whenever asked."""
    last = torch.tensor([len(ids) - 1])
    one = Sequences(torch.tensor([list(ids)]), torch.zeros(1, dtype=torch.long), last)

    def logits() -> Tensor:
        with torch.no_grad():
            return policy.score(one.to(policy.device)).logits(slice(None))[0].float().cpu()

    return logits


def _sampler(recipe: Recipe, config: EngineConfig, solver: Solver, ranks: Ranks) -> Sampler:
    model = solver.policy.model
    adapter = model.peft_config["default"] if isinstance(model, PeftModel) else None
    match config:
        case VllmServerConfig():
            # Rank 0 writes there; the others only have to know its name.
            folder = ranks.all_or_raise(lambda: _folder(config.folder) if ranks.is_main else None)
            handover = Handover(ranks.broadcast(folder) or Path(), adapter)
            return _served().VllmServer(config, handover)
        case VllmProcessConfig():
            return VllmProcess(config, _serving(recipe, solver), Handover(_folder(None), adapter))
        case _:
            raise AssertionError(config)


def _served() -> ModuleType:
    try:
        from selfteach.rollout.vllm import server_client
    except ImportError:
        raise EngineError(
            'engine.type = "vllm_server" needs OpenAI\'s client: pip install "selfteach[endpoint]"'
        ) from None
    return server_client


def _serving(recipe: Recipe, solver: Solver) -> Serving:
    own: ModelConfig = recipe.model
    if own.gguf_file:
        raise RecipeError(
            'engine.type = "vllm" reads safetensors only, and model.gguf_file is set: save the model '
            "with save_pretrained and name that folder in model.path"
        )
    return Serving(
        path=resolve(own.path),
        max_length=solver.max_length,
        lora_rank=own.lora.rank if own.lora else None,
        cuda=solver.policy.device.type == "cuda",
        trust_remote_code=own.trust_remote_code,
    )


def _folder(named: str | None) -> Path:
    """A folder of this process alone, gone with it."""
    if named is not None:
        Path(named).expanduser().mkdir(parents=True, exist_ok=True)
    parent = Path(named).expanduser() if named is not None else None
    folder = Path(tempfile.mkdtemp(prefix="selfteach-", dir=parent))
    folder.chmod(0o755)  # the server may be another user's
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
