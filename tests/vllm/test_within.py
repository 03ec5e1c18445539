"""vLLM in the trainer's process: run by vLLM's own Python, which has this package's needs beside it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_server

SCRIPT = Path(__file__).with_name("in_process.py")
FLOAT32 = 1e-3
"""Nats between trainer and engine on a sampled token, both in float32."""
BFLOAT16 = 0.5
"""The same where the engine computes in bfloat16: 0.03 on average, 0.16 at the 99th percentile."""


def run(what: str, *settings: str) -> dict[str, Any]:
    """What the script says."""
    asks = "import peft, jaxtyping, pyarrow, accelerate, matplotlib"
    if subprocess.run([vllm_server.PYTHON, "-c", asks], capture_output=True).returncode:
        pytest.skip(f"{vllm_server.PYTHON.parent} lacks what selfteach needs: make test-vllm")
    env = {
        **os.environ, **vllm_server.ENVIRONMENT, "PYTHONPATH": str(vllm_server.ROOT / "src"),
    }  # fmt: skip
    command = [str(vllm_server.PYTHON), str(SCRIPT), str(vllm_server.MODEL), what, *settings]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def assert_agree(said: dict[str, Any], tolerance: float) -> None:
    assert len(said["now"]) == 3 and max(said["now"]) < tolerance
    assert all(said["repeats"])


@pytest.mark.parametrize("what", ["full", "lora"])
def test_trainer_and_engine_agree_before_and_after_updates(
    alone: None, say: Callable[[str], None], what: str
) -> None:
    vllm_server.save_model(say)
    said = run(what, 'engine.dtype="float32"', "engine.tolerance=0.001")
    say(f"{what} in process: {said}")
    assert_agree(said, FLOAT32)
    assert min(said["before"]) > 10 * FLOAT32  # the updates were updates


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_the_engine_agrees_and_sleeps(
    alone: None, say: Callable[[str], None], what: str, dtype: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    vllm_server.save_model(say)
    tolerance = FLOAT32 if dtype == "float32" else BFLOAT16
    settings = (f"engine.dtype={json.dumps(dtype)}", f"engine.tolerance={tolerance}")
    said = run(what, *settings, 'model.device="cuda"', "engine.gpu_memory_utilization=0.4")
    assert_agree(said, tolerance)
    # Asleep between calls: what it may take of the device is free again, but for a little.
    device = torch.cuda.get_device_properties(0).total_memory
    assert min(said["free"]) > 0.7 * device
