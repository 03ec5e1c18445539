"""Runs a policy on PyTorch's ``meta`` device: it has shapes and no values, and who reads one is noted.

It takes the branches of a GPU, kernels aside. Without `Reads` whatever reads a value raises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

import selfteach
from selfteach.models import packed_attention
from selfteach.trainer.build import Built

META, CPU = torch.device("meta"), torch.device("cpu")
_SOURCES = str(Path(selfteach.__file__).parent)
_READ = torch.ops.aten._local_scalar_dense.default
_COPY = torch.ops.aten._to_copy.default


def move_to_meta(built: Built, patch: pytest.MonkeyPatch) -> None:
    """Move the policy and its teacher to the device without values."""
    policy, teacher = built.components.policy, built.components.teacher
    model = policy.model.to("meta")
    policy.trainable.update(
        {name: dict(model.named_parameters())[name] for name in policy.trainable}
    )
    weight_VH = model.get_output_embeddings().weight
    patch.setattr(policy, "_head", dataclasses.replace(policy._head, weight_VH=weight_VH))
    for name in ("_weights", "_initial"):
        if isinstance(weights := getattr(teacher, name, None), dict):
            patch.setattr(teacher, name, {key: value.to("meta") for key, value in weights.items()})
    # Autocast knows no such device; it is off here in any case.
    patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    if policy.packs_sequences:  # it was proved with a loop, which reads where sequences begin
        patch.setattr(packed_attention, "varlen_attn", varlen.varlen_attn)


class Reads(TorchDispatchMode):
    """Counts who waits for the device, by the function of selfteach: reads of values, which are ones
    here, and copies of values to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.copies = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _READ and args[0].is_meta:
            self.reads[_caller()] += 1
            return torch.ones((), dtype=args[0].dtype).item()
        if func is _COPY and kwargs.get("device", args[0].device) != args[0].device:
            if args[0].is_meta:
                self.reads[_caller()] += 1
                return _ones_like(args[0], kwargs.get("dtype"))
            self.copies[_caller()] += 1
        return func(*args, **kwargs)


def _ones_like(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.ones(values.shape, dtype=dtype or values.dtype)


def _caller() -> str:
    """Return the name of selfteach's innermost function that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_SOURCES) and not code.co_name.startswith("<"):
            return code.co_name
        frame = frame.f_back
    return "?"
