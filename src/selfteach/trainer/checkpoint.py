"""All that a resume needs, in plain safetensors (a distributed checkpoint where the model is in pieces;
either resumes on any number of ranks): weights, optimizer, teacher, and where we are.

Random streams need no saving: they are keyed by (seed, question, sample, policy version).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfteach.errors import CheckpointError
from selfteach.models import fsdp
from selfteach.models.policy import Policy
from selfteach.protocols import Teacher
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.runtime.run_folder import enough_disk, read_json, write_json

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


SHARDS = "shards"
"""Where a sharded policy's tensors lie: a distributed checkpoint, for any number of ranks."""


def save(
    folder: Path, step: int, policy: Policy, teacher: Teacher, *, keep: int = 1,
    ranks: Ranks = SINGLE_PROCESS,
) -> Path:  # fmt: skip
    """Write ``folder/step_NNNNNN`` whole or not at all, then delete all but the newest ``keep``.

    All ranks together: each writes its pieces of a sharded policy, rank 0 everything else.
    """
    target = path_of(folder, step)
    aside = folder / f".{target.name}.tmp"
    with enough_disk():
        if ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        ranks.wait()
        try:
            _fill(aside, step, policy, teacher, ranks)
            ranks.wait()
            if ranks.is_main:
                if target.exists():
                    shutil.rmtree(target)
                aside.replace(target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)  # a full disk needs the room
            raise
        if ranks.is_main:
            _sync(folder)
            for old in checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
        ranks.wait()
    return target


def _fill(aside: Path, step: int, policy: Policy, teacher: Teacher, ranks: Ranks) -> None:
    if policy.is_sharded:
        fsdp.save(aside / SHARDS, _all_tensors(policy, teacher))
    if not ranks.is_main:
        return
    if not policy.is_sharded:
        _save_tensors(aside / "weights.safetensors", dict(policy.trainable))
        _save_tensors(aside / "optimizer.safetensors", _moments(policy))
        _save_tensors(aside / "teacher.safetensors", dict(teacher.state()))
    write_json(aside / "state.json", {"step": step, "version": policy.version})


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after a step is, or would be."""
    return folder / f"step_{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").exists())


def load(checkpoint: Path, policy: Policy, teacher: Teacher) -> int:
    """Put policy, optimizer and teacher back; returns the step after which it was saved.

    Raises `CheckpointError` if it is damaged or of another model.
    """
    state = read_json(checkpoint / "state.json")
    load_weights(checkpoint, policy)
    if (checkpoint / SHARDS).exists():
        _load_shards(checkpoint / SHARDS, policy, teacher)
    else:
        _restore_moments(policy, _load_tensors(checkpoint / "optimizer.safetensors"))
        teacher.load_state(_load_tensors(checkpoint / "teacher.safetensors"))
    policy.version = state["version"]
    return int(state["step"])


@torch.no_grad()
def load_weights(checkpoint: Path, policy: Policy) -> None:
    """Only the weights, for evaluation."""
    shards = checkpoint / SHARDS
    if shards.exists():
        _require_same(_names_under("weights", fsdp.names(shards)), policy, checkpoint)
        fsdp.load(shards, _under("weights", policy.trainable))
        return
    weights = _load_tensors(checkpoint / "weights.safetensors")
    _require_same(set(weights), policy, checkpoint)
    for name, param in policy.trainable.items():
        fsdp.assign(param, weights[name])


def _require_same(names: set[str], policy: Policy, checkpoint: Path) -> None:
    if names != policy.trainable.keys():
        raise CheckpointError(f"{checkpoint} holds the weights of another model")


def _moments(policy: Policy) -> dict[str, Tensor]:
    return {
        f"{name}::{moment}": policy.optimizer.state[param][moment]
        for name, param in policy.trainable.items()
        for moment in MOMENTS
        if param in policy.optimizer.state
    }


def _restore_moments(policy: Policy, saved: dict[str, Tensor]) -> None:
    for name, param in policy.trainable.items():
        policy.optimizer.state.pop(param, None)
        if f"{name}::step" in saved:
            own = _no_moments(param)
            for moment, value in own.items():
                fsdp.assign(value, saved[f"{name}::{moment}"])
            policy.optimizer.state[param] = own


def _no_moments(param: Tensor) -> dict[str, Tensor]:
    """What AdamW keeps of a weight, before its first update: in pieces as the weight is."""
    zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
    return {**zeros, "step": torch.zeros((), dtype=torch.float32, device=param.device)}


def _all_tensors(policy: Policy, teacher: Teacher) -> dict[str, Tensor]:
    return {
        **_under("weights", policy.trainable),
        **_under("optimizer", _moments(policy)),
        **_under("teacher", teacher.state()),
    }


def _load_shards(shards: Path, policy: Policy, teacher: Teacher) -> None:
    """Moments and teacher, into tensors that are whole or in pieces as this run has them."""
    known = fsdp.names(shards)
    if _names_under("teacher", known) != teacher.state().keys():
        raise CheckpointError(f"{shards} holds another teacher")
    for name, param in policy.trainable.items():
        policy.optimizer.state.pop(param, None)
        if f"optimizer.{name}::step" in known:
            policy.optimizer.state[param] = _no_moments(param)
    fsdp.load(
        shards, {**_under("optimizer", _moments(policy)), **_under("teacher", teacher.state())}
    )


def _under(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}


def _names_under(part: str, names: set[str]) -> set[str]:
    return {name.removeprefix(f"{part}.") for name in names if name.startswith(f"{part}.")}


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
