"""Runs a model's forward passes: one prefill of all prompts, then one token per row and step.

A row of the batch stands for all completions of a prompt that are the same so far. Before each step
rows are rearranged: ``parent_R`` names, for each row of the step, the row of the step before that it
continues. Rows that no row continues are dropped, and several rows may continue the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from selfteach.models import prefix_cache
from selfteach.models.plain_pass import backbone_of
from selfteach.models.prefix_cache import States

Layout = Literal["shared_prefix", "left_padded", "equal_lengths", "uncached"]
"""How prompts of a batch lie side by side, from the fastest to the slowest way:

- ``shared_prefix``: ``[shared | padding | rest]``, the prefix that all share is run once;
- ``left_padded``: ``[padding | prompt]``, for windows, which padding inside a prompt would use up;
- ``equal_lengths``: no padding, prompts of one length at a time, for layers that read padding;
- ``uncached``: the plain pass over all tokens for each new one, for models whose cache is not known.
"""


class PrefilledPrompts:
    """Runs the prompts and holds their keys and values, one row each: ``[shared | padding | rest]``.

    The prefix that all prompts share is run once (`prefix_cache`); the rest is padded on the left.
    Under another layout than ``shared_prefix`` there is no shared part, and prompts of equal lengths
    are not padded.

    ``stored_Q`` has, for each prompt, the keys and values of its first tokens (`CachedDecoder.states`):
    only the tokens after them are run. The rows are ``[shared | padding | stored | padding | rest]``
    then, which only the layout ``shared_prefix`` has been proven for.
    """

    def __init__(
        self,
        causal: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        layout: Layout = "shared_prefix",
        least_shared: int | None = None,
        stored_Q: Sequence[States] | None = None,
    ) -> None:
        device = next(causal.parameters()).device
        shared = 0
        if layout == "shared_prefix":
            shared = prefix_cache.shared_length(prompts, least_shared)
        # Without a config every layer's cache is one of keys and values of all tokens.
        self.cache = DynamicCache(config=None if layout == "shared_prefix" else causal.config)
        cached_Q = [shared] * len(prompts)
        if stored_Q is not None:
            cached_Q = [prefix_cache.length(states) for states in stored_Q]
            shared = shared if shared <= min(cached_Q) else 0
            self.cache = prefix_cache.restore(stored_Q, shared)
        elif shared:
            prefix = torch.tensor(prompts[0][:shared], device=device)
            self.cache = prefix_cache.fill(backbone_of(causal), prefix, len(prompts))
        self.shared = shared
        rests = [prompt[cached:] for prompt, cached in zip(prompts, cached_Q, strict=True)]
        ids, mask_rest = _padded(rests, pad_id)
        after_shared = [range(cached - shared) for cached in cached_Q]
        mask_stored = _padded(after_shared, pad_id)[1]
        ones = torch.ones((len(prompts), shared), dtype=torch.long)
        mask = torch.cat([ones, mask_stored, mask_rest], 1)
        padded = not bool(mask.all())
        ids, mask = ids.to(device), mask.to(device)
        self.lengths_Q = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.mask_QT = mask if padded else None
        """1 for a token, 0 for padding; None if there is no padding."""
        self.width = mask.shape[1]
        cache_name = prefix_cache.cache_argument(causal)
        self.logits_QV: Tensor = causal(
            input_ids=ids,
            attention_mask=self.mask_QT,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            **{cache_name: self.cache},
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        """Logits of each completion's first token."""


def _padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return rows padded on the left, and their mask: 1 for a token, 0 for padding."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, width - len(row) :] = torch.tensor(row)
        mask[at, width - len(row) :] = 1
    return ids, mask


@runtime_checkable
class Decoder(Protocol):
    """Runs decoding steps of one token per row."""

    def __call__(self, parent_R: np.ndarray, token_R: Tensor) -> Tensor:
        """Append ``token_R`` to the rows ``parent_R``; return the logits [R, V] of the next token."""
        ...


@runtime_checkable
class CachedDecoder(Decoder, Protocol):
    """Decodes with keys and values of all tokens of a row, which it can hand out."""

    def states(self, row: int) -> States:
        """Return keys and values of a row's tokens that have been run."""
        ...


class TransformersDecoder:
    """Decodes with any model that takes transformers' dynamic cache."""

    def __init__(self, causal: PreTrainedModel, prompts: PrefilledPrompts) -> None:
        self._causal, self._cache, self._mask_RT = causal, prompts.cache, prompts.mask_QT
        self._cache_name = prefix_cache.cache_argument(causal)
        self._position_R = prompts.lengths_Q

    def __call__(self, parent_R: np.ndarray, token_R: Tensor) -> Tensor:
        """Run one step; see `Decoder`."""
        mask_RT = self._mask_RT
        if not np.array_equal(parent_R, np.arange(len(self._position_R))):
            parent = torch.from_numpy(parent_R).to(token_R.device)
            # Recurrent states have no other way. The annotation means dtype int64, as `parent` has.
            self._cache.reorder_cache(parent)  # pyright: ignore[reportArgumentType]
            self._position_R = self._position_R[parent]
            mask_RT = mask_RT[parent] if mask_RT is not None else None
        if mask_RT is not None:
            self._mask_RT = F.pad(mask_RT, (0, 1), value=1)
        logits = self._causal(
            input_ids=token_R[:, None],
            attention_mask=self._mask_RT,
            position_ids=self._position_R[:, None],
            **{self._cache_name: self._cache},
            use_cache=True,
        ).logits[:, -1]
        self._position_R = self._position_R + 1
        return logits

    def states(self, row: int) -> States:
        """Return a row's keys and values, see `CachedDecoder`."""
        layers: Any = self._cache.layers
        tokens = ... if self._mask_RT is None else self._mask_RT[row].bool()
        return tuple(
            (layer.keys[row][:, tokens].clone(), layer.values[row][:, tokens].clone())
            for layer in layers
        )


class UncachedDecoder:
    """Decodes by the model's plain pass over all tokens of each row: slow, and right by definition."""

    def __init__(self, causal: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._causal = causal
        self._rows = [list(prompt) for prompt in prompts]

    def __call__(self, parent_R: np.ndarray, token_R: Tensor) -> Tensor:
        """Run one step; see `Decoder`."""
        self._rows = [
            [*self._rows[parent], token]
            for parent, token in zip(parent_R.tolist(), token_R.tolist(), strict=True)
        ]
        return self.logits()

    def logits(self) -> Tensor:
        """Compute the logits [R, V] of each row's next token, rows of one length at a time."""
        device = next(self._causal.parameters()).device
        by_length: dict[int, list[int]] = {}
        for row, ids in enumerate(self._rows):
            by_length.setdefault(len(ids), []).append(row)
        by_row: dict[int, Tensor] = {}
        for rows in by_length.values():
            ids = torch.tensor([self._rows[row] for row in rows], device=device)
            logits = self._causal(input_ids=ids, use_cache=False).logits[:, -1]
            by_row.update(zip(rows, logits, strict=True))
        return torch.stack([by_row[row] for row in range(len(self._rows))])
