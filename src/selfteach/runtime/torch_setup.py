"""Which ways of PyTorch and of the system a process does not take, told before a model runs in it."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from selfteach.runtime import gc_pause

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
"""Names of mallopt(3)."""


def settle(device: torch.device) -> None:
    """Tell this process, before a model runs, which ways of PyTorch and the system not to take.

    cuDNN's attention, which PyTorch prefers on Hopper, makes a plan for every shape that comes with a
    mask, and makes it again: a pass of one token took 29 ms instead of 3 (an H200, PyTorch 2.11), and
    no two micro-batches are of one shape. What a process needs is imported by now.
    """
    gc_pause.resume()
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        own_keys_in_float32()
    elif device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc keep blocks of up to 32 MiB that are freed, 256 MiB of them: the next step wants them.

    Mapped anew, each of their pages is a fault and is zeroed: a tenth of a small model's step. What the
    environment says of it (``MALLOC_MMAP_THRESHOLD_``) counts more; other allocators know no `mallopt`.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ)
    if not told and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        for option, size in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**28)):
            ctypes.CDLL(None).mallopt(option, size)


def own_keys_in_float32() -> None:
    """Give heads that share keys copies of their own where CUDA has no kernel for sharing them.

    In float32 it has none: torch would take the plain way, which holds [T, T] of every head for the
    gradient. transformers asks for shared keys whenever no mask is given.
    """
    from transformers.integrations import sdpa_attention  # seconds, for CUDA alone

    asked = sdpa_attention.use_gqa_in_sdpa
    if asked.__module__ == __name__:
        return

    def share(mask: torch.Tensor | None, key: torch.Tensor, *more: torch.Tensor) -> bool:
        exact = key.dtype == torch.float32 and not torch.is_autocast_enabled("cuda")
        return not (key.is_cuda and exact) and asked(mask, key, *more)

    sdpa_attention.use_gqa_in_sdpa = share
