"""Samples with transformers, on CPU or one GPU: batched, KV-cached, each rollout reproducible alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from selfteach.errors import EngineError
from selfteach.prompts.renderer import Renderer
from selfteach.rollout.decoding.generate import sample_completions
from selfteach.rollout.decoding.token_sampling import uniforms
from selfteach.runtime.seeds import stream_key
from selfteach.types import Problem, Rollout, Sampling


class TransformersEngine:
    """Samples from a model in this process, usually the very module that is trained.

    Each rollout has a random stream, keyed by (seed, problem, sample, version), and uses one
    number of it per token. So its random numbers do not depend on the other rollouts of the batch, on
    the order of problems, or on what was sampled before a resume. (Its logits do, in the last bits: a
    batch of another shape adds floats in another order. Callers form the same batches again.)
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        renderer: Renderer,
        *,
        end_ids: Sequence[int],
        pad_id: int,
        max_length: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        self._model, self._renderer = model, renderer
        self._end_ids, self._pad_id, self._max_length = tuple(end_ids), pad_id, max_length
        self._autocast = autocast
        self._version = 0
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(causal, PreTrainedModel)
        self._causal = causal

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy weights into the model, but for those whose storage it shares with the trainer."""
        parameters = dict(self._model.named_parameters())
        for name, value in named_weights:
            if parameters[name].data_ptr() != value.data_ptr():
                parameters[name].data.copy_(value)
        self._version = version

    @torch.inference_mode()
    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """Prefill each problem's prompt once, then decode all its rollouts side by side.

        Raises `EngineError` if a prompt leaves no room for a completion.
        """
        self._model.eval()
        prompts = [self._renderer.solver_prompt(problem) for problem in problems]
        for problem, prompt in zip(problems, prompts, strict=True):
            if len(prompt) >= self._max_length:
                raise EngineError(
                    f"problem {problem.id!r} has a prompt of {len(prompt)} tokens; "
                    f"it leaves no room for a completion in the context of {self._max_length}"
                )
        device = next(self._model.parameters()).device
        keys = [(problem, sample) for problem in problems for sample in range(sampling.samples)]
        streams = (stream_key(*key, sampling, self._version) for key in keys)
        uniforms_BT = np.stack([uniforms(stream, sampling.max_tokens) for stream in streams])
        with torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
            ids, logps = sample_completions(
                self._causal, prompts, uniforms_BT, temperature=sampling.temperature,
                end_ids=self._end_ids, pad_id=self._pad_id, max_length=self._max_length,
            )  # fmt: skip
        rollouts = []
        for row, (problem, sample) in enumerate(keys):
            rollouts.append(
                Rollout(
                    problem=problem,
                    sample=sample,
                    prompt_ids=prompts[row // sampling.samples],
                    token_ids=tuple(ids[row]),
                    logps=tuple(logps[row]),
                    text=self._renderer.decode(ids[row]),
                    finished=ids[row][-1] in self._end_ids,
                    policy_version=self._version,
                )
            )
        return rollouts
