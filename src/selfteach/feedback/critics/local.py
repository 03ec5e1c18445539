"""A transformers model in this process as a chat model; also the solver's own initial weights.

A reply depends on its request alone (but for the last bits of a batch's sums): the random stream with
which it is drawn is its own. What the prompts of a batch begin with is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from selfteach.feedback.critics.chat_model import Keep, NoReply, Reply, Request, as_dicts, key_of
from selfteach.prompts.renderer import Renderer
from selfteach.rollout.decoding.generate import decoded
from selfteach.rollout.decoding.token_sampling import uniforms


class LocalModel:
    """Replies in batches, rows of similar length side by side."""

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
        """``weights`` is entered around all use of the model: it puts the critic's weights in place.

        ``prompt_lookup`` tokens at a time are guessed from the prompt and checked in one pass; guessing
        works on one row, so a batch is then one request.
        """
        self._model, self._renderer, self._weights = model, renderer, weights
        self.identity = identity
        self._end_ids, self._pad_id, self._max_length = list(end_ids), pad_id, max_length
        self._batch, self._autocast = 1 if prompt_lookup else batch_size, autocast
        self._guessed = prompt_lookup
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(causal, PreTrainedModel)
        self._causal = causal

    def complete(self, requests: Sequence[Request], keep: Keep) -> list[Reply | NoReply]:
        """Reply to all; a prompt that leaves no room for a reply gets none, and nothing is cut."""
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
            rows = rows[: self._batch]
            fitting = [index for index in fitting if index not in rows]
            written = self._write([prompts[i] for i in rows], [requests[i] for i in rows])
            for index, reply in zip(rows, written, strict=True):
                replies[index] = reply
                keep(index, reply)
        return [replies[index] for index in range(len(requests))]

    @torch.no_grad()
    def _write(self, prompts: Sequence[Sequence[int]], requests: Sequence[Request]) -> list[Reply]:
        device = next(self._model.parameters()).device
        with (
            self._weights(),
            torch.autocast(device.type, self._autocast, enabled=self._autocast is not None),
        ):
            self._model.eval()
            write = self._guess if self._guessed else self._decode
            written = write(prompts, requests)
        return [self._reply(*pair) for pair in zip(prompts, written, strict=True)]

    def _decode(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Request]
    ) -> list[list[int]]:
        temperature, max_tokens = _mode(requests[0])
        streams = (int(key_of("seed", request)[:32], 16) for request in requests)
        return decoded(
            self._causal, prompts, np.stack([uniforms(s, max_tokens) for s in streams]),
            temperature=temperature, end_ids=self._end_ids, pad_id=self._pad_id,
            max_length=self._max_length,
        )[0]  # fmt: skip

    def _guess(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[Request]
    ) -> list[list[int]]:
        """One reply, several tokens to a pass where what was guessed is what it says."""
        (prompt,), (request,) = prompts, requests
        temperature, max_tokens = _mode(request)
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        ids_BT = torch.tensor([prompt], device=next(self._model.parameters()).device)
        # Only this device's stream: on a machine with several, torch warns of asking for all.
        own = [ids_BT.device] if ids_BT.is_cuda else []
        with torch.random.fork_rng(devices=own):
            torch.manual_seed(int(key_of("seed", request)[:15], 16))
            out_BT = self._model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=max_tokens,
                eos_token_id=self._end_ids,
                pad_token_id=self._pad_id,
                repetition_penalty=1.0,  # whatever the model's own settings say: as without guesses
                prompt_lookup_num_tokens=self._guessed,
                **(drawn if temperature > 0 else {"do_sample": False}),
            )
        return [out_BT[0, len(prompt) :].tolist()]

    def _reply(self, prompt: Sequence[int], ids: list[int]) -> Reply:
        end = next((i for i, token in enumerate(ids) if token in self._end_ids), None)
        written = ids if end is None else ids[: end + 1]
        text = self._renderer.decode(written)
        return Reply(text, end is not None, len(prompt), len(written))


def _mode(request: Request) -> tuple[float, int]:
    return request.temperature, request.max_tokens
