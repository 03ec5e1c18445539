"""End a run whose loss is NaN or infinite before an update is made, and save the batch.

``nonfinite/step_000012.safetensors`` holds the micro-batch (the fields of `types.Batch`, the sequences'
as ``student.ids_BT``, …) and the statistics of each of its tokens (``stats.loss``, ``stats.logp``, …).
The rollouts are in ``rollouts/`` of the same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from safetensors.torch import save_file
from torch import Tensor

from selfteach.errors import LossError
from selfteach.runtime.atomic_files import atomic_path
from selfteach.runtime.run_folder import RunFolder
from selfteach.types import Batch, Sequences


class NonFiniteLoss(LossError):
    """Raised when the loss of a micro-batch is NaN or infinite."""

    def __init__(self, loss: float, batch: Batch, stats: Mapping[str, Tensor]) -> None:
        super().__init__(f"the loss is {loss}; no update was made")
        self.tensors = {
            **_fields(batch),
            **{f"stats.{name}": value for name, value in stats.items()},
        }


def require_finite(stats: Sequence[Mapping[str, Tensor]], batches: Sequence[Batch]) -> None:
    """Raise `NonFiniteLoss` for the first micro-batch whose loss (``total``) is not finite."""
    if not stats:
        return
    # Read once: a GPU is waited for here, and not after each micro-batch.
    totals = torch.cat([batch_stats["total"] for batch_stats in stats]).tolist()
    for total, batch_stats, batch in zip(totals, stats, batches, strict=True):
        if not math.isfinite(total):
            raise NonFiniteLoss(total, batch, batch_stats)


@contextmanager
def save_nonfinite_batch(run: RunFolder, step: int) -> Iterator[None]:
    """Save the micro-batch of a `NonFiniteLoss` raised in the block, and raise a `LossError`."""
    try:
        yield
    except NonFiniteLoss as error:
        path = run.path / "nonfinite" / f"step_{step:06d}.safetensors"
        with atomic_path(path) as temporary:
            tensors = {n: t.detach().cpu().contiguous() for n, t in error.tensors.items()}
            save_file(tensors, temporary)
        raise LossError(
            f"step {step}: {error}; the batch is {path}, its rollouts are in "
            f"rollouts/step_{step:06d}.*.jsonl. A resume would fail in the same way: look at the "
            "batch, and start a new run with a lower optimizer.lr, or with wider model.autocast and "
            "model.weights_dtype"
        ) from None


def _fields(batch: Batch) -> dict[str, Tensor]:
    """Return a batch's tensors by name, as copies that share no storage."""
    tensors: dict[str, Tensor] = {}
    for name in batch.__slots__:
        value = getattr(batch, name)
        if isinstance(value, Tensor):
            tensors[name] = value.clone()
        elif isinstance(value, Sequences):
            for part in ("ids_BT", "rows_N", "columns_N"):
                tensors[f"{name}.{part}"] = getattr(value, part).clone()
    return tensors
