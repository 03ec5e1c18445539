"""Samples completions of several prompts side by side: one prefill per prompt, no prefix run twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfteach.models.prefix_cache import States
from selfteach.rollout.decoding.forward import (
    CachedDecoder,
    Decoder,
    Layout,
    PrefilledPrompts,
    TransformersDecoder,
    UncachedDecoder,
)
from selfteach.rollout.decoding.llama import LlamaDecoder
from selfteach.rollout.decoding.token_sampling import TokenDistribution, sample_token

OnEnd = Callable[[int, States], None]
"""Takes the index of a completion that has ended, and its keys and values (`CachedDecoder.states`)."""


def sample_completions(
    causal: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms_BT: np.ndarray,
    *,
    distribution: TokenDistribution,
    end_ids: Sequence[int],
    pad_id: int,
    max_length: int,
    layout: Layout = "shared_prefix",
    least_shared: int | None = None,
    stored_Q: Sequence[States] | None = None,
    on_end: OnEnd | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Return the ids of B completions, equally many per prompt, and their log-probabilities (nats).

    Token t of completion b is drawn with ``uniforms_BT[b, t]``, whose T is the token limit. A
    completion ends with a token of ``end_ids``, or when prompt and completion have ``max_length``
    tokens. ``layout`` must be one that the model has proven (`proven_layout`); ``least_shared`` is the
    shortest prefix that is run once. Call it outside grad mode.

    With the layout ``shared_prefix`` a sequence can go on without running its tokens again: ``on_end``
    is called once with each completion's index and the keys and values of its prompt and all its tokens
    but the last, and ``stored_Q`` takes those of each prompt's first tokens.
    """
    assert layout == "shared_prefix" or (stored_Q is None and on_end is None)
    per_prompt = len(uniforms_BT) // len(prompts)
    batches = [list(range(len(prompts)))]
    if layout == "equal_lengths":
        rows_by_length: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_by_length.setdefault(len(prompt), []).append(row)
        batches = list(rows_by_length.values())
    sampled: dict[int, tuple[list[int], list[float]]] = {}
    for rows in batches:
        completions = [row * per_prompt + sample for row in rows for sample in range(per_prompt)]
        batch = _sample_batch(
            causal, [prompts[row] for row in rows], uniforms_BT[completions],
            distribution=distribution, end_ids=end_ids, pad_id=pad_id, max_length=max_length,
            layout=layout, least_shared=least_shared, stored_Q=stored_Q, on_end=on_end,
        )  # fmt: skip
        sampled.update(zip(completions, zip(*batch, strict=True), strict=True))
    ids, logps = zip(*(sampled[b] for b in range(len(uniforms_BT))), strict=True)
    return list(ids), list(logps)


def _sample_batch(
    causal: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms_BT: np.ndarray,
    *,
    distribution: TokenDistribution,
    end_ids: Sequence[int],
    pad_id: int,
    max_length: int,
    layout: Layout,
    least_shared: int | None,
    stored_Q: Sequence[States] | None,
    on_end: OnEnd | None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Sample a batch, see `sample_completions`.

    Completions of a prompt that are the same so far are one row of the batch, and rows whose
    completions have all ended are dropped.
    """
    completions, max_tokens = uniforms_BT.shape
    per_prompt = completions // len(prompts)
    logits_RV, decode = _start(causal, prompts, pad_id, completions, layout, least_shared, stored_Q)
    device = logits_RV.device
    continues_V = np.ones(logits_RV.shape[1], dtype=bool)
    continues_V[[i for i in end_ids if i < len(continues_V)]] = False
    room = [min(max_length - len(prompt), max_tokens) for prompt in prompts]
    room_B = np.repeat(room, per_prompt)
    ids_BT = np.zeros((completions, max_tokens), dtype=np.int64)
    logp_BT = np.zeros((completions, max_tokens))
    length_B = np.zeros(completions, dtype=np.int64)
    live_L = np.arange(completions)  # the completions that go on
    row_L = live_L // per_prompt  # the row of the batch that each of them is
    for t in range(max_tokens):
        token, logp = sample_token(
            logits_RV, torch.from_numpy(uniforms_BT[live_L, t]).to(device), distribution,
            torch.from_numpy(row_L).to(device),
        )  # fmt: skip
        token_L = token.cpu().numpy()
        ids_BT[live_L, t], logp_BT[live_L, t] = token_L, logp.cpu().numpy()
        length_B[live_L] = t + 1
        on = continues_V[token_L] & (t + 1 < room_B[live_L])
        if on_end is not None:
            assert isinstance(decode, CachedDecoder)
            for completion, row in zip(live_L[~on].tolist(), row_L[~on].tolist(), strict=True):
                on_end(completion, decode.states(row))
        live_L = live_L[on]
        if not len(live_L):
            break
        parent_R, token_R, row_L = next_rows(row_L[on], token_L[on])
        logits_RV = decode(parent_R, torch.from_numpy(token_R).to(device))
    return (
        [row[:n] for row, n in zip(ids_BT.tolist(), length_B.tolist(), strict=True)],
        [row[:n] for row, n in zip(logp_BT.tolist(), length_B.tolist(), strict=True)],
    )


def _start(
    causal: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, completions: int,
    layout: Layout, least_shared: int | None, stored_Q: Sequence[States] | None,
) -> tuple[Tensor, Decoder]:  # fmt: skip
    """Run the prompts; return the logits [Q, V] of the first tokens and what decodes the others."""
    if layout == "uncached":
        uncached = UncachedDecoder(causal, prompts)
        return uncached.logits(), uncached
    prefilled = PrefilledPrompts(causal, prompts, pad_id, layout, least_shared, stored_Q)
    if layout == "shared_prefix" and LlamaDecoder.supports(causal):
        return prefilled.logits_QV, LlamaDecoder(causal, prefilled, completions)
    return prefilled.logits_QV, TransformersDecoder(causal, prefilled)


def next_rows(row_L: np.ndarray, token_L: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of the next step: one per distinct (row, token) of the live completions.

    The result is each new row's parent and token [R], and the new row of each completion [L]. A
    parent's first child takes its place where that is among the first R, so that most rows stay where
    they are and need no copy.
    """
    if (np.bincount(row_L) == 1).all():  # no two completions share a row, and every row goes on
        token_R = np.empty_like(token_L)
        token_R[row_L] = token_L
        return np.arange(len(row_L)), token_R, row_L
    vocabulary = token_L.max() + 1
    pair_C, child_L = np.unique(row_L * vocabulary + token_L, return_inverse=True)
    parent_C, token_C = np.divmod(pair_C, vocabulary)
    rows = len(pair_C)
    stays_C = np.append(True, parent_C[1:] != parent_C[:-1]) & (parent_C < rows)
    place_C = np.empty(rows, dtype=np.int64)
    place_C[stays_C] = parent_C[stays_C]
    free = np.ones(rows, dtype=bool)
    free[parent_C[stays_C]] = False
    place_C[~stays_C] = free.nonzero()[0]
    order = np.argsort(place_C)
    return parent_C[order], token_C[order], place_C[child_L]
