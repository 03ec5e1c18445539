"""The self-teacher's weights: the initial policy's, the live policy's, an average, or a mixture.

A teacher is the policy's own module with other values in the weights that train: nothing else is
copied. Its state survives a resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from selfteach.models.fsdp import assign
from selfteach.models.lm_head import Scores
from selfteach.models.policy import Policy
from selfteach.types import Sequences


class InitialTeacher:
    """The frozen initial policy: a copy of the weights, or the adapters switched off."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._weights = {} if policy.has_adapters else _copy(policy)

    @torch.no_grad()
    def score(self, sequences: Sequences) -> Scores:
        """Logits under the initial weights."""
        return score_initial(self._policy, self._weights, sequences)

    def update(self) -> None:
        """Frozen: nothing to do."""

    def state(self) -> Mapping[str, Tensor]:
        """The initial weights (none when they are the adapters switched off)."""
        return self._weights

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up saved initial weights."""
        _load(self._weights, state)


class LiveTeacher:
    """The policy as it is now."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @torch.no_grad()
    def score(self, sequences: Sequences) -> Scores:
        """Logits under the current weights."""
        return self._policy.score(sequences)

    def update(self) -> None:
        """Follows by itself."""

    def state(self) -> Mapping[str, Tensor]:
        """Nothing of its own."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing of its own."""


class EmaTeacher:
    """An exponential moving average of the policy's weights.

    After each optimizer step ``average += rate * (weights - average)``.
    """

    def __init__(self, policy: Policy, rate: float) -> None:
        self._policy, self._rate = policy, rate
        self._weights = _copy(policy)

    @torch.no_grad()
    def score(self, sequences: Sequences) -> Scores:
        """Logits under the averaged weights."""
        with self._policy.weights_swapped(self._weights):
            return _own_head(self._policy.score(sequences))

    @torch.no_grad()
    def update(self) -> None:
        """Move a step towards the policy."""
        for name, param in self._policy.trainable.items():
            self._weights[name].lerp_(param.detach(), self._rate)

    def state(self) -> Mapping[str, Tensor]:
        """The averaged weights."""
        return self._weights

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up saved averages."""
        _load(self._weights, state)


class TrustRegionTeacher:
    """Logits between the initial policy's and the live policy's (SDPO, arXiv:2601.20802).

    ``logits = (1 - student_mix) * initial + student_mix * live``: a teacher that follows the policy
    but cannot leave the neighbourhood of where it began.
    """

    def __init__(self, policy: Policy, student_mix: float) -> None:
        self._policy, self._student_mix = policy, student_mix
        self._weights = {} if policy.has_adapters else _copy(policy)

    @torch.no_grad()
    def score(self, sequences: Sequences) -> Scores:
        """Logits interpolated between initial and current weights."""
        ((initial, initial_head, _),) = score_initial(self._policy, self._weights, sequences).terms
        ((live, live_head, _),) = self._policy.score(sequences).terms
        share = self._student_mix
        return Scores(((initial, initial_head, 1 - share), (live, live_head, share)))

    def update(self) -> None:
        """Follows by itself."""

    def state(self) -> Mapping[str, Tensor]:
        """The initial weights (none when they are the adapters switched off)."""
        return self._weights

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up saved initial weights."""
        _load(self._weights, state)


def score_initial(policy: Policy, weights: Mapping[str, Tensor], sequences: Sequences) -> Scores:
    """Logits under the initial policy: adapters off, or the kept copy of the weights."""
    if policy.has_adapters:
        with policy.adapters_off():
            return policy.score(sequences)
    with policy.weights_swapped(weights):
        return _own_head(policy.score(sequences))


def _own_head(scores: Scores) -> Scores:
    """Scores that keep the head they were made with when the policy's weights are swapped back.

    The head's parameter *object* belongs to the policy; the values behind it are the teacher's only
    inside the swap, and logits are computed later.
    """
    return Scores(
        tuple(
            (
                hidden,
                replace(
                    head,
                    weight_VH=head.weight_VH.detach(),
                    bias_V=None if head.bias_V is None else head.bias_V.detach(),
                ),
                mix,
            )
            for hidden, head, mix in scores.terms
        )
    )


def _copy(policy: Policy) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in policy.trainable.items()}


def _load(weights: dict[str, Tensor], state: Mapping[str, Tensor]) -> None:
    assert weights.keys() == state.keys(), "the saved teacher has other weights"
    for name, value in state.items():
        assign(weights[name], value)
