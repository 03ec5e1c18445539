"""Sets up tests on a CUDA device. ``SELFTEACH_GPU_TESTS_ON=cpu`` runs what it can on the CPU instead,
to check the tests themselves where there is no device."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Deterministic matrix products need it before CUDA is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from selfteach.runtime.torch_setup import use_fixed_order

ON = os.environ.get("SELFTEACH_GPU_TESTS_ON", "cuda")


@pytest.fixture(scope="session")
def device() -> str:
    """Return the kind of device that is tested."""
    if ON == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return ON


@pytest.fixture
def deterministic(device: str) -> Iterator[None]:
    """Use torch's deterministic algorithms, as `train.deterministic` does."""
    use_fixed_order()
    yield
    torch.use_deterministic_algorithms(False)
