"""Choose the fastest layout of prompts in which a model samples what its plain pass says."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfteach.models import plain_pass
from selfteach.models.prefix_cache import States
from selfteach.rollout.decoding.forward import Layout
from selfteach.rollout.decoding.generate import sample_completions
from selfteach.rollout.decoding.token_sampling import TokenDistribution

_log = logging.getLogger(__name__)
_SLOWER = {
    "left_padded": "prompts are padded on the left and a prefix they share is run for each of them",
    "equal_lengths": "only prompts of equal lengths are sampled side by side",
    "uncached": "it samples without a cache, which is slow: each token costs a pass over all before it",
}


@torch.no_grad()
def proven_layout(
    causal: PreTrainedModel, *, pad_id: int, max_length: int, autocast: torch.dtype | None = None
) -> Layout:
    """Return the fastest layout whose samples have the log-probabilities of the plain pass.

    Samples a few tokens after a ragged batch of prompts with a shared beginning; windows that
    sequences of ``max_length`` tokens reach past are made shorter than the prompts. A slower layout
    than the first is reported on the package's logger.
    Raises `EngineError` for a model that is not causal.
    """
    causal.eval()
    device = next(causal.parameters()).device
    with (
        torch.autocast(device.type, autocast, enabled=autocast is not None),
        plain_pass.shrunk_windows(causal, max_length),
    ):
        plain_pass.require_causal(causal, autocast=autocast)
        layouts = get_args(Layout)
        # With windows, padding between the shared part and the rest would count as tokens.
        candidates = layouts if plain_pass.attends_to_all(causal, max_length) else layouts[1:]
        layout = next(
            layout for layout in candidates if _is_exact(causal, layout, pad_id, autocast)
        )
    if layout != "shared_prefix":
        _log.warning("%s: %s", type(causal).__name__, _SLOWER[layout])
    return layout


def _is_exact(
    causal: PreTrainedModel, layout: Layout, pad_id: int, autocast: torch.dtype | None
) -> bool:
    if layout == "uncached":  # the plain pass itself
        return True
    prompts = plain_pass.probe_prompts(causal.config.get_text_config().vocab_size)
    # At this temperature logits have a spread of 1: certain tokens would agree whatever is wrong.
    temperature = float(plain_pass.plain_logits(causal, prompts[-1]).double().std().clamp(min=1e-6))
    uniforms_BT = np.random.default_rng(0).random((2 * len(prompts), plain_pass.PROBE_COMPLETION))
    sample = partial(
        sample_completions, causal, distribution=TokenDistribution(temperature), end_ids=(),
        pad_id=pad_id, max_length=sys.maxsize, layout=layout, least_shared=plain_pass.PROBE_SHARED,
    )  # fmt: skip
    states_B: dict[int, States] = {}
    continues = layout == "shared_prefix"
    on_end = states_B.__setitem__ if continues else None
    try:
        ids, logps = sample(prompts, uniforms_BT, on_end=on_end)
        turns = [[(prompts[row // 2], completion)] for row, completion in enumerate(ids)]
        if continues:  # a second turn, whose replies have different lengths
            replies = [prompts[0][: 1 + row % 3] for row in range(len(ids))]
            longer = [
                [*prompt, *completion, *reply]
                for ((prompt, completion),), reply in zip(turns, replies, strict=True)
            ]
            stored_Q = [states_B[row] for row in range(len(ids))]
            ids, more_logps = sample(longer, uniforms_BT, stored_Q=stored_Q)
            for row, turn in zip(turns, zip(longer, ids, strict=True), strict=True):
                row.append(turn)
            logps = [x for both in zip(logps, more_logps, strict=True) for x in both]
    except Exception:  # a model's code raises anything for a cache that it does not know
        return False
    plain = [logp for row in turns for logp in _plain_logps(causal, row, temperature)]
    rounded = plain_pass.is_rounded(causal, autocast)
    return plain_pass.agree(
        torch.tensor(np.concatenate(logps)), torch.cat(plain)[:, 0].cpu(), rounded=rounded
    )


def _plain_logps(
    causal: PreTrainedModel,
    turns: Sequence[tuple[Sequence[int], Sequence[int]]],
    temperature: float,
) -> Iterator[Tensor]:
    """Yield the log-probabilities [T, 1] of each turn's completion from one pass over the last turn.

    ``turns`` are prompts with their completions, each the beginning of the next.
    """
    prompt, completion = turns[-1]
    logits_TV = plain_pass.plain_logits(causal, [*prompt, *completion[:-1]])
    for prompt, completion in turns:
        first = len(prompt) - 1
        logp_TV = (logits_TV[first : first + len(completion)].double() / temperature).log_softmax(
            -1
        )
        yield logp_TV.gather(1, torch.tensor(completion, device=logp_TV.device)[:, None])
