"""Score with a self-teacher: the initial or current policy, an average of its weights, or a mixture.

A teacher is the policy's module with other values in the trainable weights: nothing else is copied.
Its state is saved in checkpoints.
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
    """Scores with the frozen initial policy: a copy of the weights, or the adapters switched off."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._weights = {} if policy.has_adapters else _copy(policy)

    @torch.no_grad()
    def score(self, sequences: Sequences) -> Scores:
        """Return logits under the initial weights."""
        return score_initial(self._policy, self._weights, sequences)

    def update(self) -> None:
        """Do nothing: the weights are frozen."""

    def state(self) -> Mapping[str, Tensor]:
        """Return the initial weights (none when they are the adapters switched off)."""
        return self._weights

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore saved initial weights."""
        _load(self._weights, state)


class LiveTeacher:
    """Scores with the current policy."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @torch.no_grad()
    def score(self, sequences: Sequences) -> Scores:
        """Return logits under the current weights."""
        return self._policy.score(sequences)

    def update(self) -> None:
        """Do nothing: the policy's weights are the teacher's."""

    def state(self) -> Mapping[str, Tensor]:
        """Return nothing: the weights are in the policy's checkpoint."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing: the weights are in the policy's checkpoint."""


class EmaTeacher:
    """Scores with an exponential moving average (EMA) of the policy's weights.

    After each optimizer step ``average += rate * (weights - average)``.
    """

    def __init__(self, policy: Policy, rate: float) -> None:
        self._policy, self._rate = policy, rate
        self._weights = _copy(policy)

    @torch.no_grad()
    def score(self, sequences: Sequences) -> Scores:
        """Return logits under the averaged weights."""
        with self._policy.weights_swapped(self._weights):
            return _detached_head(self._policy.score(sequences))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the policy's weights."""
        for name, param in self._policy.trainable.items():
            self._weights[name].lerp_(param.detach(), self._rate)

    def state(self) -> Mapping[str, Tensor]:
        """Return the averaged weights."""
        return self._weights

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore saved averages."""
        _load(self._weights, state)


class TrustRegionTeacher:
    """Interpolates between the initial and the current policy's logits (SDPO, arXiv:2601.20802).

    ``logits = (1 - student_mix) * initial + student_mix * current``: a teacher that follows the policy
    but stays close to the initial one.
    """

    def __init__(self, policy: Policy, student_mix: float) -> None:
        self._policy, self._student_mix = policy, student_mix
        self._weights = {} if policy.has_adapters else _copy(policy)

    @torch.no_grad()
    def score(self, sequences: Sequences) -> Scores:
        """Return logits interpolated between initial and current weights."""
        ((initial, initial_head, _),) = score_initial(self._policy, self._weights, sequences).terms
        ((current, current_head, _),) = self._policy.score(sequences).terms
        share = self._student_mix
        return Scores(((initial, initial_head, 1 - share), (current, current_head, share)))

    def update(self) -> None:
        """Do nothing: the policy's weights are the teacher's."""

    def state(self) -> Mapping[str, Tensor]:
        """Return the initial weights (none when they are the adapters switched off)."""
        return self._weights

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore saved initial weights."""
        _load(self._weights, state)


def score_initial(policy: Policy, weights: Mapping[str, Tensor], sequences: Sequences) -> Scores:
    """Return logits under the initial policy: adapters off, or a copy of the weights."""
    if policy.has_adapters:
        with policy.adapters_off():
            return policy.score(sequences)
    with policy.weights_swapped(weights):
        return _detached_head(policy.score(sequences))


def _detached_head(scores: Scores) -> Scores:
    """Return scores whose head keeps its values when the policy's weights are swapped back.

    The head's parameter *object* belongs to the policy; it holds the teacher's values only inside the
    swap, and logits are computed after it.
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
