"""A transformers model in this process as a chat model; also the solver's own initial weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from selfteach.critics.chat import Keep, NoReply, Reply, Request, as_dicts, key_of
from selfteach.rendering import Renderer


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
        batch: int,
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
        self._batch, self._autocast = 1 if prompt_lookup else batch, autocast
        self._guessed = {"prompt_lookup_num_tokens": prompt_lookup} if prompt_lookup else {}

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
        temperature, max_tokens = _mode(requests[0])
        device = next(self._model.parameters()).device
        ids_BT, mask_BT = self._padded(prompts, device)
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with (
            self._weights(),
            torch.random.fork_rng(),
            torch.autocast(device.type, self._autocast, enabled=self._autocast is not None),
        ):
            torch.manual_seed(int(key_of("seed", requests[0])[:15], 16))
            self._model.eval()
            out_BT = self._model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=max_tokens,
                eos_token_id=self._end_ids,
                pad_token_id=self._pad_id,
                **self._guessed,
                **(drawn if temperature > 0 else {"do_sample": False}),
            )
        return [
            self._reply(prompt, row.tolist())
            for prompt, row in zip(prompts, out_BT[:, ids_BT.shape[1] :], strict=True)
        ]

    def _reply(self, prompt: Sequence[int], ids: list[int]) -> Reply:
        end = next((i for i, token in enumerate(ids) if token in self._end_ids), None)
        written = ids if end is None else ids[: end + 1]
        text = self._renderer.decode(written)
        return Reply(text, end is not None, len(prompt), len(written))

    def _padded(
        self, prompts: Sequence[Sequence[int]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        ids_BT = torch.full((len(prompts), width), self._pad_id, device=device)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
            mask_BT[row, width - len(prompt) :] = 1
        return ids_BT, mask_BT


def _mode(request: Request) -> tuple[float, int]:
    return request.temperature, request.max_tokens
