"""Saves and restores what a resume needs: weights, optimizer, teacher, step and policy version.

Tensors are plain safetensors, or a distributed checkpoint if the model is sharded; either resumes on
any number of ranks. Random streams need no saving: they are keyed by (seed, problem, sample, policy
version).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfteach.errors import CheckpointError
from selfteach.models import fsdp
from selfteach.models.policy import Policy
from selfteach.models.weight_files import first_nonfinite
from selfteach.protocols import Teacher
from selfteach.runtime.atomic_files import (
    make_folder,
    report_full_disk,
    sync_folder,
    sync_tree,
    write_json,
)
from selfteach.runtime.checksums import file_checksums, sha256
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.runtime.stored_files import read_bytes, read_json, reading

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""Of AdamW, per weight."""

REMEDY = "restore it from a copy, or move the checkpoint away to continue from an earlier one"

SHARDS = "shards"
"""Folder of a sharded policy's tensors: a distributed checkpoint, for any number of ranks."""


def save(
    folder: Path, step: int, policy: Policy, teacher: Teacher, *, keep: int = 1,
    ranks: Ranks = SINGLE_PROCESS, metrics: Path | None = None,
) -> Path:  # fmt: skip
    """Write ``folder/step_NNNNNN`` atomically, then delete all but the newest ``keep`` checkpoints.

    ``state.json`` holds the checksums of its files, and of the file ``metrics`` as it is now.

    All ranks call this together: each writes its shards of a sharded policy, rank 0 everything else.
    """
    target = path_for_step(folder, step)
    temporary = folder / f".{target.name}.tmp"
    with report_full_disk():
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            make_folder(temporary)
        ranks.barrier()
        try:
            _fill(temporary, step, policy, teacher, ranks)
            ranks.barrier()
            if ranks.is_main:
                _write_state(temporary, step, policy.version, metrics)
                sync_tree(temporary)
                if target.exists():
                    shutil.rmtree(target)
                temporary.replace(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
            raise
        if ranks.is_main:
            sync_folder(folder)
            oldest = checkpoints(folder)[-keep:][0]
            for old in folder.glob("step_*"):
                if old.name < oldest.name:
                    shutil.rmtree(old)
        ranks.barrier()
    return target


def _fill(temporary: Path, step: int, policy: Policy, teacher: Teacher, ranks: Ranks) -> None:
    if policy.is_sharded:
        fsdp.save(temporary / SHARDS, _all_tensors(policy, teacher))
    if not ranks.is_main:
        return
    if not policy.is_sharded:
        _save_tensors(temporary / "weights.safetensors", dict(policy.trainable))
        _save_tensors(temporary / "optimizer.safetensors", _moments(policy))
        _save_tensors(temporary / "teacher.safetensors", dict(teacher.state()))


def _write_state(folder: Path, step: int, version: int, metrics: Path | None) -> None:
    """Write state.json, with the checksums of the checkpoint's files and of the metrics so far."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    checksums = file_checksums(files)
    state: dict[str, Any] = {
        "step": step,
        "version": version,
        "files": {path.relative_to(folder).as_posix(): checksums[path] for path in files},
    }
    content = None if metrics is None else read_bytes(metrics)
    if content is not None:
        state["metrics"] = {"bytes": len(content), "sha256": sha256(content)}
    write_json(folder / "state.json", {**state, "sha256": _state_checksum(state)})


def _state_checksum(state: Mapping[str, Any]) -> str:
    return sha256(json.dumps(state, sort_keys=True).encode())


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json. Raises `CheckpointError` if it is damaged."""
    path = checkpoint / "state.json"
    state = read_json(path)
    checksum = state.pop("sha256", None)  # checkpoints of earlier versions have none
    if checksum is not None and checksum != _state_checksum(state):
        raise CheckpointError(f"{path} is damaged: its checksum differs; {REMEDY}")
    with reading(path):
        if int(state["step"]) < 0 or int(state["version"]) < 0:
            raise ValueError("negative step or version")
    return state


def verify(checkpoint: Path, metrics: Path | None = None) -> None:
    """Compare a checkpoint's files, and the beginning of the metrics, with their checksums.

    Raises `CheckpointError` for the first that differs. A checkpoint of an earlier version has no
    checksums.
    """
    path, state = checkpoint / "state.json", _read_state(checkpoint)
    with reading(path):
        expected = {checkpoint / name: str(value) for name, value in state.get("files", {}).items()}
        before = state.get("metrics", {"bytes": 0, "sha256": sha256(b"")})
        length, checksum = int(before["bytes"]), before["sha256"]
    for file, value in file_checksums(expected).items():
        if value != expected[file]:
            raise CheckpointError(f"{file} is damaged: its checksum differs; {REMEDY}")
    if metrics is not None and sha256((read_bytes(metrics) or b"")[:length]) != checksum:
        raise CheckpointError(
            f"{metrics} is damaged: its rows up to {checkpoint.name} are not those that were written; "
            f"restore it from a copy, or move it and {checkpoint.parent} away to train again from the "
            "stored rollouts"
        )


def path_for_step(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after a step, whether it exists or not."""
    return folder / f"step_{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints, oldest first.

    Raises `CheckpointError` if the folder cannot be read, or if the newest has no state.json, which is
    written before a checkpoint gets its name. An older one without it was being deleted when the run
    was killed, and is left out.
    """
    try:
        names = sorted(path.name for path in folder.iterdir() if path.name.startswith("step_"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from None
    whole = [name for name in names if read_bytes(folder / name / "state.json") is not None]
    if names and names[-1] not in whole:
        raise CheckpointError(f"{folder / names[-1]} is damaged: it has no state.json; {REMEDY}")
    return [folder / name for name in whole]


def load(checkpoint: Path, policy: Policy, teacher: Teacher) -> int:
    """Restore policy, optimizer and teacher; return the step after which the checkpoint was saved.

    Raises `CheckpointError` if it is damaged or of another model.
    """
    state = _read_state(checkpoint)
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
    """Load only the weights, for evaluation."""
    shards = checkpoint / SHARDS
    if shards.exists():
        _require_same(_names_under("weights", fsdp.names(shards)), policy, checkpoint)
        fsdp.load(shards, _under("weights", policy.trainable))
        return
    weights = _load_tensors(checkpoint / "weights.safetensors")
    _require_same(set(weights), policy, checkpoint)
    for name, param in policy.trainable.items():
        if weights[name].shape != param.shape:
            raise CheckpointError(f"{checkpoint} holds weights that do not fit this model")
    if (bad := first_nonfinite(weights)) is not None:
        raise CheckpointError(
            f"{checkpoint}: the weight {bad} holds NaN or infinite values; {REMEDY}"
        )
    for name, param in policy.trainable.items():
        fsdp.assign(param, weights[name])


def _require_same(names: set[str], policy: Policy, checkpoint: Path) -> None:
    if names != policy.trainable.keys():
        raise CheckpointError(f"{checkpoint} holds weights that do not fit this model")


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
            moments = _no_moments(param)
            for moment, value in moments.items():
                fsdp.assign(value, saved[f"{name}::{moment}"])
            policy.optimizer.state[param] = moments


def _no_moments(param: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state of a weight before its first update: sharded as the weight is."""
    zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
    return {**zeros, "step": torch.zeros((), dtype=torch.float32, device=param.device)}


def _all_tensors(policy: Policy, teacher: Teacher) -> dict[str, Tensor]:
    return {
        **_under("weights", policy.trainable),
        **_under("optimizer", _moments(policy)),
        **_under("teacher", teacher.state()),
    }


def _load_shards(shards: Path, policy: Policy, teacher: Teacher) -> None:
    """Load moments and teacher into tensors that are replicated or sharded as in this run."""
    names = fsdp.names(shards)
    if _names_under("teacher", names) != teacher.state().keys():
        raise CheckpointError(f"{shards} does not fit this teacher")
    for name, param in policy.trainable.items():
        policy.optimizer.state.pop(param, None)
        if f"optimizer.{name}::step" in names:
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


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
