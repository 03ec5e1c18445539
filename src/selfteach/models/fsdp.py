"""Shard a model over all ranks (FSDP2), and read, write and save its shards.

Each decoder layer is a group of weights; embedding, last norm and head are the root's group, which
stays gathered between forward and backward: the chunked loss multiplies by the head outside of the
module's forward, and its gradient arrives in the same backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from selfteach.errors import CheckpointError, EngineError
from selfteach.models.compiled_layers import decoder_layers
from selfteach.models.lm_head import Head
from selfteach.models.plain_pass import backbone_of
from selfteach.models.shard_reader import ShardReader


class Shards:
    """Shards a model in place; from then on all ranks run every pass together.

    Weights are gathered and multiplied in ``param_dtype``, gradients summed in ``reduce_dtype``; None:
    as they are stored. Gradients are summed over ranks, not averaged.
    Raises `EngineError` for a model without a list of decoder layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mesh: DeviceMesh,
        *,
        param_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = param_dtype or model.dtype
        """What weights are multiplied in."""
        mixed = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
        backbone = backbone_of(model)

        def last_hidden(ids_BT: Tensor, **inputs: Any) -> Tensor:
            return backbone(input_ids=ids_BT, use_cache=False, **inputs)[0]

        # The backbone is no FSDP root: its embedding and norm belong to the whole model's group.
        self._model = cast(Any, model)
        self._model.selfteach_hidden = last_hidden
        fully_shard(model, mesh=mesh, mp_policy=mixed, reshard_after_forward=False)
        register_fsdp_forward_method(model, "selfteach_hidden")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # FSDP2 would average
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        # FSDP2 notes the gradients' dtype at its first pass, from what trains then. In a teacher's pass
        # with the adapters off nothing would, and the first backward would fail.
        with torch.no_grad():
            self.hidden(torch.zeros(1, 1, dtype=torch.long, device=mesh.device_type))
        self.reshard()

    def hidden(self, ids_BT: Tensor, **inputs: Any) -> Tensor:
        """Compute the last layer's states, [B, T, H], with further inputs of the model."""
        return self._model.selfteach_hidden(ids_BT, **inputs)

    def reshard(self) -> None:
        """Free gathered weights: after a pass without gradients that no `head` follows."""
        self._model.reshard()

    def head(self, head: Head) -> Head:
        """Return the gathered head after a pass. Outside grad mode it is a copy, and the root is
        resharded: no backward will do that, and the next pass may be under other weights."""
        linear = self._model.get_output_embeddings()
        weight_VH, bias_V = linear.weight, linear.bias
        if not torch.is_grad_enabled():
            weight_VH = weight_VH.detach().clone()
            bias_V = None if bias_V is None else bias_V.detach().clone()
            self._model.reshard()
        return replace(head, weight_VH=weight_VH, bias_V=bias_V)

    @contextmanager
    def swapped(self, weights: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with other values in this rank's shards, restored on leaving. Copied, not exchanged:
        FSDP2 gathers from its own buffer, of which a parameter's shard is a view."""
        shards = {name: local(weight) for name, weight in weights.items()}
        original = {name: shard.clone() for name, shard in shards.items()}
        self._model.reshard()
        try:
            for name, shard in shards.items():
                shard.copy_(local(other[name]))
            yield
        finally:
            for name, shard in shards.items():
                shard.copy_(original[name])
            self._model.reshard()


def local(weight: Tensor) -> Tensor:
    """Return this rank's shard, sharing memory with the weight."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def whole(weight: Tensor) -> Tensor:
    """Return the full weight on every rank; all ranks call it together."""
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def whole_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return the full weights and buffers on the CPU; all ranks call it together.

    With ``keep=False`` a rank takes part in the gathering and returns nothing.
    """
    state, seen = {}, dict[int, Tensor]()  # a tied head stays one with its embedding
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            full = whole(value)
            seen[id(value)] = full.cpu() if keep else full.new_empty(0)
        if keep:
            state[name] = seen[id(value)]
    return state


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a full value, or a shard like the target's, into the target."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(
            value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(value)


def save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a distributed checkpoint; all ranks call it together."""
    state_dict_saver.save(
        {name: tensor.detach() for name, tensor in tensors.items()}, checkpoint_id=folder
    )


def names(folder: Path) -> set[str]:
    """Return the names of a checkpoint's tensors. Raises `CheckpointError` if it is damaged."""
    try:
        return set(ShardReader(folder).read_metadata().state_dict_metadata)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise CheckpointError(f"{folder} is damaged: {error}") from None


def load(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill full or sharded tensors from a distributed checkpoint of any number of ranks.

    Raises `CheckpointError` if it is damaged or holds other tensors.
    """
    alone = not torch.distributed.is_initialized()
    targets = {name: tensor.detach() for name, tensor in tensors.items()}
    if missing := sorted(targets.keys() - names(folder)):
        raise CheckpointError(f"{folder} is damaged or of another model: it has no {missing[0]}")
    try:
        state_dict_loader.load(targets, storage_reader=ShardReader(folder), no_dist=alone)
    except (CheckpointException, RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[-300:]
        raise CheckpointError(f"{folder} is damaged or of another model: {reason}") from None


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    if (layers := decoder_layers(model)) is not None:
        return layers
    count = model.config.get_text_config().num_hidden_layers
    raise EngineError(
        f"{type(model).__name__} has no list of {count} layers to shard; "
        'set distributed.shard = "none"'
    )
