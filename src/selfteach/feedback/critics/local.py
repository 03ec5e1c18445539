"""Requests replies from a transformers model in this process, also the policy's initial weights.

A reply depends on its request alone (except for rounding, which varies with the batch): each request
has a separate random stream. A prefix shared by the prompts of a batch is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from selfteach.feedback.critics.chat_model import (
    NoReply,
    OnReply,
    Reply,
    Request,
    as_dicts,
    request_key,
)
from selfteach.prompts.renderer import Renderer
from selfteach.rollout.decoding.forward import Layout
from selfteach.rollout.decoding.generate import sample_completions
from selfteach.rollout.decoding.prompt_layout import proven_layout
from selfteach.rollout.decoding.token_sampling import TokenDistribution, uniforms


class LocalModel:
    """Generates replies in this process, in batches of requests of similar length."""

    remote = False

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        renderer: Renderer,
        *,
        identity: str,
        end_ids: Sequence[int],
        pad_id: int,
        max_length: int,
        batch_size: int,
        weights: Callable[[], AbstractContextManager[object]],
        autocast: torch.dtype | None = None,
        prompt_lookup: int | None = None,
    ) -> None:
        """Store the model; ``weights`` is a context manager that swaps in the critic's weights.

        ``prompt_lookup`` tokens at a time are guessed from the prompt and verified in one forward pass;
        that works on one row, so a batch is then one request.
        """
        self._model, self._renderer, self._weights = model, renderer, weights
        self.identity = identity
        self._end_ids, self._pad_id, self._max_length = list(end_ids), pad_id, max_length
        self._batch_size, self._autocast = 1 if prompt_lookup else batch_size, autocast
        self._prompt_lookup = prompt_lookup
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(causal, PreTrainedModel)
        self._causal = causal
        self._layout: Layout = proven_layout(
            causal, pad_id=pad_id, max_length=max_length, autocast=autocast
        )

    def complete(self, requests: Sequence[Request], on_reply: OnReply) -> list[Reply | NoReply]:
        """Return a reply per request; `NoReply` for a prompt that leaves no room for one."""
        replies: dict[int, Reply | NoReply] = {}
        prompts = [
            self._renderer.encode_messages(as_dicts(request.messages)) for request in requests
        ]
        fitting = []
        for index, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
            if len(prompt) + request.max_tokens > self._max_length:
                replies[index] = NoReply(
                    f"a prompt of {len(prompt)} tokens and a critique of up to "
                    f"{request.max_tokens} exceed the context of {self._max_length}"
                )
            else:
                fitting.append(index)
        fitting.sort(key=lambda index: (_mode(requests[index]), len(prompts[index])))
        while fitting:
            rows = [i for i in fitting if _mode(requests[i]) == _mode(requests[fitting[0]])]
            rows = rows[: self._batch_size]
            fitting = [index for index in fitting if index not in rows]
            batch = self._generate([prompts[i] for i in rows], [requests[i] for i in rows])
            for index, reply in zip(rows, batch, strict=True):
                replies[index] = reply
                on_reply(index, reply)
        return [replies[index] for index in range(len(requests))]

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Request]
    ) -> list[Reply]:
        device = next(self._model.parameters()).device
        with (
            self._weights(),
            torch.autocast(device.type, self._autocast, enabled=self._autocast is not None),
        ):
            self._model.eval()
            decode = self._decode_with_lookup if self._prompt_lookup else self._decode
            completions = decode(prompts, requests)
        return [self._reply(*pair) for pair in zip(prompts, completions, strict=True)]

    def _decode(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Request]
    ) -> list[list[int]]:
        temperature, max_tokens = _mode(requests[0])
        streams = (int(request_key("seed", request)[:32], 16) for request in requests)
        return sample_completions(
            self._causal, prompts, np.stack([uniforms(s, max_tokens) for s in streams]),
            distribution=TokenDistribution(temperature), end_ids=self._end_ids, pad_id=self._pad_id,
            max_length=self._max_length, layout=self._layout,
        )[0]  # fmt: skip

    def _decode_with_lookup(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Request]
    ) -> list[list[int]]:
        """Decode one reply, several tokens per forward pass where the guessed ones are right."""
        (prompt,), (request,) = prompts, requests
        temperature, max_tokens = _mode(request)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        ids_BT = torch.tensor([prompt], device=next(self._model.parameters()).device)
        # Only this device's generator: with several devices, torch warns against forking all of them.
        devices = [ids_BT.device] if ids_BT.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(request_key("seed", request)[:15], 16))
            out_BT = self._model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=max_tokens,
                eos_token_id=self._end_ids,
                pad_token_id=self._pad_id,
                repetition_penalty=1.0,  # as in `_decode`, whatever the model's generation config sets
                prompt_lookup_num_tokens=self._prompt_lookup,
                **(sampling if temperature > 0 else {"do_sample": False}),
            )
        return [out_BT[0, len(prompt) :].tolist()]

    def _reply(self, prompt: Sequence[int], ids: list[int]) -> Reply:
        end = next((i for i, token in enumerate(ids) if token in self._end_ids), None)
        completion = ids if end is None else ids[: end + 1]
        text = self._renderer.decode(completion)
        return Reply(text, end is not None, len(prompt), len(completion))


def _mode(request: Request) -> tuple[float, int]:
    return request.temperature, request.max_tokens
