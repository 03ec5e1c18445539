"""Require that a model's files hold all its weights, all of them finite, and none of them a pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from selfteach.config.recipe import ModelConfig
from selfteach.errors import EngineError

INDEX = "model.safetensors.index.json"
"""File of a sharded model that names the file of each weight."""


@contextmanager
def no_pickle(config: ModelConfig, path: str) -> Iterator[None]:
    """Refuse weights in pickle files, which can run any code, also if a safetensors index names one.

    ``path`` is the model's folder or hub id. A model whose code the recipe trusts may load what it
    wants. Raises `EngineError`.
    """
    if config.trust_remote_code:
        yield
        return
    for index in _indices(config, path):
        _require_safetensors(index, config)

    def refused(file: object, *_: object, **__: object) -> None:
        raise EngineError(_is_a_pickle(config, str(file)))

    with mock.patch.object(torch, "load", refused):
        yield


def require_whole(model: PreTrainedModel, info: Mapping[str, Any], config: ModelConfig) -> None:
    """Raise `EngineError` if a weight was missing, and is random now, or is NaN or infinite.

    ``info`` is transformers' loading info.
    """
    missing = sorted(map(str, info.get("missing_keys", ())))
    if missing:
        raise EngineError(
            f"model.path = {config.path!r}: its files lack {len(missing)} of the model's weights, the "
            f"first is {missing[0]}: download the model again, or complete its files"
        )
    if (name := first_nonfinite(dict(model.named_parameters()))) is not None:
        raise EngineError(
            f"model.path = {config.path!r}: the weight {name} holds NaN or infinite values: the model "
            "is damaged; download it again, or name another"
        )


def first_nonfinite(weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first weight with a NaN or infinite value; None if there is none."""
    for name, weight in weights.items():
        if weight.is_floating_point() and not torch.isfinite(weight.detach()).all():
            return name
    return None


def _indices(config: ModelConfig, path: str) -> list[Path]:
    folder = Path(path)
    if folder.is_dir():
        return sorted(folder.glob("*.safetensors.index.json"))
    if config.gguf_file:
        return []
    index = cached_file(
        path, INDEX, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return [] if index is None else [Path(str(index))]


def _require_safetensors(index: Path, config: ModelConfig) -> None:
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values())
        odd = sorted(f for f in files if Path(f).name != f or not f.endswith(".safetensors"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(
            f"model.path = {config.path!r}: {index.name} cannot be read: {error!r}"
        ) from None
    if odd:
        raise EngineError(_is_a_pickle(config, odd[0]))


def _is_a_pickle(config: ModelConfig, file: str) -> str:
    return (
        f"model.path = {config.path!r}: its weights are in {file}, which is no safetensors file of its "
        "folder and may run code when it is loaded: convert the model to safetensors"
    )
