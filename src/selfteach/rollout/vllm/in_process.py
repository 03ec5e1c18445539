"""vLLM in the trainer's own process, on its own device: awake while it samples, asleep while we learn.

Importing this needs no vLLM; building one does. vLLM wants an environment of its own, with this package
in it: docs/vllm.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from selfteach.config.engine_section import VllmProcessConfig
from selfteach.errors import EngineError
from selfteach.rollout.vllm.vllm_engine import Answer, Ask
from selfteach.rollout.vllm.weight_sync import Handover

LIKELIEST = 20
WHOLE: Mapping[str, Any] = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True,
    "detokenize": False,
}  # fmt: skip
"""The whole distribution, ends that are ours, and no text: ids are the truth."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What is served, and to what size."""

    path: str
    max_length: int
    lora_rank: int | None
    """None where full weights train."""
    cuda: bool
    trust_remote_code: bool = False


class VllmProcess:
    """vLLM's `LLM`. Raises `EngineError` if vLLM is not here; when started, if it cannot run this."""

    where = "vLLM in this process"
    patience_s = 0.0

    def __init__(self, config: VllmProcessConfig, serving: Serving, handover: Handover) -> None:
        # The engine's core stays in this process: weights are handed over by reference.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if find_spec("vllm") is None:
            raise EngineError(
                'engine.type = "vllm" needs vLLM in this environment: docs/vllm.md; or use a server: '
                'engine.type = "vllm_server"'
            )
        self._config, self._serving, self._handover = config, serving, handover
        self._sleeps = config.sleep and serving.cuda
        self._label: str | None = None
        self._adapter: Any = None
        self._loads = 0

    @cached_property
    def _llm(self) -> Any:
        """vLLM's `LLM`, started when it is first given weights: not for ``selfteach check``."""
        import vllm  # pyright: ignore[reportMissingImports]

        try:
            llm = vllm.LLM(**arguments(self._config, self._serving))
        except (OSError, RuntimeError, ValueError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:300]
            raise EngineError(f"engine: vLLM cannot run {self._serving.path}: {reason}") from error
        if self._sleeps:
            llm.sleep(level=1)
        return llm

    def load(self, named_weights: Iterable[tuple[str, Tensor]], label: str) -> None:
        """Adapters through a folder, as vLLM reads them; full weights straight from the trainer's."""
        self._loads += 1
        if self._handover.adapters:
            from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

            path = self._handover.write(named_weights, label)
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
        """It cannot be started again behind our back."""
        raise AssertionError(label)

    def label(self, ours: str) -> str | None:
        """Of its weights or of its adapter."""
        return self._label if self._handover.adapters else self._llm.get_weight_version()

    def answers(self, asks: Sequence[Ask], label: str) -> Iterator[tuple[int, Answer]]:
        """All in one call; vLLM fills its batch from them."""
        for index, output in enumerate(self._generate(asks, label, logprobs=0)):
            ids = tuple(output.token_ids)
            said = zip(ids, output.logprobs, strict=True)
            yield index, Answer(ids, tuple(by_id[token].logprob for token, by_id in said))

    def likeliest(self, ask: Ask, label: str) -> Mapping[int, float]:
        """Twenty tokens, by id."""
        (output,) = self._generate([ask], label, logprobs=LIKELIEST)
        return {token: said.logprob for token, said in output.logprobs[0].items()}

    def _generate(self, asks: Sequence[Ask], label: str, *, logprobs: int) -> list[Any]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        wanted = [
            SamplingParams(
                max_tokens=ask.max_tokens, temperature=ask.temperature, seed=ask.seed,
                stop_token_ids=list(ask.end_ids), logprobs=logprobs, **WHOLE,
            )
            for ask in asks
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": list(ask.prompt_ids)} for ask in asks]
        with self._awake():
            replies = self._llm.generate(
                prompts, wanted, use_tqdm=False, lora_request=self._adapter
            )
        outputs = [reply.outputs[0] for reply in replies]
        if not self._handover.adapters:
            _require_label(outputs, label)
        return outputs

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """The engine on its device. What keeps it awake is one call: between calls others need it."""
        if self._sleeps:
            self._llm.wake_up()
        try:
            yield
        finally:
            if self._sleeps:
                self._llm.sleep(level=1)


def arguments(config: VllmProcessConfig, serving: Serving) -> dict[str, Any]:
    """What vLLM's `LLM` is built with."""
    lora = serving.lora_rank is not None
    return {
        "model": serving.path,
        "dtype": config.dtype,
        "max_model_len": serving.max_length,
        "max_num_seqs": config.max_num_seqs,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager,
        "enable_prefix_caching": True,
        "enable_sleep_mode": config.sleep and serving.cuda,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "trust_remote_code": serving.trust_remote_code,
        # A prompt that is read in parts takes a seeded draw back, which a processor's generator cannot.
        **({} if serving.cuda else {"enable_chunked_prefill": False}),
        **({"enable_lora": True, "max_lora_rank": _rank(serving.lora_rank or 1)} if lora else {}),
    }


def _rank(rank: int) -> int:
    """The least that vLLM takes and that holds this rank."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


def _require_label(outputs: Sequence[Any], label: str) -> None:
    """Every token was sampled under this label: vLLM says it of each answer."""
    said = {span.version for output in outputs for span in output.weight_versions or ()}
    if said != {label}:
        raise EngineError(f"engine: stale: answers come from weights {sorted(said)}, not {label!r}")
