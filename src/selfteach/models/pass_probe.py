"""Prove on a few tokens that two ways of running a model have the same states and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from selfteach.models import plain_pass


def states_and_gradients(
    model: nn.Module, layers: Sequence[nn.Module], states: Callable[[], Tensor]
) -> list[Tensor]:
    """Return states [N, H] without and with gradients, and gradients of a layer's trainable weights.

    ``states`` computes them in grad mode or not. The layer is the first that trains, behind which all
    others are. No weight has a gradient afterwards; with sharded weights all ranks call this together,
    and it returns this rank's part of the gradients.
    """
    model.train(not _draws(model))
    try:
        with torch.no_grad():
            results = [states()]
        trained = ([w for w in layer.parameters() if w.requires_grad] for layer in layers)
        if weights := next(filter(None, trained), None):
            with torch.enable_grad():
                states_NH = states()
                direction_H = torch.linspace(-1, 1, states_NH.shape[1], device=states_NH.device)
                summed = (states_NH.float() * direction_H).square().sum()
            results += [states_NH.detach(), _gradients(model, summed, weights)]
    finally:
        model.eval()
    return results


def agree(ours: Sequence[Tensor], plain: Sequence[Tensor], *, rounded: bool) -> bool:
    """Return whether two results are the same but for rounding (`plain_pass.agree`).

    Gradients may differ by twice as much as states: they are rounded on the way back too.
    """
    factors = (1.0, 1.0, 2.0)
    return all(
        plain_pass.agree(one, other, rounded=rounded, spread=factor * float(other.double().std()))
        for one, other, factor in zip(ours, plain, factors[: len(plain)], strict=True)
    )


def _gradients(model: nn.Module, summed: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return gradients end to end. Those of other weights are not made, except with shards: FSDP2 sums
    gradients over ranks, and frees what it has gathered, in a whole backward pass alone."""
    if not any(isinstance(weight, DTensor) for weight in weights):
        gradients = torch.autograd.grad(summed, list(weights), materialize_grads=True)
        return torch.cat([gradient.flatten().float() for gradient in gradients])
    summed.backward()
    parts = [w.grad.to_local().flatten() for w in weights if isinstance(w.grad, DTensor)]
    for weight in model.parameters():
        weight.grad = None
    return torch.cat(parts).float()


def _draws(model: nn.Module) -> bool:
    """Return whether training mode draws random numbers, which other passes draw otherwise."""
    return any(
        isinstance(rate := getattr(module, name, None), float) and rate > 0
        for module in model.modules()
        for name in ("p", "attention_dropout")
    )
