"""Drives vLLM in the trainer's process, on its device: awake while it samples, asleep while we train.

Importing this needs no vLLM; building a `VllmProcess` does. vLLM needs a separate environment that
also has this package: docs/vllm.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from selfteach.config.engine_section import VllmProcessConfig
from selfteach.errors import EngineError
from selfteach.rollout.vllm.vllm_engine import Completion, CompletionRequest
from selfteach.rollout.vllm.weight_sync import WeightFolder

BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"
"""The environment variable in which vLLM reads whether batches may change what is sampled."""
BATCH_INVARIANT_CAPABILITY = (8, 0)
TOP_LOGPROBS = 20
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of max_lora_rank that vLLM accepts."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Describes the model that vLLM runs, and the sizes it must allow."""

    path: str
    max_length: int
    lora_rank: int | None
    """None if full weights train."""
    cuda: bool
    trust_remote_code: bool = False


class VllmProcess:
    """Drives vLLM's `LLM` in this process.

    Raises `EngineError` when built if vLLM is not installed; when first used, if it cannot run the
    model.
    """

    name = "vLLM in this process"
    patience_s = 0.0
    main_reloads = False

    def __init__(
        self, config: VllmProcessConfig, served: ServedModel, weight_folder: WeightFolder
    ) -> None:
        # The engine's core stays in this process: weights are passed by reference.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if find_spec("vllm") is None:
            raise EngineError(
                'engine.type = "vllm" needs vLLM in this environment: docs/vllm.md; or use a server: '
                'engine.type = "vllm_server"'
            )
        if config.batch_invariant:
            _set_batch_invariant(served)
        self._config, self._served, self._weight_folder = config, served, weight_folder
        self._sleeps = config.sleep and served.cuda
        self._label: str | None = None
        self._adapter: Any = None
        self._loads = 0

    @cached_property
    def _llm(self) -> Any:
        """Return vLLM's `LLM`, started when weights are first loaded: not for ``selfteach check``."""
        import vllm  # pyright: ignore[reportMissingImports]

        try:
            llm = vllm.LLM(**llm_arguments(self._config, self._served))
        except (OSError, RuntimeError, ValueError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:300]
            raise EngineError(f"engine: vLLM cannot run {self._served.path}: {reason}") from error
        if self._sleeps:
            llm.sleep(level=1)
        return llm

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], label: str) -> None:
        """Load adapters from a folder, as vLLM reads them; full weights from the trainer's tensors."""
        self._loads += 1
        if self._weight_folder.holds_adapters:
            from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

            path = self._weight_folder.write(named_weights, label)
            self._adapter = LoRARequest(label, self._loads, str(path))
            self._label = label
            return
        with self._awake():
            self._llm.update_weight_version(f"{label}-loading")
            weights = [(name, value.detach()) for name, value in named_weights]
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            if not self._llm.reset_prefix_cache():
                raise EngineError(
                    "engine: vLLM does not empty its prefix cache: requests are running"
                )
            self._llm.update_weight_version(label)
        self._label = label

    def reload_weights(self, label: str) -> None:
        """Fail: an engine in this process cannot restart without it."""
        raise AssertionError(label)

    def current_label(self, expected: str) -> str | None:
        """Return the label of the adapter or of the full weights."""
        if self._weight_folder.holds_adapters:
            return self._label
        return self._llm.get_weight_version()

    def complete(
        self, requests: Sequence[CompletionRequest], label: str
    ) -> Iterator[tuple[int, Completion]]:
        """Send all requests in one call; vLLM batches them."""
        for index, output in enumerate(self._generate(requests, label, logprobs=0)):
            ids = tuple(output.token_ids)
            positions = zip(ids, output.logprobs, strict=True)
            yield index, Completion(ids, tuple(by_id[token].logprob for token, by_id in positions))

    def top_logprobs(self, request: CompletionRequest, label: str) -> Mapping[int, float]:
        """Return the log-probabilities of the twenty most likely first tokens, by id."""
        (output,) = self._generate([request], label, logprobs=TOP_LOGPROBS)
        return {token: entry.logprob for token, entry in output.logprobs[0].items()}

    def _generate(
        self, requests: Sequence[CompletionRequest], label: str, *, logprobs: int
    ) -> list[Any]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        params = [
            SamplingParams(logprobs=logprobs, detokenize=False, **request.parameters())
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        with self._awake():
            replies = self._llm.generate(
                prompts, params, use_tqdm=False, lora_request=self._adapter
            )
        outputs = [reply.outputs[0] for reply in replies]
        if not self._weight_folder.holds_adapters:
            _require_label(outputs, label)
        return outputs

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Wake the engine for one call: between calls the trainer needs its memory."""
        if self._sleeps:
            self._llm.wake_up()
        try:
            yield
        finally:
            if self._sleeps:
                self._llm.sleep(level=1)


def _set_batch_invariant(served: ServedModel) -> None:
    """Have vLLM, which is not imported yet, sample the same in every batch. Raises `EngineError`."""
    needed = "engine.batch_invariant = true needs a GPU of compute capability 8.0 or newer"
    if not served.cuda:
        raise EngineError(f"{needed}, and the model is on a CPU: remove it")
    if torch.cuda.get_device_capability() < BATCH_INVARIANT_CAPABILITY:
        raise EngineError(f"{needed}, which {torch.cuda.get_device_name()} is not: remove it")
    if os.environ.get(BATCH_INVARIANT, "1") != "1":
        raise EngineError(
            f"engine.batch_invariant = true, and {BATCH_INVARIANT} is {os.environ[BATCH_INVARIANT]!r} "
            "in the environment: unset it"
        )
    os.environ[BATCH_INVARIANT] = "1"


def llm_arguments(config: VllmProcessConfig, served: ServedModel) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM`."""
    lora = served.lora_rank is not None
    return {
        "model": served.path,
        "dtype": config.dtype,
        "max_model_len": served.max_length,
        "max_num_seqs": config.max_num_seqs,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager,
        "enable_prefix_caching": True,
        "enable_sleep_mode": config.sleep and served.cuda,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "trust_remote_code": served.trust_remote_code,
        # Chunked prefill rolls a seeded draw back, which a CPU generator does not support.
        **({} if served.cuda else {"enable_chunked_prefill": False}),
        **(
            {"enable_lora": True, "max_lora_rank": _max_lora_rank(served.lora_rank or 1)}
            if lora
            else {}
        ),
    }


def _max_lora_rank(rank: int) -> int:
    """Return the smallest rank that vLLM accepts and that is not below this one."""
    return next((accepted for accepted in LORA_RANKS if accepted >= rank), rank)


def _require_label(outputs: Sequence[Any], label: str) -> None:
    """Check that every token was sampled under this label, which vLLM reports per output."""
    versions = {span.version for output in outputs for span in output.weight_versions or ()}
    if versions != {label}:
        raise EngineError(
            f"engine: stale: rollouts come from the weights {sorted(versions)}, not {label!r}"
        )
