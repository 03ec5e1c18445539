"""Provide divergences of every kind, and float64 tensors to compare them with."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from selfteach.losses.divergence import Divergence

INF, LN2, LN3 = math.inf, math.log(2), math.log(3)

# Whole-vocabulary and top-K specs, whose loss is the divergence itself.
EXACT = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd"),
    Divergence("jsd", beta=0.2),
    Divergence("jsd", beta=0.9, jsd_scaled=True),
]
EXACT += [replace(spec, support="top_k", top_k=2) for spec in EXACT]
EXACT += [replace(spec, support="top_k", top_k=3, top_k_from="teacher") for spec in EXACT[:5]]
CLIPPED = [replace(spec, clip=0.02) for spec in EXACT]
TEMPERED = [replace(spec, temperature=1.7) for spec in EXACT + CLIPPED]
SAMPLED = [
    Divergence("forward_kl", support="sampled"),
    Divergence("reverse_kl", support="sampled"),
    Divergence("reverse_kl", support="sampled", control_variate=True),
]


def name(spec: Divergence) -> str:
    labels = [spec.kind, spec.support, spec.top_k_from, f"b{spec.beta}"]
    labels += [key for key in ("jsd_scaled", "control_variate") if getattr(spec, key)]
    return "-".join([*labels, f"clip{spec.clip}", f"T{spec.temperature}"])


def label(value: object) -> str:
    """Return a parameter's part of a test's name."""
    return name(value) if isinstance(value, Divergence) else str(value)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got: Tensor, want: Tensor | float, rtol: float = 1e-12, atol: float = 0.0) -> None:
    want = torch.as_tensor(want, dtype=torch.float64).expand_as(got)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
