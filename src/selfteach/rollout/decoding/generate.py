"""Answers to several prompts, side by side: one prefill per prompt, no beginning computed twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from selfteach.rollout.decoding.forward import ModelPasses, Passes, Prompts
from selfteach.rollout.decoding.llama import LlamaPasses
from selfteach.rollout.decoding.token_sampling import draw


def decoded(
    causal: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms_BT: np.ndarray,
    *,
    temperature: float,
    end_ids: Sequence[int],
    pad_id: int,
    max_length: int,
) -> tuple[list[list[int]], list[list[float]]]:
    """The ids of B answers, as many to each prompt in turn, and their log-probabilities (nats).

    Token t of answer b is drawn with ``uniforms_BT[b, t]``, which says how long an answer may get.
    One ends with a token of ``end_ids``, or where prompt and answer have ``max_length`` tokens.

    Answers to one prompt that are the same so far are one row of the batch, and rows whose answers have
    all ended are none. Call it outside grad mode.
    """
    answers, max_tokens = uniforms_BT.shape
    each = answers // len(prompts)
    read = Prompts(causal, prompts, pad_id)
    step = _passes(causal, read, answers)
    logits_RV = read.logits_QV
    device = logits_RV.device
    goes_on_V = np.ones(logits_RV.shape[1], dtype=bool)
    goes_on_V[[i for i in end_ids if i < len(goes_on_V)]] = False
    room_B = np.repeat([max_length - len(prompt) for prompt in prompts], each)
    ids_BT = np.zeros((answers, max_tokens), dtype=np.int64)
    logp_BT = np.zeros((answers, max_tokens))
    length_B = np.zeros(answers, dtype=np.int64)
    live_L = np.arange(answers)  # the answers that go on
    row_L = live_L // each  # the row of the batch that each of them is
    for t in range(max_tokens):
        token, logp = draw(
            logits_RV, torch.from_numpy(uniforms_BT[live_L, t]).to(device), temperature,
            torch.from_numpy(row_L).to(device),
        )  # fmt: skip
        token_L = token.cpu().numpy()
        ids_BT[live_L, t], logp_BT[live_L, t] = token_L, logp.cpu().numpy()
        length_B[live_L] = t + 1
        on = goes_on_V[token_L] & (t + 1 < room_B[live_L])
        live_L = live_L[on]
        if not len(live_L) or t == max_tokens - 1:
            break
        parent_R, token_R, row_L = branches(row_L[on], token_L[on])
        logits_RV = step(parent_R, torch.from_numpy(token_R).to(device))
    return (
        [row[:n] for row, n in zip(ids_BT.tolist(), length_B.tolist(), strict=True)],
        [row[:n] for row, n in zip(logp_BT.tolist(), length_B.tolist(), strict=True)],
    )


def _passes(causal: PreTrainedModel, read: Prompts, answers: int) -> Passes:
    if LlamaPasses.fits(causal):
        return LlamaPasses(causal, read, answers)
    return ModelPasses(causal, read)


def branches(row_L: np.ndarray, token_L: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of the next pass: each different (row, token) of the answers that go on.

    Returns each new row's parent and token [R], and the new row of each answer [L]. A parent's first
    child takes its place where that is among the first R, so that most rows stay where they are.
    """
    if (np.bincount(row_L) == 1).all():  # nobody shares a row, and every row goes on
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
