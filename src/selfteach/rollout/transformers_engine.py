"""Samples with transformers, on CPU or one GPU: batched, KV-cached, each rollout reproducible alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from selfteach.errors import EngineError
from selfteach.models.prefix_cache import States
from selfteach.prompts.renderer import Renderer
from selfteach.rollout.decoding.forward import Layout
from selfteach.rollout.decoding.generate import sample_completions
from selfteach.rollout.decoding.prompt_layout import proven_layout
from selfteach.rollout.decoding.token_sampling import TokenDistribution, uniforms
from selfteach.rollout.episode_states import EpisodeStates
from selfteach.rollout.prompt_request import PromptRequest
from selfteach.runtime.seeds import stream_key
from selfteach.types import Problem, Rollout, Sampling


class TransformersEngine:
    """Samples from a model in this process, usually the very module that is trained.

    Each turn has a random stream, keyed by (seed, problem, sample, turn, version), and uses one
    number of it per token. So its random numbers do not depend on the other rollouts of the batch, on
    the order of problems, or on what was sampled before a resume. (Its logits do, in the last bits: a
    batch of another shape adds floats in another order. Callers form the same batches again.)

    When it is made the model proves the layout in which it samples (`proven_layout`); raises
    `EngineError` for a model that is not causal.
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
        self._end_ids, self._pad_id, self.max_length = tuple(end_ids), pad_id, max_length
        self._autocast = autocast
        self._version = 0
        self._states: EpisodeStates | None = None
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(causal, PreTrainedModel)
        self._causal = causal
        self._layout: Layout = proven_layout(
            causal, pad_id=pad_id, max_length=max_length, autocast=autocast
        )

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy weights into the model, but for those whose storage it shares with the trainer."""
        parameters = dict(self._model.named_parameters())
        for name, value in named_weights:
            if parameters[name].data_ptr() != value.data_ptr():
                parameters[name].data.copy_(value)
        self._version = version

    @contextlib.contextmanager
    def continuing_sequences(self) -> Iterator[None]:
        """Hold keys and values of what `complete` samples: a prompt that goes on from it does not
        run those tokens again. The weights must stay as they are until the context ends."""
        if self._layout == "shared_prefix":
            self._states = EpisodeStates()
        try:
            yield
        finally:
            self._states = None

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """Prefill each problem's prompt once, then decode all its rollouts side by side.

        Raises `EngineError` if a prompt leaves no room for a completion.
        """
        samples = tuple(range(sampling.samples))
        return self.complete(
            [PromptRequest(p, self._renderer.solver_prompt(p), samples) for p in problems], sampling
        )

    @torch.inference_mode()
    def complete(self, requests: Sequence[PromptRequest], sampling: Sampling) -> list[Rollout]:
        """Sample completions of given prompts, equally many of each; ``sampling.samples`` is not used.

        Raises `EngineError` if a prompt leaves no room for a completion.
        """
        self._model.eval()
        for request in requests:
            if len(request.prompt_ids) >= self.max_length:
                raise EngineError(
                    f"problem {request.problem.id!r} has a prompt of {len(request.prompt_ids)} tokens; "
                    f"it leaves no room for a completion in the context of {self.max_length}"
                )
        device = next(self._model.parameters()).device
        keys = [(request, sample) for request in requests for sample in request.samples]
        streams = (
            stream_key(r.problem, sample, sampling, self._version, r.turn) for r, sample in keys
        )
        uniforms_BT = np.stack([uniforms(stream, sampling.max_tokens) for stream in streams])
        distribution = TokenDistribution(
            sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p
        )
        states_B: dict[int, States] = {}
        with torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
            ids, logps = sample_completions(
                self._causal, [request.prompt_ids for request in requests], uniforms_BT,
                distribution=distribution, end_ids=self._end_ids, pad_id=self._pad_id,
                max_length=self.max_length, layout=self._layout,
                stored_Q=self._states.of(requests) if self._states else None,
                on_end=states_B.__setitem__ if self._states else None,
            )  # fmt: skip
        if self._states:
            self._states.replace(
                {
                    (request.problem.id, sample): ((*request.prompt_ids, *ids[b][:-1]), states_B[b])
                    for b, (request, sample) in enumerate(keys)
                }
            )
        return [
            Rollout(
                problem=request.problem,
                sample=sample,
                prompt_ids=request.prompt_ids,
                token_ids=tuple(token_ids),
                logps=tuple(token_logps),
                text=self._renderer.decode(token_ids),
                finished=token_ids[-1] in self._end_ids,
                policy_version=self._version,
            )
            for (request, sample), token_ids, token_logps in zip(keys, ids, logps, strict=True)
        ]
