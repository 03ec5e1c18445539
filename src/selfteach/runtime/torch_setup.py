"""Configures PyTorch and the allocator of this process, before a model runs in it."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import numpy as np
import torch

from selfteach.errors import EngineError
from selfteach.runtime import gc_pause

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
"""Parameters of mallopt(3)."""


CUBLAS_CONFIG = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_CONFIGS = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS sums in a fixed order, as PyTorch accepts them; the first is faster."""


def configure_torch(device: torch.device, *, deterministic: bool = False) -> None:
    """Configure this process before a model runs on the device.

    ``deterministic``: see `use_fixed_order`; a CPU's sums have a fixed order in any case.

    Turns off cuDNN's attention, which PyTorch prefers on Hopper: it makes a plan for every shape that
    comes with a mask, and makes it again. A pass of one token took 29 ms instead of 3 (an H200,
    PyTorch 2.11), and no two micro-batches have one shape. Also resumes garbage collection: imports
    are done by now.
    """
    gc_pause.resume()
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        repeat_kv_heads_in_float32()
        if deterministic:
            use_fixed_order()
    elif device.type == "cpu":
        keep_freed_memory()


def use_fixed_order() -> None:
    """Use only algorithms of CUDA whose sums have a fixed order.

    Without exceptions that PyTorch would merely warn of: with those, attention's gradient would be
    summed in the order in which the device's cores finish. An operation that has no such algorithm
    raises RuntimeError. Raises `EngineError` if the environment has cuBLAS choose freely.
    """
    config = os.environ.setdefault(CUBLAS_CONFIG, CUBLAS_CONFIGS[0])  # read at its first product
    if config not in CUBLAS_CONFIGS:
        raise EngineError(
            f"train.deterministic = true, and {CUBLAS_CONFIG} is {config!r} in the environment: unset "
            f"it, or set it to {' or '.join(CUBLAS_CONFIGS)}"
        )
    torch.use_deterministic_algorithms(True)
    memory: Any = torch.utils.deterministic
    memory.fill_uninitialized_memory = False  # nothing reads it
    torch.backends.cudnn.benchmark = False


def seed_update(seed: int, update: int, rank: int) -> None:
    """Seed PyTorch's generators for one optimizer update: dropout is all that draws from them.

    The masks of an update depend on the arguments alone, so a resumed run draws the same ones.
    """
    (state,) = np.random.SeedSequence([seed, update, rank, 11]).generate_state(1, np.uint64)
    torch.manual_seed(int(state))


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 32 MiB, 256 MiB of them, for the next step.

    Memory that is mapped again faults and is zeroed page by page: a tenth of a small model's step. The
    environment's settings (``MALLOC_MMAP_THRESHOLD_``) have precedence; other allocators have no
    `mallopt`.
    """
    configured = any(name.startswith("MALLOC_") for name in os.environ)
    if not configured and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        for option, size in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**28)):
            ctypes.CDLL(None).mallopt(option, size)


def repeat_kv_heads_in_float32() -> None:
    """Repeat shared key and value heads (GQA) in float32, where CUDA has no kernel for sharing them.

    torch would fall back to plain attention, which holds [T, T] of every head for the gradient.
    transformers asks for shared heads whenever there is no mask. Replaces transformers'
    `use_gqa_in_sdpa`.
    """
    from transformers.integrations import sdpa_attention  # seconds, for CUDA alone

    original = sdpa_attention.use_gqa_in_sdpa
    if original.__module__ == __name__:
        return

    def use_gqa(mask: torch.Tensor | None, key: torch.Tensor, *more: torch.Tensor) -> bool:
        exact = key.dtype == torch.float32 and not torch.is_autocast_enabled("cuda")
        return not (key.is_cuda and exact) and original(mask, key, *more)

    sdpa_attention.use_gqa_in_sdpa = use_gqa
