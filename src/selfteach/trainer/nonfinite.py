"""A loss that is not a number ends a run before it can spoil the weights; its batch is kept.

``offending/step_000012.safetensors`` holds the micro-batch (the fields of `types.Batch`, the sequences'
as ``student.ids_BT``, …) and what was said of each of its tokens (``loss``, ``logp``, …). Which answers
they are stands in ``samples/`` of the same step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from safetensors.torch import save_file
from torch import Tensor

from selfteach.errors import LossError
from selfteach.runtime.run_folder import RunFolder, written_whole
from selfteach.types import Batch, Sequences


class NotFinite(LossError):
    """The loss of a micro-batch is not a number, or infinite."""

    def __init__(self, loss: float, batch: Batch, said: Mapping[str, Tensor]) -> None:
        super().__init__(f"the loss is {loss}; no update was made")
        self.tensors = {**_fields(batch), **{f"said.{name}": value for name, value in said.items()}}


def require_finite(said: Sequence[Mapping[str, Tensor]], batches: Sequence[Batch]) -> None:
    """Raises `NotFinite` for the first micro-batch whose loss (``total``) is none."""
    for told, batch in zip(said, batches, strict=True):
        if not torch.isfinite(told["total"]).all():
            raise NotFinite(told["total"].sum().item(), batch, told)


@contextmanager
def kept_if_not_finite(journal: RunFolder | None, step: int) -> Iterator[None]:
    """Around learning: an offending batch is written down before its error goes on."""
    try:
        yield
    except NotFinite as error:
        if journal is None:
            raise
        path = journal.path / "offending" / f"step_{step:06d}.safetensors"
        with written_whole(path) as aside:
            save_file({n: t.detach().cpu().contiguous() for n, t in error.tensors.items()}, aside)
        raise LossError(
            f"step {step}: {error}; the batch is {path}, its answers are in "
            f"samples/step_{step:06d}.jsonl. A resume would meet it again: look at the batch, and "
            "begin anew with a lower optimizer.lr, or with model.autocast and weights_dtype as wide "
            "as the model needs"
        ) from None


def _fields(batch: Batch) -> dict[str, Tensor]:
    """A batch's tensors by name, shared storage taken apart."""
    found: dict[str, Tensor] = {}
    for name in batch.__slots__:
        value = getattr(batch, name)
        if isinstance(value, Tensor):
            found[name] = value.clone()
        elif isinstance(value, Sequences):
            for part in ("ids_BT", "rows_N", "columns_N"):
                found[f"{name}.{part}"] = getattr(value, part).clone()
    return found
